"""`conceptax convert`: load a checkpoint and write it again."""

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from conceptax.cli.options import (
    HUB,
    Additions,
    OptionalFloat,
    OptionalInt,
    OptionalModel,
    OptionalText,
)


@dataclasses.dataclass(frozen=True)
class Command:
    """Load a checkpoint and write it again, checked: every tensor present, shaped and finite.

    Reads diffusers and transformers folders (`.safetensors`, sharded or not, `.bin`, and Flax's
    `.msgpack` of earlier versions), a whole pipeline or one component; and single files of Stable
    Diffusion 1.x, 2.x, XL and 3, FLUX.1, FLUX.2 and Wan (`.ckpt`, `.pth`, `.safetensors`, `.gguf`),
    also of a part of one: what holds one model becomes the folder of that component. Nothing in a
    pickle is executed.

    With --add, what was trained elsewhere is merged into a pipeline: LoRA files (of PEFT,
    diffusers, kohya, OneTrainer and ComfyUI), embeddings of new tokens (textual inversions, also
    A1111's and SDXL's), pytorch_custom_diffusion_weights.bin, delta.bin, changed weights of a UNet
    or a text encoder (ESD, UCE), and whole components, such as an edited text encoder.

    Attributes:
      source: folder of a pipeline or of a component, a weight file beside its config.json, or a
        single file.
      dest: what to write.
      form: "folder" of safetensors in the layout of diffusers and transformers; "single" file with
        its publisher's names, of a pipeline; "changes", one file with a component's
        tensors that differ from --original; "lora", one file with the difference from --original at
        a low rank.
      add: a file or folder to merge into the pipeline; repeat for several.
      add_scale: how much of each LoRA in --add.
      add_settings: that images of a LoRA of FLUX.1 in --add are drawn with, where it does not state
        them: urae-4k, or "ntk-factor=10 attention-scale=proportional shift=3".
      original: the model that SOURCE was made from, for --form changes and lora.
      rank: of a LoRA.
      energy: in place of --rank, the fraction of each change to keep, such as 0.95.
      naming: of a LoRA's layers: "peft", as diffusers writes them, or "kohya".
      dtype: dtype to store; by default each tensor's own. Weights in float64 or 8 bits need one.
      shard_size: split larger weights over several files, in a folder.
      tokenizer: folder of the tokenizer, for a single file, which has none; by default a folder of
        that name beside it, or CLIP's own.
      prediction_type: what the UNet of a single file predicts; by default what its marker keys or
        header say, else "epsilon" for 1.x and XL and velocities for 2.x, whose base models (512
        pixels) need "epsilon".
      verify: run PyTorch on what was written and JAX on what was read, with one random input, and
        print the largest relative difference; needs torch, and diffusers or transformers.
      force: replace an earlier checkpoint at DEST.
    """

    source: Annotated[Path, tyro.conf.Positional, HUB]
    dest: Annotated[Path, tyro.conf.Positional]
    form: Literal["folder", "single", "changes", "lora"] = "folder"
    add: Additions = ()
    add_scale: float = 1.0
    add_settings: OptionalText = None
    original: OptionalModel = None
    rank: OptionalInt = None
    energy: OptionalFloat = None
    naming: Literal["peft", "kohya"] = "peft"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    shard_size: str = "10GB"
    tokenizer: OptionalModel = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    verify: bool = False
    force: bool = False


def run(command: Command) -> None:
    """Convert `command.source` into `command.dest`."""
    from conceptax.cli.bars import Bytes
    from conceptax.cli.runs import new_file, new_folder
    from conceptax.converters.files.safetensors_file import telling

    _check(command)
    claim, write = (new_folder, _folder) if command.form == "folder" else (new_file, _file)
    bar = Bytes()
    with claim(command, command.dest) as place, bar:
        model = _read(command)
        with telling(bar.wrote):
            model = write(command, model, place)
    files = [command.dest, *command.dest.rglob("*")]
    size = sum(file.stat().st_size for file in files if file.is_file())
    print(f"{command.dest}: {type(model).__name__}, {size / 1e6:.1f} MB")


