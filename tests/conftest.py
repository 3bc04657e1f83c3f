"""Set the platform before anything imports jax, and share what every test file may need."""

import gc
import os
from importlib.metadata import version

# Eight host devices for the sharding tests; programs that run briefly are compiled with fewer
# passes, in one piece (for many cores XLA splits each in 32, a third more work on two) and by the
# simpler emitters, which takes half the time (jax 0.11 has those no longer, and XLA ends a process
# whose flag it does not know); one thread per library in each worker.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
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

# Imports make a million objects that live as long as the process. The collector passes them by: it
# rests until all test files are imported, and from then on looks at what tests make.
gc.disable()

# The files that take longest, the longest first (November 2026). Whole files go to workers, so one
# of these at the end would keep one worker busy while the others have nothing left.
LONGEST = (
    "cli/test_cli.py",
    "methods/training/test_processes.py",
    "methods/erasing/test_sage.py",
    "flax_models/test_models.py",
    "methods/erasing/test_erasing.py",
    "methods/erasing/test_unet_rivals.py",
    "kernels/gna/test_transformations.py",
    "kernels/gna/test_sweep.py",
    "methods/red_team/test_red_team.py",
    "methods/diffusion/test_text_to_image.py",
    "converters/formats/test_personalized.py",
    "methods/training/test_training.py",
    "methods/evaluation/test_evaluation.py",
    "kernels/gna/test_hopper.py",
    "kernels/gna/test_cuda.py",
    "converters/formats/test_compvis.py",
    "methods/diffusion/test_xl_methods.py",
    "cli/test_segment.py",
    "converters/formats/test_segmentation.py",
    "methods/personalization/test_class_diffusion.py",
    "methods/diffusion/test_text_to_video.py",
    "flax_models/pipelines/test_flow_pipelines.py",
    "flax_models/pipelines/test_video_pipelines.py",
    "methods/training/test_sharding.py",
    "kernels/gna/test_edges.py",
    "converters/test_inspection.py",
    "flax_models/test_hunyuan_video_transformer_3d.py",
    "flax_models/test_context_parallel.py",
    "cli/test_sample_videos.py",
    "flax_models/layers/test_tiling.py",
    "flax_models/test_dit_transformer_2d.py",
    "methods/segmentation/test_maft_plus.py",
    "studio/test_work.py",
    "cli/test_evaluate_suite.py",
    "converters/test_fuzz.py",
    "front_door/test_tutorials.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first; the others keep their order (with --no-loadscope-reorder)."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


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
