"""A transformer of any size against diffusers, block by block, in the memory of a few blocks.

    python benchmarks/streaming_parity.py                            # FLUX.1-dev: minutes, 4 GB
    python benchmarks/streaming_parity.py --model flux-schnell --blocks 2+2
    python benchmarks/streaming_parity.py --model flux-2-klein-4b --weights FOLDER/transformer
    python benchmarks/streaming_parity.py --model hunyuan-video --grid 4x6x10 --text 32
    python benchmarks/streaming_parity.py --model wan-14b --blocks 2
    python benchmarks/streaming_parity.py --model cosmos-video-7b --blocks 2
    python benchmarks/streaming_parity.py --model t5-11b --blocks 1 --text 512   # a text encoder

Both models stay without values. Each block in turn is given its values, in PyTorch and here, runs
on the activations of its own side, and is emptied again; then the activations of both sides are
compared, so that the first block that differs is named. The values of a parameter follow from its
name: a stretch of one pool of normal numbers; or they are read from a checkpoint's folder. The keys
and shapes of all blocks together must be those of diffusers' model.

Prints the largest difference and the relative error behind each block, times and peak memory, and
exits with 1 where an error is beyond the tolerance. A model is a function that says its blocks: the
name of each, and how either side's is called.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from conceptax.converters.files.weights import find_weights, open_weights
from conceptax.converters.tensors import TensorSpec, tensor_specs
from conceptax.flax_models import (
    cosmos_transformer_3d,
    flux_2_transformer_2d,
    flux_transformer_2d,
    hunyuan_video_transformer_3d,
    t5,
    wan_transformer_3d,
)
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.cosmos_transformer_3d import CosmosTransformer3DConfig, Time
from conceptax.flax_models.flux_2_transformer_2d import Flux2Transformer2DConfig
from conceptax.flax_models.flux_transformer_2d import FluxTransformer2DConfig
from conceptax.flax_models.hunyuan_video_transformer_3d import HunyuanVideoTransformer3DConfig
from conceptax.flax_models.layers.joint_attention import JointSequence
from conceptax.flax_models.layers.modulation import plain_layer_norm
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig

Streams = dict[str, Any]  # activations by name, of one side
Values = Callable[[str, tuple[int, ...]], np.ndarray]  # of a parameter, by key and PyTorch's shape
SCALE = 0.02  # standard deviation of random parameters


class Block(NamedTuple):
    """A part of a model with a name, a prefix of its keys, and its call on either side.

    It may be a parameter of the model itself, which is then given as an array.

    `ours` and `theirs` take the part and the streams, and return those that change, under the same
    names and with the same axes. Blocks of a kind share `ours`, so that they compile once.
    """

    name: str
    ours: Callable[[Any, Streams], Streams]
    theirs: Callable[[Any, Streams], Streams]


class Comparison(NamedTuple):
    """What differs behind a block, relative to a stream's norm too, and the seconds it took."""

    block: str
    stream: str
    largest: float
    relative: float
    seconds: float


