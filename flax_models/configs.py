"""Frozen model configs that read the published `config.json` and write it back.

A config is hashable, so it can live in the static part of an NNX module.  Settings that change what
a model computes are fields; settings that this port computes in only one way are listed in `FIXED`
with that value, and any other value is an error instead of a silent difference.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

Config = TypeVar("Config", bound="ModelConfig")


# What diffusers' `EMAModel` writes beside the settings of the model whose moving average it is.
_MOVING_AVERAGE = frozenset({"decay", "inv_gamma", "min_decay", "optimization_step", "power"})
_MOVING_AVERAGE |= {"update_after_step", "use_ema_warmup"}


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, ModelConfig):
        return value.to_dict()
    return [_thaw(v) for v in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of all configs; a field whose type is a config is read and written as a nested object.

    Class attributes:
      * `MODEL_TYPE`: what transformers calls the kind of model; written, not read.
      * `FIXED`: published settings this port supports with one value only (setting -> value).
      * `INERT`: published settings that do not change the computation; accepted and dropped.
      * `STRICT`: whether an unknown setting is an error (diffusers) or ignored (transformers, whose
        files carry dozens of text-generation settings that no encoder reads).
    """

    MODEL_TYPE: ClassVar[str | None] = None
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
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known = {k: _freeze(v) for k, v in raw.items() if k in fields}
        for name, field in fields.items():
            if isinstance(field.type, type) and issubclass(field.type, ModelConfig):
                known[name] = field.type.from_dict(raw.get(name) or {})
            elif isinstance(field.default, float) and type(known.get(name)) is int:
                known[name] = float(known[name])  # JSON writes 1.0 as 1
        problems = []
        for key, value in sorted(raw.items()):
            if key in fields or key in cls.INERT | _MOVING_AVERAGE or key.startswith("_"):
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
        named = {} if self.MODEL_TYPE is None else {"model_type": self.MODEL_TYPE}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: _thaw(value) for key, value in {**named, **self.FIXED, **own}.items()}

    def require(self, condition: bool, message: str) -> None:
        """Raise ValueError with the config's name unless `condition` holds."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def require_one_of(self, name: str, accepted: Collection[Any]) -> None:
        """Raise ValueError unless a field has one of these values."""
        choices = " or ".join(map(repr, accepted))
        value = getattr(self, name)
        self.require(value in accepted, f"{name} accepts {choices}, received {value!r}.")

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
