"""Sharding: one table of (path pattern, PartitionSpec) rows per model family tells where arrays go.

A mesh has three axes: `data` splits the batch only, `fsdp` splits the batch and the
parameters, `tensor` splits matrix products. Rows are tried in order and the first whose pattern
matches a parameter's dotted path decides (patterns as in `paths`). Instead of a `PartitionSpec` a
row may say `LARGEST`: leaves of at least `MIN_SIZE` elements split their largest dimension that
`fsdp` divides, smaller ones are replicated. An axis that does not divide its dimension is left
out, so one table serves the tiny and the full-sized members of a family.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .paths import Pattern, dotted, matches
from .state import TrainState

Spec = PartitionSpec | Literal["largest"]
Rules = Sequence[tuple[Pattern, Spec]]

LARGEST: Literal["largest"] = "largest"
MIN_SIZE = 1024  # elements; below it, moving a leaf costs more than keeping it everywhere
BATCH_AXES = ("data", "fsdp")

_P = PartitionSpec
_COLUMN, _ROW = _P("fsdp", "tensor"), _P("tensor", "fsdp")  # first, second of a pair of products
_CONV_COLUMN = _P(None, None, "fsdp", "tensor")  # HWIO
_CONV_ROW = _P(None, None, "tensor", "fsdp")

DEFAULT_RULES: Rules = (("*", LARGEST),)

_REST: Rules = (("*.bias", _P()), ("*norm*.scale", _P()), *DEFAULT_RULES)
# DiT's and Stable Diffusion's blocks name their parts alike
_FEED_FORWARD: Rules = (("*.ff.net.0.proj.kernel", _COLUMN), ("*.ff.net.2.kernel", _ROW))
_CONVOLUTIONS: Rules = (
    ("*.resnets.*.conv1.kernel", _CONV_COLUMN),
    ("*.resnets.*.conv2.kernel", _CONV_ROW),
)

CLIP_RULES: Rules = (
    ("*.self_attn.[qkv]_proj.kernel", _COLUMN),
    ("*.self_attn.out_proj.kernel", _ROW),
    ("*.mlp.fc1.kernel", _COLUMN),
    ("*.mlp.fc2.kernel", _ROW),
    ("*embeddings.token_embedding.embedding", _ROW),
    ("*embeddings.patch_embedding.kernel", _P(None, None, None, "fsdp")),
    ("*_projection.kernel", _COLUMN),
    *_REST,
)

UNET_RULES: Rules = (
    ("*.attn[12].to_[qkv].kernel", _COLUMN),
    ("*.attn[12].to_out.0.kernel", _ROW),
    *_FEED_FORWARD,
    ("*time_embedding.linear_1.kernel", _COLUMN),
    ("*time_embedding.linear_2.kernel", _ROW),
    ("*add_embedding.linear_1.kernel", _COLUMN),
    ("*add_embedding.linear_2.kernel", _ROW),
    ("*.time_emb_proj.kernel", _COLUMN),
    *_CONVOLUTIONS,
    *_REST,  # proj_in, proj_out (linear or 1x1 conv), shortcuts, samplers, conv_in/out
)

# A modulation [B, 6 D] is taken apart by columns.  They are not split: of a batch on `data` and
# `fsdp` and columns on `tensor` jax 0.10 took the wrong ones.
_MODULATIONS: Rules = (
    ("*.norm*.linear.kernel", _ROW),
    ("*_stream_modulation*.linear.kernel", _ROW),
)

DIT_RULES: Rules = (
    ("*.attn1.to_[qkv].kernel", _COLUMN),
    ("*.attn1.to_out.0.kernel", _ROW),
    *_FEED_FORWARD,
    *_MODULATIONS,
    ("*.timestep_embedder.linear_1.kernel", _COLUMN),
    ("*.timestep_embedder.linear_2.kernel", _ROW),
    ("*.embedding_table.embedding", _P(None, "fsdp")),  # an odd number of classes
    *_REST,
)

# Transformers whose image or video and text attend jointly, in double blocks and single ones.
# Where the columns of a product are several parts (queries beside a perceptron), the activations
# are moved into place, not the weights.
JOINT_RULES: Rules = (
    ("*.attn*.to_[qkv].kernel", _COLUMN),
    ("*.attn*.add_[qkv]_proj.kernel", _COLUMN),
    ("*.attn*.to_out.0.kernel", _ROW),
    ("*.attn*.to_add_out.kernel", _ROW),
    *_FEED_FORWARD,
    ("*.ff_context.net.0.proj.kernel", _COLUMN),
    ("*.ff_context.net.2.kernel", _ROW),
    ("*.ff*.linear_in.kernel", _COLUMN),
    ("*.ff*.linear_out.kernel", _ROW),
    ("*.proj_mlp.kernel", _COLUMN),
    ("single_transformer_blocks.*.proj_out.kernel", _ROW),
    ("*.attn.to_qkv_mlp_proj.kernel", _COLUMN),
    ("*.attn.to_out.kernel", _ROW),
    *_MODULATIONS,
    ("*_embedder.linear_1.kernel", _COLUMN),
    ("*_embedder.linear_2.kernel", _ROW),
    ("*pos_embed.pos_embed", _P(None, None, "fsdp")),  # an image takes some of its rows
    *_REST,
)

COSMOS_RULES: Rules = (
    ("*.attn[12].to_[qkv].kernel", _COLUMN),
    ("*.attn[12].to_out.0.kernel", _ROW),
    *_FEED_FORWARD,
    ("*norm*.linear_*.kernel", _ROW),  # a modulation is taken apart by columns
    ("*.t_embedder.linear_1.kernel", _COLUMN),
    ("*.t_embedder.linear_2.kernel", _ROW),
    ("*.pos_emb_*", _P(None, "fsdp")),  # a video takes some of its rows
    *_REST,
)

# Wan: video attends to itself, and to the text.
WAN_RULES: Rules = (
    ("*.attn[12].to_[qkv].kernel", _COLUMN),
    ("*.attn[12].to_out.0.kernel", _ROW),
    ("*.ffn.net.0.proj.kernel", _COLUMN),
    ("*.ffn.net.2.kernel", _ROW),
    ("*.time_proj.kernel", _ROW),  # modulations, as above
    ("*scale_shift_table", _P()),
    ("*_embedder.linear_1.kernel", _COLUMN),
    ("*_embedder.linear_2.kernel", _ROW),
    *_REST,
)

T5_RULES: Rules = (
    ("*.SelfAttention.[qkv].kernel", _COLUMN),
    ("*.SelfAttention.o.kernel", _ROW),
    ("*.DenseReluDense.wi*.kernel", _COLUMN),
    ("*.DenseReluDense.wo.kernel", _ROW),
    ("*shared.embedding", _ROW),
    *_REST,
)

DECODER_RULES: Rules = (
    ("*.self_attn.[qkv]_proj.kernel", _COLUMN),
    ("*.self_attn.o_proj.kernel", _ROW),
    ("*.mlp.gate_proj.kernel", _COLUMN),
    ("*.mlp.up_proj.kernel", _COLUMN),
    ("*.mlp.down_proj.kernel", _ROW),
    ("*embed_tokens.embedding", _ROW),
    *_REST,
)

AUTOENCODER_RULES: Rules = (
    ("*.attentions.*.to_[qkv].kernel", _COLUMN),
    ("*.attentions.*.to_out.0.kernel", _ROW),
    *_CONVOLUTIONS,
    *_REST,
)

MAFT_PLUS_RULES: Rules = (
    ("*.linear1.kernel", _COLUMN),
    ("*.linear2.kernel", _ROW),
    ("*.mlp.fc1.kernel", _COLUMN),
    ("*.mlp.fc2.kernel", _ROW),
    ("rows", _P()),
    ("synonyms", _P()),
    *_REST,
)

# A training step may hold several models side by side; their rows do not overlap.
STABLE_DIFFUSION_RULES: Rules = (*UNET_RULES[:-1], *AUTOENCODER_RULES[:-1], *CLIP_RULES)

_CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPModel")
_OTHERS = (
    "Dinov2Model",
    "BlipForImageTextRetrieval",
    "Blip2ForImageTextRetrieval",
    "OpenCLIP",
    "AutoencoderKLCosmos",
    "AutoencoderKLHunyuanVideo",
)
RULES: dict[str, Rules] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION_RULES,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_RULES,
    **dict.fromkeys(("UNet2DConditionModel", "UNetMotionModel", "MotionAdapter"), UNET_RULES),
    "DiTTransformer2DModel": DIT_RULES,
    **dict.fromkeys(("FluxTransformer2DModel", "Flux2Transformer2DModel"), JOINT_RULES),
    **dict.fromkeys(("SD3Transformer2DModel", "HunyuanVideoTransformer3DModel"), JOINT_RULES),
    "CosmosTransformer3DModel": COSMOS_RULES,
    "WanTransformer3DModel": WAN_RULES,
    "AutoencoderKLWan": DEFAULT_RULES,
    "MaftPlus": MAFT_PLUS_RULES,
    **dict.fromkeys(("AutoencoderKL", "AutoencoderKLFlux2"), AUTOENCODER_RULES),
    **dict.fromkeys(("T5EncoderModel", "UMT5EncoderModel"), T5_RULES),
    **dict.fromkeys(("LlamaModel", "LlamaForCausalLM"), DECODER_RULES),
    **dict.fromkeys(("Qwen3Model", "Qwen3ForCausalLM"), DECODER_RULES),
    **dict.fromkeys(_CLIPS, CLIP_RULES),
    **dict.fromkeys(_OTHERS, DEFAULT_RULES),
}


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes `data`, `fsdp` and `tensor`, all of type Auto.

    Args:
      data: size of the data axis; None takes all devices that `fsdp` and `tensor` leave.
      fsdp: number of parts the parameters are split into.
      tensor: number of parts matrix products are split into.
      devices: devices to use, default all; surplus ones stay idle.

    Raises:
      ValueError: a size is not positive, or the mesh needs more devices than there are.
    """
    available = list(jax.devices() if devices is None else devices)
    if data is None:
        data = len(available) // max(fsdp * tensor, 1)
    shape = (data, fsdp, tensor)
    needed = math.prod(shape)
    if min(shape) < 1 or needed > len(available):
        raise ValueError(
            f"a mesh with data={data}, fsdp={fsdp}, tensor={tensor} needs positive sizes and "
            f"{needed} devices; {len(available)} are there. Choose sizes whose product is at most "
            f"{len(available)}."
        )
    return jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=available[:needed],
    )


