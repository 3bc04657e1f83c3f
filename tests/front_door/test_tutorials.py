"""Every tutorial runs from top to bottom, with the smaller settings that it notes for tests."""

import re
import shlex
import subprocess
import sys

import pytest

TUTORIALS = (
    *("convert", "erase", "flux", "gna_in_a_dit", "leaderboard", "many_hosts", "personalize"),
    "segment",
)
FAST = ("gna_in_a_dit",)
BLOCK = re.compile(r"(?:<!-- in tests: (.*?) -->\n)?```(python|sh)\n(.*?)```", re.DOTALL)
COMMANDS = ("conceptax", "mkdir", "mv")


def blocks(text):
    """(language, code) of a page with its settings for tests, `old -> new; old -> new`."""
    for note, language, code in BLOCK.findall(text):
        if note == "skipped":
            continue
        for change in note.split("; ") if note else ():
            old, new = change.split(" -> ")
            assert old in code, f"{old!r} is not in the block that notes it"
            code = code.replace(old, new)
        yield language, code


def program(page):
    """A page as one Python program."""
    lines = ["import subprocess, sys"]
    for language, code in blocks(page):
        if language == "python":
            lines.append(code)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            assert not words or words[0] in COMMANDS, line
            if words[:1] == ["conceptax"]:
                lines.append("from conceptax.cli import main as _main")
                lines.append(f"assert _main({words[1:]!r}) == 0, {line!r}")
            elif words:
                lines.append(f"subprocess.run({words!r}, check=True)")
    return "\n".join(lines)


def test_changes_in_notes():
    page = "<!-- in tests: a(1 -> a(2; b=3 -> b=4, c=5; d -> e -->\n```python\na(1) b=3 d\n```\n"
    assert list(blocks(page)) == [("python", "a(2) b=4, c=5 e\n")]
    with pytest.raises(AssertionError, match="'x' is not in the block"):
        list(blocks("<!-- in tests: x -> y -->\n```python\na\n```\n"))


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TUTORIALS],
)
def test_the_tutorial_runs(name, repository, tmp_path):
    page = (repository / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    code = program(page)
    assert code.count("conceptax") > 2
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
def test_the_readme_runs_and_runs_again(repository, tmp_path):
    code = program((repository / "README.md").read_text(encoding="utf-8"))
    assert "erase_step" in code
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr[-3000:]


def test_every_tutorial_is_tested(repository):
    pages = {path.stem for path in (repository / "docs" / "tutorials").glob("*.md")}
    assert pages == set(TUTORIALS)
