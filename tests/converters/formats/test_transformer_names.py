"""FLUX, HunyuanVideo, Stable Diffusion 3 and Wan under their publishers' names, and diffusers."""

import numpy as np
import pytest

from conceptax.converters import CheckpointError, OutputError
from conceptax.converters.files.safetensors_file import PendingTensor, StoredTensor
from conceptax.converters.formats.compvis_parts import read_single_file
from conceptax.converters.formats.names import Rows, joined, split
from conceptax.converters.formats.transformer_parts import (
    FLUX,
    FLUX_2,
    HUNYUAN,
    SD_3,
    WAN,
    table_of,
)

UNET = "model.diffusion_model."
# diffusers' classes at their published sizes, and what tells which they are.
PUBLISHED = {
    "FLUX.1 dev": (FLUX, {"guidance_embeds": True}),
    "FLUX.1 schnell": (FLUX, {"guidance_embeds": False}),
    "FLUX.1 Fill": (FLUX, {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
    "FLUX.2 klein": (
        FLUX_2,
        {
            "guidance_embeds": False,
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
    ),
    "HunyuanVideo": (HUNYUAN, {}),
    "SD 3 medium": (
        SD_3,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
    ),
    "SD 3 3.5 large": (
        SD_3,
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "SD 3 3.5 medium": (
        SD_3,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "Wan 2.1 1.3B": (WAN, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "Wan 14B": (WAN, {}),
    "Wan 2.2 5B": (
        WAN,
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
        | {"in_channels": 48, "out_channels": 48},
    ),
}
CONVERTERS = {
    FLUX: ("FluxTransformer2DModel", "convert_flux_transformer_checkpoint_to_diffusers"),
    FLUX_2: ("Flux2Transformer2DModel", "convert_flux2_transformer_checkpoint_to_diffusers"),
    SD_3: ("SD3Transformer2DModel", "convert_sd3_transformer_checkpoint_to_diffusers"),
    WAN: ("WanTransformer3DModel", "convert_wan_transformer_to_diffusers"),
    HUNYUAN: ("HunyuanVideoTransformer3DModel", "convert_hunyuan_video_transformer_to_diffusers"),
}
_SD_3_SIZES = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "sample_size": 128}


def on_meta(torch, family, settings):
    diffusers = pytest.importorskip("diffusers")
    settings = (_SD_3_SIZES if family == SD_3 else {}) | settings
    with torch.device("meta"):
        return getattr(diffusers, CONVERTERS[family][0])(**settings)


def nothing():
    raise AssertionError("a value was read where names suffice")


def pending(shapes):
    kind = np.dtype(np.float32)
    return [PendingTensor(key, kind, tuple(shape), nothing) for key, shape in shapes.items()]


def stored(tensors):
    return {t.key: StoredTensor("F32", t.shape, t.produce) for t in tensors}


def shapes_of(state):
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_and_shape_at_full_size(torch, name):
    """Written names are those that diffusers reads, and lead back; settings follow from shapes."""
    from diffusers.loaders import single_file_utils

    family, settings = PUBLISHED[name]
    model = on_meta(torch, family, settings)
    theirs = shapes_of(model.state_dict())
    written = joined(pending(theirs), table_of(family, model.config))
    convert = getattr(single_file_utils, CONVERTERS[family][1])
    state = {each.key: torch.empty(each.shape, device="meta") for each in written}
    assert shapes_of(convert(state)) == theirs
    for prefix in (UNET, "", "diffusion_model."):
        file = read_single_file({prefix + k: v for k, v in stored(written).items()}, "it")
        part = file.parts["transformer"]
        assert {key: each.shape for key, each in part.tensors.items()} == theirs
        assert (file.unknown, file.leftovers) == ([], {})
        assert part.class_name == CONVERTERS[family][0]
        told = {k: tuple(v) if isinstance(v, list) else v for k, v in part.raw.items()}
        own = {**model.config, "_class_name": part.class_name}
        assert {k: own[k] for k in told} == told
        assert set(own) - set(told) <= {
            "_use_default_values",
            "_diffusers_version",
            "_name_or_path",
        }
        assert file.kind == f"single file of {name}, transformer alone"


@pytest.mark.parametrize("family", CONVERTERS)
def test_values_come_where_diffusers_puts_them(torch, family):
    """One block of each kind, as wide as diffusers takes for granted, with narrow inputs."""
    from diffusers.loaders import single_file_utils

    settings = {
        FLUX: {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
        FLUX_2: {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "axes_dims_rope": (4, 4, 4, 4)},
        HUNYUAN: {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
        SD_3: PUBLISHED["SD 3 3.5 medium"][1]
        | {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
        | {"dual_attention_layers": (0,), "pos_embed_max_size": 4},
        WAN: {"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 8, "text_dim": 6},
    }[family]
    model = on_meta(torch, family, settings)
    rng = np.random.default_rng(0)
    own = {
        key: rng.standard_normal((shape[0], *(min(n, 2) for n in shape[1:]))).astype(np.float32)
        for key, shape in shapes_of(model.state_dict()).items()
    }
    table = table_of(family, model.config)
    written = {
        each.key: each.produce()
        for each in joined([PendingTensor.of(k, v) for k, v in own.items()], table)
    }
    state = {key: torch.from_numpy(value) for key, value in written.items()}
    theirs = getattr(single_file_utils, CONVERTERS[family][1])(state)
    assert theirs.keys() == own.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value.numpy(), own[key], err_msg=key)
    back, odd = split({key: StoredTensor.of(value) for key, value in written.items()}, table)
    assert odd == []
    assert back.keys() == own.keys()
    for key, tensor in back.items():
        assert tensor.shape == own[key].shape
        np.testing.assert_array_equal(tensor.read(), own[key], err_msg=key)


def test_what_does_not_fit_together_is_told():
    table = {"fused": Rows({"a": 1, "b": 3}), "last": Rows({"c": 1}, swapped=True)}
    tensors = pending({"a.weight": (2, 4), "b.weight": (6, 4), "c.bias": (2,)})
    assert {t.key: t.shape for t in joined(tensors, table)} == {
        "fused.weight": (8, 4),
        "last.bias": (2,),
    }
    with pytest.raises(OutputError, match=r"fused\.weight of a single file holds a, b, whose"):
        joined(pending({"a.weight": (2, 4)}), table)
    with pytest.raises(OutputError, match=r"fused\.weight of a single file holds a, b, whose"):
        joined(pending({"a.weight": (2, 4), "b.weight": (4, 4)}), table)
    with pytest.raises(OutputError, match=r"d\.weight has no place"):
        joined(pending({"d.weight": (2, 4)}), table)
    for key, rows in (("fused.weight", 6), ("last.bias", 3)):
        with pytest.raises(ValueError, match="rows of"):
            split({key: StoredTensor("F32", (rows,), nothing)}, table)
    shapes = {"double_blocks.0.img_mod.lin.weight": (6, 1), "img_in.weight": (1, 4)}
    with pytest.raises(CheckpointError, match="sizes of its transformer cannot be told"):
        read_single_file(stored(pending(shapes)), "it")
