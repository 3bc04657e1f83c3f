"""The names of LoRA files, of many programs: which layer a tensor belongs to, and as what.

They are

* PEFT's: `unet.<module>.lora_A.weight`, `.lora_B.weight` (what diffusers writes; `transformer.` of
  FLUX and SD 3), or with `base_model.model.` in front, of a model that the settings tell;
* diffusers' older: `unet.<module>.lora.down.weight`, `<attention>.processor.to_q_lora.up.weight`;
* kohya's and OneTrainer's: `lora_unet_<module, with _ for .>.lora_down.weight`, with `.alpha`;
  `lora_transformer_<module>` with diffusers' names of a transformer;
* ComfyUI's: `diffusion_model.<module>`, `clip_l.transformer.<module>`;
* XLabs's, of FLUX: `double_blocks.<n>.processor.qkv_lora1.down.weight`.

A module of the UNet may also have CompVis's name, and one of a transformer its publisher's, in
which several of diffusers' layers are one, row upon row.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..files.safetensors_file import PendingTensor
from ..tensors import TensorSpec, tensor_specs
from .compvis_parts import unet_names_of
from .names import Rows, Table, equal_rows, renamed, swap
from .transformer_parts import CLASSES, FLUX, table_of

NAMINGS = ("peft", "kohya")
Pair = tuple[np.ndarray, np.ndarray]
Pairs = Mapping[str, Mapping[str, Pair]]  # component -> module path -> A, B

_KEY = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<new>A|B|down|mid|up)(?:(?:\.[^.]+)?\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<old>down|up|alpha)(?:\.weight)?"
    r"|\.(?P<alpha>alpha))"
)
_XLABS = re.compile(
    r"(?P<block>(?:.*\.)?(?:double|single)_blocks\.\d+)\.processor\.(?P<part>qkv|proj)"
    r"_lora(?P<stream>[12]?)\.(?P<kind>down|up)\.weight"
)
_STREAMS = {"": "", "1": "img_attn.", "2": "txt_attn."}
_KINDS = {"A": "A", "down": "A", "B": "B", "up": "B", "mid": "mid", "alpha": "alpha"}
# What else such files hold, none of which is read.
_RELATIVES = {
    "LoHa": r".+\.hada_.+",
    "LoKr": r".+\.lokr_.+",
    "GLoRA": r"lora_.+\.[ab][12]\.weight",
    "DoRA": r".+\.(dora_scale|lora_magnitude_vector.*)",
    "OFT": r".+\.b?oft_.+",
    "IA3": r".+\.(on_input|ia3_l.*)",
    "VeRA": r".+\.vera_.+",
    "LoRA of embeddings": r".+\.lora_embedding_[AB].*",
    "LoRA with biases": r".+\.lora_(B|up)(\..+)?\.bias",
    "whole differences": r".+\.diff(_b)?",
    "embeddings within a LoRA": r"bundle_emb\..+",
}
# What is there beside the pairs of a LoRA with an input of its own, which a whole model has too.
_CONTROL = re.compile(r".+\.(query|key)_norm\.scale")
# What a module's name begins with -> the pipeline's component.
_PREFIXES = {
    r"unet\.|lora_unet_|(model\.)?diffusion_model\.|net\.": "unet",
    r"transformer\.|lora_transformer_(?!2_)": "transformer",
    r"transformer_2\.|lora_transformer_2_": "transformer_2",
    r"text_encoder\.|lora_te1?_|(text_encoders\.)?clip_[lh]\.(transformer\.)?": "text_encoder",
    r"text_encoder_2\.|lora_te2_|(text_encoders\.)?clip_g\.(transformer\.)?": "text_encoder_2",
    r"text_encoder_3\.|lora_te3_|(text_encoders\.)?t5xxl\.(transformer\.)?": "text_encoder_3",
}
COMPONENTS = tuple(_PREFIXES.values())
_KOHYA = dict(zip(COMPONENTS, ("unet", "unet", "transformer_2", "te1", "te2", "te3"), strict=True))
PEFT = "base_model.model."
TEXT = "text_model."
# The attention of text encoders, by diffusers' names of 2023.
_TEXT_2023 = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Place(NamedTuple):
    """What a tensor of a LoRA file is.

    Attributes:
      component: the pipeline's, or "" where the name does not tell.
      module: the layer's name in it, of whatever program.
      kind: "A", "B", "mid" or "alpha".
    """

    component: str
    module: str
    kind: str


# ---- in ----


def place_of(key: str) -> Place | str:
    """What a tensor of this name is; or, of one that is not read, what it belongs to."""
    if (kind := relative(key)) is not None:
        return f"of {kind}, which is not supported"
    if found := _XLABS.fullmatch(key):
        module = f"{found['block']}.{_STREAMS[found['stream']]}{found['part']}"
        return Place(*_component_in(module), _KINDS[found["kind"]])
    if (found := _KEY.fullmatch(key)) is None:
        control = "of a control LoRA of FLUX (Canny, Depth), which is not supported"
        return control if _CONTROL.fullmatch(key) else "unexpected"
    kind = _KINDS[found["new"] or found["old"] or found["alpha"]]
    return Place(*_component_in(found["module"]), kind)


def is_lora(keys: Iterable[str]) -> bool:
    """Whether tensors with these names are a LoRA, or a relative of it, of whatever program."""
    for key in keys:
        found = place_of(key)
        if relative(key) or (isinstance(found, Place) and not key.endswith("alpha")):
            return True
    return False


def relative(key: str) -> str | None:
    """What a tensor of this name belongs to, if it is one of LoRA's relatives."""
    return next((kind for kind, form in _RELATIVES.items() if re.fullmatch(form, key)), None)


