"""Pictures and the report: everything is in its place, and the page needs nothing else."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conceptax.converters import OutputError
from conceptax.converters.files.output import atomic_file
from conceptax.reporting.pictures import (
    HIT,
    MISS,
    Block,
    Row,
    before_after,
    png_bytes,
    save_png,
    sheet,
)
from conceptax.reporting.report import (
    Gallery,
    Number,
    Picture,
    Table,
    counted,
    html_report,
    interval,
    markdown_table,
    share,
)
from conceptax.reporting.results import write_records

FIGURE = {"count": 47, "of": 48, "rate": 47 / 48, "low": 0.891, "high": 0.996}


def images(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def color(name):
    return tuple(bytes.fromhex(name.removeprefix("#")))


def test_a_sheet_holds_every_image_in_order():
    batch = images(5)
    canvas = np.asarray(sheet(batch, columns=3, gap=4))
    assert canvas.shape == (2 * 12 + 4, 3 * 12 + 4, 3)
    for n, image in enumerate(batch):
        top, left = 4 + n // 3 * 12, 4 + n % 3 * 12
        assert np.array_equal(canvas[top : top + 8, left : left + 8], image)
    assert (canvas[16:, 28:] == 255).all()  # the place of the sixth stays empty


def test_a_sheet_frames_what_is_marked():
    marked = np.array([True, False, True])
    canvas = np.asarray(sheet(images(3), columns=3, marked=marked))
    frames = [tuple(canvas[3, 4 + 12 * n].tolist()) for n in range(3)]
    assert frames == [color(HIT), color(MISS), color(HIT)]


@pytest.mark.parametrize("count", [1, 2, 7, 48])
def test_a_sheet_chooses_its_own_columns(count):
    canvas = np.asarray(sheet(images(count), gap=0))
    cells = canvas.shape[0] * canvas.shape[1] // 64
    assert count <= cells < count + canvas.shape[1] // 8


def test_the_grid_shows_before_and_after_side_by_side():
    black, white = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 255, np.uint8)
    rows = [Row("a very long prompt " * 20, black, white), Row("short", black, white)]
    blocks = [Block("left", rows), Block("right", rows[:1])]
    picture = np.asarray(before_after(blocks, title="Title", note="note", cell=100, gap=6))
    # Each block: 2 + 2 cells of 100 pixels; black before, white after.
    dark = (picture == 0).all(-1)
    assert dark.sum() == 100 * 100 * 2 * 3
    assert dark[230, 28:128].all() and not dark[230, 28 + 206 + 18 :][:206].any()
    # A long prompt ends where its block ends.
    assert (picture[172:200, 28 + 430 : 28 + 430 + 20] == 255).all()


def test_png_files_carry_text(tmp_path):
    image = images(1)[0]
    save_png(image, tmp_path / "x.png", {"conceptax": "settings"})
    with Image.open(tmp_path / "x.png") as loaded:
        loaded.load()
    assert loaded.text == {"conceptax": "settings"}
    assert np.array_equal(np.asarray(loaded), image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(image)))), image)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_file_and_escapes_text():
    picture = Picture(png_bytes(images(1)[0]), "<caption>")
    page = html_report(
        title="t & t",
        lead="<lead>",
        grid=picture,
        tables=[Table("found", ("a", "b"), [("a <b>", counted(FIGURE))], "note")] * 2,
        galleries=[Gallery("first", "text", [picture, picture])],
        record='{"a": 1}',
    )
    parsed = Page()
    parsed.feed(page)
    assert not parsed.open
    assert not {"script", "link", "iframe"} & set(parsed.seen)
    assert "<lead>" not in page and "&lt;lead&gt;" in page and "t &amp; t" in page
    sources = [value for name, value in parsed.attributes if name in ("src", "href")]
    assert len(sources) == 3 and all(each.startswith("data:image/png;base64,") for each in sources)
    assert base64.b64decode(sources[0].split(",")[1]) == picture.png
    assert not re.search(r"https?:|url\(", page)
    assert page.count("47/48 (98 %) <small>89–100 %</small>") == 2 == parsed.seen.count("table")
    assert "<td>a &lt;b&gt;</td>" in page


def test_tables_become_markdown():
    table = Table("found", ("a", "b"), [("x|y", counted(FIGURE)), ("z", Number("1.2"))], "note")
    assert markdown_table(table).splitlines() == [
        "## found",
        "",
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y | 47/48 (98 %), 89–100 % |",
        "| z | 1.2 |",
        "",
        "note",
    ]
    assert counted(None) == Number("–")


def test_proportions_read_well():
    assert share(FIGURE) == "47/48 (98 %)"
    assert interval(FIGURE) == "89–100 %"


def test_new_files_appear_only_when_complete(tmp_path):
    target = tmp_path / "deeper" / "x.txt"
    with pytest.raises(RuntimeError), atomic_file(target) as file:
        file.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_file(target) as file:
        file.write_text("one")
        assert not target.exists()
    with pytest.raises(OutputError, match="already exists"), atomic_file(target):
        pass
    with atomic_file(target, force=True) as file:
        file.write_text("two")
    assert target.read_text() == "two" and list(target.parent.iterdir()) == [target]
    with pytest.raises(OutputError, match="No space left"), atomic_file(tmp_path / "full.txt"):
        raise OSError(28, "No space left on device")
    assert not (tmp_path / "full.txt").exists()


def test_figures_are_written_one_line_a_record(tmp_path):
    rows = {"a": {"mean": 0.5, "values": [1, {"deep": None}]}, "ö": {}}
    content = {"date": "today", "list": [1, [2]], "rows": rows, "runs": [{"n": 1}, {"n": 2}]}
    write_records(tmp_path / "figures.json", content)
    text = (tmp_path / "figures.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text == "\n".join(
        [
            "{",
            ' "date": "today",',
            ' "list": [1, [2]],',
            ' "rows": {',
            '  "a": {"mean": 0.5, "values": [1, {"deep": null}]},',
            '  "ö": {}',
            " },",
            ' "runs": [',
            '  {"n": 1},',
            '  {"n": 2}',
            " ]",
            "}",
            "",
        ]
    )
