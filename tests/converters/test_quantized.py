"""Quantized weights: 8 bits with scales, and GGUF; read as what they stand for, or refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf_writer import gguf_bytes, setting, text

from conceptax import bundled_model
from conceptax.converters import CheckpointError, inspect_checkpoint, load_pytorch
from conceptax.converters.files import gguf_file
from conceptax.converters.files.gguf_file import open_gguf
from conceptax.converters.files.quantized import dequantized
from conceptax.converters.files.safetensors_file import FLOAT_TYPES, StoredTensor
from conceptax.converters.files.weights import open_weights
from conceptax.converters.tensors import tensor_specs, variables

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64"])
def test_plain_types_of_gguf(tmp_path, kind):
    number = next(n for n, each in gguf_file._KINDS.items() if each.name == kind)
    dtype = FLOAT_TYPES[kind]
    values = RNG.standard_normal((3, 5)).astype(dtype)
    odd = values.reshape(15)[:7]
    shape = setting("comfy.gguf.orig_shape.b", 9, struct.pack("<IQ2i", 5, 2, 7, 1))
    settings = [
        setting("general.architecture", 8, text("flux")),
        setting("general.alignment", 4, struct.pack("<I", 64)),
        setting("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
        setting("tokenizer.ggml.scores", 9, struct.pack("<IQ9f", 6, 9, *range(9))),
        setting("yes", 7, b"\x01"),
        shape,
    ]
    tensors = {"a": (number, (3, 5), values.tobytes()), "b": (number, (7,), odd.tobytes())}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(tensors, settings, alignment=64))
    found = open_weights(tmp_path / "a.gguf")
    assert {name: (t.dtype, t.shape, t.kept) for name, t in found.items()} == {
        "a": (kind, (3, 5), ""),
        "b": (kind, (7, 1), ""),
    }
    np.testing.assert_array_equal(found["a"].read(), values)
    np.testing.assert_array_equal(found["b"].read()[:, 0], odd)


def q8_0(blocks):
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return scale * blocks[:, 2:].view(np.int8)


def q4_0(blocks):
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return scale * (np.concatenate([low, high], 1).astype(np.float32) - 8)


def q4_k(blocks):
    """Eight groups of 32 with scales and minima of six bits, as ggml's C reads them."""
    out = []
    for block in blocks:
        scale, least = block[:4].copy().view(np.float16).astype(np.float32)
        six, quants = block[4:16].astype(int), block[16:]
        for group in range(8):
            if group < 4:
                factor, below = six[group] & 63, six[group + 4] & 63
            else:
                factor = (six[group + 4] & 15) | (six[group - 4] >> 6 << 4)
                below = (six[group + 4] >> 4) | (six[group] >> 6 << 4)
            part = quants[32 * (group // 2) :][:32] >> (4 * (group % 2)) & 15
            out.append(scale * factor * part.astype(np.float32) - least * below)
    return np.stack(out)


QUANTIZED = {"Q8_0": (8, q8_0), "Q4_0": (2, q4_0), "Q4_K": (12, q4_k)}


def random_blocks(name, count):
    """Any bits, but scales that are small."""
    _, block, size = gguf_file._KINDS[QUANTIZED[name][0]]
    blocks = RNG.integers(0, 256, (count, size), np.uint8)
    scales = 4 if name == "Q4_K" else 2
    halves = RNG.uniform(0.01, 0.1, (count, scales // 2)).astype(np.float16)
    blocks[:, :scales] = halves.view(np.uint8)
    return blocks, block


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_types_of_gguf(tmp_path, name):
    """Against the definition of each type, whichever way the package computes it."""
    number, formula = QUANTIZED[name]
    blocks, block = random_blocks(name, 6)
    tensors = {"w": (number, (3, 2 * block), blocks.tobytes())}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(tensors))
    tensor = open_gguf(tmp_path / "a.gguf")["w"]
    assert (tensor.dtype, tensor.kept, tensor.shape) == ("F32", name, (3, 2 * block))
    assert tensor.bytes_each * 6 * block == blocks.size
    pytest.importorskip("gguf")
    expected = formula(blocks).reshape(3, 2 * block)
    np.testing.assert_allclose(tensor.read(), expected, rtol=1e-6, atol=1e-7)
    part = tensor.rows(slice(1, 3))
    assert (part.shape, part.kept) == ((2, 2 * block), name)
    np.testing.assert_array_equal(part.read(), tensor.read()[1:3])


def test_files_that_the_package_writes(tmp_path):
    gguf = pytest.importorskip("gguf")
    values = RNG.standard_normal((4, 512)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    expected = {}
    for kind in ("Q8_0", "Q4_0", "Q5_1", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        packed = gguf.quants.quantize(values, number)
        writer.add_tensor(kind, packed, raw_dtype=number)
        expected[kind] = gguf.quants.dequantize(packed, number)
    writer.add_tensor("F16", values.astype(np.float16))
    expected["F16"] = values.astype(np.float16)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    found = open_weights(tmp_path / "a.gguf")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.read(), expected[name], err_msg=name)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    blocks, block = random_blocks("Q8_0", 2)
    (tmp_path / "a.gguf").write_bytes(gguf_bytes({"w": (8, (2, block), blocks.tobytes())}))
    with pytest.raises(CheckpointError, match=r"quantized as Q8_0.*Install conceptax\[gguf\]"):
        open_gguf(tmp_path / "a.gguf")["w"].read()


def test_unknown_types_of_gguf_are_named(tmp_path):
    for number, named in ((16, "IQ2_XXS"), (39, "MXFP4"), (77, "type 77")):
        (tmp_path / "a.gguf").write_bytes(gguf_bytes({"w": (number, (256,), bytes(300))}))
        for read in (open_weights, inspect_checkpoint, load_pytorch):
            with pytest.raises(CheckpointError, match=f"'w' is quantized as {named}, which is not"):
                read(tmp_path / "a.gguf")


def test_other_models_in_gguf_are_none_here(tmp_path):
    tensors = {"blk.0.attn_q.weight": (0, (2, 2), bytes(16))}
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(tensors, [setting("a", 8, text("llama"))]))
    assert inspect_checkpoint(tmp_path / "a.gguf").kind == "weight file"
    with pytest.raises(CheckpointError, match="is no model that can be read alone"):
        load_pytorch(tmp_path / "a.gguf")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.gguf").read_bytes())  # misnamed
    assert open_weights(tmp_path / "a.safetensors").keys() == tensors.keys()


# 8 bits with scales.


def scaled(names=("scale_weight", "scale_input"), shape=()):
    factor = np.array(RNG.uniform(0.1, 2, shape), np.float32)
    content = {"a.weight": RNG.standard_normal((4, 3)).astype(E4M3), f"a.{names[0]}": factor}
    return content | {f"a.{name}": np.array(3, np.float32) for name in ("bias", *names[1:])}


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale",)])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)])
def test_scales_are_multiplied(tmp_path, names, shape):
    content = scaled(names, shape)
    factor = content[f"a.{names[0]}"]
    if names[0] == "scale_weight":
        content["scaled_fp8"] = np.zeros(2, E4M3)
    else:
        form = json.dumps({"format": "float8_e4m3fn"}).encode()
        content["a.comfy_quant"] = np.frombuffer(form, np.uint8)
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    found = open_weights(tmp_path / "a.safetensors")
    assert found.keys() == {"a.weight", "a.bias"}
    weight = found["a.weight"]
    assert (weight.dtype, weight.kept, weight.bytes_each) == ("F32", "F8_E4M3 with scales", 1)
    product = content["a.weight"].astype(np.float32) * factor.reshape(-1, 1)
    np.testing.assert_array_equal(weight.read(), product)
    np.testing.assert_array_equal(weight.rows(slice(1, 3)).read(), product[1:3])


def test_scales_may_be_in_another_shard(tmp_path):
    content = scaled()
    places = {key: f"{'scale' in key}.safetensors" for key in content}
    for name in set(places.values()):
        own = {key: value for key, value in content.items() if places[key] == name}
        safetensors.numpy.save_file(own, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = open_weights(index)
    assert found.keys() == {"a.weight", "a.bias"}
    product = content["a.weight"].astype(np.float32) * content["a.scale_weight"]
    np.testing.assert_array_equal(found["a.weight"].read(), product)


def test_what_is_no_such_file_stays_as_it_is(tmp_path):
    stored = {"input_scale": StoredTensor("F32", (3,), lambda: np.ones(3, np.float32))}
    stored["a.scale_weight"] = stored["input_scale"]
    assert dequantized(stored, tmp_path) == stored
    stored["a.weight"] = StoredTensor("F8_E4M3", (2, 2), lambda: np.zeros((2, 2), E4M3))
    with pytest.raises(CheckpointError, match="expected one floating-point number, or one a row"):
        dequantized(stored, tmp_path)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"scaled_fp8": 0, "b.scale_weight": 1.0}, r"no b\.weight that it scales"),
        ({"a.comfy_quant": b'{"format": "nvfp4"}'}, "not read here: 'nvfp4'"),
        ({"a.comfy_quant": b"[1]"}, "must be a JSON object"),
        ({"a.comfy_quant": b"{" * 9000}, "is not valid JSON"),
        ({"a.weight.quant_state.bitsandbytes__nf4": b"x"}, "bitsandbytes's 4 bits"),
        ({"b.SCB": 1.0}, "bitsandbytes's 8 bits"),
        ({"b.qweight": b"x"}, "GPTQ or AWQ"),
        ({"a.weight_scale_2": 1.0}, "two scales"),
    ],
)
def test_other_forms_are_named(tmp_path, extra, told):
    content = scaled()
    for key, value in extra.items():
        is_text = isinstance(value, bytes)
        content[key] = np.frombuffer(value, np.uint8) if is_text else np.full(1, value, np.float32)
    safetensors.numpy.save_file(content, tmp_path / "a.safetensors")
    for read in (open_weights, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=told) as caught:
            read(tmp_path / "a.safetensors")
        assert len(str(caught.value)) < 700


