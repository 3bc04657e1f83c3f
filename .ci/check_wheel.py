"""Check an installed wheel: import every module, and compare its assets with the source tree's.

Usage: python check_wheel.py SOURCE_TREE, from a directory outside the source tree.
"""

import importlib
import pkgutil
import sys
from importlib import resources
from pathlib import Path


def main(source: Path) -> None:
    """Exit with a message unless the installed wheel is whole; `source` is the source tree."""
    import conceptax

    home = Path(conceptax.__file__).resolve().parent
    if home.is_relative_to(source):
        sys.exit(f"conceptax came from the source tree ({home}), not from the wheel")

    modules = [module.name for module in pkgutil.walk_packages(conceptax.__path__, "conceptax.")]
    for name in modules:
        if not name.endswith("__main__"):
            importlib.import_module(name)

    wanted = _files(source / "src" / "conceptax" / "assets")
    with resources.as_file(resources.files(conceptax).joinpath("assets")) as assets:
        found = _files(assets)
    if wanted != found:
        sys.exit(f"assets differ; in one only: {sorted(wanted.items() ^ found.items())}")
    print(f"wheel: {len(modules)} modules import, {len(found)} asset files are there")


def _files(folder: Path) -> dict[str, int]:
    """Relative path -> size of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
