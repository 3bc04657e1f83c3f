"""The page of a run: what is written is read again, runs stand side by side, a browser shows it."""

import json
import re

import numpy as np
import pytest
from browser import browser_page
from PIL import Image

from conceptax.cli import main
from conceptax.reporting.gallery import (
    BESIDE,
    REPORT,
    SIDE,
    SOURCES,
    Fact,
    Front,
    Group,
    Images,
    Item,
    Page,
    Ran,
    Shot,
    compared,
    merged_tables,
    read_report,
    write_report,
)
from conceptax.reporting.report import Number, Table

HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror=alert(1)> & “q” \\'
COLORS = {"before": (200, 40, 40), "after": (40, 40, 200)}


def picture(side, number, size=16):
    """A plain color that differs from number to number."""
    image = np.full((size, size, 3), COLORS[side], np.uint8)
    image[..., 1] = number % 256
    image[0, 0] = number // 256 % 256
    return image


def run_page(
    images, label="SAGE", count=4, *, kind="erasure", shift=0, title="figures", text="a {}"
):
    """Of two attacks and a retained group, `count` prompts each; an attack draws nothing before."""
    groups = (
        Group("plain", "plain prompts", "attack"),
        Group("search", "token search", "attack"),
        Group("neighbors", "neighboring concepts", "retention"),
    )
    items = []
    for g, group in enumerate(groups):
        for n in range(count):
            number = g * count + n
            before = Shot(images.add(picture("before", number)), True, "three", 0.98)
            own = f"{label} {n}" if group.name == "search" else ""
            hit = (number + shift) % 2 == 0
            word = "three" if hit else "nine"
            after = Shot(
                images.add(picture("after", number + 97 * shift)), hit, word, 0.75, prompt=own
            )
            items.append(
                Item(
                    g,
                    own or text.format(n),
                    ("four" if group.name == "neighbors" else "three",),
                    (16, 16),
                    None if own else before,
                    (after,),
                    n % 2,
                    number,
                )
            )
    rows = [("plain", Number("4/4", "51–100 %"), Number(f"{shift}/4", "0–49 %"))]
    table = Table(title, ("asked for by", "original", "edited"), rows, "note")
    facts = (Fact("Plain", f"{shift} %", "0–49 %", "Gone, as far as 4 images tell."),)
    ran = Ran(label, "conceptax evaluate --x y", "", facts, (table,), '{"seed": 0}')
    sides = ("original", "edited")
    front = (Front("first", (0, 2 * count)),)
    return Page(kind, "The page", "What.", sides, "Legend.", groups, tuple(items), front, (ran,))


def written(folder, *arguments, within=1 << 20, **options):
    folder.mkdir(parents=True)
    images = Images(folder, within=within)
    page = run_page(images, *arguments, **options)
    write_report(folder, page, images)
    return page


# --- what is written ---


@pytest.mark.parametrize("within", [1 << 20, 0])
def test_what_is_written_is_read(tmp_path, within):
    page = written(tmp_path / "run", within=within, text=HOSTILE + " {}")
    files = sorted((tmp_path / "run").rglob("*.webp"))
    assert bool(files) == (within == 0)
    again = Images(tmp_path / "again")
    place = page.runs[0]._replace(place="run")
    for path in (tmp_path / "run", tmp_path / "run" / REPORT):
        assert read_report(path, again) == page._replace(runs=(place,))
    assert again.sources.keys() == {s.image for i in page.items for s in (i.before, *i.after) if s}


def test_prompts_are_no_code(tmp_path):
    images = Images(tmp_path)
    page = run_page(images, HOSTILE, text=HOSTILE + " {}", title=HOSTILE)
    page = page._replace(title=HOSTILE, lead=HOSTILE, legend=HOSTILE)
    write_report(tmp_path, page, images)
    text = (tmp_path / REPORT).read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text.replace("\\u003cimg", "") and "{{" not in text
    assert not re.search(r"https?:|url\(", text)
    assert read_report(tmp_path, images).title == HOSTILE


