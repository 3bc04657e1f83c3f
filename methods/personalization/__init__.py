"""Personalising methods on one interface: a model, concepts and settings in, a model out.

    personalise(pipeline, [Concept("<new1>", "dog", images)], CustomDiffusionConfig(), seed=0)

The settings say which method it is; all of them are one step, `class_diffusion`'s.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..subjects.images import Concept, read_concepts, read_images
from .baselines import CustomDiffusionConfig, DreamBoothConfig, TextualInversionConfig
from .class_diffusion import ClassDiffusionConfig, personalise


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to personalise.

    Attributes:
      title: its name for people.
      config: the type of its settings.
    """

    title: str
    config: type[ClassDiffusionConfig]


METHODS: Mapping[str, Method] = MappingProxyType({
    "class-diffusion": Method("ClassDiffusion", ClassDiffusionConfig),
    "custom-diffusion": Method("Custom Diffusion", CustomDiffusionConfig),
    "dreambooth": Method("DreamBooth", DreamBoothConfig),
    "textual-inversion": Method("textual inversion", TextualInversionConfig),
})  # fmt: skip


def method_of(config: Any) -> Method:
    """The method that some settings belong to.

    Raises:
      ValueError: they are of no method.
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    names = sorted(method.config.__name__ for method in METHODS.values())
    raise ValueError(f"settings are one of {names}, received {type(config).__name__}.")


__all__ = [
    "METHODS",
    "ClassDiffusionConfig",
    "Concept",
    "CustomDiffusionConfig",
    "DreamBoothConfig",
    "Method",
    "TextualInversionConfig",
    "method_of",
    "personalise",
    "read_concepts",
    "read_images",
]
