"""Hostile single files, LoRAs, Flax files and settings: refused in one sentence, at little cost."""

import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
import safetensors.numpy
from gguf_writer import entry, gguf_bytes, head, setting, text

from conceptax import bundled_model
from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    inspect_checkpoint,
    load_personalized,
    load_pytorch,
    merge_lora,
    save_lora,
)
from conceptax.converters.files.msgpack_file import open_flax
from conceptax.converters.files.weights import open_weights


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def fails(read, path, *fragments):
    """One message within a second or so, that has all fragments."""
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert time.process_time() - start < 5
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert len(message) < 1200


# Pickles.


@pytest.mark.parametrize("name", ["sd.ckpt", "pytorch_lora_weights.bin", "<new1>.bin", "x.pt"])
def test_pickles_are_never_executed(tmp_path, torch, monkeypatch, name):
    target = tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(target))
    torch.save({"state_dict": {"model.diffusion_model.x": Bomb()}}, tmp_path / name)
    for read in (
        load_pytorch,
        inspect_checkpoint,
        lambda path: merge_lora(None, path),
        lambda path: load_personalized(None, path),
    ):
        fails(read, tmp_path / name, "is not a PyTorch file of plain tensors")
    (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Bomb()}))
    fails(load_pytorch, tmp_path / name, "is not a PyTorch file of plain tensors")
    assert not target.exists()


def test_zip_bombs(tmp_path, torch):
    """An archive of a few kilobytes whose pickle would unpack to half a gigabyte."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as whole,
        zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            content = whole.read(entry)
            bomb.writestr(entry.filename, content + bytes(1 << 29) * entry.filename.endswith("pkl"))
    assert (tmp_path / "bomb.bin").stat().st_size < 1 << 20
    for read in (open_weights, inspect_checkpoint, lambda path: load_personalized(None, path)):
        fails(read, tmp_path / "bomb.bin", "is compressed", "Do not trust")


def test_archives_that_no_program_writes(tmp_path, torch):
    """Found by fuzzing: a disk number in the directory's end, which zipfile reports in its way."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin")
    whole = (tmp_path / "a.bin").read_bytes()
    at = whole.rindex(b"PK\x06\x07")  # the locator of the 64-bit end
    (tmp_path / "a.bin").write_bytes(whole[: at + 4] + b"\x07" + whole[at + 5 :])
    fails(open_weights, tmp_path / "a.bin", "span multiple disks")
    (tmp_path / "a.bin").write_bytes(whole[: at - 30])
    fails(open_weights, tmp_path / "a.bin", "is not a PyTorch file of plain tensors")


def test_tensors_larger_than_their_storage(tmp_path, torch):
    """Strides of zero make terabytes out of four bytes."""
    huge = torch.ones(1).expand(1 << 20, 1 << 20)
    torch.save({"<new1>": huge}, tmp_path / "<new1>.bin")
    fails(lambda path: load_personalized(None, path), tmp_path / "<new1>.bin", "in 4 bytes")
    fails(lambda path: open_weights(path)["<new1>"].read(), tmp_path / "<new1>.bin", "in 4 bytes")


# Flax's msgpack.


def msgpack_fails(tmp_path, content, *fragments):
    (tmp_path / "a.msgpack").write_bytes(content)
    fails(open_flax, tmp_path / "a.msgpack", *fragments)