def _component_in(module: str) -> tuple[str, str]:
    """The component, "" where the name does not tell, and the module's name in it."""
    module = module.removeprefix(PEFT).replace(".processor.", ".")
    for prefix, name in _PREFIXES.items():
        if found := re.match(prefix, module):
            return name, module[found.end() :]
    return "", module


def component_of(name: str, pipeline: Any) -> str:
    """A component as a pipeline calls it: its denoiser, and T5, have two names each."""
    if name == "unet" and getattr(pipeline, "transformer", None) is not None:
        return "transformer"
    if name == "text_encoder_3" and not hasattr(pipeline, name) and _is_t5(pipeline):
        return "text_encoder_2"
    return name


def _is_t5(pipeline: Any) -> bool:
    return "T5" in getattr(getattr(pipeline, "text_encoder_2", None), "pytorch_class", "")


def weights(model: Any) -> dict[str, TensorSpec]:
    """The weights of linear and convolutional layers by module path."""
    specs = tensor_specs(model)
    return {
        spec.key.removesuffix(".weight"): spec
        for spec in specs
        if spec.key.endswith(".weight") and spec.axes != tuple(range(len(spec.axes)))
    }


def targets(model: Any, component: str) -> dict[str, Rows]:
    """Every name that a file may have for a module, or for several at once, -> their paths."""
    if model is None:
        return {}
    back: dict[str, str] = {}
    if component == "unet":
        back = {new: old for old, new in unet_names_of(model.config.to_dict()).items()}
    modules, found = weights(model), dict[str, Rows]()

    def add(name: str, rows: Rows) -> None:
        found.update({name: rows, name.replace(".", "_"): rows})

    for old, rows in _published(model).items():
        if rows.parts.keys() <= modules.keys():
            add(old, rows)
    for module in modules:
        bare = module.removeprefix(TEXT)
        *inside, last = bare.rsplit(".", 1)
        names = [bare, bare.removesuffix(".0"), renamed(bare, back) or bare]
        if inside and inside[0].endswith("self_attn"):
            names.append(f"{inside[0]}.{_TEXT_2023[last]}")
        if component.startswith("text"):
            names += [TEXT + name for name in names]
        for name in names:
            add(name, equal_rows(module))
    return found


