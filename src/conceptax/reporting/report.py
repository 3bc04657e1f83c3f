"""Reports: tables and pictures, as one HTML file that needs nothing beside it, or as Markdown."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --quiet: #6a737d; --line: #d8dee4; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  max-width: 72rem; margin: 2.5rem auto; padding: 0 1.25rem; background: #fff; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; }
.lead { color: var(--quiet); margin-top: 0; max-width: 50rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .45rem 1.1rem .45rem 0; border-bottom: 1px solid var(--line); }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--quiet); }
.pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; } figcaption { color: var(--quiet); font-size: .9rem; }
code, pre { font: .85rem/1.5 ui-monospace, "Cascadia Mono", Menlo, monospace; }
pre { background: #f6f8fa; padding: 1rem; border-radius: 6px; overflow-x: auto; }
@media (max-width: 40rem) {
  body { margin-top: 1.5rem; padding: 0 1rem; }
  table { display: block; overflow-x: auto; font-size: .85rem; }
  th, td { padding-right: .6rem; } td small { display: block; }
}
"""


class Picture(NamedTuple):
    """The bytes of a PNG file and a caption."""

    png: bytes
    caption: str


class Gallery(NamedTuple):
    """Pictures side by side under a heading."""

    title: str
    text: str
    pictures: Sequence[Picture]


class Number(NamedTuple):
    """A figure in a table, and what is told in gray beside it."""

    text: str
    aside: str = ""


class Table(NamedTuple):
    """Rows under a heading; a cell is a text or a `Number`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Number]]
    note: str = ""


def share(figure: Mapping[str, Any]) -> str:
    """A proportion for people: "47/48 (98 %)"."""
    return f"{figure['count']}/{figure['of']} ({100 * figure['rate']:.0f} %)"


def interval(figure: Mapping[str, Any]) -> str:
    """Its 95 % interval in per cent: "89–100 %"."""
    return f"{100 * figure['low']:.0f}–{100 * figure['high']:.0f} %"


def counted(figure: Mapping[str, Any] | None) -> Number:
    """A proportion, as `quality.proportion` gives it, with its interval; a dash for None."""
    return Number("–") if figure is None else Number(share(figure), interval(figure))


def html_report(
    *,
    title: str,
    lead: str,
    grid: Picture,
    tables: Sequence[Table],
    galleries: Sequence[Gallery],
    record: str,
) -> str:
    """The whole page.

    Args:
      title, lead: what happened, in a line and in a paragraph.
      grid: the main picture.
      tables: what was found.
      galleries: every image that was counted.
      record: settings and versions, shown as they are.
    """
    sections = "\n".join(
        f"<h2>{html.escape(each.title)}</h2>\n<p>{html.escape(each.text)}</p>\n"
        f'<div class="pair">{"".join(map(_figure, each.pictures))}</div>'
        for each in galleries
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
{_figure(grid)}
{"".join(map(_table, tables))}
{sections}
<h2>Settings and versions</h2>
<pre>{html.escape(record)}</pre>
</body>
</html>
"""


def markdown_table(table: Table) -> str:
    """A table in Markdown, under a heading of the second level."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def told(cell: str | Number) -> str:
        if isinstance(cell, str):
            return cell
        return f"{cell.text}, {cell.aside}" if cell.aside else cell.text

    lines = [f"## {table.title}", "", line(table.columns)]
    lines.append(line(["---" if isinstance(cell, str) else "---:" for cell in table.rows[0]]))
    lines += [line([told(cell) for cell in row]) for row in table.rows]
    return "\n".join([*lines, *(["", table.note] if table.note else []), ""])


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return f"""<h2>{html.escape(table.title)}</h2>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p>{html.escape(table.note)}</p>
"""


def _cell(cell: str | Number) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    aside = f" <small>{html.escape(cell.aside)}</small>" if cell.aside else ""
    return f'<td class="number">{html.escape(cell.text)}{aside}</td>'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    caption = html.escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
