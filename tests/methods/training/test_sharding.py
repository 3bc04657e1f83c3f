"""Models on a mesh: what their compiled programs move, and what leaves the mesh for a folder."""

import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled_models import sizes
from flax import nnx

from conceptax.flax_models.dit_transformer_2d import (
    DiTTransformer2DConfig,
    DiTTransformer2DModel,
)
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig, WanTransformer3DModel
from conceptax.methods import training
from conceptax.methods.training.sharding import RULES

CONFIG = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=(32,),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    cross_attention_dim=64,
    attention_head_dim=8,
)
FLUX = FluxTransformer2DConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=8,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=True,
    axes_dims_rope=(2, 2, 4),
)
DIT = DiTTransformer2DConfig(
    sample_size=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=8,
)
WAN = WanTransformer3DConfig(
    num_attention_heads=8,
    attention_head_dim=8,
    text_dim=64,
    freq_dim=64,
    ffn_dim=128,
    num_layers=2,
)
GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather")


class Split(NamedTuple):
    """A model in two parts, of which the first trains, and a batch of eight."""

    rules: Any
    graphdef: Any
    params: tuple[Any, Any]
    batch: tuple[Any, ...]

    def predict(self, trained, frozen, *inputs):
        return nnx.merge(self.graphdef, trained, frozen)(*inputs)

    def loss(self, *given):
        return jnp.mean(self.predict(*given) ** 2)

    @property
    def all(self):
        return *self.params, *self.batch

    def on(self, mesh):
        """Weights and batch where they belong."""
        where = [training.shard_tree(tree, mesh, self.rules) for tree in self.params]
        return (
            *jax.device_put(list(self.params), where),
            *jax.device_put(self.batch, training.shard_batch(self.batch, mesh)),
        )


def unet():
    """Cross-attention's keys and values train, as in Custom Diffusion; the rest is frozen."""
    model = UNet2DConditionModel(CONFIG, rngs=nnx.Rngs(0))
    graphdef, *params = training.split_trainable(model, ("*.attn2.to_k.*", "*.attn2.to_v.*"))
    text_states = jnp.ones((8, 5, CONFIG.cross_attention_dim))
    batch = (jnp.ones((8, 8, 8, 4)), jnp.zeros(8, jnp.int32), text_states)
    return Split(RULES["UNet2DConditionModel"], graphdef, tuple(params), batch)


def drawn(leaf):
    """Values for a leaf, none of them zero."""
    random = np.random.default_rng(leaf.size)
    return jnp.asarray(0.1 * random.standard_normal(leaf.shape, np.float32))


def of_values(kind, config, *batch):
    """A transformer whose image queries train, at eight timesteps."""
    graphdef, *params = training.split_trainable(sizes(kind, config), ("*.to_q.*",))
    latents, *condition = batch
    return Split(
        RULES[kind.__name__],
        graphdef,
        tuple(jax.tree.map(drawn, params)),
        (latents, jnp.linspace(100.0, 900.0, 8), *condition),
    )


def flux():
    """Of each kind of block there are two, lest one be all."""
    latents, states, pooled = map(drawn, map(np.empty, ((8, 4, 4, 16), (8, 8, 64), (8, 64))))
    condition = JointTextCondition(states, pooled, jnp.full(8, 3.5))
    return of_values(FluxTransformer2DModel, FLUX, latents, condition)


def dit():
    return of_values(DiTTransformer2DModel, DIT, drawn(np.empty((8, 8, 8, 4))), jnp.arange(8))


def wan():
    latents, states = map(drawn, map(np.empty, ((8, 2, 4, 4, 16), (8, 8, 64))))
    return of_values(WanTransformer3DModel, WAN, latents, states)


@pytest.fixture(scope="module", params=[unet, flux])
def model(request):
    return request.param()


def compiled(model, mesh, of=jax.grad):
    """The optimized program of a loss, or `of` it; the frozen weights on the mesh."""
    given = model.on(mesh)
    with jax.set_mesh(mesh):
        program = jax.jit(of(model.loss)).lower(*given).compile()
    return program.as_text() or "", given[1]


def gathered(text):
    """Shapes of all results of all-gathers in a program."""
    return [tuple(int(n) for n in dims.split(",") if n) for _, dims in GATHER.findall(text)]