class Pool:
    """Random values of parameters, which follow from their names."""

    def __init__(self, size: int = 1 << 26):
        self.pool = SCALE * np.random.default_rng(0).standard_normal(size, np.float32)

    def __call__(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """N(0, 0.02^2), and 1 more for the weights of norms; a view where the pool has it whole."""
        size, total = math.prod(shape), len(self.pool)
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little") % total
        pieces = [self.pool[start : start + size]]
        while (missing := size - sum(map(len, pieces))) > 0:
            pieces.append(self.pool[:missing])
        values = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        norm = len(shape) == 1 and key.endswith("weight")
        return (values + 1 if norm else values).reshape(shape)


def stored(folder: Path) -> Values:
    """The values of a checkpoint, read from its files one by one, as float32."""
    tensors = open_weights(find_weights(folder, "diffusers"))
    return lambda key, shape: tensors[key].read().astype(np.float32).reshape(shape)


def compare(
    name: str,
    config: Any,
    values: Values,
    *,
    grid: tuple[int, ...] | None = None,
    text: int = 64,
) -> Iterator[Comparison]:
    """Runs both sides of a model of that family, of batch 1, and yields what differs.

    Raises:
      ValueError: the blocks do not have the keys and shapes of diffusers' model.
    """
    import torch

    family = FAMILIES[name]
    grid = grid or family.grid
    rngs = OneKey()
    model = nnx.eval_shape(lambda: family.model(config, rngs=rngs))
    with torch.device("meta"):
        module = _theirs(model, config).eval()
    streams, blocks = family.blocks(module, config, grid, text)
    parts = {block.name: functools.reduce(_part, block.name.split("."), model) for block in blocks}
    specs = {name: _specs(part) for name, part in parts.items()}
    ours = {_key(name, spec): spec.shape for name, of in specs.items() for spec in of}
    tied = getattr(model, "pytorch_tied", {})
    theirs = {k: tuple(v.shape) for k, v in module.state_dict().items() if k not in tied}
    if ours != theirs:
        differing = sorted(key for key, _ in ours.items() ^ theirs.items())
        raise ValueError(f"keys or shapes differ from diffusers': {', '.join(differing[:5])}, ...")

    here = {key: jnp.asarray(value) for key, value in streams.items()}
    there = {key: torch.from_numpy(value) for key, value in streams.items()}
    for block in blocks:
        began = time.perf_counter()
        arrays = {
            spec.key: values(_key(block.name, spec), spec.shape) for spec in specs[block.name]
        }
        changed = _run_torch(module, block, arrays, there)
        there |= changed
        here |= _run_ours(parts[block.name], block, arrays, here)
        seconds = time.perf_counter() - began
        for stream, value in changed.items():
            expected, received = value.numpy(), np.asarray(here[stream])
            if expected.shape != received.shape:
                raise ValueError(f"{block.name}: {stream} {received.shape}, not {expected.shape}")
            difference = received - expected
            relative = np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30)
            largest = float(np.abs(difference).max())
            yield Comparison(block.name, stream, largest, float(relative), seconds)


def _theirs(model: Any, config: Any) -> Any:
    """The model of diffusers or transformers of that class, whose config is an object there."""
    library = importlib.import_module(model.pytorch_library)
    kind, settings = getattr(library, model.pytorch_class), config.to_dict()
    if model.pytorch_library == "diffusers":
        return kind(**settings)
    return kind(kind.config_class(**settings))


def _part(owner: Any, name: str) -> Any:
    return owner[int(name)] if name.isdigit() else getattr(owner, name)


def _specs(part: Any) -> list[TensorSpec]:
    """Of a module's parameters, or of one parameter, whose key is its name."""
    if not isinstance(part, nnx.Variable):
        return tensor_specs(part)
    shape = tuple(part.get_value().shape)
    return [TensorSpec("", (), shape, tuple(range(len(shape))))]


def _key(block: str, spec: TensorSpec) -> str:
    return f"{block}.{spec.key}" if spec.key else block


def _run_torch(model: Any, block: Block, arrays: Streams, streams: Streams) -> Streams:
    import torch

    tensors = {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in arrays.items()}
    if "" in tensors:
        return block.theirs(tensors[""], streams)
    module = model.get_submodule(block.name)
    module.load_state_dict(tensors, assign=True)
    with torch.no_grad():
        changed = block.theirs(module, streams)
    module.to("meta")
    return changed


def _run_ours(part: Any, block: Block, arrays: Streams, streams: Streams) -> Streams:
    if "" in arrays:
        return _call(None, block.ours, jnp.asarray(arrays[""]), streams)
    graphdef, state = nnx.split(part)
    by_path = {spec.path: jnp.asarray(spec.to_nnx(arrays[spec.key])) for spec in tensor_specs(part)}
    params = jax.tree_util.tree_map_with_path(
        lambda path, _: by_path[tuple(getattr(p, "key", getattr(p, "idx", None)) for p in path)],
        nnx.to_pure_dict(state),
    )
    return jax.block_until_ready(_call(graphdef, block.ours, params, streams))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(graphdef: Any, call: Callable[..., Streams], params: Any, streams: Streams) -> Streams:
    with jax.default_matmul_precision("highest"):
        part = params if graphdef is None else nnx.merge(graphdef, params)
        return call(part, streams)


