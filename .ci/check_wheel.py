"""Check an installed wheel: import every module, and compare its data with the source tree's.

Usage: python check_wheel.py SOURCE_TREE, from a directory outside the source tree.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

# What is no Python: folders in the wheel, and where they lie in the source tree.
DATA = {"assets": "src/conceptax/assets", "kernels/gna/cuda": "kernels/gna/cuda"}

# Modules that kernels for other machines need, and that may be missing on this one.
OPTIONAL = ("triton",)


def main(source: Path) -> None:
    """Exit with a message unless the installed wheel is whole; `source` is the source tree."""
    import conceptax

    home = Path(conceptax.__file__).resolve().parent
    if home.is_relative_to(source):
        sys.exit(f"conceptax came from the source tree ({home}), not from the wheel")

    modules = [module.name for module in pkgutil.walk_packages(conceptax.__path__, "conceptax.")]
    left_out = [name for name in modules if not _imports(name)]

    for name, folder in DATA.items():
        wanted, found = _files(source / folder), _files(home / name)
        if wanted != found:
            sys.exit(f"{name} differs; in one only: {sorted(wanted.items() ^ found.items())}")
        print(f"wheel: {len(found)} files are in {name}")
    print(f"wheel: {len(modules) - len(left_out)} modules import; left out: {left_out}")


def _imports(name: str) -> bool:
    """Import a module; False where it needs what is optional."""
    if name.endswith("__main__"):
        return False
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        return False
    return True


def _files(folder: Path) -> dict[str, int]:
    """Relative path -> size of every file below a folder but Python's."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
