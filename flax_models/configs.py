"""Frozen model configs that read the published `config.json` and write it back.

A config is hashable, so it can live in the static part of an NNX module.  Settings that change what
a model computes are fields; settings that this port computes in only one way are listed in `FIXED`
with that value, and any other value is an error instead of a silent difference.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

Config = TypeVar("Config", bound="ModelConfig")


# What diffusers' `EMAModel` writes beside the settings of the model whose moving average it is.
_MOVING_AVERAGE = frozenset(
    {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    return [_thaw(v) for v in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of all configs.

    Class attributes:
      FIXED: published settings this port supports with one value only (setting -> value).
      INERT: published settings that do not change the computation; they are accepted and dropped.
      STRICT: whether an unknown setting is an error (diffusers) or ignored (transformers, whose
        files carry dozens of text-generation settings that no encoder reads).
    """

    FIXED: ClassVar[Mapping[str, Any]] = {}
    INERT: ClassVar[frozenset[str]] = frozenset()
    STRICT: ClassVar[bool] = True

    @classmethod
    def from_dict(cls: type[Config], raw: Mapping[str, Any]) -> Config:
        """Read a parsed `config.json`.

        Raises:
          ValueError: an unsupported or unknown setting, or a value of the wrong kind; the message
            names all of them.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        known = {k: _freeze(v) for k, v in raw.items() if k in names}
        for field in dataclasses.fields(cls):  # JSON writes 1.0 as 1
            if isinstance(field.default, float) and type(known.get(field.name)) is int:
                known[field.name] = float(known[field.name])
        problems = []
        for key, value in sorted(raw.items()):
            if key in names or key in cls.INERT | _MOVING_AVERAGE or key.startswith("_"):
                continue
            if key in cls.FIXED:
                if _freeze(value) != _freeze(cls.FIXED[key]):
                    problems.append(f"{key}={value!r} (supported: {cls.FIXED[key]!r})")
            elif cls.STRICT:
                problems.append(f"{key}={value!r} (unknown)")
        if problems:
            raise ValueError(
                f"{cls.__name__} cannot represent these settings: {'; '.join(problems)}."
            )
        try:
            return cls(**known)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: malformed settings ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings under their published names, ready for `json.dump`."""
        own = {f.name: _thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**{k: _thaw(v) for k, v in self.FIXED.items()}, **own}

    def require(self, condition: bool, message: str) -> None:
        """Raise ValueError with the config's name unless `condition` holds."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def require_positive(self, *names: str) -> None:
        """Raise ValueError unless each named field is a positive integer (or a tuple of them)."""
        for name in names:
            value = getattr(self, name)
            entries = value if isinstance(value, tuple) else (value,)
            ok = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in entries)
            self.require(ok and bool(entries), f"{name} must be positive, received {value!r}.")

    def require_size(self, name: str) -> None:
        """Raise ValueError unless a field is a positive number, two of them, or None."""
        value = getattr(self, name)
        pair = not isinstance(value, tuple) or len(value) == 2
        self.require(pair, f"{name} takes one number, or height and width; received {value!r}.")
        if value is not None:
            self.require_positive(name)
