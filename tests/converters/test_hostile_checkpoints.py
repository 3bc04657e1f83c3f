"""Damaged, unsafe and foreign checkpoints: one clear sentence, nothing executed, nothing left."""

import dataclasses
import errno
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from conceptax.converters import (
    CheckpointError,
    OutputError,
    atomic_folder,
    load_pytorch,
    save_pytorch,
)
from conceptax.converters.files.safetensors_file import open_safetensors
from conceptax.flax_models.configs import ModelConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class PairConfig(ModelConfig):
    width: int = 2

    def __post_init__(self):
        self.require_positive("width")


class Pair(nnx.Module):
    config_class = PairConfig
    pytorch_class = "Pair"
    pytorch_library = "diffusers"

    def __init__(self, config, *, dtype, param_dtype, rngs):
        self.config = config
        self.first = nnx.Linear(config.width, 3, param_dtype=param_dtype, rngs=rngs)
        self.second = nnx.Linear(3, config.width, param_dtype=param_dtype, rngs=rngs)


def tensors():
    return {
        "first.bias": np.zeros(3, np.float32),
        "first.weight": np.ones((3, 2), np.float32),
        "second.bias": np.zeros(2, np.float32),
        "second.weight": np.ones((2, 3), np.float32),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "Pair", "width": 2}')
    safetensors.numpy.save_file(tensors(), folder / WEIGHTS)
    return folder


def load(folder):
    return load_pytorch(folder, architecture=Pair)