def array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is empty"),
        (b"\x93\x01\x02\x03", "must hold a map of named arrays, received list"),
        (b"\x81\xa1a" * 200 + b"\xc0", "nested deeper than"),
        (b"\x91" * 100_000, "nested deeper than"),
        (b"\xdf\xff\xff\xff\xff\xa1a\xc0", "4294967295 entries are announced"),
        (b"\xdd\xff\xff\xff\xff", "4294967295 entries are announced"),
        (b"\x81\xa1a\xdd\x00\x04\x93\xe0" + b"\xc0" * 300_000, "more than 100000 values"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "truncated"),
        (b"\x81\xdb\x00\x02\x00\x00" + b"a" * 0x20000 + b"\xc0", "a text of 131072 bytes"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "the key 'a' for the second time"),
        (b"\x81\x01\xc0", "a key that is int"),
        (b"\x81\xa1\xff\xc0", "not UTF-8"),
        (b"\x81\xa1a\xc1", "an unknown type 0xc1"),
        (b"\x81\xa1a\xc0\x00", "1 bytes behind its end"),
        (b"\x81\xa1a\xc0", "a is NoneType, expected an array"),
        (msgpack.packb({"a": msgpack.ExtType(2, b"\x00")}), "the unknown code 2"),
        (msgpack.packb({"a": array([2**40], "float32", b"1234")}), "4 bytes for float32"),
        (msgpack.packb({"a": array([-1], "float32", b"")}), "not (shape, type, bytes)"),
        (msgpack.packb({"a": array([1] * 40, "float32", b"1234")}), "not (shape, type, bytes)"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\x90\x00")}), "not (shape, type, bytes)"),
        (
            msgpack.packb(
                {
                    "a": {
                        "__msgpack_chunked_array__": True,
                        "shape": {"0": 2**60},
                        "chunks": {"0": array([1], "float32", b"1234")},
                    }
                }
            ),
            "the chunks of a do not fit together",
        ),
        (
            msgpack.packb({"a.b": array([], "int8", b"1"), "a": {"b": array([], "int8", b"1")}}),
            "names a.b more than once",
        ),
    ],
)
def test_msgpack_bombs(tmp_path, content, fragment):
    msgpack_fails(tmp_path, content, fragment)


def test_msgpack_truncated_at_every_length(tmp_path):
    whole = msgpack.packb({"a": {"kernel": array([2, 2], "float32", bytes(16))}, "b": 1.5})
    for length in range(len(whole)):
        msgpack_fails(tmp_path, whole[:length], "a.msgpack")


# GGUF.

F32, Q8_0 = 0, 8
ONE = gguf_bytes({"a": (F32, (2, 2), bytes(16)), "b": (Q8_0, (1, 32), bytes(34))})


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (head(0, 0, version=1), "version 1"),
        (head(2**60, 0), f"{2**60} entries are announced"),
        (head(0, 2**60), f"{2**60} entries are announced"),
        (head(1, 0) + struct.pack("<Q", 2**60) + bytes(99), f"a name of {2**60} bytes"),
        (head(1, 0) + text(b"\xff" * 40), "a text that is not UTF-8"),
        (head(1, 0) + entry("a", [1] * 5, F32, 0), "5 dimensions of 'a'"),
        (head(1, 0) + entry("a", [2**40], F32, 0), "'a' of shape"),
        (head(1, 0) + entry("a", [2**63, 0], F32, 0), "'a' of shape"),
        (head(1, 0) + entry("a", [2**40, 2**40], F32, 0), "'a' of shape"),
        (head(1, 0) + entry("a", [33], Q8_0, 0) + bytes(64), "in Q8_0"),
        (head(1, 0) + entry("a", [4], F32, 2**60) + bytes(64), "truncated, 'a' ends at byte"),
        (head(1, 0) + entry("a", [4], F32, 3) + bytes(64), "lies where another tensor is"),
        (
            head(2, 0) + entry("a", [4], F32, 0) + entry("b", [4], F32, 0) + bytes(64),
            "lies where another tensor is",
        ),
        (
            head(2, 0) + entry("a", [4], F32, 0) + entry("a", [4], F32, 32) + bytes(96),
            "is named twice",
        ),
        (head(0, 1) + setting("a", 99, bytes(8)), "unknown type 99"),
        (head(0, 1) + setting("a", 9, struct.pack("<IQ", 8, 2**60)), "entries are announced"),
        (head(0, 1) + setting("a", 9, struct.pack("<IQ", 6, 2**60)), "truncated"),
        (head(0, 1) + setting("a", 9, struct.pack("<IQ", 9, 1) * 40), "too deep"),
        (head(0, 1) + setting("a", 8, struct.pack("<Q", 2**60)), "truncated"),
        (
            head(0, 1) + setting("general.alignment", 4, struct.pack("<I", 0)) + bytes(64),
            "an alignment of 0",
        ),
        (
            gguf_bytes(
                {"a": (F32, (4,), bytes(16))},
                [setting("comfy.gguf.orig_shape.a", 9, struct.pack("<IQ2i", 5, 2, 2, 3))],
            ),
            "'a' has shapes that differ",
        ),
    ],
)
def test_gguf_bombs(tmp_path, content, fragment):
    (tmp_path / "a.gguf").write_bytes(content)
    for read in (open_weights, inspect_checkpoint, load_pytorch):
        fails(read, tmp_path / "a.gguf", fragment)


