"""MAFT+, FC-CLIP and OpenCLIP checkpoints travel under their published names, bit by bit.

The names and shapes are written down here by themselves, from the published key tables.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from conceptax.cli import convert
from conceptax.converters import (
    CheckpointError,
    OutputError,
    inspect_checkpoint,
    load_maft_plus,
    load_open_clip,
    load_pytorch,
    save_maft_plus,
    save_pytorch,
)
from conceptax.converters.formats.segmentation import TEACHER, clip_config, maft_plus_config
from conceptax.converters.parameters import OneKey
from conceptax.converters.tensors import tensor_specs
from conceptax.flax_models.maft_plus import MaftPlus, MaftPlusConfig

DEPTHS = (3, 3, 27, 3)


@dataclasses.dataclass
class Sizes:
    """What the published tables leave open."""

    dims: tuple[int, ...]
    width: int  # of the text tower
    layers: int
    embed: int
    mlp_head: bool
    hidden: int = 256
    encoder_ffn: int = 1024
    decoder_ffn: int = 2048
    queries: int = 100
    vocabulary: int = 49408
    context: int = 77
    classes: int = 171


BASE = Sizes((128, 256, 512, 1024), 640, 12, 640, False)
LARGE = Sizes((192, 384, 768, 1536), 768, 16, 768, True)
# The keys of the Base and the Large model with widths of a few numbers.
SHRUNK = {
    "hidden": 32,
    "encoder_ffn": 6,
    "decoder_ffn": 10,
    "queries": 3,
    "vocabulary": 11,
    "context": 5,
    "classes": 7,
}
SMALL_BASE = Sizes((2, 4, 6, 10), 16, 12, 16, False, **SHRUNK)
SMALL_LARGE = Sizes((2, 4, 6, 12), 16, 16, 16, True, **SHRUNK)


def pair(name, weight, bias=None):
    return {f"{name}.weight": weight, f"{name}.bias": (weight[0],) if bias is None else bias}


def attention(name, width):
    return {
        f"{name}.in_proj_weight": (3 * width, width),
        f"{name}.in_proj_bias": (3 * width,),
        **pair(f"{name}.out_proj", (width, width)),
    }


def clip_keys(s):
    keys = {
        "positional_embedding": (s.context, s.width),
        "text_projection": (s.width, s.embed),
        "logit_scale": (),
        "token_embedding.weight": (s.vocabulary, s.width),
        **pair("ln_final", (s.width,)),
    }
    for i in range(s.layers):
        block = f"transformer.resblocks.{i}"
        keys |= pair(f"{block}.ln_1", (s.width,)) | pair(f"{block}.ln_2", (s.width,))
        keys |= attention(f"{block}.attn", s.width)
        keys |= pair(f"{block}.mlp.c_fc", (4 * s.width, s.width))
        keys |= pair(f"{block}.mlp.c_proj", (s.width, 4 * s.width))
    trunk = "visual.trunk"
    keys |= pair(f"{trunk}.stem.0", (s.dims[0], 3, 4, 4)) | pair(f"{trunk}.stem.1", (s.dims[0],))
    for n, (dim, depth) in enumerate(zip(s.dims, DEPTHS, strict=True)):
        stage = f"{trunk}.stages.{n}"
        if n:
            keys |= pair(f"{stage}.downsample.0", (s.dims[n - 1],))
            keys |= pair(f"{stage}.downsample.1", (dim, s.dims[n - 1], 2, 2))
        for j in range(depth):
            block = f"{stage}.blocks.{j}"
            keys |= {f"{block}.gamma": (dim,)} | pair(f"{block}.conv_dw", (dim, 1, 7, 7))
            keys |= pair(f"{block}.norm", (dim,))
            keys |= pair(f"{block}.mlp.fc1", (4 * dim, dim))
            keys |= pair(f"{block}.mlp.fc2", (dim, 4 * dim))
    last = s.dims[-1]
    keys |= pair(f"{trunk}.head.norm", (last,))
    if s.mlp_head:
        keys |= pair("visual.head.mlp.fc1", (2 * s.embed, last))
        keys["visual.head.mlp.fc2.weight"] = (s.embed, 2 * s.embed)
    else:
        keys["visual.head.proj.weight"] = (s.embed, last)
    return keys


def pixel_decoder_keys(s):
    width, keys = s.hidden, {}
    for n, channels in enumerate(s.dims[:0:-1]):
        keys |= pair(f"input_proj.{n}.0", (width, channels, 1, 1))
        keys |= pair(f"input_proj.{n}.1", (width,))
    keys["transformer.level_embed"] = (3, width)
    for n in range(6):
        layer = f"transformer.encoder.layers.{n}"
        keys |= pair(f"{layer}.self_attn.sampling_offsets", (192, width))
        keys |= pair(f"{layer}.self_attn.attention_weights", (96, width))
        keys |= pair(f"{layer}.self_attn.value_proj", (width, width))
        keys |= pair(f"{layer}.self_attn.output_proj", (width, width))
        keys |= pair(f"{layer}.norm1", (width,)) | pair(f"{layer}.norm2", (width,))
        keys |= pair(f"{layer}.linear1", (s.encoder_ffn, width))
        keys |= pair(f"{layer}.linear2", (width, s.encoder_ffn))
    keys |= {"adapter_1.weight": (width, s.dims[0], 1, 1)} | pair("adapter_1.norm", (width,))
    keys |= {"layer_1.weight": (width, width, 3, 3)} | pair("layer_1.norm", (width,))
    return keys | pair("mask_features", (width, width, 1, 1))


def predictor_keys(s):
    width, keys = s.hidden, {}
    for n in range(9):
        for kind, inner in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"transformer_{kind}_attention_layers.{n}"
            keys |= attention(f"{layer}.{inner}", width) | pair(f"{layer}.norm", (width,))
        layer = f"transformer_ffn_layers.{n}"
        keys |= pair(f"{layer}.linear1", (s.decoder_ffn, width))
        keys |= pair(f"{layer}.linear2", (width, s.decoder_ffn)) | pair(f"{layer}.norm", (width,))
    keys |= pair("decoder_norm", (width,))
    keys |= {f"query_{name}.weight": (s.queries, width) for name in ("feat", "embed")}
    keys["level_embed.weight"] = (3, width)
    for name, out in (("mask_embed", width), ("class_embed", s.embed)):
        for n, size in enumerate((width, width, out)):
            keys |= pair(f"{name}.layers.{n}", (size, width))
    keys |= pair("_mask_pooling_proj.0", (width,)) | pair("_mask_pooling_proj.1", (width, width))
    return keys | {"logit_scale": ()}


def prefixed(prefix, keys):
    return {prefix + key: shape for key, shape in keys.items()}


def transfer_keys(s):
    return {
        **attention("cdt.cross_atten.multihead_attn", s.embed),
        **pair("cdt.cross_atten.norm", (s.embed,)),
        **pair("cdt.cross_atten.MLP", (s.embed, s.embed)),
    }


def model_keys(s):
    return {
        **prefixed("backbone.clip_model.", clip_keys(s)),
        **prefixed("sem_seg_head.pixel_decoder.", pixel_decoder_keys(s)),
        **prefixed("sem_seg_head.predictor.", predictor_keys(s)),
        "void_embedding.weight": (1, s.embed),
        **transfer_keys(s),
    }


def all_keys(s):
    teacher = prefixed("backbone_t.clip_model.", clip_keys(s))
    return {**model_keys(s), **teacher, "criterion.empty_weight": (s.classes + 1,)}


def synthetic(shapes, seed=0):
    rng = np.random.default_rng(seed)
    tensors = {key: np.asarray(rng.standard_normal(s, np.float32)) for key, s in shapes.items()}
    if "criterion.empty_weight" in tensors:
        tensors["criterion.empty_weight"][:] = 1
        tensors["criterion.empty_weight"][-1] = 0.1
    return tensors


def same_bits(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].shape == right[key].shape, key
        assert left[key].dtype == right[key].dtype, key
        assert left[key].tobytes() == right[key].tobytes(), key


@pytest.mark.parametrize(
    ("sizes", "count", "clip", "config"),
    [(BASE, 1297, 493, MaftPlusConfig.base()), (LARGE, 1397, 543, MaftPlusConfig.large())],
    ids=["base", "large"],
)
def test_published_names_and_sizes(sizes, count, clip, config):
    """Our names and shapes are the published ones, and the sizes are read from them."""
    shapes = all_keys(sizes)
    assert (len(shapes), len(clip_keys(sizes))) == (count, clip)
    assert (len(pixel_decoder_keys(sizes)), len(predictor_keys(sizes))) == (117, 184)
    keys = OneKey()
    model = nnx.eval_shape(lambda: MaftPlus(config, rngs=keys))
    assert {spec.key: spec.shape for spec in tensor_specs(model)} == model_keys(sizes)
    assert maft_plus_config(shapes, source="file") == config
    panoptic = maft_plus_config(shapes, form="panoptic", token_order="raster", source="file")
    assert panoptic == dataclasses.replace(config, form="panoptic", token_order="raster")
    assert clip_config(clip_keys(sizes), source="file") == config.clip_config


@pytest.fixture(scope="module")
def published(torch, tmp_path_factory):
    """Both models with small widths, as detectron2 would have written them."""
    folder = tmp_path_factory.mktemp("published")
    files = {}
    for name, sizes in (("base", SMALL_BASE), ("large", SMALL_LARGE)):
        tensors = synthetic(all_keys(sizes))
        files[name] = folder / f"{name}.pth", tensors, sizes
        as_torch = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
        extras = {"optimizer": {"state": {0: {"step": 3}}}, "iteration": 60000}
        torch.save({"model": as_torch, **extras}, files[name][0])
    return files


def read_pickle(torch, path):
    stored = torch.load(path, weights_only=True)
    assert set(stored) == {"model"}
    return {key: value.numpy() for key, value in stored["model"].items()}


@pytest.mark.parametrize("name", ["base", pytest.param("large", marks=pytest.mark.slow)])
def test_round_trip_is_bit_exact(name, published, torch, tmp_path):
    path, tensors, sizes = published[name]
    model = load_maft_plus(path)
    kernel = model.backbone.clip_model.visual.trunk.stages[2].blocks[26].conv_dw.kernel[...]
    key = "backbone.clip_model.visual.trunk.stages.2.blocks.26.conv_dw.weight"
    np.testing.assert_array_equal(kernel, tensors[key].transpose(2, 3, 1, 0))
    teacher = load_open_clip(path, prefix=TEACHER)
    save_maft_plus(model, tmp_path / "out.pth", teacher=teacher, classes=sizes.classes)
    same_bits(read_pickle(torch, tmp_path / "out.pth"), tensors)

    save_maft_plus(model, tmp_path / "out.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    same_bits(written, {key: tensors[key] for key in model_keys(sizes)})
    again = load_maft_plus(tmp_path / "out.safetensors")
    assert nnx.graphdef(again) == nnx.graphdef(model)


def test_a_folder_keeps_the_options(published, tmp_path):
    path, tensors, sizes = published["base"]
    model = load_maft_plus(path, form="panoptic", token_order="raster")
    save_pytorch(model, tmp_path / "folder")
    again = load_pytorch(tmp_path / "folder")
    assert isinstance(again, MaftPlus)
    assert again.config == model.config
    assert (again.cdt.form, again.cdt.token_order) == ("panoptic", "raster")
    written = safetensors.numpy.load_file(tmp_path / "folder/model.safetensors")
    same_bits(written, {key: tensors[key] for key in model_keys(sizes)})


def test_half_precision_travels(published, torch, tmp_path):
    path, tensors, _ = published["base"]
    model = load_maft_plus(path, param_dtype=jnp.bfloat16)
    save_maft_plus(model, tmp_path / "half.pth")
    stored = torch.load(tmp_path / "half.pth", weights_only=True)["model"]
    key = "sem_seg_head.predictor.query_feat.weight"
    assert stored[key].dtype == torch.bfloat16
    expected = torch.from_numpy(tensors[key]).to(torch.bfloat16)
    assert torch.equal(stored[key], expected)
    assert load_maft_plus(tmp_path / "half.pth").void_embedding.embedding.dtype == jnp.bfloat16


def test_bare_dict_without_teacher_and_with_extras(published, torch, tmp_path):
    _, tensors, sizes = published["base"]
    bare = {k: torch.from_numpy(np.array(tensors[k])) for k in model_keys(sizes)}
    bare["something.else"] = torch.zeros(2)
    torch.save({**bare, "note": "hello"}, tmp_path / "bare.pth")
    save_maft_plus(load_maft_plus(tmp_path / "bare.pth"), tmp_path / "out.pth")
    same_bits(
        read_pickle(torch, tmp_path / "out.pth"), {key: tensors[key] for key in model_keys(sizes)}
    )
    with pytest.raises(CheckpointError, match=r"bare.pth holds no OpenCLIP model .*visual.trunk"):
        load_open_clip(tmp_path / "bare.pth", prefix=TEACHER)


def test_fc_clip_gets_a_transfer_that_does_nothing(published, torch, tmp_path):
    _, tensors, sizes = published["base"]
    own = {k: v for k, v in tensors.items() if not k.startswith(("cdt.", "backbone_t."))}
    path = tmp_path / "fcclip.pth"
    torch.save({"model": {k: torch.from_numpy(np.array(v)) for k, v in own.items()}}, path)
    model = load_maft_plus(path)
    assert model.config.form == model.cdt.form == "panoptic"
    rows = jax.random.normal(jax.random.key(0), (3, sizes.embed))
    image = jax.random.normal(jax.random.key(1), (1, 2, 2, sizes.embed))
    np.testing.assert_array_equal(model.cdt(rows, image)[0], rows)
    np.testing.assert_array_equal(
        model.void_embedding.embedding[...], tensors["void_embedding.weight"]
    )


def test_open_clip_files(published, torch, tmp_path):
    """`open_clip_pytorch_model.bin` and `.safetensors`, and what open_clip writes in training."""
    _, tensors, sizes = published["large"]
    own = {key: tensors[f"{TEACHER}{key}"] for key in clip_keys(sizes)}
    safetensors.numpy.save_file(own, tmp_path / "open_clip_pytorch_model.safetensors")
    as_torch = {key: torch.from_numpy(np.array(value)) for key, value in own.items()}
    torch.save(as_torch, tmp_path / "open_clip_pytorch_model.bin")
    wrapped = {f"module.{key}": value for key, value in as_torch.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "epoch_3.pt")
    for path in sorted(tmp_path.iterdir()):
        model = load_open_clip(path)
        save_pytorch(model, tmp_path / "out", force=True)
        same_bits(safetensors.numpy.load_file(tmp_path / "out/model.safetensors"), own)
    assert load_pytorch(tmp_path / "out").config == model.config


def test_files_are_told_apart_by_their_names(published, torch, tmp_path):
    """`load_pytorch`, `convert` and `inspect` need not be told which loader a file is for."""
    path, tensors, sizes = published["base"]
    own = {key: tensors[f"{TEACHER}{key}"] for key in clip_keys(sizes)}
    safetensors.numpy.save_file(own, tmp_path / "clip.safetensors")
    for source, keys, prefix in (
        (path, model_keys(sizes), ""),
        (tmp_path / "clip.safetensors", clip_keys(sizes), TEACHER),
    ):
        convert.run(convert.Command(source, tmp_path / "out", force=True))
        written = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
        same_bits(written, {key: tensors[prefix + key] for key in keys})
    assert load_pytorch(path, form="panoptic").config.form == "panoptic"
    with pytest.raises(ValueError, match="load_open_clip, which takes no form"):
        load_pytorch(tmp_path / "clip.safetensors", form="panoptic")

    found = inspect_checkpoint(path)
    assert found.kind == "single file of MaftPlus" and found.healthy
    assert found.parts[0].parameters == sum(tensors[key].size for key in model_keys(sizes))
    assert f"{TEACHER}logit_scale" in found.leftovers["tensors that are not loaded"]
    del own["text_projection"]
    safetensors.numpy.save_file(own, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="holds no OpenCLIP model"):
        inspect_checkpoint(tmp_path / "clip.safetensors")


class TestErrors:
    def test_missing_and_misshaped(self, published, torch, tmp_path):
        _, tensors, sizes = published["base"]
        broken = {k: torch.from_numpy(np.array(tensors[k])) for k in model_keys(sizes)}
        del broken["cdt.cross_atten.norm.weight"]
        broken["void_embedding.weight"] = torch.zeros(1, 3)
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(CheckpointError) as error:
            load_maft_plus(tmp_path / "broken.pth")
        assert "1 missing: cdt.cross_atten.norm.weight" in str(error.value)
        assert "void_embedding.weight [1, 3] instead of [1, 16]" in str(error.value)

    def test_other_files(self, torch, tmp_path):
        torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="holds no OpenCLIP model with a ConvNeXt"):
            load_maft_plus(tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="is not a file"):
            load_maft_plus(tmp_path / "absent.pth")
        clip = {f"backbone.clip_model.{k}": s for k, s in clip_keys(SMALL_BASE).items()}
        with pytest.raises(CheckpointError, match="is no checkpoint of MAFT"):
            maft_plus_config(clip, source="clip.pth")

    def test_output(self, published, tmp_path):
        model = load_maft_plus(published["base"][0])
        with pytest.raises(ValueError, match=r"writes .pth and .safetensors, received 'out.bin'"):
            save_maft_plus(model, tmp_path / "out.bin")
        (tmp_path / "out.pth").write_text("mine")
        with pytest.raises(OutputError, match="already exists"):
            save_maft_plus(model, tmp_path / "out.pth")
        assert (tmp_path / "out.pth").read_text() == "mine"
        model.void_embedding.embedding[...] = model.void_embedding.embedding[...] * jnp.nan
        with pytest.raises(OutputError, match="NaN"):
            save_maft_plus(model, tmp_path / "out.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


def test_sizes_that_shapes_do_not_tell(published):
    """Heads: a config of one's own."""
    path = published["base"][0]
    config = load_maft_plus(path).config
    text = dataclasses.replace(config.clip_config.text_config, heads=4)
    other = dataclasses.replace(
        config,
        clip_config=dataclasses.replace(config.clip_config, text_config=text),
        transfer_heads=2,
    )
    model = load_maft_plus(path, config=other)
    assert model.backbone.clip_model.transformer.resblocks[0].attn.heads == 4
    assert model.cdt.cross_atten.multihead_attn.heads == 2