def test_a_component_is_loaded_and_told(tmp_path):
    """The bundled text encoder with its linear layers in 8 bits: float32, or as asked."""
    source = bundled_model() / "text_encoder"
    whole = safetensors.numpy.load_file(source / "model.safetensors")
    content, expected = {"scaled_fp8": np.zeros(0, E4M3)}, {}
    for key, value in whole.items():
        if value.ndim == 2 and "embedding" not in key:
            content[key] = (value * 2).astype(E4M3)
            content[key.replace(".weight", ".scale_weight")] = np.array(0.5, np.float32)
            expected[key] = content[key].astype(np.float32) / 2
        else:
            content[key], expected[key] = value, value.astype(np.float32)
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    part = inspect_checkpoint(tmp_path).parts[0]
    assert part.quantized == {"F8_E4M3 with scales"}
    assert set(part.dtypes) == {"F8_E4M3 with scales", "F16"}
    assert (part.problems, inspect_checkpoint(tmp_path).advice) == ({}, "")
    for dtype in (np.float32, ml_dtypes.bfloat16):
        model = load_pytorch(tmp_path, param_dtype=dtype)
        slots = variables(model)
        for spec in tensor_specs(model):
            value = slots[spec.path].get_value()
            assert value.dtype == dtype
            own = expected["text_model." + spec.key].astype(dtype)
            np.testing.assert_array_equal(spec.to_torch(np.asarray(value)), own, err_msg=spec.key)