# How one side's part becomes the next activations.


def _linear(source: str, target: str) -> Callable[[Any, Streams], Streams]:
    return lambda part, s: {target: part(s[source])}


def _tokens(*grid_and_features: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, *grid_and_features), np.float32)


def _inputs(config: Any, grid: tuple[int, int], text: int) -> Streams:
    """Packed latents, states of a text, the time 500 of 1000, guidance 3.5."""
    return {
        "latents": _tokens(math.prod(grid), config.in_channels, seed=1),
        "states": _tokens(text, config.joint_attention_dim, seed=2),
        "times": np.array([500.0], np.float32),
        "guidance": np.array([3.5], np.float32),
    }


def _positions(grid: tuple[int, int], text: int, axes: int) -> Any:
    """Of [text; image], as diffusers' pipelines give them."""
    import torch

    ids = torch.zeros(text + math.prod(grid), axes)
    ids[text:, 1], ids[text:, 2] = (torch.from_numpy(x.ravel()) for x in np.indices(grid))
    if axes == 4:  # FLUX.2 counts the text's tokens
        ids[:text, 3] = torch.arange(text)
    return ids


def flux(
    module: Any, config: FluxTransformer2DConfig, grid: tuple[int, int], text: int
) -> tuple[Streams, list[Block]]:
    """FLUX.1."""
    streams = _inputs(config, grid, text)
    streams["pooled"] = _tokens(config.pooled_projection_dim, seed=3)
    sequence = JointSequence(grid, rotary=flux_transformer_2d.rotary_of(config, grid, text))
    rotary = module.pos_embed(_positions(grid, text, 3))
    guided = config.guidance_embeds

    def condition(part: Any, s: Streams) -> Streams:
        return {"condition": part(s["times"], s["guidance"], s["pooled"])}

    def their_condition(part: Any, s: Streams) -> Streams:
        guidance = (1000 * s["guidance"],) if guided else ()
        return {"condition": part(s["times"], *guidance, s["pooled"])}

    def theirs(part: Any, s: Streams) -> Streams:
        words, image = part(s["image"], s["text"], s["condition"], rotary)
        return {"image": image, "text": words}

    embedders = [
        Block("time_text_embed", condition, their_condition),
        Block("x_embedder", *(_linear("latents", "image"),) * 2),
        Block("context_embedder", *(_linear("states", "text"),) * 2),
    ]
    return streams, [*embedders, *_joint(config, sequence, theirs)]