def shard_tree(tree: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The `NamedSharding` of every leaf of a parameter tree, by its path.

    Raises:
      ValueError: no row matches a path, or a row's spec has more axes than the leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(dotted(path), np.shape(leaf), mesh, rules)),
        tree,
    )


def shard_state(state: TrainState, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> TrainState:
    """Shardings of a `TrainState`, as a `TrainState` of `NamedSharding`.

    A leaf of the optimizer state whose path ends with a parameter's path, and which has its shape
    (Adam's moments, momentum, averages), lies where the parameter lies; all others are replicated.
    """
    params = shard_tree(state.params, mesh, rules)
    shardings = jax.tree_util.tree_leaves(params)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    by_path = {
        path: (leaf.shape, where) for (path, leaf), where in zip(leaves, shardings, strict=True)
    }
    replicated = NamedSharding(mesh, _P())

    def follow(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, where = by_path.get(path[start:], (None, replicated))
            if shape == leaf.shape:
                return where
        return replicated

    opt_state = jax.tree_util.tree_map_with_path(follow, state.opt_state)
    return TrainState(replicated, params, opt_state)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Shardings of a batch: the first dimension over `data` and `fsdp`, scalars replicated.

    Raises:
      ValueError: the first dimension is not a multiple of the number of parts.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not getattr(leaf, "shape", ()):
            return NamedSharding(mesh, _P())
        if leaf.shape[0] % (parts // jax.process_count() or 1):
            raise ValueError(
                f"batch leaf {dotted(path) or '(root)'} has shape {leaf.shape}; its first "
                f"dimension must be a multiple of {parts} (data x fsdp) to be split over the mesh."
            )
        return NamedSharding(mesh, _P(BATCH_AXES))

    return jax.tree_util.tree_map_with_path(leaf_sharding, batch)


def constrain_batch(tree: Any) -> Any:
    """Inside a step: split the first dimension of arrays made there (noise, prompts) over the mesh.

    Uses the mesh that `train` sets; without one it returns `tree` unchanged. Axes that do not
    divide the dimension are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return tree

    def constrain(leaf: Any) -> Any:
        if leaf.ndim == 0:
            return leaf
        for axes in (BATCH_AXES, ("data",), ("fsdp",)):
            if leaf.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0:
                return jax.lax.with_sharding_constraint(leaf, _P(axes))
        return leaf

    return jax.tree.map(constrain, tree)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> PartitionSpec:
    spec = next((spec for pattern, spec in rules if matches(pattern, path)), None)
    if spec is None:
        raise ValueError(
            f"no sharding row matches parameter {path} of shape {shape}. Add a row for it, or end "
            "the table with the default row ('*', LARGEST)."
        )
    if isinstance(spec, str):
        return _largest(shape, mesh.shape["fsdp"])
    if len(spec) > len(shape):
        raise ValueError(
            f"the sharding row for {path} names {len(spec)} dimensions ({spec}), but the parameter "
            f"has shape {shape}."
        )
    return _P(*(_divides(axes, size, mesh) for axes, size in zip(spec, shape, strict=False)))


def _divides(axes: Any, size: int, mesh: Mesh) -> Any:
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return axes if size % math.prod(mesh.shape[name] for name in names) == 0 else None


def _largest(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    candidates = [axis for axis, size in enumerate(shape) if size and size % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_SIZE or not candidates:
        return _P()
    largest = max(candidates, key=lambda axis: (shape[axis], axis))
    return _P(*("fsdp" if axis == largest else None for axis in range(largest + 1)))
