"""Custom calls into C++ and CUDA: numbers, building, lowering.

The GPU's sources also run here, on an emulator of the instructions they use (`cuda_emulator.h`).
"""

import ctypes
import os
import pickle
import re
import stat
import subprocess
import sys
from types import SimpleNamespace

import gna_machines
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gna_oracle import attention, operands, random_case
from jax.experimental import serialize_executable

from conceptax.kernels import gna
from conceptax.kernels.gna import cuda, platforms
from conceptax.kernels.gna.cuda import build
from conceptax.kernels.gna.problem import windows_of
from conceptax.kernels.gna.tiles import cut

needs_compiler = pytest.mark.skipif(build.compiler("cpu") is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(build.compiler("gpu") is None, reason="no nvcc")

# Against float64, by dtype: rounding of the results, and of the probabilities where these are
# rounded to 16 bits; float32 sums a few hundred terms of size one.
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def settings(case: dict) -> dict:
    return {name: case[name] for name in ("kernel_size", "stride", "dilation", "is_causal")}


def rounded(arrays, dtype):
    """All but the last of arrays, which is the log-sum-exp's cotangent, rounded."""

    def one(x):
        return None if x is None else jnp.asarray(x, dtype)

    return [*map(one, arrays[:-1]), jnp.asarray(arrays[-1])]


def with_gradients(case, arrays):
    """Output, log-sum-exp and gradients of the inputs that are present."""
    *inputs, d_output, d_lse = arrays

    def call(q, k, v, ak, av):
        return gna.neighborhood_attention(
            q,
            k,
            v,
            additional_keys=ak,
            additional_values=av,
            return_lse=True,
            implementation="cuda",
            **settings(case),
        )

    results, pull = jax.vjp(call, *inputs)
    return *results, *(x for x in pull((d_output, d_lse)) if x is not None)


def check(case, heads, arrays, dtype="float32"):
    arrays = rounded(arrays, dtype)
    got = with_gradients(case, arrays)
    expected = attention(case, *(None if x is None else np.asarray(x, float) for x in arrays))
    for n, (one, other) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(
            np.asarray(one, float),
            other,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * max(1, np.abs(other).max()),
            err_msg=f"result {n} of {case} {heads}",
        )


@needs_compiler
@pytest.mark.parametrize(("dim", "value_dim"), [(5, 37), (64, 80)])
def test_any_head_dimension(dim, value_dim):
    """Whatever is left over from whole vectors and register blocks."""
    rng = np.random.default_rng(dim)
    case = random_case(rng, rank=2)
    heads = {"batch": 1, "heads": 2, "kv_heads": 1, "dim": dim, "value_dim": value_dim}
    heads["additional"] = 1
    check(case, heads, operands(rng, case, heads))


@needs_compiler
def test_extreme_numbers():
    """Scores in the hundreds, NaN, infinities and subnormal numbers."""
    case = {"kernel_size": 4, "stride": 1, "dilation": 1, "is_causal": False, "layout": (9,)}
    heads = {"batch": 1, "heads": 1, "kv_heads": 1, "dim": 4, "value_dim": 4, "additional": 0}
    arrays = operands(np.random.default_rng(0), case, heads)
    arrays[0] = arrays[0] * 300
    got = with_gradients(case | {"is_causal": True}, rounded(arrays, jnp.float32))
    expected = attention(
        case | {"kernel_size": (4,), "stride": (1,), "dilation": (1,), "is_causal": (True,)},
        *arrays,
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-3, atol=1e-3)
    values = [0.0, -0.0, 1e-7, 6e-8, 3e-8, 65504.0, 65519.0, 65520.0, 1e9, -np.inf, np.nan, 1 / 3]
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        # A key alone hands its value through.
        v = jnp.asarray(values, jnp.float32).astype(dtype).reshape(-1, 1, 1, 1)
        ones = jnp.ones_like(v)
        out = gna.neighborhood_attention(ones, ones, v, kernel_size=1, implementation="cuda")
        np.testing.assert_array_equal(np.asarray(out, float), np.asarray(v, float))
    nan = jnp.asarray(arrays[1]).at[0, 3].set(jnp.nan)
    q, v = (jnp.asarray(arrays[n]) for n in (0, 2))
    out = gna.neighborhood_attention(q, nan, v, kernel_size=3, implementation="cuda")
    seen = jnp.isnan(out).any((0, 2, 3))
    np.testing.assert_array_equal(seen, [n in (2, 3, 4) for n in range(9)])


@needs_compiler
def test_transformations():
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 2, 6, 5, 2, 8)), jnp.float32) for _ in "qkv")

    def attend(implementation):
        def one(q, k, v):
            out = gna.neighborhood_attention(
                q, k, v, kernel_size=(3, 4), stride=(2, 1), implementation=implementation
            )
            return (out**2).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(one, argnums=(0, 1, 2)), in_axes=(0, None, 1)))

    args = q, k[0], jnp.moveaxis(v, 0, 1)
    expected = attend("reference")(*args)
    for one, other in zip(
        jax.tree.leaves(attend("cuda")(*args)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_in_shard_map():
    """Spread over batch and heads, with jax's checks of what varies between devices."""
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (2, 9, 2, 8))

    def loss(x):
        return (
            gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="cuda") ** 2
        ).sum()

    def spread(x):
        return jax.lax.psum(loss(x), ("data", "heads"))

    rows = jax.P("data", None, "heads")
    run = jax.shard_map(spread, mesh=mesh, in_specs=rows, out_specs=jax.P())
    got = jax.jit(jax.value_and_grad(run))(x)
    for one, other in zip(got, jax.value_and_grad(loss)(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_results_are_the_same_each_time():
    """Threads share work out as they come, sums do not depend on it."""
    case = {"kernel_size": (7, 5), "stride": (2, 1), "dilation": (1, 2), "is_causal": (False, True)}
    case["layout"] = (20, 24)
    heads = {"batch": 1, "heads": 2, "kv_heads": 1, "dim": 16, "value_dim": 16, "additional": 2}
    arrays = rounded(operands(np.random.default_rng(0), case, heads), jnp.float32)
    first = with_gradients(case, arrays)
    for _ in range(3):
        for one, other in zip(with_gradients(case, arrays), first, strict=True):
            np.testing.assert_array_equal(one, other)


# Small, and between them: every kernel size, queries that all see a tile of keys, several tiles of
# keys and of queries, dimensions short of the kernel's, groups of unequal length, and additional
# keys for more than one tile.
EMULATED = [
    (1, (140,), (100,), (40,), (1,), (False,), (2, 1), (24, 32), 0, "float16"),
    (1, (150,), (150,), (1,), (1,), (False,), (1, 1), (8, 8), 5, "bfloat16"),
    (2, (9, 13), (3, 5), (1, 2), (2, 1), (False, True), (2, 2), (32, 16), 0, "bfloat16"),
    (1, (12, 12), (9, 8), (3, 8), (1, 1), (False, False), (1, 1), (64, 40), 3, "float16"),
    (
        1,
        (3, 5, 7),
        (2, 3, 2),
        (1, 2, 1),
        (1, 1, 3),
        (True, False, False),
        (2, 1),
        (8, 8),
        70,
        "float16",
    ),
    (
        1,
        (4, 4, 8),
        (4, 2, 5),
        (2, 2, 1),
        (1, 2, 1),
        (False, False, True),
        (1, 1),
        (128, 128),
        1,
        "bfloat16",
    ),
]


@pytest.mark.parametrize(
    ("n", "hopper"), [*((n, False) for n in range(len(EMULATED))), (2, True), (4, True)]
)
def test_gpu_sources(n, hopper):
    """On sm_80, and on sm_90a by its own kernels (more in `test_hopper.py`)."""
    batch, layout, *window, (heads, kv_heads), (dim, value_dim), additional, dtype = EMULATED[n]
    names = ("kernel_size", "stride", "dilation", "is_causal")
    case = {"layout": layout} | dict(zip(names, window, strict=True))
    sizes = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": dim,
        "value_dim": value_dim,
        "additional": additional,
    }
    with gna_machines.emulator(hopper):
        check(case, sizes, operands(np.random.default_rng(n), case, sizes), dtype)


def test_tiles_fit_the_windows():
    # One stride group of 8 x 8 queries fills a tile of 64, two one of 128.
    windows = windows_of((64, 64), (32, 32), (8, 8))
    cpu, forward, query, key, *boxes = cuda.tiles(windows)
    assert cpu == query == (8, 8)
    assert sorted(forward) == [8, 16]
    assert np.prod(key) == 64
    sizes = [tokens for one in cuda.BOXES for tokens in one[:2]]
    assert [np.prod(shape) for shape in boxes] == sizes
    assert all(shape[-1] >= cuda.LEAST_SEEN for shape in boxes[1::2])
    for length, kernel, stride, dilation, causal in [(37, 5, 2, 3, False), (20, 9, 4, 1, True)]:
        (window,) = windows_of((length,), kernel, stride, dilation, causal)
        for tile in (1, 4, 7):
            for by_key in (False, True):
                mask = window.mask().T if by_key else window.mask()
                groups = [
                    range(g, length, dilation)[n : n + tile]
                    for g in range(dilation)
                    for n in range(0, len(range(g, length, dilation)), tile)
                ]
                met = sum(int(mask[list(one)].any(0).sum()) for one in groups)
                found = cut(window, tile, inverse=by_key)
                assert (found.tiles, found.met, found.steps) == (len(groups), met, met)


def problem(**changes):
    shape = {"head_dim": 8, "dtype": jnp.float16} | changes
    x = jnp.zeros((1, 6, 2, shape["head_dim"]), shape["dtype"])
    return gna.describe(x, x, x, kernel_size=3)


def test_what_it_cannot_do(monkeypatch):
    assert "multiples of 8 up to 128, not 12" in gna.unsupported(
        "cuda", problem(head_dim=12), "gpu"
    )
    assert "up to 128, not 136" in gna.unsupported("cuda", problem(head_dim=136), "gpu")
    assert "not float32" in gna.unsupported("cuda", problem(dtype=jnp.float32), "gpu")
    assert "not on a tpu" in gna.unsupported("cuda", problem(), "tpu")
    monkeypatch.setattr(build, "capabilities", lambda: ["75", "90"])
    with platforms.traced_for("gpu"):
        x = jnp.zeros((1, 6, 2, 8), jnp.float16)
        with pytest.raises(NotImplementedError, match=r"capability 8\.0 or later, not 7\.5"):
            gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="cuda")
    monkeypatch.setattr(build, "capabilities", lambda: ["80", "90"])
    for name in ("CXX", "NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "nvcc was not found" in gna.unsupported("cuda", problem(), "gpu")
    x = jnp.zeros((1, 6, 2, 8))
    with pytest.raises(NotImplementedError, match=re.escape("no C++ compiler was found (g++, ")):
        gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="cuda")
    with pytest.raises(RuntimeError, match="cannot be built: no C"):
        build.build("cpu")


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """A compiler that writes its arguments to its output, and fails while `broken` exists."""
    path = tmp_path / "c++"
    path.write_text(
        "#!/bin/sh\n"
        "for last; do :; done\n"
        'if [ "$last" = --version ]; then echo fake 1; exit; fi\n'
        f"if [ -e {tmp_path}/broken ]; then echo it is broken >&2; exit 1; fi\n"
        f"echo run >> {tmp_path}/runs\n"
        'echo "$@" > "$last"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_libraries_are_built_once(fake_compiler, monkeypatch):
    def runs():
        return (fake_compiler / "runs").read_text().count("run")

    library = build.build("cpu")
    assert library.parent == fake_compiler / "cache" / "conceptax"
    assert "gna_cpu.cc" in library.read_text() and "-std=c++17" in library.read_text()
    assert build.build("cpu") == library and runs() == 1
    # It may be for another machine, whose compiler and headers lie elsewhere.
    moved = (fake_compiler / "c++").rename(fake_compiler / "moved")
    monkeypatch.setenv("CXX", str(moved))
    monkeypatch.setattr(build.jax.ffi, "include_dir", lambda: "/elsewhere")
    assert build.build("cpu") == library and runs() == 1
    # Another machine, and other sources, have libraries of their own.
    monkeypatch.setattr(build, "_instructions", lambda: "sse")
    assert build.build("cpu") != library and runs() == 2
    monkeypatch.setattr(build, "SOURCES", fake_compiler)
    (fake_compiler / "gna_cpu.cc").write_text("// other")
    other = build.build("cpu")
    assert other != library and runs() == 3
    (fake_compiler / "gna_cpu.cc").write_text("// another")
    assert build.build("cpu") != other and runs() == 4
    assert len(list(library.parent.iterdir())) == 4  # nothing else is left behind


@pytest.mark.parametrize(
    "damage", [b"", b"\x7fELF", None], ids=["empty", "truncated", "other bytes"]
)
def test_a_damaged_library_is_built_again(fake_compiler, damage):
    library = build.build("cpu")
    whole = library.read_bytes()
    other = library.with_name(library.name.replace(library.stem[-20:], "0" * 20))
    for path in (library, other):
        path.write_bytes(whole[::-1] if damage is None else damage)
    again = build.build("cpu")
    assert (fake_compiler / "runs").read_text().count("run") == 2
    assert list(library.parent.iterdir()) == [again]
    assert again.read_bytes().startswith(b"-std=c++17")  # as written, if not to the same place


def test_a_library_that_does_not_load_says_what_to_do(fake_compiler):
    """What the fake compiler writes is no library, which the system says when it is to map it."""
    with pytest.raises(RuntimeError, match=r"could not be loaded: .*\. If .*XDG_CACHE_HOME"):
        build.load.__wrapped__("cpu")


def test_compilers_with_arguments_and_without_a_program(fake_compiler, monkeypatch):
    path = fake_compiler / "c++"
    monkeypatch.setenv("CXX", f"{path} -m64 '-DA=b c'")
    monkeypatch.setenv("NVCC", f"{path} -ccbin g++")
    assert build.compiler("cpu") == build.compiler("gpu") == str(path)
    assert build.command("cpu")[:3] == [str(path), "-m64", "-DA=b c"]
    assert build.command("gpu", "80")[:3] == [str(path), "-ccbin", "g++"]
    first = build.build("cpu")
    assert first.read_text().startswith("-m64 -DA=b c -std=c++17")
    monkeypatch.setenv("CXX", str(path))
    assert build.build("cpu") != first
    for value, words in (
        ("/nowhere/g++ -O3", "/nowhere/g++ is not an exec"),
        ("g++ '", "No closin"),
    ):
        monkeypatch.setenv("CXX", value)
        with pytest.raises(
            RuntimeError, match=f"cannot be built: CXX={re.escape(value)} .*{re.escape(words)}"
        ):
            build.build("cpu")
        assert build.missing("cpu") is None  # said when it is built, not passed over in silence


def test_a_home_that_is_unknown(fake_compiler, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", unknown)
    with pytest.raises(RuntimeError, match=r"no place .* home directory\. XDG_CACHE_HOME chooses"):
        build.build("cpu")


def test_a_failed_build_says_why(fake_compiler):
    (fake_compiler / "broken").touch()
    with pytest.raises(RuntimeError, match=r"did not compile with\n[^\n]*gna_cpu.cc[^\n]*\nit is"):
        build.build("cpu")
    assert not list((fake_compiler / "cache" / "conceptax").iterdir())


@pytest.mark.parametrize("writes", [":", ': > "$last"'], ids=["nothing", "an empty file"])
def test_a_compiler_that_writes_no_library(fake_compiler, writes):
    path = fake_compiler / "c++"
    asked = '[ "$last" = --version ] && exit'
    path.write_text(f"#!/bin/sh\nfor last; do :; done\n{asked}\n{writes}\n")
    with pytest.raises(RuntimeError, match=re.escape(f"{path} reported success but wrote no lib")):
        build.build("cpu")
    assert not list((fake_compiler / "cache" / "conceptax").iterdir())


def test_a_library_of_something_else(fake_compiler, monkeypatch):
    """One that the system loads but that lacks the calls is refused like one that it does not."""
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: ctypes.PyDLL(None))
    with pytest.raises(RuntimeError, match=r"could not be loaded: .*GnaForward"):
        build.load.__wrapped__("cpu")


def test_what_a_killed_build_left_is_cleared(fake_compiler):
    folder = fake_compiler / "cache" / "conceptax"
    for name in ("build-old", "build-new"):
        (folder / name).mkdir(parents=True)
    os.utime(folder / "build-old", (0, 0))
    library = build.build("cpu")
    assert sorted(folder.iterdir()) == [folder / "build-new", library]


@needs_compiler
def test_lowers_for_a_gpu_without_one():
    x = jnp.zeros((1, 6, 2, 8), jnp.float16)

    def loss(x):
        out = gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="cuda")
        return out.sum().astype(jnp.float32)

    lowered = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert cuda.FORWARD in lowered and cuda.BACKWARD in lowered
    assert "windows = dense<[6, 3, 1, 1, 0]>" in lowered