def fails(folder, *fragments):
    """Loading fails with one message that has all fragments, names the place and stays readable."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message, message
    assert str(folder) in message
    assert len(message) < 1200
    assert "\n" not in message
    return message


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_healthy_folder_loads(folder):
    assert load(folder).first.kernel.shape == (2, 3)


# The folder.


def test_missing_folder(tmp_path):
    fails(tmp_path / "nowhere", "does not exist", "Pass a folder")


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path, "is not a checkpoint", "config.json", "found notes.txt")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    fails(folder, "holds no weights", f"expected {WEIGHTS}", "found config.json")


def test_unknown_architecture(folder):
    with pytest.raises(CheckpointError, match="unknown architecture 'Pair'; known are Autoenc"):
        load_pytorch(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no class name; known are"):
        load_pytorch(folder)
    with pytest.raises(CheckpointError, match=r"unknown architecture 'os\.system'"):
        load_pytorch(folder, architecture="os.system")


@pytest.mark.parametrize("name", [["Pair"], {"a": 1}, 7])
def test_malformed_architecture(folder, name):
    (folder / "config.json").write_text(json.dumps({"_class_name": name, "architectures": name}))
    with pytest.raises(CheckpointError, match="known are"):
        load_pytorch(folder)


def test_unknown_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "ChromaPipeline"}')
    with pytest.raises(CheckpointError, match="'ChromaPipeline' pipeline; known are"):
        load_pytorch(tmp_path)


def test_pipeline_without_its_parts(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "../evil"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="unet does not exist"):
        load_pytorch(tmp_path)
    (tmp_path / "unet").mkdir()
    with pytest.raises(CheckpointError, match=r"unet is not a checkpoint.*found nothing"):
        load_pytorch(tmp_path)
    (tmp_path / "unet/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"unknown architecture '\.\./evil'"):
        load_pytorch(tmp_path)
    for part in ("tokenizer", "scheduler"):
        with pytest.raises(CheckpointError, match=part):
            load_pytorch(tmp_path, components=[part])


def test_broken_tokenizer(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{]")
    (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a CLIP tokenizer"):
        load_pytorch(tmp_path, components=["tokenizer"])


# The config.


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "is in UTF-16"),
        (b"[1, 2]", "must be a JSON object, received list"),
        pytest.param(b"[" * 100_000, "not valid JSON", id="nested"),
        (b'{"width": 2, "width": 3}', "names 'width' more than once"),
        (b'{"width": -1}', "width must be positive"),
        (b'{"width": "two"}', "width must be positive"),
        (b'{"width": 2, "heads": 8}', "heads=8 (unknown)"),
    ],
)
def test_bad_config(folder, text, fragment):
    (folder / "config.json").write_bytes(text)
    fails(folder, fragment, "config.json")


def test_oversized_config(folder):
    with open(folder / "config.json", "ab") as file:
        file.truncate((64 << 20) + 1)
    fails(folder, "larger than 64 MiB")


# The tensors: everything that is wrong at once, sorted, at a readable length.


def test_all_mismatches_in_one_error(folder):
    bad = tensors()
    bad["first.weight"] = np.ones((2, 3), np.float32)
    bad["second.bias"] = np.zeros(2, np.int32)
    del bad["second.weight"]
    bad["third.weight"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(bad, folder / WEIGHTS)
    message = fails(
        folder,
        "does not fit Pair",
        "1 missing: second.weight",
        "1 unexpected: third.weight",
        "1 of the wrong shape: first.weight [2, 3] instead of [3, 2]",
        "1 of the wrong type (accepted: F32, F16, BF16): second.bias (I32)",
        "Check that config.json and the weights belong together",
    )
    assert message.count("second.weight") == 1


def test_long_lists_are_cut_and_sorted(folder):
    extra = {f"x{i:03}": np.zeros(1, np.float32) for i in range(500)}
    safetensors.numpy.save_file({**tensors(), **extra}, folder / WEIGHTS)
    fails(folder, "500 unexpected: x000, x001, x002", "x007, … and 492 more")


def test_the_same_parameter_twice(folder, monkeypatch):
    monkeypatch.setattr(Pair, "pytorch_prefix", "pair.", raising=False)
    both = {**tensors(), "pair.first.bias": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(both, folder / WEIGHTS)
    fails(folder, "1 stored twice: first.bias and pair.first.bias")


def test_unsupported_float_types(folder):
    specs = {"first.bias": ("F8_E4M3", [3], 3), "first.weight": ("F4", [3, 2], 3)}
    header, offset = {}, 0
    for key, value in tensors().items():
        dtype, shape, size = specs.get(key, ("F32", list(value.shape), value.nbytes))
        header[key] = entry(dtype, shape, (offset, offset + size))
        offset += size
    write_raw(folder / WEIGHTS, header, bytes(offset))
    fails(folder, "2 of the wrong type", "first.bias (F8_E4M3), first.weight (F4)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite(folder, value, dtype):
    bad = {key: array.astype(dtype) for key, array in tensors().items()}
    bad["second.weight"][1, 2] = value
    bad["first.bias"][0] = value
    safetensors.numpy.save_file(bad, folder / WEIGHTS)
    fails(folder, "2 tensors hold NaN or infinite values: first.bias, second.weight")


def test_largest_finite_values_are_fine(folder):
    good = tensors()
    good["first.bias"][:] = [np.finfo(np.float32).max, np.finfo(np.float32).min, 1e-45]
    safetensors.numpy.save_file(good, folder / WEIGHTS)
    np.testing.assert_array_equal(np.asarray(load(folder).first.bias[...]), good["first.bias"])


# The safetensors file.


def test_truncated_at_every_length(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        fails(folder, "truncated", "Download or copy it again")


def test_trailing_bytes(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"payload")
    fails(folder, "7 bytes that belong to no tensor")


def test_corrupted_header_never_escapes_as_another_error(folder):
    whole = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, header, size=rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            open_safetensors(folder / WEIGHTS)
        except CheckpointError as error:
            assert len(str(error)) < 1200


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"not a model at all, but a text file", "is a text, no model"),
        (b"PK\x03\x04" + bytes(100), "is not a safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "is not a safetensors file"),
        (struct.pack("<Q", 50_000_000) + b"{}", "truncated"),
        (struct.pack("<Q", 3) + b"{]}", "not valid JSON"),
        (b"<!DOCTYPE html><html>404 Not Found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
    ],
)
def test_not_safetensors(folder, content, fragment):
    (folder / WEIGHTS).write_bytes(content)
    fails(folder, fragment)


@pytest.mark.parametrize(
    ("header", "fragment"),
    [
        (b'{"a": {}, "a": {}}', "names 'a' more than once"),
        ({"a": []}, "is not an object"),
        ({"a": {}}, "needs a dtype, a shape and two data_offsets"),
        ({"a": entry(shape=(-2,))}, "needs a dtype"),
        ({"a": entry(shape=(True, 2))}, "needs a dtype"),
        ({"a": entry(shape=(2.0,))}, "needs a dtype"),
        ({"a": entry(dtype=3)}, "needs a dtype"),
        ({"a": entry(offsets=(0, 8, 8))}, "needs a dtype"),
        ({"a": entry(offsets=(-8, 0))}, "needs a dtype"),
        ({"a": entry(offsets=(0, 2**70), shape=(2**68,))}, "truncated"),
        ({"a": entry(offsets=(8, 0))}, "gives -8 bytes"),
        ({"a": entry(offsets=(0, 4))}, "gives 4 bytes to a F32 tensor of shape [2]"),
        ({"a": entry(shape=(2**40, 2**40))}, "gives 8 bytes"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "'b' overlaps the one before it"),
        ({"a": entry(), "b": entry()}, "overlaps the one before it"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, "'b' leaves a gap before it"),
        ({"a": entry()}, "16 bytes that belong to no tensor"),
        ({}, "24 bytes that belong to no tensor"),
    ],
)
def test_inconsistent_header(folder, header, fragment):
    write_raw(folder / WEIGHTS, header, bytes(24))
    fails(folder, fragment, WEIGHTS)


def test_special_files_are_not_opened(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)  # reading it would wait for ever
    fails(folder, "holds no weights")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    fails(folder, "is not a regular file")


# The index.


def write_index(folder, weight_map, shards=()):
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / (WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": weight_map}))
    for name, content in dict(shards).items():
        safetensors.numpy.save_file(content, folder / name)


@pytest.mark.parametrize(
    "name",
    [
        "../stolen.safetensors",
        "/etc/passwd",
        "a/../../stolen.safetensors",
        "..",
        ".",
        "",
        "..\\stolen.safetensors",
        "sub/shard.safetensors",
        "a\0.safetensors",
    ],
)
def test_index_points_outside(folder, name):
    safetensors.numpy.save_file(tensors(), folder.parent / "stolen.safetensors")
    write_index(folder, dict.fromkeys(tensors(), name))
    fails(folder, "points outside its folder", "do not trust this checkpoint")


@pytest.mark.parametrize(
    ("weight_map", "fragment"),
    [
        (None, "has no weight_map"),
        ({"a": 3}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": "model.exe"}, "neither .safetensors nor .bin"),
        ({"a": "config.json"}, "neither .safetensors nor .bin"),
        ({"a": "gone.safetensors"}, "gone.safetensors does not exist"),
    ],
)
def test_bad_index(folder, weight_map, fragment):
    write_index(folder, weight_map)
    fails(folder, fragment)


def test_index_and_shards_disagree(folder):
    write_index(folder, dict.fromkeys(tensors(), "a.safetensors"), {"a.safetensors": {}})
    fails(folder, "disagree about 4 tensors: first.bias, first.weight")


def test_symlinks_to_a_blob_store_load_and_dangling_ones_are_named(folder):
    blob = folder.parent / "blob"
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to("../blob")
    load(folder)
    write_index(folder, dict.fromkeys(tensors(), "a.safetensors"))
    (folder / "a.safetensors").symlink_to("../blob")
    load(folder)
    blob.unlink()
    fails(folder, "a.safetensors does not exist (a symlink to nothing)")


# Pickles.


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def test_pickles_are_never_executed(folder, torch, monkeypatch):
    (folder / WEIGHTS).unlink()
    target = folder / "exploded"
    monkeypatch.setenv("BOMB", str(target))
    torch.save({"first.bias": Bomb()}, folder / "diffusion_pytorch_model.bin")
    fails(folder, "is not a PyTorch file of plain tensors", "Use the checkpoint's .safetensors")
    assert not target.exists()


def test_pickles_of_something_else(folder, torch):
    (folder / WEIGHTS).unlink()
    file = folder / "diffusion_pytorch_model.bin"
    torch.save([1, 2], file)
    fails(folder, "must hold a dict of tensors, received list")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, file)
    fails(folder, "'state_dict' is a dict, expected a dense tensor")
    torch.save({k: torch.from_numpy(v).long() for k, v in tensors().items()}, file)
    fails(folder, "4 of the wrong type", "first.bias (I64)")
    whole = file.read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b"\x80\x04." + bytes(50)):
        file.write_bytes(damaged)
        fails(folder, "is not a PyTorch file of plain tensors")
    file.write_bytes(b"")
    fails(folder, "is empty, truncated by an interrupted download")


def test_pickles_from_before_torch_1_6(folder, torch, monkeypatch):
    """They are no archives: whole they are read, else refused, and never executed."""
    (folder / WEIGHTS).unlink()
    file = folder / "diffusion_pytorch_model.bin"
    state = {key: torch.from_numpy(value) for key, value in tensors().items()}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    assert load(folder) is not None
    size = max(t.numel() for t in state.values())
    claimed = b"\x8a\x06" + (1 << 44).to_bytes(6, "little")
    lied = whole.replace(b"K" + bytes([size]) + b"Nt", claimed + b"Nt")
    assert lied != whole
    for damaged in (whole[:-1], whole[:300], whole[:20], lied):
        file.write_bytes(damaged)
        fails(folder, "is not a PyTorch file of plain tensors")
    target = folder / "exploded"
    monkeypatch.setenv("BOMB", str(target))
    torch.save({"first.bias": Bomb()}, file, _use_new_zipfile_serialization=False)
    fails(folder, "is not a PyTorch file of plain tensors", "which could run a program")
    torch.save(state | {"best": np.float64(3)}, file)
    fails(folder, "it names numpy", "which could run a program and is not loaded")
    assert not target.exists()


def test_pickle_without_torch(folder, monkeypatch):
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(folder, "needs torch", "conceptax[torch]")


# The output: complete or absent.


@pytest.fixture
def model(folder):
    return load(folder)


def disk_full(monkeypatch, after):
    """Every file refuses once `after` bytes have been written, as a full disk does."""
    import builtins

    opened, left = builtins.open, [after]

    def limited(file, mode="r", *args, **kwargs):
        handle = opened(file, mode, *args, **kwargs)
        if "w" in mode:
            write = handle.write

            def refuse(data):
                left[0] -= len(data)
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
                return write(data)

            class Limited:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    handle.close()

                write = staticmethod(refuse)

            return Limited()
        return handle

    monkeypatch.setattr("conceptax.converters.files.safetensors_file.open", limited, raising=False)


@pytest.mark.parametrize("short", [1, 20, 10_000])
def test_disk_full_leaves_nothing(model, tmp_path, monkeypatch, short):
    size = (save_pytorch(model, tmp_path / "whole") / WEIGHTS).stat().st_size
    shutil.rmtree(tmp_path / "whole")
    disk_full(monkeypatch, size - short)
    with pytest.raises(OutputError, match=r"No space left on device\. Nothing was left behind"):
        save_pytorch(model, tmp_path / "new/deeper/out")
    assert os.listdir(tmp_path) == ["model"]


def test_disk_full_keeps_the_earlier_result(model, tmp_path, monkeypatch):
    before = (save_pytorch(model, tmp_path / "saved") / WEIGHTS).read_bytes()
    disk_full(monkeypatch, 100)
    with pytest.raises(OutputError, match="No space left"):
        save_pytorch(model, tmp_path / "saved", force=True)
    assert (tmp_path / "saved" / WEIGHTS).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["model", "saved"]


def test_failing_swap_restores_the_earlier_result(model, tmp_path, monkeypatch):
    save_pytorch(model, tmp_path / "saved")
    rename = Path.rename

    def fail_once(self, target):
        if self.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OutputError, match="Input/output error"):
        save_pytorch(model, tmp_path / "saved", force=True)
    assert sorted(os.listdir(tmp_path)) == ["model", "saved"]
    assert sorted(os.listdir(tmp_path / "saved")) == ["conceptax.json", "config.json", WEIGHTS]


def test_unwritable_output(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file is not a folder, so .* cannot be made in it"):
        save_pytorch(model, tmp_path / "file/out")
    with pytest.raises(OutputError, match="could not be written"):
        save_pytorch(model, "/proc/conceptax/out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write anywhere
        with pytest.raises(OutputError, match="could not be written: Permission denied"):
            save_pytorch(model, locked / "out")
    assert sorted(os.listdir(tmp_path)) == ["file", "locked", "model"]
    assert os.listdir(locked) == []


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a/out") as work:
        (work / "half").write_text("written")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_diverged_parameters_are_not_written(model, tmp_path):
    model.first.kernel[...] = model.first.kernel[...] * np.nan
    with pytest.raises(OutputError, match=r"first.weight holds NaN .* nothing was written"):
        save_pytorch(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]
