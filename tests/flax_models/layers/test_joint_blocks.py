"""Double and single blocks, one after the other, and the settings of their attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conceptax.flax_models.layers.attention import GNA
from conceptax.flax_models.layers.joint_attention import JointSequence
from conceptax.flax_models.layers.joint_blocks import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    of_blocks,
    through_blocks,
)

GRID, TEXT = (2, 3), 4


class Blocks(nnx.Module):
    """Two of each kind, every parameter random."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        init = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        self.remat = False
        self.transformer_blocks = nnx.List([FluxTransformerBlock(8, 2, None, **init) for _ in "12"])
        self.single_transformer_blocks = nnx.List(
            [FluxSingleTransformerBlock(8, 2, None, **init) for _ in "12"]
        )
        for _, node in nnx.iter_graph(self):
            if isinstance(node, nnx.Param):
                node.set_value(node[...] + 0.3 * rngs.normal(node.shape))


def test_double_blocks_then_single_ones_over_both():
    graphdef, params = nnx.split(Blocks())
    image, text, condition = (
        jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate(((2, 6, 8), (2, TEXT, 8), (2, 8)))
    )

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        first, behind = (JointSequence(GRID, text_first=first) for first in (True, False))
        given = (image, text, (condition,), (condition,))
        received = [through_blocks(model, *given, each) for each in (first, behind)]
        seen, words = image, text
        for block in model.transformer_blocks:
            seen, words = block(seen, words, condition, first)
        x = jnp.concatenate([words, seen], axis=1)
        for block in model.single_transformer_blocks:
            x = block(x, condition, first)
        return received, x[:, TEXT:]

    with jax.default_matmul_precision("highest"):
        received, expected = run(params)
    assert float(jnp.abs(expected - image).max()) > 0.1
    for each in received:  # without positions the order of the two does not matter
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-5)


def test_settings_go_to_double_blocks_first():
    window = GNA(window=2)
    assert of_blocks([window, None, None], 1, 2) == ((window,), (None, None))
    assert of_blocks(window, 1, 2) == ((window,), (window, window))
    with pytest.raises(ValueError, match="or 3, one per block, the 1 double blocks before the sin"):
        of_blocks([window], 1, 2)