def flux_2(
    module: Any, config: Flux2Transformer2DConfig, grid: tuple[int, int], text: int
) -> tuple[Streams, list[Block]]:
    """FLUX.2."""
    streams = _inputs(config, grid, text)
    sequence = JointSequence(grid, rotary=flux_2_transformer_2d.rotary_of(config, grid, text))
    rotary = module.pos_embed(_positions(grid, text, 4))

    def condition(part: Any, s: Streams) -> Streams:
        return {"condition": part(s["times"], s["guidance"])}

    def their_condition(part: Any, s: Streams) -> Streams:
        return {"condition": part(s["times"], 1000 * s["guidance"])}

    def modulation(target: str) -> tuple[Callable[[Any, Streams], Streams], ...]:
        return (
            lambda part, s: {target: jnp.concatenate(part.vectors(s["condition"]), axis=-1)},
            lambda part, s: {target: part(s["condition"])},
        )

    def double(part: Any, s: Streams) -> Streams:
        modulations = (jnp.split(s[key], 6, axis=-1) for key in ("of_image", "of_text"))
        image, words = part(s["image"], s["text"], *modulations, sequence)
        return {"image": image, "text": words}

    def their_double(part: Any, s: Streams) -> Streams:
        words, image = part(s["image"], s["text"], s["of_image"], s["of_text"], rotary)
        return {"image": image, "text": words}

    def single(part: Any, s: Streams) -> Streams:
        x = sequence.join(s["image"], s["text"])
        x = part(x, jnp.split(s["of_both"], 3, axis=-1), sequence)
        return dict(zip(("image", "text"), sequence.split(x), strict=True))

    def their_single(part: Any, s: Streams) -> Streams:
        words, image = part(s["image"], s["text"], s["of_both"], rotary, split_hidden_states=True)
        return {"image": image, "text": words}

    def norm(part: Any, s: Streams) -> Streams:
        return {"output": part(s["image"], s["condition"])}

    first = [
        Block("time_guidance_embed", condition, their_condition),
        Block("double_stream_modulation_img", *modulation("of_image")),
        Block("double_stream_modulation_txt", *modulation("of_text")),
        Block("single_stream_modulation", *modulation("of_both")),
        Block("x_embedder", *(_linear("latents", "image"),) * 2),
        Block("context_embedder", *(_linear("states", "text"),) * 2),
    ]
    doubles = [
        Block(f"transformer_blocks.{n}", double, their_double) for n in range(config.num_layers)
    ]
    singles = [
        Block(f"single_transformer_blocks.{n}", single, their_single)
        for n in range(config.num_single_layers)
    ]
    last = [Block("norm_out", norm, norm), Block("proj_out", *(_linear("output", "output"),) * 2)]
    return streams, [*first, *doubles, *singles, *last]


def hunyuan_video(
    module: Any, config: HunyuanVideoTransformer3DConfig, grid: tuple[int, int, int], text: int
) -> tuple[Streams, list[Block]]:
    """HunyuanVideo, the last quarter of whose text is padding."""
    import torch

    sides = tuple(side * size for side, size in zip(grid, config.patch, strict=True))
    mask = np.arange(text)[None] < text - text // 4
    streams = {
        "latents": _tokens(*sides, config.in_channels, seed=1),
        "states": _tokens(text, config.text_embed_dim, seed=2),
        "pooled": _tokens(config.pooled_projection_dim, seed=3),
        "mask": mask,
        "times": np.array([500.0], np.float32),
        "guidance": np.array([6.0], np.float32),
    }
    rotary = hunyuan_video_transformer_3d.rotary_of(config, grid, text)
    sequence = JointSequence(grid, text_first=False, rotary=rotary, mask=jnp.asarray(mask))
    their_rotary = module.rope(torch.empty(1, 1, *sides))
    shown = torch.from_numpy(np.pad(mask, ((0, 0), (math.prod(grid), 0)), constant_values=True))
    guided = config.guidance_embeds

    def condition(part: Any, s: Streams) -> Streams:
        return {"condition": part(s["times"], s["guidance"], s["pooled"])}

    def their_condition(part: Any, s: Streams) -> Streams:
        guidance = 1000 * s["guidance"] if guided else None
        return {"condition": part(s["times"], s["pooled"], guidance)[0]}

    def patches(part: Any, s: Streams) -> Streams:
        return {"image": part(s["latents"]).reshape(1, -1, config.features)}

    def their_patches(part: Any, s: Streams) -> Streams:
        return {"image": part(s["latents"].permute(0, 4, 1, 2, 3))}

    def refined(part: Any, s: Streams) -> Streams:
        return {"text": part(s["states"], s["times"], s["mask"])}

    def theirs(part: Any, s: Streams) -> Streams:
        sees = shown[:, None, None]
        image, words = part(s["image"], s["text"], s["condition"], sees, their_rotary)
        return {"image": image, "text": words}

    first = [
        Block("time_text_embed", condition, their_condition),
        Block("x_embedder", patches, their_patches),
        Block("context_embedder", refined, refined),
    ]
    return streams, [*first, *_joint(config, sequence, theirs)]


