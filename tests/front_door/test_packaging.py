"""The list of packages, the tree, the wheel and the weight of `import conceptax`."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOMS = ("flax_models", "methods", "kernels", "converters")


@pytest.fixture(scope="module")
def setuptools_table(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]


def tree_files(repository: Path) -> dict[str, Path]:
    """Path inside the wheel -> path in the tree, for every source file and asset."""
    front_door = repository / "src" / "conceptax"
    files = {f"conceptax/{path.relative_to(front_door)}": path for path in front_door.rglob("*")}
    for room in ROOMS:
        for path in (repository / room).rglob("*"):
            files[f"conceptax/{path.relative_to(repository)}"] = path
    return {
        name: path
        for name, path in files.items()
        if path.is_file()
        and (path.suffix in (".py", ".cc", ".cu", ".h") or name.startswith("conceptax/assets/"))
    }


def test_every_sub_package_is_listed(repository, setuptools_table):
    folders = {
        str(Path(name).parent).replace("/", ".")
        for name in tree_files(repository)
        if name.endswith(".py")
    }
    assert sorted(setuptools_table["packages"]) == sorted(folders)


def test_every_sub_package_has_an_init(repository):
    files = tree_files(repository)
    without = {
        str(Path(name).parent)
        for name in files
        if name.endswith(".py") and f"{Path(name).parent}/__init__.py" not in files
    }
    assert not without


def test_kernels_init_is_empty(repository):
    # transformers and diffusers look for a top-level `kernels`; with the repository root on the
    # path they find ours, which must then hold nothing that they could take for theirs.
    assert (repository / "kernels" / "__init__.py").read_bytes() == b""


def test_wheel_holds_every_file(repository, tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"  # a copy, since building writes into the tree
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((repository / name).read_bytes())
    for path in tree_files(repository).values():
        copy = source / path.relative_to(repository)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    script = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    wheel = tmp_path / result.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    held = {name: size for name, size in sizes.items() if name.startswith("conceptax/")}
    assert held == {name: path.stat().st_size for name, path in tree_files(repository).items()}
    assert any(name.endswith("licenses/LICENSE") for name in sizes)


def test_import_is_light():
    heavy = ("torch", "transformers", "diffusers", "jax_triton", "jax", "flax")
    script = (
        "import sys, conceptax; assert conceptax.__version__; "
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_rooms_leave_torch_alone(setuptools_table):
    packages = setuptools_table["packages"]
    script = (
        "import importlib, sys\n"
        f"for name in {packages!r}: importlib.import_module(name)\n"
        "print(*[name for name in ('torch', 'diffusers', 'jax_triton') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_benchmarks_use_what_users_use(repository):
    # The commands are no library; import-linter does not see the benchmarks.
    imported = {
        name
        for path in (repository / "benchmarks").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
        )
    }
    assert any(name.startswith("conceptax.reporting.") for name in imported)
    assert not [name for name in imported if name.startswith("conceptax.cli")]
