"""`conceptax convert`: load a checkpoint and write it again."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Command:
    """Load a checkpoint and write it again, checked: every tensor present, shaped and finite.

    Reads diffusers and transformers folders (`.safetensors`, sharded or not, and `.bin`), a whole
    pipeline or one component, and writes safetensors in the same layout.

    With --add, what personalising left elsewhere is merged into a pipeline: embeddings of new
    tokens (textual inversions), pytorch_custom_diffusion_weights.bin, delta.bin.

    Attributes:
      source: folder of a pipeline or of a component, or a weight file beside its config.json.
      dest: the folder to write.
      add: a file or folder to merge into the pipeline; repeat for several.
      dtype: dtype to store; by default each tensor's own.
      max_shard_size: split larger weights over several files.
      force: replace an earlier checkpoint at DEST.
    """

    source: Annotated[Path, tyro.conf.Positional]
    dest: Annotated[Path, tyro.conf.Positional]
    add: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_size: str = "10GB"
    force: bool = False


def run(command: Command) -> None:
    """Convert `command.source` into `command.dest`."""
    from conceptax.cli.results import new_folder
    from conceptax.converters import load_personalised, load_pytorch, save_pytorch
    from conceptax.flax_models.stable_diffusion import StableDiffusionPipeline

    with new_folder(command.dest, force=command.force) as folder:
        model = load_pytorch(command.source)
        if command.add and not isinstance(model, StableDiffusionPipeline):
            raise ValueError(
                f"{command.source} is one component; --add merges into a pipeline, the folder with "
                "model_index.json."
            )
        for addition in command.add:
            model = load_personalised(model, addition)
        save_pytorch(model, folder, dtype=command.dtype, max_shard_size=command.max_shard_size)
    size = sum(file.stat().st_size for file in command.dest.rglob("*") if file.is_file())
    print(f"{command.dest}: {type(model).__name__}, {size / 1e6:.1f} MB")
