"""Estimates that commands tell, and the question before what takes long."""

import io

import pytest

from conceptax.cli import confirm


@pytest.fixture
def terminal(monkeypatch):
    """Standard input as a terminal with an answer typed into it."""

    def typed(answer):
        stream = io.StringIO(answer)
        stream.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", stream)

    monkeypatch.delenv("CONCEPTAX_YES", raising=False)
    return typed


def test_what_is_short_is_not_told(capsys, terminal, monkeypatch):
    terminal("n\n")
    confirm.announcing("drawing")(0.2, 5.0)
    assert capsys.readouterr().err == ""
    confirm.announcing("drawing")(40.0, 300.0)
    assert capsys.readouterr().err == "drawing will take about 5.7 min on this CPU.\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    confirm.announcing("drawing")(40.0, 300.0)
    assert capsys.readouterr().err.startswith("compiling, about 40 s …\n")


@pytest.mark.parametrize(("answer", "goes_on"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_before_hours_somebody_is_asked(answer, goes_on, capsys, terminal):
    terminal(answer)
    if goes_on:
        confirm.announcing("training")(60.0, 79 * 3600.0)
    else:
        with pytest.raises(confirm.Declined, match="--yes"):
            confirm.announcing("training")(60.0, 79 * 3600.0)
    err = capsys.readouterr().err
    assert "training will take about 79 h on this CPU; a GPU is advised.\nGo on? [y/N]" in err


def test_nobody_is_asked_with_yes_or_without_a_terminal(capsys, terminal, monkeypatch):
    terminal("n\n")
    monkeypatch.setenv("CONCEPTAX_YES", "1")
    confirm.announcing("training")(60.0, 79 * 3600.0)
    monkeypatch.delenv("CONCEPTAX_YES")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    confirm.announcing("training")(60.0, 79 * 3600.0)
    assert "Go on?" not in capsys.readouterr().err


def test_counts_tell_what_is_left(capsys, monkeypatch):
    now = iter([0.0, 10.0, 12.0, 20.0, 40.0])
    monkeypatch.setattr(confirm.time, "monotonic", lambda: next(now))
    told = confirm.counting("images")
    for done in (1, 2, 3, 4):
        told(done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["1 of 4 images, about 30 s left", "3 of 4 images, about 7 s left"]
