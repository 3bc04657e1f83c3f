"""Personalizing methods on one interface: a model, concepts and settings in, a model out.

    personalize(pipeline, [Concept("<new1>", "dog", images)], CustomDiffusionConfig(), seed=0)

The settings say which method it is; all of them are one step, `class_diffusion`'s.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType

from .. import settings
from ..settings import Method
from ..subjects.images import Concept, read_concepts, read_images
from .baselines import CustomDiffusionConfig, DreamBoothConfig, TextualInversionConfig
from .class_diffusion import ClassDiffusionConfig, personalize
from .class_images import draw_class_images

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "class-diffusion": Method("ClassDiffusion", ClassDiffusionConfig),
        "custom-diffusion": Method("Custom Diffusion", CustomDiffusionConfig),
        "dreambooth": Method("DreamBooth", DreamBoothConfig),
        "textual-inversion": Method("textual inversion", TextualInversionConfig),
    }
)
# The method that some settings belong to; ValueError: they are of no method.
method_of = functools.partial(settings.method_of, METHODS)

__all__ = [
    "METHODS",
    "ClassDiffusionConfig",
    "Concept",
    "CustomDiffusionConfig",
    "DreamBoothConfig",
    "Method",
    "TextualInversionConfig",
    "draw_class_images",
    "method_of",
    "personalize",
    "read_concepts",
    "read_images",
]