def test_images_are_kept_once_and_small(tmp_path):
    images = Images(tmp_path)
    large = np.zeros((40, 2 * SIDE, 3), np.uint8)
    key = images.add(large)
    assert images.add(large.copy()) == key != images.add(large[:39])
    write_report(tmp_path, run_page(images), images)
    few = Images(tmp_path / "few", within=0)
    (tmp_path / "few").mkdir()
    key = few.add(large)
    assert few.sources == {key: None}
    with Image.open(tmp_path / "few" / BESIDE / f"{key}.webp") as image:
        assert image.size == (SIDE, 20) and image.format == "WEBP"


def test_the_page_is_small_without_its_images():
    assert sum(file.stat().st_size for file in SOURCES.iterdir()) < 60_000


def test_missing_images_are_told(tmp_path):
    page = written(tmp_path / "run", within=0)
    first, second = sorted((tmp_path / "run" / BESIDE).iterdir())[:2]
    first.unlink()
    second.write_text("no image")
    images = Images(tmp_path / "again")
    with pytest.warns(UserWarning, match=r"2 of 20 images of .*run are missing"):
        assert read_report(tmp_path / "run", images).items == page.items
    assert len(images.sources) == 18


def test_a_page_names_no_other_files(tmp_path):
    """What others give may name anything as an image."""
    written(tmp_path / "run", within=0)
    (tmp_path / "run" / "secret.webp").write_bytes(b"RIFF....WEBPsecret")
    file = tmp_path / "run" / REPORT
    key = next(iter((tmp_path / "run" / BESIDE).iterdir())).stem
    file.write_text(file.read_text().replace(key, "../secret"))
    images = Images(tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 20 images"):
        read_report(tmp_path / "run", images)
    assert "../secret" not in images.sources and len(images.sources) == 19


# --- several runs ---


def side_by_side(tmp_path, *labels, **options):
    images, pages = Images(tmp_path), {}
    for n, label in enumerate(labels):
        written(tmp_path / f"run{n}", label, shift=n, **options)
        pages[f"run{n}"] = read_report(tmp_path / f"run{n}", images)
    return compared(pages)


def test_methods_stand_side_by_side(tmp_path):
    page = side_by_side(tmp_path, "SAGE", "UCE", "SAGE")
    assert [run.label for run in page.runs] == ["SAGE (run0)", "UCE", "SAGE (run2)"]
    assert len(page.items) == 12 and all(all(item.after) for item in page.items)
    searched = [item for item in page.items if page.groups[item.group].name == "search"]
    assert [shot.prompt for shot in searched[1].after] == ["SAGE 1", "UCE 1", "SAGE 1"]
    (table,) = merged_tables(page.runs)
    assert table.columns == ("asked for by", "original", "SAGE (run0)", "UCE", "SAGE (run2)")
    assert table.rows[0][0] == "plain" and [cell.text for cell in table.rows[0][1:]] == [
        "4/4",
        "0/4",
        "1/4",
        "2/4",
    ]
    assert table.note == "note" and "12 of 12 prompts are common" in page.lead
    # A page of several runs is compared as well.
    images = Images(tmp_path / "more")
    (tmp_path / "more").mkdir()
    write_report(tmp_path / "more", page, images)
    more = compared({"a": page, "b": page})
    assert len(more.runs) == 6 and len({run.label for run in more.runs}) == 6


def test_other_originals_and_prompts_do_not_mix(tmp_path):
    images = Images(tmp_path)
    one, other = run_page(images, "A"), run_page(images, "B", shift=1, count=5, text="the {}")
    page = compared({"a": one, "b": other})
    alone = [item for item in page.items if not all(item.after)]
    assert len(page.items) > 12 and alone
    assert {group.name for group in page.groups} == {"plain", "search", "neighbors"}
    assert all(page.items[place].after[0] for place in page.front[0].items)


def test_tables_of_several_runs_are_joined():
    def ran(label, rows, note="n", columns=("metric", "mean", "alike")):
        return Ran(label, "", "", (), (Table("t", columns, rows, note),), "")

    one = ran("A", [("x", Number("1"), Number("2")), ("y", Number("3"), Number("4"))])
    other = ran("B", [("x", Number("5"), Number("6"))], note="m")
    (table,) = merged_tables([one, other])
    assert table.columns == ("metric", "mean, A", "mean, B", "alike, A", "alike, B")
    assert [[getattr(cell, "text", cell) for cell in row] for row in table.rows] == [
        ["x", "1", "5", "2", "6"],
        ["y", "3", "–", "4", "–"],
    ]
    assert table.note == "A: n B: m"
    assert merged_tables([one]) == list(one.tables)


def said(capsys, *arguments, status=0):
    assert main([str(each) for each in arguments]) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_command_writes_one_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a", "SAGE")
    written(tmp_path / "b", "UCE", shift=1, within=0)
    assert said(capsys, "report", "a", "b") == "comparison: report.html of 2 runs\n"
    page = read_report(tmp_path / "comparison", Images(tmp_path / "x"))
    assert [run.label for run in page.runs] == ["SAGE", "UCE"]
    assert said(capsys, "report", f"a/{REPORT}", "--output", "one").endswith("of 1 run\n")
    assert "already exists and is not empty" in said(capsys, "report", "a", "b", status=1)
    said(capsys, "report", "b", "a", "--force")


def test_what_cannot_be_reported_is_told(tmp_path, capsys):
    written(tmp_path / "a")
    written(tmp_path / "scenes", kind="segmentation")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / REPORT).write_text("<p>something else</p>")
    text = (tmp_path / "a" / REPORT).read_text()
    for name, changed in (
        ("newer", text.replace('{"format":1,', '{"format":2,')),
        ("odd", text.replace('"groups":', '"troops":')),
        ("short", text.replace('"after":[{', '"after":[null,{', 1)),
    ):
        assert changed != text
        (tmp_path / name).mkdir()
        (tmp_path / name / REPORT).write_text(changed)
    out = tmp_path / "out"
    for runs, told in (
        ([], "there is nothing to report: pass the folder of at least one run."),
        (["empty"], "empty holds no report.html: pass folders that `conceptax evaluate`, "),
        (["absent"], "absent holds no report.html"),
        (["a", "scenes"], "a is of evaluations of erasures, and "),
        (["a", "scenes"], "of evaluations of segmentations: runs of one kind can be compared."),
        (["a", "a"], "a comes twice: pass each run once."),
        (["other"], "report.html is no report of conceptax, or is damaged."),
        (["odd"], "is no report of conceptax, or is damaged."),
        (["short"], "is no report of conceptax, or is damaged."),
        (["newer"], "was written by another version of conceptax: repeat its run with this one."),
    ):
        paths = [tmp_path / run for run in runs]
        answer = said(capsys, "report", *paths, "--output", out, status=1)
        assert told in answer and answer.count("\n") == 1, answer
        assert not out.exists()


