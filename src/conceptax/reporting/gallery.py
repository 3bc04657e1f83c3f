"""The page of a run, report.html: what was found and what it means, and every image that counted.

One HTML file, whose images lie in a folder beside it where they are many. It holds its own data,
so that `conceptax report` reads the pages of several runs and shows their methods side by side.
"""

import base64
import binascii
import hashlib
import html
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

import conceptax
from conceptax.reporting.report import Number, Table, html_table
from conceptax.text import read_text

REPORT, BESIDE = "report.html", "report-images"
SIDE = 512  # pixels along an image's longer side
WITHIN = 12 << 20  # bytes of all images that go into the page; a browser opens more if they do not
SOURCES = Path(conceptax.__file__).parent / "assets" / "gallery"
_FORMAT = 1
_OPENING = '<script type="application/json" id="gallery">'
_KEY = re.compile(r"[0-9a-f]{20}")
_KINDS = {
    "demo": "demonstrations",
    "erasure": "evaluations of erasures",
    "personalization": "evaluations of learnt subjects",
    "segmentation": "evaluations of segmentations",
}


class Fact(NamedTuple):
    """A figure in front: its name, its value, the interval beside it, and what that means."""

    title: str
    value: str
    aside: str
    meaning: str


class Group(NamedTuple):
    """Images that are counted together.

    Attributes:
      name: what it is called in links.
      title: what people call it.
      kind: whether an image that shows what it is asked about is a success of an "attack" or
        something kept ("retention"), or nothing is counted ("shown").
    """

    name: str
    title: str
    kind: str


class Shot(NamedTuple):
    """An image, and what the judge says of it.

    Attributes:
      image: its key among the `Images`.
      shown: whether it shows what it is asked about; None where nobody was asked.
      word: what the judge takes it for.
      confidence: the judge's probability of that word.
      told: scores, in words.
      prompt: its own, where methods ask in words of their own.
    """

    image: str
    shown: bool | None = None
    word: str = ""
    confidence: float | None = None
    told: str = ""
    prompt: str = ""


class Item(NamedTuple):
    """What one prompt and one noise give, before and after.

    Attributes:
      group: its place among the page's groups.
      prompt: what was asked for; of a scene its name.
      concepts: what it is about.
      size: width and height of an image.
      before: None where there is nothing to compare with.
      after: of each run; None where a run has no such image.
      seed, number: of the noise, and of the image under that seed.
    """

    group: int
    prompt: str
    concepts: tuple[str, ...]
    size: tuple[int, int]
    before: Shot | None
    after: tuple[Shot | None, ...]
    seed: int | None = None
    number: int | None = None


class Front(NamedTuple):
    """Items in front of all others, by their places, under a title."""

    title: str
    items: tuple[int, ...]


class Ran(NamedTuple):
    """One run of a page.

    Attributes:
      label: of its method.
      command: that made it, as it was typed; "" where it was made from Python.
      again: another command that repeats it from its record.
      facts: figures in front.
      tables: all figures.
      record: settings and versions, as text.
      place: the name of its folder, which tells runs of one method apart.
    """

    label: str
    command: str
    again: str
    facts: tuple[Fact, ...]
    tables: tuple[Table, ...]
    record: str
    place: str = ""


class Page(NamedTuple):
    """Everything that a page shows.

    Attributes:
      kind: "erasure", "demo", "personalization" or "segmentation": what is compared only with its
        like.
      title, lead: what happened, in a line and in a paragraph.
      sides: what images before and after are called.
      legend: what is said of each image, and by whom.
      groups, items, front, runs: what there is.
    """

    kind: str
    title: str
    lead: str
    sides: tuple[str, str]
    legend: str
    groups: tuple[Group, ...]
    items: tuple[Item, ...]
    front: tuple[Front, ...]
    runs: tuple[Ran, ...]


