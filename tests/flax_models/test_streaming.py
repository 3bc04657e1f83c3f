"""Streamed models: the same numbers, two blocks at a time."""

import gc
import mmap
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flow_toy import save_pipeline

import conceptax
from conceptax.converters import load_pytorch, merge_parts, save_pytorch
from conceptax.converters.errors import OutputError
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.layers.attention import GNA, with_attention
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.streaming import Deferred, StreamError, is_streamed, release, stream

CONFIG = FluxTransformer2DConfig(
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=(4, 4, 8),
)
TEXT = JointTextCondition(jnp.ones((2, 3, 12)), jnp.ones((2, 10)))
INPUTS = (jnp.ones((2, 4, 6, 4)), jnp.array([3.0, 700.0]), TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = FluxTransformer2DModel(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), nnx.state(model)
    )
    nnx.update(model, state)
    return save_pytorch(model, tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def expected(folder):
    graphdef, state = nnx.split(load_pytorch(folder))
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))(state, *INPUTS)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_streamed_model_computes_the_same(folder, expected, pinned):
    model = stream(load_pytorch(folder, sharding="mapped"), pinned=pinned)
    assert is_streamed(model) and not is_streamed(load_pytorch(folder))
    for _ in range(2):  # the second pass begins with what the first has brought
        np.testing.assert_allclose(model(*INPUTS), expected, rtol=1e-5, atol=1e-5)


def test_a_streamed_model_takes_another_attention(folder):
    settings = (None, GNA(3), GNA((2, 3)), None)
    whole = with_attention(load_pytorch(folder), settings)
    streamed = with_attention(load_pytorch(folder, stream=True), settings)
    np.testing.assert_allclose(streamed(*INPUTS), whole(*INPUTS), rtol=1e-5, atol=1e-5)
    assert np.abs(whole(*INPUTS) - load_pytorch(folder)(*INPUTS)).max() > 1e-3
    with pytest.raises(ValueError, match="has no choice of attention"):
        with_attention(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), GNA(3))


def test_two_blocks_are_in_memory_at_a_time(folder, monkeypatch):
    model = stream(load_pytorch(folder, sharding="mapped"), pinned=False)
    block = model.transformer_blocks[0].stream
    kept = sum(leaf.nbytes for leaf in block._split[0][3])
    most, run = 0, type(block).run

    def watched(self, index, *args, **kwargs):
        nonlocal most
        output = run(self, index, *args, **kwargs)
        gc.collect()
        most = max(most, sum(x.nbytes for x in jax.live_arrays()) - others)
        return output

    monkeypatch.setattr(type(block), "run", watched)
    others = sum(x.nbytes for x in jax.live_arrays())
    model(*INPUTS)
    assert 0 < most < 2.5 * kept  # of four


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_quantized_is_converted_as_it_is_brought(folder, tmp_path, pinned):
    name = "diffusion_pytorch_model.safetensors"
    content = {}
    for key, value in safetensors.numpy.load_file(folder / name).items():
        content[key] = value
        if value.ndim == 2:
            content[key] = (value * 4).astype(ml_dtypes.float8_e4m3fn)
            content[key.replace(".weight", ".weight_scale")] = np.full(len(value), 0.25, np.float32)
    shutil.copy(folder / "config.json", tmp_path)
    safetensors.numpy.save_file(content, tmp_path / name)
    model = stream(load_pytorch(tmp_path, sharding="streamed"), pinned=pinned)
    first = model.transformer_blocks[0].stream
    assert any(isinstance(leaf, Deferred) for leaf in first._split[0][3]) is not pinned
    whole = stream(load_pytorch(tmp_path, sharding="mapped"), pinned=False)
    # Where an array begins in memory decides in which order XLA sums.
    np.testing.assert_allclose(model(*INPUTS), whole(*INPUTS), rtol=1e-5, atol=2e-6)


def test_what_cannot_be_streamed_is_told(folder, tmp_path):
    model = stream(load_pytorch(folder, sharding="mapped"))
    with pytest.raises(StreamError, match=r"not inside jax\.jit"):
        jax.jit(lambda x: model(x, *INPUTS[1:]))(INPUTS[0])
    with pytest.raises(StreamError, match="has no blocks to stream"):
        stream(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    broken = load_pytorch(folder)
    kernel = broken.single_transformer_blocks[0].proj_mlp.kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.nan)
    with pytest.raises(StreamError, match=r"proj_mlp\.kernel of block 2 holds NaN"):
        stream(broken)(*INPUTS)


def test_pages_of_a_mapped_file_are_given_back(tmp_path):
    file = tmp_path / "numbers"
    np.arange(1 << 20, dtype=np.float32).tofile(file)
    with open(file, "rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(content, np.float32)[1000:].reshape(-1, 8).T

    def resident():
        with open("/proc/self/smaps") as maps:
            lines = maps.read().split(str(file))[1].splitlines()
        return int(next(line for line in lines if line.startswith("Rss")).split()[1])

    total = view.sum(dtype=np.float64)
    assert resident() > 3000
    release(view)
    assert resident() < 100
    assert view.sum(dtype=np.float64) == total


def test_a_streamed_pipeline_takes_no_parts_and_is_not_written(tmp_path):
    save_pipeline(tmp_path / "flux", "flux-schnell")
    pipeline = load_pytorch(tmp_path / "flux", stream=True)
    assert is_streamed(pipeline.transformer) and is_streamed(pipeline.text_encoder_2)
    with pytest.raises(ValueError, match="takes no parts: merge them first"):
        merge_parts(pipeline, tmp_path / "flux" / "vae")
    with pytest.raises(OutputError, match="is in its file already: copy that"):
        save_pytorch(pipeline, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="whose UNet is loaded whole"):
        load_pytorch(conceptax.bundled_model(), stream=True)
    options = {"num_inference_steps": 2, "height": 16, "width": 24}
    streamed = conceptax.text_to_image(pipeline, "a three", **options)
    whole = conceptax.text_to_image(load_pytorch(tmp_path / "flux"), "a three", **options)
    assert np.abs(streamed.astype(int) - whole.astype(int)).max() <= 1
    with pytest.raises(ValueError, match="is not guided away from a negative_prompt"):
        conceptax.text_to_image(pipeline, "a three", negative_prompt="red", **options)