def spread(weights):
    return [leaf for leaf in jax.tree.leaves(weights) if not leaf.is_fully_replicated]


def test_frozen_weights_stay_split_over_the_tensor_axis(model):
    """Products are split there: activations are summed, and no weight is put together."""
    text, weights = compiled(model, training.make_mesh(1, 1, 8))
    linear = {leaf.shape for leaf in spread(weights) if leaf.ndim == 2}
    assert linear and "all-reduce" in text
    assert not linear & set(gathered(text))


@pytest.mark.parametrize(("of", "most"), [(lambda loss: loss, 1.05), (jax.grad, 2)])
def test_frozen_weights_are_put_together_at_most_once_a_pass_over_fsdp(model, of, most):
    """Once to predict and once more on the way back, never to update what does not train."""
    text, weights = compiled(model, training.make_mesh(1, 8), of)
    whole, shapes = spread(weights), gathered(text)
    assert shapes, "nothing is gathered: the weights are not split"
    assert sum(map(np.prod, shapes)) <= most * sum(leaf.size for leaf in whole)
    # One at a time: no all-gather yields more than the largest weight of a block.
    assert max(map(np.prod, shapes)) <= max(leaf.size for leaf in whole)


def test_nothing_is_gathered_over_the_data_axis(model):
    text, weights = compiled(model, training.make_mesh(8))
    assert not spread(weights)
    assert not gathered(text)


@pytest.mark.parametrize("make", [unet, flux, dit, wan])
def test_a_mesh_of_all_axes_predicts_what_one_device_does(make):
    model = make()
    given = model.on(training.make_mesh(2, 2, 2))
    received, expected = (jax.jit(model.loss)(*each) for each in (given, model.all))
    np.testing.assert_allclose(received, expected, rtol=1e-4)


def test_a_transformer_over_fsdp_is_that_of_one_device():
    """Its prediction, its loss and what a step makes of the weights that train."""
    model = flux()

    def step(trained, frozen, *inputs):
        def loss(trained):
            velocity = model.predict(trained, frozen, *inputs)
            return jnp.mean((velocity - inputs[0]) ** 2), velocity

        (value, velocity), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        return velocity, value, jax.tree.map(lambda p, g: p - g, trained, gradients)

    mesh = training.make_mesh(1, 8)
    given = model.on(mesh)
    with jax.set_mesh(mesh):
        program = jax.jit(step).lower(*given).compile()
        velocity, value, after = program(*given)
    assert all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in spread(given[:2]))
    expected = jax.jit(step)(*model.all)
    assert float(expected[1]) > 0.01
    for one, other in zip(
        jax.tree.leaves((velocity, value, after)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()), rtol=0)
    changes = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), after, given[0])
    assert min(jax.tree.leaves(changes)) > 0
    largest = max(leaf.size for leaf in spread(given[:2]))
    assert max(map(np.prod, gathered(program.as_text() or ""))) <= largest


def test_an_export_takes_a_tensor_at_a_time(tmp_path):
    """256 MiB on eight devices go to a file in the memory of a device's share and a tensor."""
    program = """
import resource, sys
import jax, jax.numpy as jnp
from flax import nnx
from conceptax.converters.parameters import pending
from conceptax.converters.files.safetensors_file import write_safetensors
from conceptax.converters.tensors import tensor_specs
from conceptax.methods import training

class Layers(nnx.Module):
    def __init__(self):
        keys = nnx.Rngs(0)
        self.layers = nnx.List([
            nnx.Linear(2048, 2048, use_bias=False, rngs=keys) for _ in range(16)
        ])

graphdef, tree = nnx.split(nnx.eval_shape(Layers))
tree = nnx.to_pure_dict(tree)
shardings = training.shard_tree(tree, training.make_mesh(1, 8))
ones = lambda: jax.tree.map(lambda leaf: jnp.ones(leaf.shape), tree)
params = jax.block_until_ready(jax.jit(ones, out_shardings=shardings)())
assert all(leaf.addressable_shards[0].data.nbytes == 2**21 for leaf in jax.tree.leaves(params))
model = nnx.merge(graphdef, params)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_safetensors(sys.argv[1], pending(model, tensor_specs(model), None), {})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.safetensors")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert (tmp_path / "model.safetensors").stat().st_size > 256 * 2**20
    assert float(ended.stdout) <= 256 / 8 + 16  # MiB