def cosmos(
    module: Any, config: CosmosTransformer3DConfig, grid: tuple[int, int, int], text: int
) -> tuple[Streams, list[Block]]:
    """Cosmos, whose masks are channels of its latents here."""
    import torch

    sides = tuple(side * size for side, size in zip(grid, config.patch_size, strict=True))
    channels = config.in_channels + config.concat_padding_mask
    streams = {
        "latents": _tokens(*sides, channels, seed=1),
        "text": _tokens(text, config.text_embed_dim, seed=2),
        "times": np.array([0.3], np.float32),
    }
    rotary = cosmos_transformer_3d.rotary_of(config, grid, jnp.full(1, 24.0))
    sequence = JointSequence(grid, rotary=rotary, halves=True)
    their_latents = torch.empty(1, 1, *sides)
    their_rotary = module.rope(their_latents, fps=24)
    learnt = config.extra_pos_embed_type is not None

    def patches(part: Any, s: Streams) -> Streams:
        return {"x": part(s["latents"]).reshape(1, -1, config.features)}

    def their_patches(part: Any, s: Streams) -> Streams:
        return {"x": part(s["latents"].permute(0, 4, 1, 2, 3)).flatten(1, 3)}

    def positions(part: Any, s: Streams) -> Streams:
        return {"positions": part(grid)}

    def their_positions(part: Any, s: Streams) -> Streams:
        return {"positions": part(their_latents)}

    def time(part: Any, s: Streams) -> Streams:
        return part(s["times"][:, None])._asdict()

    def their_time(part: Any, s: Streams) -> Streams:
        shared, embedded = part(s["x"], s["times"])
        return {"shared": shared[:, None], "embedded": embedded[:, None]}

    def block(part: Any, s: Streams) -> Streams:
        told = Time(s["shared"], s["embedded"])
        return {"x": part(s["x"], s["text"], told, s.get("positions"), sequence)}

    def their_block(part: Any, s: Streams) -> Streams:
        told = s["embedded"][:, 0], s["shared"][:, 0]
        return {"x": part(s["x"], s["text"], *told, their_rotary, s.get("positions"))}

    def norm(part: Any, s: Streams) -> Streams:
        return {"output": part(s["x"], Time(s["shared"], s["embedded"]))[0]}

    def their_norm(part: Any, s: Streams) -> Streams:
        return {"output": part(s["x"], s["embedded"][:, 0], s["shared"][:, 0])}

    learned = [Block("learnable_pos_embed", positions, their_positions)] if learnt else []
    blocks = [
        Block(f"transformer_blocks.{n}", block, their_block) for n in range(config.num_layers)
    ]
    return streams, [
        Block("patch_embed", patches, their_patches),
        *learned,
        Block("time_embed", time, their_time),
        *blocks,
        Block("norm_out", norm, their_norm),
        Block("proj_out", *(_linear("output", "output"),) * 2),
    ]


