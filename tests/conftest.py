"""Set the platform before anything imports jax, and share what every test file may need."""

import os
from importlib.metadata import version

# Eight host devices for the sharding tests; programs that run briefly are compiled with fewer
# passes and the simpler emitters, which takes half the time (jax 0.11 has those no longer, and XLA
# ends a process whose flag it does not know); one thread per library in each worker.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Compilation is most of the tests' time: workers, files and later runs share what was compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="session")
def torch():
    """The torch module; the test skips where it is not installed."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def golden():
    """Path of a golden-vector file by name; the test skips where the vectors are not at hand."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / "golden" / name
        if not path.exists():
            pytest.skip(f"golden vectors {name} are not beside the repository")
        return path

    return find


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT
