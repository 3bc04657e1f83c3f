"""Readers of checkpoints, to throw damaged and hostile bytes at: an error for people or a result.

`tests/converters/test_fuzz.py` runs them briefly, `benchmarks/fuzz_checkpoints.py` as long as told.
"""

import functools
import io
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from filled_models import filled
from flax import serialization
from gguf_writer import entry, gguf_bytes, head, setting, text
from hypothesis import strategies as st

from conceptax import bundled_model
from conceptax.converters import CheckpointError, inspect_checkpoint, load_pytorch, merge_lora
from conceptax.converters.files.weights import open_weights
from conceptax.converters.formats.compvis import build_parts, load_single_file, open_single_file
from conceptax.converters.formats.compvis_parts import read_single_file
from conceptax.converters.formats.lora import load_lora
from conceptax.converters.formats.personalized import read_personalization
from conceptax.converters.formats.segmentation import load_open_clip
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)


class Target(NamedTuple):
    """A reader.

    Attributes:
      name: of the file it reads, in a folder of its own.
      contents: strategy of its bytes.
      read: what is done with the folder.
    """

    name: str
    contents: st.SearchStrategy[bytes]
    read: Callable[[Path], Any]


def read_all(path: Path) -> None:
    """Every tensor of a weight file."""
    for tensor in open_weights(path).values():
        if tensor.dtype in ("F64", "F32", "F16", "BF16"):
            tensor.read()


def allowed(target: Target, folder: Path, contents: bytes) -> str | None:
    """Run a target on bytes; the message of its error, or None where there was none."""
    file = folder / target.name
    file.unlink(missing_ok=True)  # the last one may still be mapped
    file.write_bytes(contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(folder)
        except CheckpointError as error:
            return str(error)
    return None


# ---- bytes ----


def damaged(*wholes: bytes) -> st.SearchStrategy[bytes]:
    """A healthy file with bytes changed, cut out, repeated, or lost from its end."""

    def apply(whole: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
        content = bytearray(whole)
        for kind, where, piece in edits:
            at = int(where * len(content))
            if kind == "set":
                content[at : at + len(piece)] = piece
            elif kind == "insert":
                content[at:at] = piece
            elif kind == "delete":
                del content[at : at + len(piece)]
            else:
                del content[at:]
        return bytes(content)

    edit = st.tuples(
        st.sampled_from(["set", "set", "set", "insert", "delete", "cut"]),
        st.floats(0, 0.999) | st.floats(0, 0.05),  # headers are at the front
        st.binary(min_size=1, max_size=9),
    )
    return st.builds(apply, st.sampled_from(wholes), st.lists(edit, min_size=1, max_size=4))


_COUNTS = st.integers(-3, 12) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1, 2**70])
_JSON = st.recursive(
    st.none() | st.booleans() | _COUNTS | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


def safetensors_bytes(header: Any, size: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "X"]) | _JSON,
        "shape": st.lists(_COUNTS, max_size=4) | _JSON,
        "data_offsets": st.lists(_COUNTS, min_size=2, max_size=2) | _JSON,
    }
)