def wan(
    module: Any, config: WanTransformer3DConfig, grid: tuple[int, int, int], text: int
) -> tuple[Streams, list[Block]]:
    """Wan 2.1 and 2.2."""
    import torch

    sides = tuple(side * size for side, size in zip(grid, config.patch_size, strict=True))
    streams = {
        "latents": _tokens(*sides, config.in_channels, seed=1),
        "states": _tokens(text, config.text_dim, seed=2),
        "times": np.array([500.0], np.float32),
    }
    sequence = JointSequence(grid, rotary=wan_transformer_3d.rotary_of(config, grid))
    settings = (config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    rotary = type(module.rope)(*settings)(torch.empty(1, 1, *sides))
    norm = plain_layer_norm(config.features, config.eps, rngs=nnx.Rngs(0))

    def patches(part: Any, s: Streams) -> Streams:
        return {"video": part(s["latents"]).reshape(1, -1, config.features)}

    def their_patches(part: Any, s: Streams) -> Streams:
        return {"video": part(s["latents"].permute(0, 4, 1, 2, 3)).flatten(2).transpose(1, 2)}

    def condition(part: Any, s: Streams) -> Streams:
        time, of_time, words = part(s["times"][:, None], s["states"])
        return {"time": time[:, 0], "of_time": of_time[:, 0], "text": words}

    def their_condition(part: Any, s: Streams) -> Streams:
        time, of_time, words, _ = part(s["times"], s["states"])
        return {"time": time, "of_time": of_time.unflatten(1, (6, -1)), "text": words}

    def block(part: Any, s: Streams) -> Streams:
        return {"video": part(s["video"], s["text"], s["of_time"][:, None], sequence)}

    def their_block(part: Any, s: Streams) -> Streams:
        return {"video": part(s["video"], s["text"], s["of_time"], rotary)}

    def modulated(normalized: Any, table: Any, s: Streams) -> Streams:
        shift, scale = table[:, :1] + s["time"][:, None], table[:, 1:] + s["time"][:, None]
        return {"output": normalized * (1 + scale) + shift}

    return streams, [
        Block("patch_embedding", patches, their_patches),
        Block("condition_embedder", condition, their_condition),
        *(Block(f"blocks.{n}", block, their_block) for n in range(config.num_layers)),
        Block(
            "scale_shift_table",
            lambda table, s: modulated(norm(s["video"]), table, s),
            lambda table, s: modulated(module.norm_out(s["video"]), table, s),
        ),
        Block("proj_out", *(_linear("output", "output"),) * 2),
    ]


def t5_encoder(
    module: Any, config: t5.T5Config, grid: tuple[int, ...], text: int
) -> tuple[Streams, list[Block]]:
    """An encoder of texts, whose first block's bias of distances is all blocks'."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (1, text))

    def block(part: Any, s: Streams) -> Streams:
        bias = s["bias"][0] if "bias" in s else None
        x, bias = part(s["x"], None, bias)
        return {"x": x, "bias": bias[None]}

    def their_block(part: Any, s: Streams) -> Streams:
        x, bias, _ = part(s["x"], position_bias=s.get("bias"))
        return {"x": x, "bias": bias}

    blocks = [Block(f"encoder.block.{n}", block, their_block) for n in range(config.num_layers)]
    return {"ids": ids}, [
        Block("shared", *(_linear("ids", "x"),) * 2),
        *blocks,
        Block("encoder.final_layer_norm", *(_linear("x", "output"),) * 2),
    ]


def _joint(config: Any, sequence: JointSequence, theirs: Any) -> list[Block]:
    """FLUX.1's double and single blocks, and what follows."""

    def double(part: Any, s: Streams) -> Streams:
        image, words = part(s["image"], s["text"], s["condition"], sequence)
        return {"image": image, "text": words}

    def single(part: Any, s: Streams) -> Streams:
        x = part(sequence.join(s["image"], s["text"]), s["condition"], sequence)
        return dict(zip(("image", "text"), sequence.split(x), strict=True))

    def norm(part: Any, s: Streams) -> Streams:
        return {"output": part(s["image"], s["condition"])}

    doubles = [Block(f"transformer_blocks.{n}", double, theirs) for n in range(config.num_layers)]
    singles = [
        Block(f"single_transformer_blocks.{n}", single, theirs)
        for n in range(config.num_single_layers)
    ]
    last = [Block("norm_out", norm, norm), Block("proj_out", *(_linear("output", "output"),) * 2)]
    return [*doubles, *singles, *last]


class Family(NamedTuple):
    """A model class, its function that says its blocks, its published settings by name, and how
    many tokens along each side it is compared on."""

    model: Any
    blocks: Callable[..., tuple[Streams, list[Block]]]
    published: dict[str, Callable[[], Any]]
    grid: tuple[int, ...] = (16, 16)


FAMILIES = {
    "flux": Family(
        flux_transformer_2d.FluxTransformer2DModel,
        flux,
        {
            "flux-dev": FluxTransformer2DConfig.dev,
            "flux-schnell": FluxTransformer2DConfig.schnell,
        },
    ),
    "flux-2": Family(
        flux_2_transformer_2d.Flux2Transformer2DModel,
        flux_2,
        {
            "flux-2-klein-4b": Flux2Transformer2DConfig.klein_4b,
            "flux-2-klein-9b": Flux2Transformer2DConfig.klein_9b,
            "flux-2-dev": Flux2Transformer2DConfig,
        },
    ),
    "hunyuan-video": Family(
        hunyuan_video_transformer_3d.HunyuanVideoTransformer3DModel,
        hunyuan_video,
        {"hunyuan-video": HunyuanVideoTransformer3DConfig},
        grid=(4, 8, 8),
    ),
    "cosmos": Family(
        cosmos_transformer_3d.CosmosTransformer3DModel,
        cosmos,
        {
            "cosmos-text-7b": CosmosTransformer3DConfig.text_to_world_7b,
            "cosmos-video-7b": CosmosTransformer3DConfig.video_to_world_7b,
            "cosmos-text-14b": CosmosTransformer3DConfig.text_to_world_14b,
            "cosmos-2-video-2b": CosmosTransformer3DConfig.predict2_2b_video_to_world,
        },
        grid=(4, 8, 8),
    ),
    "t5": Family(
        t5.T5EncoderModel,
        t5_encoder,
        {"t5-11b": t5.T5Config.t5_11b, "t5-xxl": t5.T5Config.xxl},
    ),
    "wan": Family(
        wan_transformer_3d.WanTransformer3DModel,
        wan,
        {
            "wan-1.3b": WanTransformer3DConfig.t2v_1_3b,
            "wan-14b": WanTransformer3DConfig.t2v_14b,
            "wan-2.2-5b": WanTransformer3DConfig.ti2v_5b,
        },
        grid=(4, 8, 8),
    ),
}
MODELS = {model: name for name, family in FAMILIES.items() for model in family.published}


def report(comparisons: Iterator[Comparison], tolerance: float) -> str | None:
    """Prints the comparisons as they come; the first block beyond the tolerance, if one is."""
    beyond = None
    print(f"{'block':<32} {'stream':<10} {'largest':>9} {'relative':>9} {'seconds':>8}")
    for each in comparisons:
        print(
            f"{each.block:<32} {each.stream:<10} {each.largest:9.2e} {each.relative:9.2e} "
            f"{each.seconds:8.2f}",
            flush=True,
        )
        if beyond is None and not each.relative <= tolerance:
            beyond = each.block
    return beyond


def numbers(text: str, by: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(by))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="flux-dev")
    parser.add_argument("--blocks", help="how many, double + single such as 2+2; by default all")
    parser.add_argument("--grid", help="tokens of the image or video; by default 256 in all")
    parser.add_argument("--text", type=int, default=64, help="tokens of the text")
    parser.add_argument("--weights", type=Path, help="a component's folder; by default random")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative error")
    chosen = parser.parse_args()
    family = FAMILIES[MODELS[chosen.model]]
    config = family.published[chosen.model]()
    if chosen.blocks:
        layers = zip(("num_layers", "num_single_layers"), numbers(chosen.blocks, "+"), strict=False)
        config = dataclasses.replace(config, **dict(layers))
    values = stored(chosen.weights) if chosen.weights else Pool()
    grid = numbers(chosen.grid, "x") if chosen.grid else None
    began = time.perf_counter()
    comparisons = compare(MODELS[chosen.model], config, values, grid=grid, text=chosen.text)
    beyond = report(comparisons, chosen.tolerance)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - began:.0f} s, peak memory {peak:.2f} GiB")
    if beyond:
        sys.exit(f"{beyond} is the first block beyond {chosen.tolerance:g}.")


if __name__ == "__main__":
    main()