# --- in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_page(tmp_path_factory.mktemp("gallery") / "profile") as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run, two runs side by side, and one of 2,000 images, within the page and beside it."""
    folder = tmp_path_factory.mktemp("pages")
    written(folder / "one", text=HOSTILE + " {}")
    page = written(folder / "gap", within=0)
    (folder / "gap" / BESIDE / f"{page.items[0].before.image}.webp").unlink()
    written(folder / "a", "SAGE", count=6)
    written(folder / "b", "UCE", shift=1, count=5)
    arguments = [str(folder / "a"), str(folder / "b"), "--output", str(folder / "two")]
    assert main(["report", *arguments]) == 0
    written(folder / "within", count=400, within=1 << 30)
    written(folder / "beside", count=400, within=0)
    return folder


def show(browser, file, address="", *, width=1200, phone=False, dark=False):
    browser.look(width, 900, phone=phone, dark=dark)
    browser.open("about:blank")
    browser.errors.clear()
    browser.open(f"{(file / REPORT).as_uri()}{address}")
    browser.wait("document.documentElement.dataset.ready")


def choose(browser, name, value):
    browser.evaluate(
        f"{{const f = document.getElementById('{name}'); f.value = {json.dumps(value)};"
        "f.dispatchEvent(new Event('input', {bubbles: true}))}"
    )


