"""Name weight files: what diffusers, transformers and PEFT call them, and which comes first."""

import re
from typing import Any, NamedTuple

FORMS = ("safetensors", "bin", "msgpack")
# Library -> stem of the weights that it writes, or wrote: safetensors, pickle, Flax.
STEMS = {
    "diffusers": ("diffusion_pytorch_model", "diffusion_pytorch_model", "diffusion_flax_model"),
    "transformers": ("model", "pytorch_model", "flax_model"),
}
ADDITIONS = ("pytorch_lora_weights", "adapter_model", "learned_embeds")
# Variants in the order in which they are taken where the plain file is absent; others follow.
_VARIANTS = ("", "fp32", "fp16", "bf16", "ema")
_NOT_AVERAGED = "non_ema"  # the last, since a model is used with its moving average
_SHARD = re.compile(r"-\d{5}-of-\d{5}")  # before the variant or, in later names, behind it
_NAME = re.compile(
    rf"(?P<stem>.+?)(?:\.(?P<variant>[\w-]+))?\.(?P<form>{'|'.join(FORMS)})"
    r"(?P<index>\.index(?:\.(?P<later>[\w-]+))?\.json)?"
)


class WeightName(NamedTuple):
    """The name of a weight file, one of several shards, or their index, in lower case.

    Attributes:
      stem: such as "diffusion_pytorch_model".
      variant: such as "fp16"; empty for the plain one.
      form: one of `FORMS`.
      index: whether it is the index of several.
      shard: whether it is one of several.
    """

    stem: str
    variant: str
    form: str
    index: bool
    shard: bool

    @property
    def libraries(self) -> list[str]:
        """Those that load such a name."""
        place = FORMS.index(self.form)
        return [library for library, stems in STEMS.items() if stems[place] == self.stem]

    def rank(self, library: str = "", variant: str | None = None) -> tuple[Any, ...]:
        """What names are sorted by: the least is read, of this variant where there is one."""
        order = _VARIANTS.index(self.variant) if self.variant in _VARIANTS else len(_VARIANTS)
        return (
            variant not in (None, self.variant),
            self.form == "msgpack",
            self.variant == _NOT_AVERAGED,
            order,
            self.variant,
            FORMS.index(self.form),
            library not in self.libraries,
            self.index,
        )


def weight_name(file: str) -> WeightName | None:
    """The parts of a name; None for what is not called as weights are."""
    whole = _SHARD.sub("", file.lower())
    if (found := _NAME.fullmatch(whole)) is None:
        return None
    variant = found["variant"] or found["later"] or ""
    return WeightName(
        found["stem"], variant, found["form"], bool(found["index"]), len(whole) < len(file)
    )