def test_builds_for_all_gpus_of_the_process(monkeypatch):
    devices = [SimpleNamespace(compute_capability=x) for x in ("9.0", "8.0", "9.0", "10.3")]
    monkeypatch.setattr(jax, "local_devices", lambda backend: devices)
    assert build.architectures() == "80,90a,103a"
    monkeypatch.setenv("NVCC", "true")
    options = build.command("gpu", build.architectures())
    assert "-gencode=arch=compute_90a,code=sm_90a" in options
    assert sum(one.startswith("-gencode") for one in options) == 3
    devices.clear()
    with pytest.raises(RuntimeError, match="there is no NVIDIA GPU"):
        build.command("gpu", build.architectures())


@needs_nvcc
@pytest.mark.parametrize("architecture", [pytest.param("80", marks=pytest.mark.slow), "90a"])
def test_compiles_for_gpus(architecture, tmp_path):
    library = ctypes.CDLL(str(build.build("gpu", architecture, tmp_path)))
    assert library.GnaForward and library.GnaBackward and library.GnaInitialize


RUN = """
import pickle, sys
import jax
import numpy as np
from jax.experimental import serialize_executable
import conceptax.kernels.gna
folder = sys.argv[1]
with open(f"{folder}/program", "rb") as file:
    run = serialize_executable.deserialize_and_load(
        *pickle.load(file), execution_devices=jax.devices()[:1]
    )
np.save(f"{folder}/gradient.npy", run(np.load(f"{folder}/x.npy")))
"""


@needs_compiler
def test_a_program_compiled_elsewhere_runs_after_the_import(tmp_path):
    """Its calls are known without anything being traced."""

    def loss(x):
        return gna.neighborhood_attention(x, x, x, kernel_size=3, implementation="cuda").sum()

    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
    step = jax.jit(jax.grad(loss)).lower(x).compile()
    (tmp_path / "program").write_bytes(pickle.dumps(serialize_executable.serialize(step)))
    np.save(tmp_path / "x.npy", x)
    later = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True
    )
    assert later.returncode == 0, later.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "gradient.npy"), step(x))


def test_importing_builds_nothing(fake_compiler):
    cuda.prepare_what_is_built()
    assert not (fake_compiler / "runs").exists()


def test_preparing_by_name():
    gna.prepare("xla")
    with pytest.raises(ValueError, match=r"implementation must be one of.*received 'cxx'"):
        gna.prepare("cxx")