def test_gguf_truncated_at_every_length(tmp_path):
    for length in range(4, len(ONE)):
        (tmp_path / "a.gguf").write_bytes(ONE[:length])
        fails(open_weights, tmp_path / "a.gguf", "a.gguf")
    (tmp_path / "a.gguf").write_bytes(ONE)
    assert open_weights(tmp_path / "a.gguf").keys() == {"a", "b"}


# Sizes that settings and names claim.


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10**9},
        {"block_out_channels": [32] * 10**5},
        {"transformer_layers_per_block": [1, 10**9]},
        {"layers_per_block": [1, 10**12]},
    ],
)
def test_absurdly_many_layers(tmp_path, change):
    config = json.loads((bundled_model() / "unet/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(bundled_model() / "unet" / name)
    fails(load_pytorch, tmp_path, "is more layers than any model has")
    assert "more layers" in str(inspect_checkpoint(tmp_path).parts[0].problems)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.999999999999.0.in_layers.2.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.999999999999.norm1.weight",
        "cond_stage_model.model.transformer.resblocks.999999999999.ln_1.weight",
        "model.diffusion_model.double_blocks.0.img_mod.lin.weight",
        "model.diffusion_model.joint_blocks.0.x_block.adaLN_modulation.1.weight",
        "double_stream_modulation_img.lin.weight",
    ],
)
def test_absurd_numbers_in_names(tmp_path, key):
    safetensors.numpy.save_file({key: np.ones((1, 1), np.float32)}, tmp_path / "a.safetensors")
    fails(load_pytorch, tmp_path / "a.safetensors", "cannot be told")
    fails(inspect_checkpoint, tmp_path / "a.safetensors", "cannot be told")


def test_headers_of_other_formats(tmp_path):
    """What is checked in every safetensors file is checked before a single file is recognized."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps(
        {"model.diffusion_model.a": entry, "model.diffusion_model.b": entry}
    ).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    fails(load_pytorch, path, "overlaps the one before it")
    path.write_bytes(struct.pack("<Q", 2**40) + header + bytes(8))
    fails(inspect_checkpoint, path, "is not a safetensors file")
    twice = header.replace(b"model.b", b"model.a")
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + bytes(8))
    fails(load_pytorch, path, "more than once")


# Nothing is written outside the destination, and nothing through links.


def test_links_at_the_destination_are_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "work").mkdir()
    link = tmp_path / "work/change.safetensors"
    link.symlink_to(outside)
    original = bundled_model() / "text_encoder"
    content = safetensors.numpy.load_file(original / "model.safetensors")
    scaled = {k: v * np.float16(1 + k.endswith("fc1.weight")) for k, v in content.items()}
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited/config.json").write_bytes((original / "config.json").read_bytes())
    safetensors.numpy.save_file(scaled, tmp_path / "edited/model.safetensors")
    command = ["convert", str(tmp_path / "edited"), str(link), "--original", str(original)]
    command += ["--form", "lora", "--rank", "1"]
    assert main(command) == 1
    assert main([*command, "--force"]) == 0
    assert not link.is_symlink()
    link.unlink()
    link.symlink_to(outside)
    save_lora(load_pytorch(tmp_path / "edited"), load_pytorch(original), link, rank=1, force=True)
    assert not link.is_symlink()
    assert outside.read_text() == "precious"
    assert os.listdir(tmp_path / "work") == ["change.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["edited", "outside", "work"]


def test_links_in_a_checkpoint_lead_to_weights_only(tmp_path):
    """The Hub's cache links weights to a blob store; whatever else a link reaches is no model."""
    (tmp_path / "model.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError) as caught:
        load_pytorch(tmp_path)
    assert "root:" not in str(caught.value)
    for name in ("pytorch_lora_weights.safetensors", "a.msgpack"):
        (tmp_path / name).symlink_to("/etc/passwd")
        with pytest.raises(CheckpointError) as caught:
            open_weights(tmp_path / name)
        assert "root:" not in str(caught.value)
