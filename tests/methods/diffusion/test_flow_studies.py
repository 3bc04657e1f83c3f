"""The studies of small transformers on glyphs, end to end at their tiny sizes."""

import importlib
import json

import numpy as np
import pytest

STUDIES = {"flux_glyphs": ("whole", 3, "png"), "video_glyphs": ("frame", 8 * 3, "gif")}


@pytest.fixture(scope="module")
def benchmarks(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="module", params=STUDIES)
def study(request, benchmarks):
    return benchmarks(request.param)


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """The folder of a run, and the arguments that it was begun with."""
    folder = tmp_path_factory.mktemp(study.__name__)
    command = ["--quick", "--seeds", "3", "--workdir", str(folder)]
    command += ["--output", str(folder / "figures.json"), "--page", str(folder / "page.md")]
    study.main(command)
    return folder, command


@pytest.mark.slow
def test_every_cell_has_its_figures_and_the_page_tells_them(study, finished):
    folder, _ = finished
    counted, of, suffix = STUDIES[study.__name__]
    record = json.loads((folder / "figures.json").read_text())
    (seed,) = record["seeds"].values()
    assert list(seed["cells"]) == list(study.CELLS)
    assert seed["training"]["steps"] == 2 and seed["tuning"]["steps"] == 1
    assert all(cell[counted]["of"] == of for cell in seed["cells"].values())
    # The bundled autoencoder, which learnt single digits, shows larger images to the judge.
    assert record["ceiling"]["autoencoded"]["color"]["rate"] == 1
    assert 0.89 < record["timing"]["sparsity"] < 0.91
    page = (folder / "page.md").read_text()
    assert all(f"| {name} |" in page for name in (*study.CELLS, "rendered"))
    assert f"(page.{suffix})" in page and (folder / f"page.{suffix}").exists()


@pytest.mark.slow
def test_a_second_run_does_only_what_is_missing(study, finished, benchmarks, monkeypatch):
    folder, command = finished
    path, name = folder / "figures.json", "all steps sparse, tuned"
    before = json.loads(path.read_text())
    lacking = json.loads(path.read_text())
    del lacking["seeds"]["3"]["cells"][name]
    path.write_text(json.dumps(lacking))
    shared = benchmarks("_flow_study")
    drawn, draw = [], shared.draw_all
    monkeypatch.setattr(shared, "draw_all", lambda *args: drawn.append(args[1]) or draw(*args))

    def train_again(*_):
        raise AssertionError("its trainings are finished")

    monkeypatch.setattr(shared, "flow_step", train_again)
    study.main(command)
    assert drawn == [study.CELLS[name]]
    assert json.loads(path.read_text())["seeds"] == before["seeds"]


@pytest.mark.slow
def test_figures_of_another_size_are_kept(study, finished, capsys):
    _, command = finished
    with pytest.raises(SystemExit):
        study.main([*command, "--images", "5"])
    assert "name another --output" in capsys.readouterr().err


def test_seeds_are_pooled_and_compared_drawing_by_drawing(benchmarks):
    study = benchmarks("flux_glyphs")

    def cell(*right):
        count = {"count": sum(right), "of": len(right)}
        names = (*study.ATTRIBUTES, "whole")
        return {"right": list(right), "distance": len(right), **dict.fromkeys(names, count)}

    seeds = ([cell(1, 1), cell(1, 0)], [cell(0, 1), cell(0, 1)])
    cells = [dict(zip(("dense", "sparse"), seed, strict=True)) for seed in seeds]
    record = {"seeds": {name: {"cells": each} for name, each in zip("03", cells, strict=True)}}
    found = study.pooled(record, "sparse")
    assert (found["whole"]["count"], found["whole"]["of"]) == (2, 4)
    assert found["difference"]["mean"] == -0.25 and found["difference"]["of"] == 4
    assert study.pooled(record, "dense")["difference"]["low"] == 0


def test_a_digit_is_enlarged_and_comes_back(benchmarks):
    study = benchmarks("flux_glyphs")
    images = study.rendered([(3, 0, 1), (8, 2, 0)], "judge_test", 0)
    large = study.enlarged(images)
    assert large.shape == (2, 128, 128, 3)
    apart = study.reduced(large).astype(int) - images
    assert np.abs(apart).mean() < 3  # what a texture's finest grain loses


def test_a_digit_goes_the_way_that_is_named_and_is_found(benchmarks):
    study = benchmarks("video_glyphs")
    specs = [(way, way % 6, way % 3, way) for way in range(len(study.WAYS))]
    clips, paths = study.rendered(specs, "judge_test")
    assert clips.shape == (6, 8, 128, 128, 3)
    places, areas = study.located(clips)
    assert np.linalg.norm(places - paths, axis=-1).max() < 8 and areas.min() > 200
    # As it moves, within half a pixel: the middle of a stroke need not be that of its image.
    moved = np.diff(places, axis=1) - np.diff(paths, axis=1)
    assert np.abs(moved).max() < 0.5
    ways, told = study.along(places)
    assert ways.tolist() == list(range(6)) and told.min() > 0.99
    # The texture stands still: a corner that no digit comes near, in the clip that goes down.
    down = clips[list(study.WAYS).index("down")]
    assert (down[:, :8, :8] == down[0, :8, :8]).all()
    crops = study.cropped(clips, paths)
    assert crops.shape == (48, 64, 64, 3)


def test_paths_that_follow_no_way_are_told(benchmarks):
    study = benchmarks("video_glyphs")
    rng = np.random.default_rng(0)
    still = np.full((1, 8, 2), 64.0) + rng.normal(size=(1, 8, 2))
    jumping = rng.uniform(32, 96, (200, 8, 2))
    assert study.along(still)[1][0] == 0
    assert (study.along(jumping)[1] >= study.FOLLOWED).mean() < 0.05
    right = study.WAYS["to the right"][None] * 25 + 64
    for paths, name in ((right, "to the right"), (right[:, ::-1], "to the left")):
        way, told = study.along(paths)
        assert study.NAMES[way[0]] == name and told[0] > 0.999
