"""What measures on a GPU, as far as it goes without one: checks, baseline, table."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention

from conceptax.kernels import gna


@pytest.fixture(scope="module")
def benchmarks(repository):
    names = ("_gna_checks", "_gpu_table", "_natten")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_kernels_are_measured_without_flax(repository):
    program = "import sys; sys.path.insert(0, 'benchmarks'); sys.modules['flax'] = None; import gna"
    subprocess.run([sys.executable, "-c", program], cwd=repository, check=True)


@pytest.mark.parametrize("number", [1, 4])
def test_what_is_exact(benchmarks, number):
    """Float64 of the benchmark beside that of the tests, which are written apart."""
    checks = benchmarks._gna_checks
    _, problem = list(checks.small_problems(["float32"], 8))[number]
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(x.shape) for x in checks.shapes_of(problem)]
    d_output, d_lse, *operands = given
    settings = {
        new: tuple(getattr(window, old) for window in problem.windows)
        for old, new in [("length", "layout")]
        + [(same, same) for same in ("kernel_size", "stride", "dilation", "is_causal")]
    }
    operands += [None] * (5 - len(operands))
    wanted = attention(settings, *operands, d_output, d_lse)
    found = checks.exact(problem, *given)
    for one, other in zip(found, wanted, strict=False):
        np.testing.assert_allclose(one, other, atol=1e-12)
    assert np.isnan(checks.worst([0.1, float("nan"), 0.2]))


def test_natten_is_given_tiles(benchmarks):
    """Tile by tile, and within each, the first dimension fastest."""
    natten = benchmarks._natten
    layout, tile = (4, 16, 8), (2, 8, 8)
    x = jax.ShapeDtypeStruct((1, *layout, 1, 128), jnp.bfloat16)
    problem = gna.describe(x, x, x, kernel_size=(2, 8, 8))
    assert natten.unsupported(problem) is None
    numbers = np.arange(4 * 16 * 8).reshape(1, *layout, 1, 1)
    tiled = np.asarray(natten.permuted(problem, numbers)).ravel()
    for place in np.ndindex(layout):
        (r0, t0), (r1, t1), (r2, t2) = map(divmod, place, tile)
        at = (r0 + 2 * (r1 + 2 * r2)) * 128 + t0 + 2 * (t1 + 8 * t2)
        assert tiled[at] == numbers[(0, *place, 0, 0)]
    again = natten.restored(problem, natten.permuted(problem, numbers))
    np.testing.assert_array_equal(again, numbers)
    odd = gna.describe(*[jax.ShapeDtypeStruct((1, 17, 8, 1, 128), jnp.bfloat16)] * 3, kernel_size=3)
    assert "whole tiles" in natten.unsupported(odd)


def test_the_last_lines(benchmarks, tmp_path, capsys, monkeypatch):
    def check(name, **told):
        one = {"implementation": name, "passed": True, "error_over_allowed": {}, "left_out": {}}
        content = {"checks": [one | told]}
        (tmp_path / f"check_{name}.json").write_text(json.dumps(content))

    check("cuda", error_over_allowed={"a": 0.5, "b": float("nan")}, passed=False)
    check("triton", failed="it broke", passed=False)
    head = {"name": "FLUX-4K", "dtype": "bfloat16", "pass": "forward", "layout": [256, 256]}
    head |= {"heads": 24, "head_dim": 128, "pairs_bound": 10.24}
    rows = [
        head | {"contender": name, "median_s": seconds}
        for name, seconds in [
            ("jax.nn cudnn, dense", 0.0974),
            ("NATTEN, cooperative", 0.0081),
            ("NATTEN, ping-pong", 0.0079),
            ("cuda", 0.0075),
        ]
    ]
    rows.append(head | {"contender": "triton", "absent": "it broke"})
    (tmp_path / "sparse.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "stride_1.json").write_text('{"rows": [')  # cut short
    (tmp_path / "clocks.csv").write_text("345, 3201, 70, 30, 0\n1980, 3201, [N/A], 50, 99\n19")
    (tmp_path / "not_done").write_text("check_triton (1)\n")

    def told(*more):
        monkeypatch.setattr(sys, "argv", ["table", str(tmp_path), *more])
        benchmarks._gpu_table.main()
        return capsys.readouterr().out

    assert told("--able", "cuda", "triton", "xla").split() == ["cuda"]
    lines = told()
    assert "cuda: 2 problems WRONG (b)" in lines and "triton: FAILED: it broke" in lines
    assert "attention: JSONDecodeError" in lines and "1980 MHz" in lines
    assert lines.endswith("NOT DONE: check_triton (1)\n")
    (tmp_path / "stride_1.json").unlink()
    (row,) = (line for line in told().splitlines() if line.startswith("FLUX-4K"))
    assert row.split()[3:] == ["97.40", "7.90", "7.50", "687.19", "7.90"]
