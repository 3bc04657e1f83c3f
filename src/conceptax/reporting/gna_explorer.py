"""The explorer of neighborhood attention: one HTML file that simulates what is chosen in it.

Its simulator is a port of `conceptax.kernels.gna` to JavaScript (assets/explorer/simulator.js), and
takes every constant, presets, models, GPUs, tiles and rates, from here.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import conceptax
from conceptax.kernels.gna.presets import OF_ALL_LAYERS, PRESETS, Preset, Transformer
from conceptax.kernels.gna.simulator.schedule import GPUS
from conceptax.kernels.gna.simulator.search import ALL_PRODUCTS, ALL_ROWS
from conceptax.kernels.gna.simulator.simulate import BYTES
from conceptax.kernels.gna.simulator.whole_model import RATES

SOURCES = Path(conceptax.__file__).parent / "assets" / "explorer"


def explorer_constants() -> dict[str, Any]:
    """What the page's simulator is given, in plain values, by the names that it knows."""
    presets = {name: PRESETS[name] for name in OF_ALL_LAYERS}  # the page draws one window
    models = {preset.model.name: preset.model for preset in presets.values() if preset.model}
    return _plain(
        {
            "gpus": {name: _fields(gpu) for name, gpu in GPUS.items()},
            "rates": {
                name: {what: rate._asdict() for what, rate in rates._asdict().items()}
                for name, rates in RATES.items()
            },
            "models": {name: _fields(model) for name, model in models.items()},
            "presets": {name: _preset(preset) for name, preset in presets.items()},
            "bytes": BYTES,
            "all_rows": ALL_ROWS,
            "all_products": ALL_PRODUCTS,
        }
    )


def explorer_page() -> str:
    """The whole page, which needs nothing beside it."""
    page = (SOURCES / "explorer.html").read_text(encoding="utf-8")
    constants = json.dumps(explorer_constants(), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "explorer.css": (SOURCES / "explorer.css").read_text(encoding="utf-8"),
        "simulator.js": (SOURCES / "simulator.js").read_text(encoding="utf-8"),
        "constants": f"const CONSTANTS = {constants};\n".replace("</", "<\\/"),
        "explorer.js": (SOURCES / "explorer.js").read_text(encoding="utf-8"),
    }
    for name, text in parts.items():
        page = page.replace(f"/* {name} */", text, 1)
    return page


def _fields(each: Any) -> dict[str, Any]:
    return {field.name: getattr(each, field.name) for field in dataclasses.fields(each)}


def _preset(preset: Preset) -> dict[str, Any]:
    model = preset.model.name if isinstance(preset.model, Transformer) else None
    fields = _fields(preset) | {"model": model}
    del fields["layers"]
    return fields


def _plain(value: Any) -> Any:
    """Lists for tuples, and the fields' names as JavaScript writes them: head_dim is headDim."""
    if isinstance(value, Mapping):
        return {_camel(str(name)): _plain(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))
