"""NATTEN itself as the oracle: its Flex backend runs on a CPU; `make test-natten` brings it.

What NATTEN refuses is left out: windows of one key, and 1-D causal windows of the whole layout. It
has no cotangent of the log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import operands, random_case

from conceptax.kernels import gna

IMPLEMENTATIONS = ("reference", "xla", "cuda")

# layout, kernel_size, stride, dilation, is_causal; B, Hq, Hkv, D, A
CASES = {
    "row": ((64,), (9,), (1,), (1,), (False,), (2, 2, 2, 8, 0)),
    "even row": ((61,), (8,), (4,), (3,), (False,), (1, 2, 1, 16, 0)),
    "causal row": ((50,), (12,), (5,), (2,), (True,), (1, 2, 2, 8, 7)),
    "blocks": ((12, 16), (6, 8), (6, 8), (1, 1), (False, False), (1, 2, 2, 32, 0)),
    "image": ((11, 14), (4, 7), (2, 3), (2, 1), (False, False), (2, 4, 2, 8, 5)),
    "causal image": ((10, 9), (3, 4), (3, 2), (1, 2), (True, True), (1, 3, 1, 8, 0)),
    "mixed image": ((9, 13), (5, 6), (4, 1), (1, 2), (False, True), (1, 2, 2, 16, 3)),
    "whole image": ((6, 7), (6, 7), (1, 1), (1, 1), (False, False), (1, 2, 2, 8, 3)),
    "video": ((5, 8, 9), (2, 4, 5), (1, 2, 5), (2, 1, 1), (False, False, False), (1, 2, 2, 8, 0)),
    "causal video": (
        (4, 6, 10),
        (4, 3, 4),
        (2, 3, 1),
        (1, 2, 2),
        (True, False, False),
        (1, 4, 2, 8, 6),
    ),
}
RANDOM = 30

# Both sides sum a few hundred float32 terms of size one, in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def drawn(seed):
    """A random problem that NATTEN takes."""
    rng = np.random.default_rng(seed)
    while True:
        case = random_case(rng, rank=1 + seed % 3)
        whole_row = case["is_causal"] == (True,) and case["kernel_size"] == case["layout"]
        if min(case["kernel_size"]) >= 2 and not whole_row:
            break
    kv_heads = int(rng.integers(1, 3))
    sizes = (
        int(rng.integers(1, 3)),
        kv_heads * int(rng.integers(1, 4)),
        kv_heads,
        int(rng.choice([8, 16])),
        int(rng.choice([0, 5])),
    )
    return *case.values(), sizes


@pytest.fixture(scope="module")
def natten(torch):
    """natten.functional, its gradients let loose on a CPU."""
    functional = pytest.importorskip("natten.functional")
    from torch.nn.attention import flex_attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_validate_device", lambda *args, **options: None)
        yield functional


@functools.cache
def problem(name):
    """Settings of a problem and its operands, the cotangent of the output last."""
    *window, sizes = drawn(name) if isinstance(name, int) else CASES[name]
    batch, heads, kv_heads, dim, additional = sizes
    names = ("layout", "kernel_size", "stride", "dilation", "is_causal")
    case = dict(zip(names, window, strict=True))
    sizes = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": dim,
        "value_dim": dim,
        "additional": additional,
    }
    arrays = operands(np.random.default_rng(0), case, sizes)[:-1]
    return {key: value for key, value in case.items() if key != "layout"}, arrays


@functools.cache
def original(natten, name):
    """NATTEN's output, log-sum-exp and gradients."""
    import torch

    settings, (*inputs, d_output) = problem(name)
    tensors = [None if x is None else torch.tensor(x, requires_grad=True) for x in inputs]
    q, k, v, ak, av = tensors
    output, lse = natten.neighborhood_attention_generic(
        q,
        k,
        v,
        **settings,
        backend="flex-fna",
        return_lse=True,
        additional_keys=ak,
        additional_values=av,
        attention_kwargs={"backend": "flex-fmha"},
    )
    output.backward(torch.tensor(d_output))
    results = [output.detach(), lse.detach(), *(x.grad for x in tensors if x is not None)]
    return [x.numpy() for x in results]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*CASES, *range(RANDOM)])
def test_matches_natten(natten, name, implementation):
    settings, (*inputs, d_output) = problem(name)
    q, k, v, *additional = (None if x is None else jnp.asarray(x) for x in inputs)
    reason = gna.unsupported(implementation, gna.describe(q, k, v, *additional, **settings))
    if reason is not None:
        pytest.skip(reason)

    def attend(q, k, v, ak, av):
        return gna.neighborhood_attention(
            q,
            k,
            v,
            additional_keys=ak,
            additional_values=av,
            return_lse=True,
            implementation=implementation,
            **settings,
        )

    def run(inputs, d_output):
        results, pull = jax.vjp(attend, *inputs)
        return *results, *pull((d_output, jnp.zeros_like(results[1])))

    got = jax.jit(run)((q, k, v, *additional), jnp.asarray(d_output))
    expected = original(natten, name)
    for one, other in zip([x for x in got if x is not None], expected, strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE, err_msg=str(problem(name)[0]))
