"""The study of a FLUX-type model on glyphs, end to end at its tiny size."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="module")
def study(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        import flux_glyphs

        yield flux_glyphs


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """The folder of a run, and the arguments that it was begun with."""
    folder = tmp_path_factory.mktemp("flux_glyphs")
    command = ["--quick", "--seeds", "3", "--workdir", str(folder)]
    command += ["--output", str(folder / "figures.json"), "--page", str(folder / "page.md")]
    study.main(command)
    return folder, command


@pytest.mark.slow
def test_every_cell_has_its_figures_and_the_page_tells_them(study, finished):
    folder, _ = finished
    record = json.loads((folder / "figures.json").read_text())
    (seed,) = record["seeds"].values()
    assert list(seed["cells"]) == list(study.CELLS)
    assert seed["training"]["steps"] == 2 and seed["tuning"]["steps"] == 1
    assert all(cell["quarter"]["of"] == 4 * 3 for cell in seed["cells"].values())
    # The bundled autoencoder, which learnt single digits, shows whole scenes to the judge.
    assert record["ceiling"]["autoencoded"]["color"]["rate"] == 1
    assert 0.9 < record["timing"]["sparsity"] < 0.91
    page = (folder / "page.md").read_text()
    assert all(f"| {name} |" in page for name in (*study.CELLS, "rendered"))
    assert (folder / "page.png").exists()


@pytest.mark.slow
def test_a_second_run_does_only_what_is_missing(study, finished, monkeypatch):
    folder, command = finished
    path, name = folder / "figures.json", "all steps sparse, tuned"
    before = json.loads(path.read_text())
    lacking = json.loads(path.read_text())
    del lacking["seeds"]["3"]["cells"][name]
    path.write_text(json.dumps(lacking))
    drawn, draw = [], study.draw_all
    monkeypatch.setattr(study, "draw_all", lambda *args: drawn.append(args[1]) or draw(*args))

    def train_again(*_):
        raise AssertionError("its trainings are finished")

    monkeypatch.setattr(study, "flow_step", train_again)
    study.main(command)
    assert drawn == [study.CELLS[name]]
    assert json.loads(path.read_text())["seeds"] == before["seeds"]


@pytest.mark.slow
def test_figures_of_another_size_are_kept(study, finished, capsys):
    _, command = finished
    with pytest.raises(SystemExit):
        study.main([*command, "--images", "5"])
    assert "name another --output" in capsys.readouterr().err


def test_seeds_are_pooled_and_compared_scene_by_scene(study):
    def cell(*right):
        count = {"count": sum(right), "of": 4 * len(right)}
        names = (*study.ATTRIBUTES, "quarter", "scene")
        return {"right": list(right), "distance": len(right), **dict.fromkeys(names, count)}

    seeds = ([cell(4, 4), cell(4, 2)], [cell(4, 4), cell(3, 3)])
    cells = [dict(zip(("dense", "sparse"), seed, strict=True)) for seed in seeds]
    record = {"seeds": {name: {"cells": each} for name, each in zip("03", cells, strict=True)}}
    found = study.pooled(record, "sparse")
    assert (found["quarter"]["count"], found["quarter"]["of"]) == (12, 16)
    assert found["difference"]["mean"] == -0.25 and found["difference"]["of"] == 4
    assert study.pooled(record, "dense")["difference"]["low"] == 0


def test_a_scene_is_four_handwritings_of_its_digit(study):
    (image,) = study.rendered([(3, 0, 1)], "judge_test")
    parts = study.quarters(image[None])
    np.testing.assert_array_equal(parts[1], image[:64, 64:])
    red = (parts[..., 0].astype(int) - parts[..., 1] > 100).mean(axis=(1, 2))
    assert (red > 0.05).all()
    assert len({part.tobytes() for part in parts}) == 4