def headers(names: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return st.builds(
        safetensors_bytes,
        st.dictionaries(names, _ENTRY | _JSON, max_size=5) | _JSON,
        st.integers(0, 40),
    )


def consistent(names: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Files without a fault of their own, with any names and shapes."""

    def build(shapes: dict[str, list[int]]) -> bytes:
        header, end = {}, 0
        for name, shape in shapes.items():
            stop = end + 4 * int(np.prod(shape, dtype=int))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, stop]}
            end = stop
        return safetensors_bytes(header, end)

    shapes = st.lists(st.integers(0, 5), max_size=4)
    return st.builds(build, st.dictionaries(names, shapes, max_size=12))


def words(text: str) -> st.SearchStrategy[str]:
    """Names put together from the parts of real ones."""
    parts = sorted(set(text.split()))
    return st.lists(st.sampled_from(parts), min_size=1, max_size=8).map("".join)


_COMPVIS = words(
    """model.diffusion_model. first_stage_model. cond_stage_model.transformer.text_model.
    cond_stage_model.model. conditioner.embedders.1.model. model_ema. input_blocks. output_blocks.
    middle_block. 0. 1. 2. 3. 99999999999. in_layers. op. transformer_blocks. norm1. attn2. to_k.
    proj_in. weight bias out. encoder. decoder. down. block. conv1. conv_in. resblocks.
    transformer. ln_1. attn. in_proj_weight embeddings. token_embedding. position_embedding. layers.
    mlp. fc1. layer_norm1."""
)
_COMPVIS_KEYS = [
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.out.2.weight",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "first_stage_model.encoder.down.0.block.0.conv1.weight",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.decoder.conv_out.weight",
    "first_stage_model.decoder.conv_in.weight",
    "cond_stage_model.model.token_embedding.weight",
    "cond_stage_model.model.positional_embedding",
    "cond_stage_model.model.transformer.resblocks.0.ln_1.weight",
    "cond_stage_model.model.transformer.resblocks.1.ln_1.weight",
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight",
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
]
_LORA = words(
    """unet. text_encoder. lora_unet_ lora_te_ down_blocks.0.resnets.0.conv1
    down_blocks_0_resnets_0_conv1 mid_block.attentions.0.proj_in to_q_lora .processor. . _
    text_model. .lora_A.weight .lora_B.weight .lora_down.weight .lora_up.weight .alpha
    .lora.down.weight"""
)
_OPEN_CLIP = words(
    """visual.trunk.stages. 0. 1. 3. 99999999 blocks. norm.weight text_projection transformer.
    resblocks. token_embedding.weight positional_embedding visual.head.proj.weight"""
)


_TRANSFORMER = words(
    """model.diffusion_model. double_blocks. single_blocks. joint_blocks. 0. 1. 99999999999.
    img_attn. txt_attn. qkv. norm.query_norm.scale img_mod.lin. x_block. context_block. attn. ln_q.
    adaLN_modulation.1. linear1. blocks. ffn.0. weight bias scale final_layer.linear. img_in.
    txt_in. pos_embed text_encoders.t5xxl.transformer. shared. encoder.block. layer. SelfAttention.
    q. wo."""
)
_TRANSFORMER_KEYS = (
    [
        f"model.diffusion_model.{key}"
        for key in (
            "double_blocks.0.img_mod.lin.weight",
            "double_blocks.0.img_attn.qkv.weight",
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "double_blocks.0.img_mlp.2.weight",
            "double_stream_modulation_img.lin.weight",
            "img_in.weight",
            "txt_in.weight",
            "vector_in.in_layer.weight",
            "time_in.in_layer.weight",
            "final_layer.linear.weight",
            "final_layer.adaLN_modulation.1.weight",
            "joint_blocks.0.x_block.adaLN_modulation.1.weight",
            "joint_blocks.0.x_block.attn.qkv.weight",
            "x_embedder.proj.weight",
            "pos_embed",
            "context_embedder.weight",
            "y_embedder.mlp.0.weight",
            "head.modulation",
            "head.head.weight",
            "patch_embedding.weight",
            "text_embedding.0.weight",
            "time_embedding.0.weight",
            "blocks.0.ffn.0.weight",
        )
    ]
    + [
        f"text_encoders.t5xxl.transformer.{key}"
        for key in (
            "shared.weight",
            "encoder.block.0.layer.0.layer_norm.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        )
    ]
    + [
        f"first_stage_model.{key}"
        for key in (
            "decoder.middle.0.residual.0.gamma",
            "encoder.conv1.weight",
            "encoder.downsamples.0.residual.2.weight",
            "encoder.downsamples.0.residual.6.weight",
            "encoder.downsamples.0.downsamples.0.residual.6.weight",
            "encoder.downsamples.1.resample.1.weight",
            "decoder.head.0.gamma",
            "decoder.head.2.weight",
            "conv2.weight",
        )
    ]
)
_SCALES = words(
    """a. b. weight scale_weight weight_scale scale_input comfy_quant scaled_fp8 weight_scale_2"""
)
_FLUX_LORA = words(
    """transformer. lora_unet_ lora_transformer_ diffusion_model. double_blocks.0. single_blocks.0.
    double_blocks_0_ processor. img_attn.qkv img_attn_qkv qkv_lora1 proj_lora final_layer
    adaLN_modulation.1 .lora_A.weight .lora_B.weight .lora_down.weight .lora_up.weight .alpha
    .down.weight .up.weight norm.query_norm.scale"""
)


def _gguf() -> st.SearchStrategy[bytes]:
    """Entries and settings with any sizes and kinds."""
    counts = st.integers(0, 40) | st.sampled_from([2**31, 2**63, 2**64 - 1])
    small = st.integers(0, 9) | st.sampled_from([2**32 - 1])
    names = st.text(max_size=4) | st.just("general.alignment")
    entries = st.builds(
        entry, names, st.lists(counts, max_size=5), small | counts.map(lambda n: n % 2**32), counts
    )
    settings = st.builds(
        setting, names, st.integers(0, 13), st.binary(max_size=24) | st.builds(text, names)
    )
    front = st.builds(head, small, small, st.integers(1, 4))
    pieces = st.lists(entries | settings | st.binary(max_size=40), max_size=4)
    return st.builds(lambda start, rest: start + b"".join(rest), front, pieces)


def packed(value: Any) -> bytes:
    return msgpack.packb(value)


_ARRAYS = st.builds(
    lambda shape, name, data: msgpack.ExtType(1, packed((shape, name, data))),
    st.lists(st.integers(0, 3), max_size=3)
    | st.lists(_COUNTS.filter(lambda n: n < 2**64), max_size=3),
    st.sampled_from(["float32", "bfloat16", "int8", "object"]) | st.text(max_size=5),
    st.binary(max_size=40),
)
_MSGPACK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | _ARRAYS
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=30)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["kernel", "value", "shape", "chunks", "__msgpack_chunked_array__", "0"]
            )
            | st.text(max_size=4)
            | st.integers(0, 3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
).map(packed)


# ---- targets ----


@functools.cache
def pipeline() -> Any:
    return load_pytorch(bundled_model(), components=["unet", "text_encoder"])


def _healthy_msgpack() -> bytes:
    kernel = np.ones((2, 3), np.float32)
    return serialization.msgpack_serialize(
        {"params": {"a_0": {"kernel": kernel, "bias": kernel[0]}}}
    )


def _healthy_pickle() -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({"<new1>": torch.ones(3), "b": torch.ones(2, 2).bfloat16()}, file)
    return file.getvalue()


def _component(folder: Path) -> None:
    weights = bundled_model() / "text_encoder/model.safetensors"
    if not (folder / "model.safetensors").exists():
        (folder / "model.safetensors").symlink_to(weights)
    inspect_checkpoint(folder)
    load_pytorch(folder)


def _settings() -> st.SearchStrategy[bytes]:
    """The bundled text encoder's config.json with some settings replaced."""
    whole = json.loads((bundled_model() / "text_encoder/config.json").read_text())
    changes = st.dictionaries(st.sampled_from(sorted(whole)), _JSON, min_size=1, max_size=3)
    return st.builds(lambda change: json.dumps({**whole, **change}).encode(), changes)


def _single(folder: Path) -> None:
    path = folder / "x.safetensors"
    inspect_checkpoint(path)
    load_single_file(path, components=["unet", "vae", "text_encoder"])


def _lora(folder: Path) -> None:
    load_lora(folder / "x.safetensors", pipeline())
    merge_lora(pipeline(), folder / "x.safetensors")


class Parts:
    """What a LoRA needs of a pipeline of FLUX."""

    def __init__(self) -> None:
        sizes = {"num_attention_heads": 1, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}
        config = FluxTransformer2DConfig(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=2,
            pooled_projection_dim=2,
            **sizes,
        )
        self.transformer = filled(FluxTransformer2DModel, config)


flux = functools.cache(Parts)


def _flux_lora(folder: Path) -> None:
    load_lora(folder / "x.safetensors", flux())


def _transformer(folder: Path) -> None:
    path = folder / "x.safetensors"
    inspect_checkpoint(path)
    file = read_single_file(open_single_file(path) or {}, str(path))
    build_parts(file, str(path), list(file.parts), dtype=np.float32, param_dtype=None)


def _weight_map(folder: Path) -> None:
    open_weights(folder / "model.safetensors.index.json")


@functools.cache
def targets() -> dict[str, Target]:
    pair = {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float16)}
    import safetensors.numpy

    healthy = safetensors.numpy.save(pair)
    lora = safetensors.numpy.save(
        {f"unet.mid_block.attentions.0.proj_in.lora_{x}.weight": pair["a"] for x in "AB"}
    )
    index = json.dumps({"weight_map": {"a": "a.safetensors"}}).encode()
    maps = st.dictionaries(st.text(max_size=4), st.text(max_size=12) | _JSON, max_size=3)
    made = {
        "safetensors": Target(
            "x.safetensors",
            damaged(healthy) | headers(st.text(max_size=5)),
            lambda folder: read_all(folder / "x.safetensors"),
        ),
        "single": Target(
            "x.safetensors",
            headers(_COMPVIS) | consistent(_COMPVIS | st.sampled_from(_COMPVIS_KEYS)),
            _single,
        ),
        "lora": Target("x.safetensors", damaged(lora) | headers(_LORA) | consistent(_LORA), _lora),
        "transformer": Target(
            "x.safetensors",
            headers(_TRANSFORMER)
            | consistent(_TRANSFORMER | st.sampled_from(_TRANSFORMER_KEYS))
            | consistent(st.sampled_from(_TRANSFORMER_KEYS)),
            _transformer,
        ),
        "flux lora": Target(
            "x.safetensors", headers(_FLUX_LORA) | consistent(_FLUX_LORA), _flux_lora
        ),
        "scales": Target(
            "x.safetensors",
            headers(_SCALES) | consistent(_SCALES),
            lambda folder: read_all(folder / "x.safetensors"),
        ),
        "gguf": Target(
            "x.gguf",
            damaged(gguf_bytes({"a": (0, (2, 2), bytes(16)), "b": (8, (1, 32), bytes(34))}))
            | _gguf(),
            lambda folder: read_all(folder / "x.gguf"),
        ),
        "open_clip": Target(
            "x.safetensors",
            consistent(_OPEN_CLIP),
            lambda folder: load_open_clip(folder / "x.safetensors"),
        ),
        "msgpack": Target(
            "x.msgpack",
            damaged(_healthy_msgpack()) | _MSGPACK | st.binary(max_size=60),
            lambda folder: read_all(folder / "x.msgpack"),
        ),
        "index": Target(
            "model.safetensors.index.json",
            damaged(index) | st.builds(lambda m: json.dumps({"weight_map": m}).encode(), maps),
            _weight_map,
        ),
        "config": Target(
            "config.json", _settings() | _JSON.map(lambda x: json.dumps(x).encode()), _component
        ),
    }
    try:
        pickle = _healthy_pickle()
    except ImportError:
        return made
    made["pickle"] = Target("x.bin", damaged(pickle), lambda folder: read_all(folder / "x.bin"))
    made["embeddings"] = Target(
        "x.bin", damaged(pickle), lambda folder: read_personalization(folder / "x.bin")
    )
    return made