class Images:
    """The images of a page as WebP files, each once: in the page, or beside it when they are many.

    Args:
      folder: of the page.
      within: bytes that go into the page.
    """

    def __init__(self, folder: Path, *, within: int = WITHIN):
        self.folder, self.within = folder, within
        self._kept: dict[str, bytes] = {}
        self._keys: set[str] = set()
        self._size = 0

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> str:
        """Keep an image, at most `SIDE` pixels long; its key."""
        digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        key = digest.hexdigest()[:20]
        if key not in self._keys:
            buffer, picture = io.BytesIO(), Image.fromarray(image)
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.save(buffer, format="WEBP", quality=88)
            self.put(key, buffer.getvalue())
        return key

    def put(self, key: str, data: bytes) -> None:
        """Keep the bytes of an image by its key."""
        if key in self._keys:
            return
        self._keys.add(key)
        self._size += len(data)
        self._kept[key] = data
        if self._size > self.within:
            place = self.folder / BESIDE
            place.mkdir(exist_ok=True)
            for each, content in self._kept.items():
                (place / f"{each}.webp").write_bytes(content)
            self._kept.clear()

    @property
    def sources(self) -> dict[str, str | None]:
        """By key the image in base64, or None where it is a file of that name beside the page."""
        beside = self._size > self.within
        return {
            key: None if beside else base64.b64encode(self._kept[key]).decode("ascii")
            for key in sorted(self._keys)
        }


def write_report(folder: Path, page: Page, images: Images) -> None:
    """Write a page with its images into a folder."""
    (folder / REPORT).write_text(_html(page, images.sources), encoding="utf-8")


# ---- several runs ----


def read_report(run: Path, images: Images) -> Page:
    """The page of a run, whose images are kept; a warning tells how many are missing.

    Args:
      run: the run's folder, or its report.html.
      images: what takes them.

    Raises:
      ValueError: there is no page, or none of this version.
    """
    file = run / REPORT if run.is_dir() else run
    if not file.is_file():
        raise ValueError(
            f"{run} holds no {REPORT}: pass folders that `conceptax evaluate`, `demo` or `segment "
            "evaluate` wrote."
        )
    _, _, rest = read_text(file).partition(_OPENING)
    try:
        data = json.loads(rest.partition("</script>")[0])
        known = data["format"] == _FORMAT
        page = _read(data["page"]) if known else None
        sources = {key: data["images"][key] for key in data["images"] if _KEY.fullmatch(key)}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} is no report of conceptax, or is damaged.") from error
    if page is None:
        raise ValueError(
            f"{file} was written by another version of conceptax: repeat its run with this one."
        )
    keys = {shot.image for item in page.items for shot in (item.before, *item.after) if shot}
    missing = 0
    for key in sorted(keys):
        content = _content(sources.get(key), file.parent / BESIDE / f"{key}.webp", key in sources)
        if content is None:
            missing += 1
        else:
            images.put(key, content)
    if missing:
        warnings.warn(f"{missing} of {len(keys)} images of {run} are missing.", stacklevel=2)
    place = file.absolute().parent.name
    runs = tuple(each if each.place else each._replace(place=place) for each in page.runs)
    return page._replace(runs=runs)


