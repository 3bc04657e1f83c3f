"""Every public module is in the API pages, once, and has tests."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOMS = {
    "src/conceptax": "conceptax",
    "flax_models": "conceptax.flax_models",
    "methods": "conceptax.methods",
    "kernels": "conceptax.kernels",
    "converters": "conceptax.converters",
}


def public_modules(repository):
    """The dotted names of what programs import: all but the command line and empty packages."""
    for room, package in ROOMS.items():
        for path in sorted((repository / room).rglob("*.py")):
            parts = path.relative_to(repository / room).with_suffix("").parts
            if parts[-1] == "__init__" and path.read_bytes():
                parts = parts[:-1]
            if parts[:1] != ("cli",) and not any(part.startswith("_") for part in parts):
                yield ".".join((package, *parts))


def test_every_public_module_is_in_the_api_pages(repository):
    text = "".join(path.read_text() for path in (repository / "docs" / "api").glob("*.md"))
    described = Counter(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert described == Counter(public_modules(repository))


# Modules that no test imports and none is named for: what runs them.
RUNS = {
    "cli/test_cli.py": ("text", "reporting.demo", "reporting.runs"),
    "cli/test_segment.py": (
        "methods.segmentation.segmenter",
        "reporting.segmentation",
    ),
    "converters/test_pytorch.py": (
        "converters.components",
        "converters.formats",
    ),
    "flax_models/test_metric_models.py": (
        "flax_models.blip",
        "flax_models.blip_2",
        "flax_models.layers.bert",
        "flax_models.layers.encoder",
    ),
    "flax_models/test_models.py": (
        "flax_models",
        "flax_models.pipelines",
        "flax_models.layers.embeddings",
        "flax_models.layers.transformer",
    ),
    "kernels/gna/test_api.py": ("kernels.gna.backends.reference",),
    "kernels/gna/test_block_sparse.py": (
        "kernels.gna.backends.lists",
        "kernels.gna.backends.reference_lists",
    ),
    "kernels/gna/test_transformations.py": (
        "kernels.gna.context_parallel",
        "kernels.gna.merge",
        "kernels.gna.varying",
    ),
    "kernels/gna/test_triton.py": (
        "kernels.gna.backends.triton_geometry",
        "kernels.gna.backends.triton_kernels",
    ),
    "kernels/gna/test_simulator.py": ("reporting.gna_pictures",),
    "methods/erasing/test_erasing.py": ("methods.settings", "methods.text"),
    "methods/erasing/test_sage.py": ("methods.vectors",),
    "methods/evaluation/test_evaluation.py": ("reporting.evaluating", "reporting.evaluation"),
    "methods/personalization/test_class_diffusion.py": (
        "methods.class_diffusion",
        "methods.personalization.baselines",
    ),
    "methods/segmentation/test_maft_plus.py": ("methods.maft_plus",),
    "methods/subjects/test_subjects.py": ("methods.subjects",),
}


def imported(path):
    """The dotted names that a test file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{each.name}" for each in node.names))
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names)


def test_every_public_module_has_tests(repository):
    """Of its name, or of its folder's, at its place or above; or else some that import it."""
    tests = repository / "tests"
    files = {path.relative_to(tests): path for path in tests.rglob("test_*.py")}
    direct = {name for path in files.values() for name in imported(path)}
    untested = set()
    for module in public_modules(repository):
        *folder, name = module.split(".")[1:] or ["conceptax"]
        mirrored = {
            Path(*folder[:depth], f"test_{each}.py")
            for each in (name, *folder[-1:])
            for depth in range(1, len(folder) + 1)
        }
        if module not in direct and not mirrored & files.keys():
            untested.add(module)
    run = {f"conceptax.{name}" for names in RUNS.values() for name in names}
    assert untested == run
    assert {Path(path) for path in RUNS} <= files.keys()
