"""The studio's page, served by the command and used in a headless Chromium."""

import dataclasses
import importlib.util
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from browser import browser_page
from personalizing_toy import random_model, tiny_pipeline

from conceptax.cli import main
from conceptax.converters import save_pytorch
from conceptax.errors import MissingPackageError
from conceptax.flax_models.clip import CLIPTextModel
from conceptax.studio.page import load_gradio

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, and one with another text encoder."""
    folder, original = tmp_path_factory.mktemp("models"), tiny_pipeline()
    text_encoder = random_model(
        CLIPTextModel, original.text_encoder.config, np.random.default_rng(1)
    )
    save_pytorch(original, folder / "model")
    save_pytorch(dataclasses.replace(original, text_encoder=text_encoder), folder / "edited")
    return folder


@pytest.fixture(scope="module")
def address(models):
    """Where the command serves; it ends by Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["--model", models / "model", "--edited", models / "edited", "--port", port]
    arguments += ["--output", models / "results"]
    with subprocess.Popen(
        [sys.executable, "-m", "conceptax", "studio", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True"},  # are not heeded
    ) as process:
        try:
            ready, _, _ = select.select([process.stdout], [], [], 240)
            assert ready, "the studio does not start"
            line = process.stdout.readline()
            assert line == f"http://127.0.0.1:{port}  (Ctrl-C ends it)\n", process.stderr.read()
            yield line.split()[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
            said = process.stderr.read()
            assert said.endswith("conceptax studio: interrupted.\n") and "Traceback" not in said
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(address, tmp_path_factory):
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        page.look(1440, 900)
        page.open(f"{address}/")
        page.wait("document.querySelector('#draw')", 60)
        yield page


FIELD = """(label => [...document.querySelectorAll('[data-testid=block-info]')]
  .find(e => e.innerText.trim().startsWith(label) && e.checkVisibility())
  .closest('label, .block').querySelector('input, textarea'))"""


def fill(page, label, value):
    """Type into the visible field with a label that begins so, anew where it was redrawn."""
    field, wanted = f"{FIELD}({json.dumps(label)})", json.dumps(value)
    for _ in range(8):
        page.evaluate(f"(field => {{ field.focus(); field.select(); }})({field})")
        page.type(value)
        page.evaluate("document.activeElement.blur()")
        page.evaluate("new Promise(done => setTimeout(done, 250))")  # until the page has noted it
        if page.evaluate(f"{field}.value === {wanted}"):
            return
    raise AssertionError(f"{label} does not keep {value}")


def tab(page, name):
    page.evaluate(
        "[...document.querySelectorAll('button[role=tab]')]"
        f".find(e => e.innerText.trim() === {json.dumps(name)}).click()"
    )
    page.wait(f"document.querySelector('button[role=tab][aria-selected=true]').innerText.trim() "
              f"=== {json.dumps(name)}")  # fmt: skip


def start(page, job):
    page.evaluate(f"document.querySelector('#{job}').click()")


def status(page, job, beginning, seconds=90):
    """What a job says, once it begins so."""
    told = f"(document.querySelector('#{job}-status .cx-status')?.innerText.trim() ?? '')"
    end = time.monotonic() + seconds
    while not (said := page.evaluate(told)).startswith(beginning):
        assert time.monotonic() < end, said
        time.sleep(0.05)
    return said


def captions(page, job):
    return page.evaluate(
        f"[...document.querySelectorAll('#{job}-pictures figure')].map(e => e.innerText.trim())"
    )


@needs_gradio
def test_both_models_draw_side_by_side(page):
    tab(page, "Draw")
    fill(page, "Prompt", "a <b>red</b> three {{on}} brick")
    start(page, "draw")
    status(page, "draw", "“a <b>red</b> three {{on}} brick”, seed 0, 25 steps")
    assert captions(page, "draw") == ["original", "edited"]
    loaded = "[...document.querySelectorAll('#draw-pictures img')].map(e => e.naturalWidth)"
    assert page.evaluate(loaded) == [16, 16]
    sources = page.evaluate("[...document.querySelectorAll('#draw-pictures img')].map(e => e.src)")
    assert sources[0] != sources[1]
    assert page.errors == []


@needs_gradio
def test_an_error_is_a_sentence(page):
    tab(page, "Draw")
    fill(page, "Prompt", " ")
    start(page, "draw")
    said = status(page, "draw", "There is nothing to draw")
    assert said == "There is nothing to draw: write a prompt."
    assert page.evaluate("document.querySelector('#draw-status [role=alert]') !== null")
    assert "Traceback" not in page.evaluate("document.body.innerText")


@needs_gradio
def test_a_job_stops_between_two_steps(page):
    tab(page, "Draw")
    fill(page, "Prompt", "a red three")
    page.evaluate("[...document.querySelectorAll('button')].find(e => "
                  "e.innerText.startsWith('Steps, guidance')).click()")  # fmt: skip
    page.wait(f"{FIELD}('Steps')")
    fill(page, "Steps", "900")
    start(page, "draw")
    page.wait("/original: step [1-9]/.test(document.querySelector('#draw-status').innerText)", 90)
    page.evaluate("document.querySelector('#draw-stop').click()")
    said = status(page, "draw", "Stopped.")
    assert 1 <= int(re.search(r"original: step (\d+) of 900", said)[1]) < 900
    fill(page, "Steps", "2")
    start(page, "draw")
    status(page, "draw", "“a red three”, seed 0, 2 steps")


@needs_gradio
def test_a_concept_is_erased_and_the_result_chosen_and_saved(page, models):
    tab(page, "Erase")
    page.evaluate("document.querySelector('#sage-how input').focus()")
    page.wait("document.querySelector('ul[role=listbox] li')")
    assert page.evaluate("document.querySelectorAll('ul[role=listbox] li').length") == 14
    page.evaluate(
        "[...document.querySelectorAll('ul[role=listbox] li')].find(e => "
        "e.innerText.trim().endsWith('UCE'))"
        ".dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))"
    )
    page.evaluate("document.activeElement.blur()")
    cycles = "[...document.querySelectorAll('[data-testid=block-info]')].some(e => "
    page.wait(f"!{cycles} e.innerText.trim() === 'Cycles' && e.checkVisibility())")
    fill(page, "Concepts to erase", "three")
    page.evaluate("[...document.querySelectorAll('button')].filter(e => e.checkVisibility())"
                  ".find(e => e.innerText.startsWith('Other settings')).click()")  # fmt: skip
    page.wait("[...document.querySelectorAll('.cx-table')].some(e => e.checkVisibility() && "
              "e.innerText.includes('--preserve-weight'))")  # fmt: skip
    fill(page, "As flags", "--vocabulary many")
    start(page, "erase")
    assert status(page, "erase", "--vocabulary") == (
        "--vocabulary takes a whole number, received 'many'."
    )
    fill(page, "As flags", "--vocabulary 40 --similarity-cap 1 --contexts 2")
    start(page, "erase")
    status(page, "erase", "“three erased by UCE” is among the edited models now")
    assert captions(page, "erase") == ["before", "after"]
    page.wait("document.querySelector('#edited input').value === 'three erased by UCE'")
    fill(page, "Save the edited model", "../elsewhere")
    start(page, "save")
    status(page, "save", "a folder's name begins with a letter or digit")
    fill(page, "Save the edited model", "mine")
    start(page, "save")
    status(page, "save", str(models / "results" / "mine"))
    assert (models / "results" / "mine" / "erasing.json").is_file()
    assert not (models / "elsewhere").exists()


@needs_gradio
def test_page_fits_and_says_what_a_model_cannot(page):
    tab(page, "Attention")
    page.wait("document.body.innerText.includes('has no choice of attention')")
    for width, dark in ((390, True), (390, False), (1440, True)):
        page.look(width, 844, dark=dark, phone=width < 500)
        time.sleep(0.2)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.look(1440, 900)


@needs_gradio
def test_nothing_else_is_asked_for_or_answered(page, address):
    """After all of the above; a page that is closed and opened anew finds the models."""
    page.open(f"{address}/")
    page.wait("document.querySelector('#edited input')?.value === 'three erased by UCE'", 60)
    elsewhere = {url for url in page.requests if not url.startswith((address, "data:"))}
    assert elsewhere == set()
    assert not [url for url in page.requests if "/file=" in url or "/upload" in url]
    assert page.errors == []
    for path, host in (
        ("/gradio_api/file=/etc/hostname", None),
        ("/gradio_api/upload", None),
        ("/monitoring", None),
        ("/", "evil.example"),
    ):
        headers = {"Host": host} if host else {}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{address}{path}", headers=headers))
        with refused.value as answer:
            assert answer.code == 404


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'conceptax\[ui\]'"):
        load_gradio()
    assert main(["studio", "--port", "0"]) == 1
    assert "--port takes a number from 1 to 65535" in capsys.readouterr().err
    assert main(["studio"]) == 1
    assert "the studio needs the package gradio" in capsys.readouterr().err