def _content(source: Any, file: Path, known: bool) -> bytes | None:
    """The bytes of a WebP file out of a page or beside it; None where there is none."""
    try:
        if isinstance(source, str):
            content = base64.b64decode(source, validate=True)
        else:
            content = file.read_bytes() if known else b""
    except (OSError, binascii.Error):
        return None
    return content if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def compared(pages: Mapping[str, Page]) -> Page:
    """The runs of several pages, by the names that messages call them, in one page.

    Images are side by side that came of one prompt and one noise, and have the same image before.

    Raises:
      ValueError: no page, or pages of different kinds.
    """
    if not pages:
        raise ValueError("there is nothing to report: pass the folder of at least one run.")
    (name, first), *others = pages.items()
    for other, page in others:
        if page.kind != first.kind:
            raise ValueError(
                f"{name} is of {_KINDS[first.kind]}, and {other} of {_KINDS[page.kind]}: runs of "
                "one kind can be compared."
            )
    if not others:
        return first
    runs = [run for page in pages.values() for run in page.runs]
    groups = {group.name: group for page in pages.values() for group in page.groups}
    places = {each: place for place, each in enumerate(groups)}
    found: dict[Any, Item] = {}
    start = 0
    for page in pages.values():
        for item in page.items:
            group = page.groups[item.group]
            own_words = group.kind == "attack" and item.before is None
            key = (
                *(group.name, item.concepts, item.seed, item.number),
                "" if own_words else item.prompt,
                item.before and item.before.image,
            )
            other = found.get(key) or item._replace(
                group=places[group.name], after=(None,) * len(runs)
            )
            after = (*other.after[:start], *item.after, *other.after[start + len(page.runs) :])
            found[key] = other._replace(after=after)
        start += len(page.runs)
    labels = _told_apart(runs)
    drawn = [item for item in found.values() if any(item.after)]
    shared = sum(all(item.after) for item in drawn)
    lead = (
        f"{len(runs)} runs side by side: {', '.join(labels)}. "
        f"{shared} of {len(drawn)} prompts are common to all of them, with the same noise."
    )
    return first._replace(
        lead=f"{first.lead} {lead}",
        groups=tuple(groups.values()),
        items=tuple(found.values()),
        runs=tuple(run._replace(label=label) for run, label in zip(runs, labels, strict=True)),
    )


def _told_apart(runs: Sequence[Ran]) -> list[str]:
    """Labels that differ: with their folders, and with numbers, where they must."""
    labels = [run.label for run in runs]
    more = [f"{run.label} ({run.place})" if run.place else run.label for run in runs]
    labels = [m if labels.count(one) > 1 else one for one, m in zip(labels, more, strict=True)]
    return [
        f"{one} {labels[:n].count(one) + 1}" if labels.count(one) > 1 else one
        for n, one in enumerate(labels)
    ]


def merged_tables(runs: Sequence[Ran]) -> list[Table]:
    """The tables of all runs, those of one title in one: with a column of numbers for each run."""
    if len(runs) == 1:
        return list(runs[0].tables)
    titles = dict.fromkeys(table.title for run in runs for table in run.tables)
    return [_merged(title, runs) for title in titles]


def _merged(title: str, runs: Sequence[Ran]) -> Table:
    own = [(run.label, each) for run in runs for each in run.tables if each.title == title]
    words = [n for n, cell in enumerate(own[0][1].rows[0]) if isinstance(cell, str)]
    rows: dict[Any, dict[str, dict[str, Number]]] = {}  # texts -> column -> label -> number
    columns: dict[str, None] = {}
    for label, table in own:
        seen: list[Any] = []
        for row in table.rows:
            texts = tuple(cell for cell in row if isinstance(cell, str))
            key = (texts, seen.count(texts))
            seen.append(texts)
            for column, cell in zip(table.columns, row, strict=True):
                if isinstance(cell, Number):
                    columns.setdefault(column)
                    rows.setdefault(key, {}).setdefault(column, {})[label] = cell
    labels = [run.label for run in runs]
    same = {
        column: all(
            len({*cells.get(column, {}).values()}) == 1 and len(cells.get(column, {})) == len(runs)
            for cells in rows.values()
        )
        for column in columns
    }
    alone = sum(not each for each in same.values()) == 1
    named: list[tuple[str, str, str]] = []  # column, label, heading
    for column in columns:
        if same[column]:
            named.append((column, labels[0], column))
        else:
            named += [(column, each, each if alone else f"{column}, {each}") for each in labels]
    lines = [
        (*texts, *(cells.get(column, {}).get(label, Number("–")) for column, label, _ in named))
        for (texts, _), cells in rows.items()
    ]
    notes = dict.fromkeys(table.note for _, table in own if table.note)
    if len(notes) > 1:
        notes = dict.fromkeys(f"{label}: {table.note}" for label, table in own)
    heads = (*(own[0][1].columns[n] for n in words), *(heading for *_, heading in named))
    return Table(title, heads, lines, " ".join(notes))


# ---- as text ----