def cards(browser):
    return browser.evaluate("document.querySelectorAll('#cards .card').length")


def text(browser, selector):
    return browser.evaluate(f"document.querySelector('{selector}').innerText")


def test_hostile_prompts_are_shown(browser, folder):
    show(browser, folder / "one", "#group=plain")
    assert browser.evaluate("document.title") == "The page" and not browser.errors
    assert text(browser, "#cards .prompt") == HOSTILE + " 0"


def test_filters_are_kept_in_the_address(browser, folder):
    show(browser, folder / "a")
    assert cards(browser) == 18 and text(browser, "#count") == "18 prompts, 30 images"
    for name, value, left in (
        ("group", "plain", 6),
        ("judged", "shown", 3),
        ("seed", "0", 3),
        ("find", "A 2", 1),
    ):
        choose(browser, name, value)
        assert cards(browser) == left, name
    address = browser.evaluate("location.hash")
    assert address == "#group=plain&judged=shown&seed=0&find=A+2"
    show(browser, folder / "a", address)
    assert cards(browser) == 1 and text(browser, "#count").startswith("1 of 18 prompts")
    assert "✓ shows it · three\u00a075\u00a0%" in text(browser, "#cards .verdicts")
    for address, left in (
        ("#concept=four", 6),
        ("#judged=not", 9),
        ("#judged=changed", 6),
        ("#group=none-such", 18),
        ("#find=none-such", 0),
    ):
        show(browser, folder / "a", address)
        assert cards(browser) == left, address
    assert text(browser, "#count") == "Nothing is so: take fewer filters."
    show(browser, folder / "a", "#tables")  # a place, no filter
    assert cards(browser) == 18 and browser.evaluate("location.hash") == "#tables"
    assert not browser.errors


def test_sliders_move_by_keys(browser, folder):
    show(browser, folder / "a", "#group=plain")
    slider = "document.querySelector('#cards .slider')"
    browser.evaluate(f"{slider}.querySelector('input').focus()")
    for key, at in (("ArrowRight", "51%"), ("Home", "0%"), ("End", "100%")):
        browser.key(key)
        browser.wait(f"{slider}.style.getPropertyValue('--at') === '{at}'")
    assert (
        browser.evaluate(f"getComputedStyle({slider}.querySelector('.over')).clipPath").startswith(
            "inset(0px 0%"
        )
        or browser.evaluate(f"getComputedStyle({slider}.querySelector('.over')).clipPath")
        == "inset(0px)"
    )
    choose(browser, "all", "25")
    ats = "[...document.querySelectorAll('.slider')].map((s) => s.style.getPropertyValue('--at'))"
    assert set(browser.evaluate(ats)) == {"25%"}
    choose(browser, "view", "side")
    assert browser.evaluate("document.querySelectorAll('#cards .slider').length") == 0
    assert browser.evaluate("document.querySelectorAll('#cards .card:first-child img').length") == 2


def test_a_prompt_is_enlarged_and_linked(browser, folder):
    show(browser, folder / "a", "#group=plain&pair=1")
    browser.wait("document.getElementById('large').open")
    assert text(browser, "#one .prompt") == "a 1"
    browser.evaluate("document.getElementById('next').click()")
    assert text(browser, "#one .prompt") == "a 2"
    assert browser.evaluate("location.hash") == "#group=plain&pair=2"
    browser.key("Escape")
    browser.wait("location.hash === '#group=plain'")
    assert not browser.evaluate("document.getElementById('large').open")
    focus = "document.activeElement.closest('[data-place]').dataset.place"
    assert browser.evaluate(focus) == "2"


