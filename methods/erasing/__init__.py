"""Erasing methods on one interface: a model, a method's settings and concepts in, a model out.

    erase(pipeline, ["three"], EsdXConfig(), retain=None, seed=0) -> pipeline

The settings say which method it is.  Those that train have `prepare` and a pure step for the
training loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from .. import settings
from ..seeds import check_seed
from ..text.phrases import Retained
from . import (
    advunlearn,
    concept_ablation,
    esd,
    mace,
    rece,
    receler,
    sage,
    salun,
    speed,
    spm,
    stereo,
    uce,
)
from .advunlearn import AdvUnlearnConfig
from .common import trained
from .concept_ablation import ConceptAblationConfig
from .esd import EsdUConfig, EsdXConfig
from .mace import MaceConfig
from .rece import ReceConfig
from .receler import RecelerConfig
from .salun import SalUnConfig
from .speed import SpeedConfig
from .spm import SpmConfig
from .stereo import StereoConfig
from .uce import UceConfig
from .word import WordConfig


@dataclasses.dataclass(frozen=True)
class Method(settings.Method):
    """One way to erase.

    Attributes:
      erase: its function, as this package's `erase`.
      edits: the part of the pipeline that it changes.
      trains: whether it runs the training loop and takes its options.
      retains: whether it protects the retained phrases, or only puts them around the concept.
      lora: whether what it changes is a LoRA of its settings' `rank`.
    """

    erase: Callable[..., StableDiffusionPipeline]
    edits: Literal["text_encoder", "unet"]
    trains: bool = True
    retains: bool = True
    lora: bool = False


_esd = functools.partial(trained, esd.esd_step, esd.prepare)
_advunlearn = functools.partial(trained, advunlearn.adversarial_step, advunlearn.prepare)
_ablation = functools.partial(trained, concept_ablation.ablation_step, concept_ablation.prepare)
_salun = functools.partial(trained, salun.salun_step, salun.prepare)
_mace = functools.partial(trained, mace.mace_step, mace.prepare)
_receler = functools.partial(trained, receler.receler_step, receler.prepare)
_stereo = functools.partial(trained, stereo.stereo_step, stereo.prepare)
_spm = functools.partial(trained, spm.spm_step, spm.prepare)
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sage": Method("SAGE", sage.SageConfig, sage.erase, "text_encoder"),
        "esd-x": Method("ESD-x", EsdXConfig, _esd, "unet", retains=False),
        "esd-u": Method("ESD-u", EsdUConfig, _esd, "unet", retains=False),
        "uce": Method("UCE", UceConfig, uce.erase, "unet", trains=False),
        "rece": Method("RECE", ReceConfig, rece.erase, "unet", trains=False),
        "speed": Method("SPEED", SpeedConfig, speed.erase, "unet", trains=False),
        "word": Method("word erasure", WordConfig, sage.erase, "text_encoder"),
        "advunlearn": Method("AdvUnlearn", AdvUnlearnConfig, _advunlearn, "text_encoder"),
        "concept-ablation": Method(
            "Concept Ablation", ConceptAblationConfig, _ablation, "unet", retains=False
        ),
        "salun": Method("SalUn", SalUnConfig, _salun, "unet"),
        "spm": Method("SPM", SpmConfig, _spm, "unet", lora=True),
        "mace": Method("MACE", MaceConfig, _mace, "unet"),
        "receler": Method("Receler", RecelerConfig, _receler, "unet", retains=False, lora=True),
        "stereo": Method("STEREO", StereoConfig, _stereo, "unet", retains=False),
    }
)
# The method that some settings belong to; ValueError: they are of no method.
method_of = functools.partial(settings.method_of, METHODS)


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: Any,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts with the method that `config` belongs to.

    Args:
      pipeline: the model; it stays as it is.
      concepts: what to erase, one phrase each.
      config: the settings of one of `METHODS`.
      retain: phrases to preserve; default: whole words of the tokenizer's own vocabulary.
      seed: of everything random in the run.
      options: passed to `common.trained` (`on_step`) and the training loop, by methods that have
        one.

    Returns:
      the pipeline with one part edited (`method_of(config).edits`).
    """
    method = method_of(config)
    check_seed(seed)
    return method.erase(pipeline, concepts, config, retain=retain, seed=seed, **options)


__all__ = [
    "METHODS",
    "AdvUnlearnConfig",
    "ConceptAblationConfig",
    "EsdUConfig",
    "EsdXConfig",
    "MaceConfig",
    "Method",
    "ReceConfig",
    "RecelerConfig",
    "SalUnConfig",
    "SpeedConfig",
    "SpmConfig",
    "StereoConfig",
    "UceConfig",
    "WordConfig",
    "erase",
    "method_of",
]
