"""Neighborhood attention under `jax.jit` over a mesh: devices divide batch and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conceptax.kernels import gna

LAYOUT = (6, 5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    ("kv_heads", "additional", "gathers"),
    [(4, 0, False), (2, 3, False), (1, 0, True)],
    ids=["MHA", "GQA and additional keys", "MQA"],
)
def test_devices_divide_batch_and_heads(kv_heads, additional, gathers, implementation):
    rng = np.random.default_rng(0)

    def operand(tokens, heads):
        return jnp.asarray(rng.standard_normal((8, *tokens, heads, 8), np.float32))

    query, key, value = (operand(LAYOUT, heads) for heads in (4, kv_heads, kv_heads))
    given = [query, key, value]
    if additional:
        given += [operand((additional,), kv_heads) for _ in range(2)]

    def loss(query, key, value, additional_keys=None, additional_values=None):
        out, lse = gna.neighborhood_attention(
            query, key, value, kernel_size=3, stride=2, return_lse=True,
            additional_keys=additional_keys, additional_values=additional_values,
            implementation=implementation,
        )  # fmt: skip
        return (out**2).mean() + (lse**2).mean()

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def spread(x):
        heads = "tensor" if x.shape[-2] % 2 == 0 else None
        spec = PartitionSpec("data", *(None,) * (x.ndim - 3), heads)
        return jax.device_put(x, NamedSharding(mesh, spec))

    function = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(given)))))
    divided = [spread(x) for x in given]
    assert ("all-gather(" in function.lower(*divided).compile().as_text()) == gathers
    received, expected = function(*divided), function(*given)
    assert received[1][0].sharding.spec[0] == "data"
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)


def test_tokens_on_many_devices_are_gathered():
    mesh = jax.make_mesh((2,), ("tokens",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
    slab = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "tokens")))
    attend = jax.jit(lambda x: gna.neighborhood_attention(x, x, x, kernel_size=3))
    np.testing.assert_allclose(attend(slab), attend(x), atol=1e-6)
