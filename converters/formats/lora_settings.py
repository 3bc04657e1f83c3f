"""PEFT's settings of a LoRA: what multiplies it, and what makes of it something else."""

import json
import re
from typing import Any

import numpy as np

from ..errors import CheckpointError, listing
from ..files.weights import WeightFile
from .lora_names import COMPONENTS, TEXT

Noted = dict[str, Any]  # PEFT's settings

_HEADER = "lora_adapter_metadata"  # where diffusers notes PEFT's settings
# PEFT's settings that make of a LoRA something else; what is not named here serves training alone.
_REFUSED = re.compile(
    r"use_(dora|qalora|bdlora)|lora_bias|fan_in_fan_out|modules_to_save|layer_replication"
    r"|trainable_token_indices|target_parameters|(megatron|arrow)_config|alora_invocation_tokens"
)
_OTHER_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that change it
_PEFT_ALPHA = 8  # PEFT's own, where its settings name none
_MAX_PATTERN = 300


def noted_in(file: WeightFile) -> dict[str, Noted]:
    """PEFT's settings by component, or "" of a model alone, where the header has them."""
    path = file.path
    try:
        settings = json.loads(file.metadata.get(_HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the {_HEADER} in its header is no JSON.") from error
    noted: dict[str, Noted] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        component, _, setting = name.partition(".")
        if component not in COMPONENTS:
            component, setting = "", name
        noted.setdefault(component, {})[setting] = value
    return {
        name: supported(own, str(path), f" ({name})" if name else "") for name, own in noted.items()
    }


def supported(settings: Noted, source: str, where: str = "") -> Noted:
    """PEFT's settings, if the LoRA is one that W + alpha/r B A describes."""
    odd = [name for name, value in settings.items() if value and _REFUSED.fullmatch(name)]
    if settings.get("bias") not in (None, "none"):
        odd.append(f"bias={settings['bias']!r}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASES):
        odd.append(f"init_lora_weights={start!r}")
    kind = settings.get("peft_type")
    if kind is not None and str(kind).upper().removeprefix("PEFTTYPE.") != "LORA":
        odd.append(f"peft_type={kind!r}")
    if odd:
        raise CheckpointError(
            f"{source} was trained with {listing(odd)}{where}, which is not supported."
        )
    patterns = {name: settings.get(name) or {} for name in ("alpha_pattern", "rank_pattern")}
    numbers = {name: settings.get(name, _PEFT_ALPHA) for name in ("lora_alpha", "r")}
    for name, value in (numbers | patterns).items():
        values = list(value.values()) if name in patterns and isinstance(value, dict) else [value]
        if not all(map(_is_number, values)):
            raise CheckpointError(f"{source}: {name} is {str(value)[:80]!r}, expected numbers.")
    return {**settings, **patterns}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _setting(noted: Noted, pattern: str, default: Any, module: str, what: str) -> Any:
    """A setting of a module: the first pattern that its name ends with, or the default."""
    for form, value in noted[pattern].items():
        try:
            if len(form) <= _MAX_PATTERN and re.match(rf"(.*\.)?({form})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{what}: {pattern} has {form[:80]!r}: {error}.") from error
    return default


def scale_of(noted: Noted | None, rank: int, module: str, what: str) -> float:
    """What B A is multiplied by, where no tensor says so."""
    if noted is None:
        return 1.0
    module = TEXT + module if module.startswith(("encoder.", "embeddings.")) else module
    alpha = _setting(noted, "alpha_pattern", noted.get("lora_alpha", _PEFT_ALPHA), module, what)
    told = _setting(noted, "rank_pattern", noted.get("r"), module, what)
    if told not in (None, rank):
        raise CheckpointError(f"{what} has rank {rank}, and its settings say {told}.")
    return alpha / (np.sqrt(rank) if noted.get("use_rslora") else rank)
