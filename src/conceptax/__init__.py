"""conceptax erases, learns and locates visual concepts in JAX.

Everything that most programs need is here, and is imported on first use, so that this module stays
light. Behind it are the rooms of the house:

* `conceptax.flax_models`: what computes. NNX modules, one architecture per file.
* `conceptax.methods`: what trains. Losses, pure steps, samplers, data, the training loop.
* `conceptax.kernels`: what is fast.
* `conceptax.converters`: what travels. PyTorch weights in and out.
* `conceptax.cli`: the `conceptax` command.
"""

import sys

from .errors import ConceptaxError
from .moved import MovedModules

TYPE_CHECKING = False  # which type checkers take for True; importing typing takes longer than this
if TYPE_CHECKING:
    from . import converters, flax_models, kernels, methods
    from .bundled import bundled_model, bundled_segmenter
    from .converters import load_pytorch as load
    from .converters import merge_parts
    from .converters import save_pytorch as save
    from .flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
    from .flax_models.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
    from .kernels.gna import neighborhood_attention
    from .kernels.gna.simulator import simulate
    from .methods.diffusion.text_to_image import text_to_image
    from .methods.diffusion.text_to_video import text_to_video
    from .methods.erasing import erase
    from .methods.evaluation import evaluate
    from .methods.personalization import personalize
    from .methods.segmentation.segmenter import segment
    from .methods.training import train

__version__ = "0.1.0"

# Public name -> module, and the name there if it is another one.
_LAZY = {
    "bundled_model": ("bundled",),
    "bundled_segmenter": ("bundled",),
    "load": ("converters", "load_pytorch"),
    "merge_parts": ("converters",),
    "save": ("converters", "save_pytorch"),
    "text_to_image": ("methods.diffusion.text_to_image",),
    "text_to_video": ("methods.diffusion.text_to_video",),
    "erase": ("methods.erasing",),
    "personalize": ("methods.personalization",),
    "segment": ("methods.segmentation.segmenter",),
    "evaluate": ("methods.evaluation",),
    "train": ("methods.training",),
    "neighborhood_attention": ("kernels.gna",),
    "simulate": ("kernels.gna.simulator",),
    "StableDiffusionPipeline": ("flax_models.pipelines.stable_diffusion",),
    "StableDiffusionXLPipeline": ("flax_models.pipelines.stable_diffusion_xl",),
}
_ROOMS = ("flax_models", "methods", "kernels", "converters")

__all__ = [
    "ConceptaxError",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "bundled_model",
    "bundled_segmenter",
    "converters",
    "erase",
    "evaluate",
    "flax_models",
    "kernels",
    "load",
    "merge_parts",
    "methods",
    "neighborhood_attention",
    "personalize",
    "save",
    "segment",
    "simulate",
    "text_to_image",
    "text_to_video",
    "train",
]


sys.meta_path.append(MovedModules)  # type: ignore[arg-type]


def __getattr__(name: str):
    if name not in _LAZY and name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    room, *other = _LAZY[name]
    value = getattr(import_module(f".{room}", __name__), other[0] if other else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