def _published(model: Any) -> dict[str, Rows]:
    """The layers of a transformer as its publisher names them, and XLabs's of FLUX."""
    family = _family(model)
    if family is None:
        return {}
    table: dict[str, Any] = dict(table_of(family, model.config.to_dict()))
    if family == FLUX:
        for layer in range(model.config.num_single_layers):
            block, new = f"single_blocks.{layer}", f"single_transformer_blocks.{layer}"
            table[f"{block}.qkv"] = equal_rows(*(f"{new}.attn.to_{x}" for x in "qkv"))
            table[f"{block}.proj"] = f"{new}.proj_out"
    return {old: equal_rows(new) if isinstance(new, str) else new for old, new in table.items()}


def _family(model: Any) -> str | None:
    kind = getattr(model, "pytorch_class", "")
    return next((family for family, name in CLASSES.items() if name == kind), None)


# ---- out ----


def peft_tensors(component: str, model: Any, pairs: Mapping[str, Pair]) -> list[PendingTensor]:
    """Under PEFT's names, as diffusers writes them."""
    prefix = f"{component}." + getattr(model, "pytorch_prefix", "")
    return [
        PendingTensor.of(f"{prefix}{module}.lora_{kind}.weight", values)
        for module, pair in pairs.items()
        for kind, values in zip("AB", pair, strict=True)
    ]


def kohya_tensors(
    component: str, model: Any, pairs: Mapping[str, Pair], *, several: bool
) -> list[PendingTensor]:
    """Under kohya's names, with alpha; layers that the publisher's model has as one are fused.

    Args:
      component: the pipeline's.
      model: it, for the sizes of its layers.
      pairs: module path -> A, B, with everything that multiplies them.
      several: whether the pipeline has more than one text encoder.
    """
    kind = _KOHYA[component]
    if component == "text_encoder_2" and "T5" in model.pytorch_class:
        kind = "te3"
    prefix = f"lora_{kind if several else kind.replace('te1', 'te')}_"
    prefix += getattr(model, "pytorch_prefix", "").replace(".", "_")
    tensors = []
    family = _family(model)
    table = {} if family is None else table_of(family, model.config.to_dict())
    for module, (down, up) in _fused(table, model, pairs).items():
        name = prefix + module.replace(".", "_")
        alpha = np.array(len(down), down.dtype)
        for leaf, values in (("lora_down.weight", down), ("lora_up.weight", up), ("alpha", alpha)):
            tensors.append(PendingTensor.of(f"{name}.{leaf}", values))
    return tensors


def _fused(table: Table, model: Any, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Pairs by the publisher's names of modules; those that share one become one pair."""
    back: dict[str, tuple[str, Rows]] = {}
    for old, entry in table.items():
        rows = equal_rows(entry) if isinstance(entry, str) else entry
        back |= dict.fromkeys(rows.parts, (old, rows))
    groups: dict[str, dict[str, Pair]] = {}
    for module, pair in pairs.items():
        groups.setdefault(back.get(module, (module, None))[0], {})[module] = pair
    modules, fused = weights(model), dict[str, Pair]()
    for old, group in groups.items():
        rows = back[next(iter(group))][1] if next(iter(group)) in back else None
        if rows is None or len(rows.parts) == 1:
            ((down, up),) = group.values()
            fused[old] = down, swap(up) if rows is not None and rows.swapped else up
            continue
        downs = [pair[0] for pair in group.values()]
        shared = all(np.array_equal(down, downs[0]) for down in downs)
        down = downs[0] if shared else np.concatenate(downs)
        heights = [modules[path].shape[0] for path in rows.parts]
        up = np.zeros((sum(heights), len(down)), down.dtype)
        start = column = 0
        columns = {}
        for module, pair in group.items():
            columns[module] = 0 if shared else column
            column += len(pair[0])
        for path, height in zip(rows.parts, heights, strict=True):
            if path in group:
                own = group[path][1]
                at = columns[path]
                up[start : start + height, at : at + own.shape[1]] = own
            start += height
        fused[old] = down, up
    return fused