def test_methods_are_shown_side_by_side(browser, folder):
    show(browser, folder / "two", "#group=plain")
    assert text(browser, "#count") == "6 of 28 prompts, 17 images"
    names = (
        "[...document.querySelectorAll('#cards .card:first-child .name')].map((n) => n.innerText)"
    )
    assert browser.evaluate(names) == ["original", "SAGE", "original", "UCE"]
    last = "document.querySelector('#cards .card:last-child').textContent"
    assert "not drawn by UCE" in browser.evaluate(last)  # no innerText: it is out of sight
    heads = "[...document.querySelectorAll('#tables th')].map((h) => h.innerText)"
    assert browser.evaluate(heads) == ["asked for by", "original", "SAGE", "UCE"]
    choose(browser, "judged", "differ")
    assert cards(browser) == 5
    assert browser.evaluate("document.querySelectorAll('.facts .run').length") == 2
    assert not browser.errors


def test_missing_images_are_shown_as_such(browser, folder):
    show(browser, folder / "gap", "#group=plain")
    browser.evaluate("document.getElementById('images').scrollIntoView()")
    browser.wait("document.querySelector('#cards .missing')")
    assert text(browser, "#cards .missing") == "image missing"
    browser.wait("document.querySelectorAll('#cards img[src]').length >= 3")


@pytest.mark.parametrize("name", ["within", "beside"])
def test_two_thousand_images_open_in_two_seconds(browser, folder, name):
    """The best of three, since other work may be going on."""
    times = []
    for _ in range(3):
        show(browser, folder / name)
        times.append(browser.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(times) < 2000, times
    assert text(browser, "#count") == "1,200 prompts, 2,000 images"
    browser.evaluate("document.getElementById('images').scrollIntoView()")
    loaded = "[...document.querySelectorAll('#cards img')].filter((i) => i.naturalWidth).length"
    browser.wait(f"{loaded} > 4")
    assert browser.evaluate(loaded) < 500  # those that are near
    browser.evaluate("document.getElementById('more').scrollIntoView()")
    browser.wait("document.querySelectorAll('#cards .card').length > 48")
    assert not browser.errors


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_the_page_fits_windows_of_every_width(browser, folder, width):
    for name, address in (("two", ""), ("two", "#pair=0"), ("one", "#view=side")):
        show(browser, folder / name, address, width=width, phone=width < 500)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, (name, address)


def test_colors_follow_the_reader_and_the_button(browser, folder):
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light, dark = "rgb(245, 247, 249)", "rgb(17, 22, 28)"
    show(browser, folder / "a", dark=True)
    assert browser.evaluate(paper) == dark
    press = "document.getElementById('theme').click()"
    browser.evaluate(press)
    assert browser.evaluate(paper) == light
    show(browser, folder / "a", dark=True)
    assert browser.evaluate(paper) == light  # it is remembered
    browser.evaluate(press)
    assert browser.evaluate(paper) == dark
    browser.evaluate(press)
    show(browser, folder / "a")
    assert browser.evaluate(paper) == light


def luminance(color):
    levels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colors_are_legible():
    css = (SOURCES / "gallery.css").read_text(encoding="utf-8")
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    for mode in (1, 2):
        colors = {pair[0]: pair[mode] for pair in pairs}
        for ink, paper in (
            *((ink, paper) for ink in ("ink", "quiet", "accent") for paper in ("page", "card")),
            *((name, f"{name}-card") for name in ("good", "bad")),
        ):
            bright, dim = sorted((luminance(colors[ink]), luminance(colors[paper])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (mode, ink, paper)
