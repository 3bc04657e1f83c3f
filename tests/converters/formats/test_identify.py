"""A load opens each weight file once, whatever is asked of it before."""

import os

import pytest
from opened_files import opened_files

from conceptax import bundled_model
from conceptax.converters import load_pytorch, merge_parts, save_pytorch
from conceptax.converters.additions import is_whole
from conceptax.converters.formats.identify import COMPONENT, PIPELINE, identify, resolved


@pytest.fixture(scope="module")
def pipeline():
    return load_pytorch(bundled_model(), sharding="mapped")


def once(files):
    return {path.name: 1 for path in files}


def test_a_pipeline_folder_is_opened_once(pipeline):
    folder = bundled_model()
    with opened_files() as files:
        load_pytorch(folder)
    models = [folder / name for name in ("unet", "vae", "text_encoder")]
    assert sum(files.values()) == len(models)
    assert files.keys() == {path.name for model in models for path in model.glob("*.safetensors")}
    assert identify(folder).kind == PIPELINE


@pytest.mark.parametrize("given", ["folder", "file", "shards", "index"])
def test_a_component_is_opened_once(pipeline, tmp_path, given):
    folder = tmp_path / "vae"
    limit = "100KB" if given in ("shards", "index") else "1GB"
    save_pytorch(pipeline.vae, folder, max_shard_size=limit)
    weights = list(folder.glob("*.safetensors"))
    assert (len(weights) > 1) == (limit == "100KB")
    path = {"file": weights[0], "index": next(iter(folder.glob("*.index.json")), folder)}
    with opened_files() as files:
        load_pytorch(path.get(given, folder))
    assert files == once(weights)
    assert identify(path.get(given, folder)).kind == COMPONENT


def test_a_pickle_is_opened_once_here_and_once_by_torch(torch, pipeline, tmp_path):
    folder = save_pytorch(pipeline.vae, tmp_path / "vae")
    (weights,) = folder.glob("*.safetensors")
    from safetensors.torch import load_file

    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with opened_files() as files:
        load_pytorch(folder)
    assert files == {weights.with_suffix(".bin").name: 2}


def test_the_hubs_cache_stands_for_its_version(pipeline, tmp_path, monkeypatch):
    cache = tmp_path / ".cache/huggingface/hub/models--org--name"
    for age, name in enumerate(("newer", "older")):
        save_pytorch(pipeline.unet, cache / "snapshots" / name)
        os.utime(cache / "snapshots" / name, (2e9 - age, 2e9 - age))
    monkeypatch.setenv("HOME", str(tmp_path))
    newest = cache / "snapshots/newer"
    assert resolved("~/.cache/huggingface/hub/models--org--name") == resolved(newest) == newest
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("older")
    assert resolved(cache) == cache / "snapshots/older"
    assert identify(cache).kind == COMPONENT and not is_whole(cache)
    whole = load_pytorch(bundled_model(), sharding="mapped")
    assert merge_parts(whole, cache).unet is not whole.unet