def _check(command: Command) -> None:
    compares = command.form in ("changes", "lora")
    if compares != (command.original is not None):
        raise ValueError("--original goes with --form changes and --form lora, and they need it.")
    low_rank = (command.rank is not None) + (command.energy is not None)
    if low_rank != (command.form == "lora"):
        raise ValueError("--form lora takes --rank or --energy, one of them; other forms neither.")
    if command.naming != "peft" and command.form != "lora":
        raise ValueError(f"--naming is for --form lora; leave it out of --form {command.form}.")
    if command.form != "folder" and command.dest.suffix != ".safetensors":
        raise ValueError(f"--form {command.form} writes a file: name one in .safetensors.")
    if command.verify and command.form != "folder":
        raise ValueError("--verify is for --form folder, which PyTorch's libraries load.")
    needed = ("torch", "diffusers", "transformers") if command.verify else ()
    if lost := ", ".join(name for name in needed if importlib.util.find_spec(name) is None):
        raise ValueError(f"--verify needs {lost}: install conceptax[torch] and diffusers.")


def _read(command: Command) -> Any:
    """The source, with what is added to it."""
    from conceptax.flax_models.pipelines.pipeline import Pipeline

    options = {"tokenizer": command.tokenizer, "prediction_type": command.prediction_type}
    options = {k: v for k, v in options.items() if v is not None}
    model = _mapped(command.source, command.dtype, **options)
    how = command.add_scale, command.add_settings
    if not command.add and how == (1, None):  # what adds takes a second to import
        return model
    from conceptax.reporting.models import with_additions

    if command.add and not isinstance(model, Pipeline):
        raise ValueError(
            f"{command.source} is one component; --add merges into a pipeline, the folder with "
            "model_index.json."
        )
    return with_additions(model, command.add, *how)


def _mapped(source: Path, dtype: str | None, **options: Any) -> Any:
    """A model left in its file, unless its weights are of a type to be converted."""
    from conceptax.converters import load_pytorch
    from conceptax.converters.errors import TypeToConvert

    try:
        return load_pytorch(source, sharding="mapped", **options)
    except TypeToConvert:
        if dtype is None:
            raise
        import jax.numpy as jnp

        return load_pytorch(source, sharding="mapped", param_dtype=jnp.dtype(dtype), **options)


def _alone(command: Command, model: Any) -> Any:
    """The one model of a single file without a tokenizer, which is a component and no pipeline."""
    from conceptax.flax_models.pipelines.pipeline import Pipeline

    if not isinstance(model, Pipeline) or command.source.expanduser().is_dir():
        return model
    parts = [getattr(model, name) for name in (*model.MODELS, *model.TOKENIZERS)]
    parts = [part for part in parts if part is not None]
    if len(parts) > 1:
        return model
    if model.scheduler_config.get("prediction_type", "epsilon") != "epsilon":
        warnings.warn(
            f"{command.source} tells that its UNet predicts velocities (v_prediction), for which "
            "the folder of one component has no place: set it in the pipeline's scheduler.",
            stacklevel=2,
        )
    return parts[0]


def _folder(command: Command, model: Any, folder: Path) -> Any:
    from conceptax.converters import save_pytorch

    model = _alone(command, model)
    save_pytorch(model, folder, dtype=command.dtype, max_shard_size=command.shard_size)
    if command.verify:
        from conceptax.converters.verification import verify

        for name, difference in verify(model, folder).items():
            told = "not compared" if difference is None else f"{difference:.1e}"
            print(f"{name}: largest relative difference between JAX and PyTorch: {told}")
    return model


def _file(command: Command, model: Any, file: Path) -> Any:
    from conceptax.converters import save_changes, save_lora, save_single_file
    from conceptax.converters.errors import listing
    from conceptax.flax_models.pipelines.pipeline import Pipeline

    whole = isinstance(model, Pipeline)
    if command.form == "single":
        if not whole:
            raise ValueError(f"{command.source} is one component; --form single takes a pipeline.")
        save_single_file(model, file, dtype=command.dtype, force=True)
        return model
    assert command.original is not None
    original = _mapped(command.original, command.dtype)
    if command.form == "changes":
        if whole or type(model) is not type(original):
            raise ValueError(
                "--form changes compares one component: pass the folders of two UNets, or of two "
                "text encoders."
            )
        keys = save_changes(model, original, file, dtype=command.dtype)
        print(f"{len(keys)} tensors differ")
        return model
    options = {"rank": command.rank, "energy": command.energy, "dtype": command.dtype}
    summary = save_lora(model, original, file, naming=command.naming, force=True, **options)
    ranks, error = sorted(summary.ranks.values()), f"relative error {summary.error:.1e}"
    print(f"{len(ranks)} modules, rank {ranks[0]} to {ranks[-1]}, {error}")
    if summary.left_out:
        print(f"left out, because a LoRA cannot hold them: {listing(summary.left_out)}")
    return model
