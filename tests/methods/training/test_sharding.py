"""Models on a mesh: what their compiled programs move, and what leaves the mesh for a folder."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
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
GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather")


@pytest.fixture(scope="module")
def unet():
    """Cross-attention's keys and values train, as in Custom Diffusion; the rest is frozen."""
    model = UNet2DConditionModel(CONFIG, rngs=nnx.Rngs(0))
    return training.split_trainable(model, ("*.attn2.to_k.*", "*.attn2.to_v.*"))


def compiled(unet, mesh, of=jax.grad):
    """The optimized program of a loss, or `of` it; the frozen weights on the mesh."""
    graphdef, *params = unet
    rules = RULES["UNet2DConditionModel"]
    trained, frozen = jax.device_put(
        params, [training.shard_tree(tree, mesh, rules) for tree in params]
    )
    text_states = jnp.ones((8, 5, CONFIG.cross_attention_dim))
    batch = (jnp.ones((8, 8, 8, 4)), jnp.zeros(8, jnp.int32), text_states)
    placed = jax.device_put(batch, training.shard_batch(batch, mesh))

    def loss(trained, frozen, *inputs):
        return jnp.mean(nnx.merge(graphdef, trained, frozen)(*inputs) ** 2)

    with jax.set_mesh(mesh):
        program = jax.jit(of(loss)).lower(trained, frozen, *placed).compile()
    return program.as_text() or "", frozen


def gathered(text):
    """Shapes of all results of all-gathers in a program."""
    return [tuple(int(n) for n in dims.split(",") if n) for _, dims in GATHER.findall(text)]


def spread(weights):
    return [leaf for leaf in jax.tree.leaves(weights) if not leaf.is_fully_replicated]


def test_frozen_weights_stay_split_over_the_tensor_axis(unet):
    """Products are split there: activations are summed, and no weight is put together."""
    text, weights = compiled(unet, training.make_mesh(1, 1, 8))
    linear = {leaf.shape for leaf in spread(weights) if leaf.ndim == 2}
    assert linear and "all-reduce" in text
    assert not linear & set(gathered(text))


@pytest.mark.parametrize(("of", "most"), [(lambda loss: loss, 1.05), (jax.grad, 2)])
def test_frozen_weights_are_put_together_at_most_once_a_pass_over_fsdp(unet, of, most):
    """Once to predict and once more on the way back, never to update what does not train."""
    text, weights = compiled(unet, training.make_mesh(1, 8), of)
    whole, shapes = spread(weights), gathered(text)
    assert shapes, "nothing is gathered: the weights are not split"
    assert sum(map(np.prod, shapes)) <= most * sum(leaf.size for leaf in whole)


def test_nothing_is_gathered_over_the_data_axis(unet):
    text, weights = compiled(unet, training.make_mesh(8))
    assert not spread(weights)
    assert not gathered(text)


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