def _plain(value: Any) -> Any:
    """What JSON holds: of a named tuple its fields, but for those at their defaults."""
    fields = getattr(value, "_fields", None)
    if fields is not None:
        defaults = value._field_defaults
        pairs = zip(fields, value, strict=True)
        return {k: _plain(v) for k, v in pairs if k not in defaults or v != defaults[k]}
    return [*map(_plain, value)] if isinstance(value, tuple | list) else value


def _read(data: Mapping[str, Any]) -> Page:
    """The page that `_plain` wrote."""

    def table(each: Mapping[str, Any]) -> Table:
        rows = [
            tuple(Number(**cell) if isinstance(cell, dict) else str(cell) for cell in row)
            for row in each["rows"]
        ]
        return Table(**{**each, "columns": tuple(each["columns"]), "rows": rows})

    def ran(each: Mapping[str, Any]) -> Ran:
        facts = tuple(Fact(**fact) for fact in each["facts"])
        return Ran(**{**each, "facts": facts, "tables": tuple(map(table, each["tables"]))})

    def item(each: Mapping[str, Any]) -> Item:
        before = each["before"] and Shot(**each["before"])
        after = tuple(shot and Shot(**shot) for shot in each["after"])
        lists = {"concepts": tuple(each["concepts"]), "size": tuple(each["size"])}
        return Item(**{**each, **lists, "before": before, "after": after})

    page = Page(
        **{
            **data,
            "sides": tuple(data["sides"]),
            "groups": tuple(Group(**each) for each in data["groups"]),
            "items": tuple(map(item, data["items"])),
            "front": tuple(Front(each["title"], tuple(each["items"])) for each in data["front"]),
            "runs": tuple(map(ran, data["runs"])),
        }
    )
    _ = _KINDS[page.kind], [page.groups[each.group] for each in page.items]
    _ = [page.items[place] for each in page.front for place in each.items]
    if any(len(each.after) != len(page.runs) for each in page.items):
        raise ValueError("items and runs differ")
    return page


def _html(page: Page, sources: Mapping[str, str | None]) -> str:
    """The whole file."""
    data = {"format": _FORMAT, "page": _plain(page), "images": sources}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    beside = " 'self' file:" if None in sources.values() else ""
    parts = {
        "title": html.escape(page.title),
        "lead": html.escape(page.lead),
        "legend": html.escape(page.legend),
        "images": f"data:{beside}",
        "facts": _facts(page.runs),
        "tables": "".join(map(html_table, merged_tables(page.runs))),
        "runs": "".join(_run(run, several=len(page.runs) > 1) for run in page.runs),
        "data": f"{_OPENING}{text}</script>",
        "css": (SOURCES / "gallery.css").read_text(encoding="utf-8"),
        "js": (SOURCES / "gallery.js").read_text(encoding="utf-8"),
    }
    template = (SOURCES / "gallery.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _facts(runs: Sequence[Ran]) -> str:
    """A card for each figure, with a line for each run."""
    titles = dict.fromkeys(fact.title for run in runs for fact in run.facts)
    cards = []
    for title in titles:
        own = [(run.label, fact) for run in runs for fact in run.facts if fact.title == title]
        lines = "".join(
            (f'<p class="run">{html.escape(label)}</p>' if len(runs) > 1 else "")
            + f'<p class="value">{html.escape(fact.value)} <small>{html.escape(fact.aside)}</small>'
            f"</p><p>{html.escape(fact.meaning)}</p>"
            for label, fact in own
        )
        cards.append(f"<article><h3>{html.escape(title)}</h3>{lines}</article>\n")
    return "".join(cards)


def _run(run: Ran, *, several: bool) -> str:
    """How to reproduce one run, and its settings."""
    heading = f"<h3>{html.escape(run.label)}</h3>\n" if several else ""
    lines = []
    for command, told in ((run.command, "The command"), (run.again, "Again, from its record")):
        if command:
            lines.append(
                f'<p class="quiet">{told}</p>\n<div class="snippet"><pre><code>'
                f'{html.escape(command)}</code></pre><button type="button">Copy</button></div>\n'
            )
    return (
        f"{heading}{''.join(lines)}<details><summary>Settings and versions</summary>\n"
        f"<pre>{html.escape(run.record)}</pre></details>\n"
    )
