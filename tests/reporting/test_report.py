"""Pictures and tables: everything is in its place."""

import json

import numpy as np
import pytest
from PIL import Image

from conceptax.converters import OutputError
from conceptax.converters.files.output import atomic_file
from conceptax.methods.evaluation.statistics import proportion
from conceptax.reporting.pictures import (
    Block,
    Row,
    before_after,
    save_png,
    sheet,
)
from conceptax.reporting.report import (
    Number,
    Table,
    attack_meaning,
    counted,
    html_table,
    interval,
    markdown_table,
    retention_meaning,
    share,
)
from conceptax.reporting.results import write_records

FIGURE = {"count": 47, "of": 48, "rate": 47 / 48, "low": 0.891, "high": 0.996}


def images(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def test_a_sheet_holds_every_image_in_order():
    batch = images(5)
    canvas = np.asarray(sheet(batch, columns=3, gap=4))
    assert canvas.shape == (2 * 12 + 4, 3 * 12 + 4, 3)
    for n, image in enumerate(batch):
        top, left = 4 + n // 3 * 12, 4 + n % 3 * 12
        assert np.array_equal(canvas[top : top + 8, left : left + 8], image)
    assert (canvas[16:, 28:] == 255).all()  # the place of the sixth stays empty


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


def test_tables_become_html():
    text = html_table(Table("a & b", ("a", "b <i>"), [("a <b>", counted(FIGURE))], "<note>"))
    assert "<h3>a &amp; b</h3>" in text and 'aria-label="a &amp; b"' in text
    assert '<th scope="col">b &lt;i&gt;</th>' in text and "<td>a &lt;b&gt;</td>" in text
    assert '<td class="number">47/48 (98 %) <small>89–100 %</small></td>' in text
    assert "&lt;note&gt;</p>" in text and "<p" not in html_table(Table("t", ("a",), [("b",)]))


def test_figures_are_said_in_a_sentence():
    none, few, half, most = (proportion(np.arange(100) < n) for n in (0, 10, 60, 95))
    assert attack_meaning(most, none) == (
        "Gone, as far as 100 images tell: at most about 4 in a hundred would show it."
    )
    assert attack_meaning(None, none).startswith("Gone")
    assert attack_meaning(None, half) == "It comes back: about 60 in a hundred images show it."
    assert attack_meaning(most, few).startswith("Weakened, not gone: about 10 in a hundred")
    assert attack_meaning(half, most).startswith("Stronger than before: about 95")
    assert attack_meaning(most, most).startswith("Not erased, as far as 100 images tell")
    assert "10 of 100 images: this figure says little" in attack_meaning(few, none)
    assert retention_meaning(most, half).startswith("Damaged: about 60 in a hundred")
    assert retention_meaning(most, most).startswith("Kept, as far as 100 images tell")
    assert retention_meaning(half, most).startswith("Better than before: about 95")


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
