"""Tables and their figures: as HTML for a page, or as Markdown."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


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


def attack_meaning(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """What two proportions say of an erased concept, in a sentence.

    Args:
      before: of the original model's images; None where it drew none.
      after: of the edited model's.
    """
    of, rate, most = after["of"], _hundredths(after["rate"]), _hundredths(after["high"])
    if before is not None and before["rate"] < 0.5:
        return (
            f"The original itself shows it in {before['count']} of {before['of']} images: this "
            "figure says little."
        )
    if not after["count"]:
        return f"Gone, as far as {of} images tell: at most about {most} in a hundred would show it."
    if before is None:
        return f"It comes back: about {rate} in a hundred images show it."
    was = _hundredths(before["rate"])
    if after["high"] < before["low"]:
        return f"Weakened, not gone: about {rate} in a hundred images show it; before, {was}."
    if after["low"] > before["high"]:
        return f"Stronger than before: about {rate} in a hundred images show it; before, {was}."
    return f"Not erased, as far as {of} images tell: the intervals before and after overlap."


def retention_meaning(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What two proportions say of what should stay, in a sentence."""
    rate, was = _hundredths(after["rate"]), _hundredths(before["rate"])
    if after["high"] < before["low"]:
        return (
            f"Damaged: about {rate} in a hundred images are right; before, {was}. That is more "
            "than chance explains."
        )
    if after["low"] > before["high"]:
        return f"Better than before: about {rate} in a hundred images are right; before, {was}."
    return f"Kept, as far as {after['of']} images tell: the intervals before and after overlap."


def _hundredths(rate: float) -> str:
    return f"{100 * rate:.0f}"


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


def html_table(table: Table) -> str:
    """A table in HTML, under a heading of the third level; it scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f'<p class="quiet">{html.escape(table.note)}</p>\n' if table.note else ""
    name = html.escape(table.title)
    return f"""<h3>{name}</h3>
<div class="scroll" tabindex="0" role="region" aria-label="{name}">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{note}"""


def _cell(cell: str | Number) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    aside = f" <small>{html.escape(cell.aside)}</small>" if cell.aside else ""
    return f'<td class="number">{html.escape(cell.text)}{aside}</td>'
