"""`conceptax erase`: edit a pipeline so that concepts are gone, by one of several methods."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

import conceptax
from conceptax.cli.options import (
    CheckpointDir,
    Mesh,
    Model,
    OptionalPath,
    chosen,
    computed_in,
    concepts_in,
)
from conceptax.cli.runs import kept_run, new_folder
from conceptax.cli.streams import print_stage
from conceptax.converters.files.output import CHECKPOINT_FILES
from conceptax.methods.erasing import METHODS, Method
from conceptax.methods.text.phrases import read_phrases, retained_phrases
from conceptax.reporting.erasing import RECORD, Export, describe_near, erase_into
from conceptax.reporting.models import Recompute, load_pipeline

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[Config]):
    """Erase concepts from a text-to-image model.

    SAGE, word erasure and AdvUnlearn edit the text encoder (of SDXL those that --edit names); ESD
    and UCE edit the UNet. What follows --force are the settings of the chosen method: `--method
    NAME --help` lists those of another.

    Writes a folder: what --export asks for, with erasing.json, which records settings, seed,
    versions, the phrases that were too near to a concept to be retained, and the last losses; and
    training.jsonl.

    Attributes:
      concept: what to erase, in words; repeat for several concepts. A name that ends in .txt is a
        file of them, one a line.
      output: the folder to write.
      method: how.
      model: a folder of Stable Diffusion 1, 2 or XL.
      retain: file of phrases to preserve, one a line; by default the tokenizer's own words. ESD
        preserves nothing and only puts them beside the concept.
      export: the pipeline, the edited part alone (text-encoder or unet), or the changed tensors
        alone, as one safetensors file.
      seed: of everything random in the run.
      checkpoint_every: save after every n-th cycle, and when interrupted; 0 keeps none.
      dtype: computation dtype; parameters keep the dtype they are stored in. auto takes the one
        that is fastest here, and says which.
      remat: recompute activations in the backward pass, which takes a third longer and far less
        memory; auto does so where the UNet has more than 100 million parameters.
      force: replace an earlier checkpoint at the output.
      settings: of the method.
    """

    concept: tyro.conf.UseAppendAction[tuple[str, ...]]
    output: Path = Path("erased")
    method: Literal["sage", "esd-x", "esd-u", "uce", "word", "advunlearn"] = "sage"
    model: Model = None
    retain: OptionalPath = None
    export: Export = "pipeline"
    seed: int = 0
    checkpoint_dir: CheckpointDir = None
    checkpoint_every: int = 100
    mesh: Mesh = None
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    remat: Recompute = "auto"
    force: bool = False
    settings: Annotated[Config, tyro.conf.arg(name="")]


def types() -> dict[str, Any]:
    """The command with the settings of each method."""
    return {name: Command[method.config] for name, method in METHODS.items()}


def command_type(arguments: Sequence[str]) -> Any:
    """That of the method which the arguments name; SAGE without one."""
    known = types()
    return known.get(chosen(arguments, "--method", "sage"), known["sage"])  # the parser tells


def run(command: Command[Any]) -> None:
    """Load, erase, save; the output is claimed first."""
    concepts = concepts_in(command.concept)
    method, settings = METHODS[command.method], command.settings
    _check_options(command, method)
    retain = None if command.retain is None else read_phrases(command.retain)
    with (
        kept_run(command, settings.cycles if method.trains else 0) as kept,
        new_folder(command, markers=(*CHECKPOINT_FILES, RECORD)) as folder,
    ):
        source = command.model or conceptax.bundled_model()
        print_stage(f"loading {command.model or 'the bundled model'}")
        dtype = computed_in(command.dtype)
        pipeline = load_pipeline(source, dtype, "erasing", remat=command.remat)
        began = time.perf_counter()
        retained = retained_phrases(pipeline, concepts, settings, retain)
        print(describe_near(retained, settings.similarity_cap), end="")
        erase_into(
            folder,
            pipeline,
            concepts,
            settings,
            seed=command.seed,
            retain=retained,
            source=str(command.model or "bundled"),
            export=command.export,
            dtype=dtype,
            kept=kept,
        )
    names = ", ".join(repr(concept) for concept in concepts)
    seconds = time.perf_counter() - began
    print(f"{command.output}: erased {names} with {method.title} in {seconds:.0f} s")
    evaluating = "conceptax evaluate"
    if command.model is not None:
        evaluating = f"conceptax evaluate --original {command.model}"
    asked = " ".join(f"--concept {shlex.quote(concept)}" for concept in command.concept)
    print(f"next: {evaluating} --edited {command.output} {asked}")


def _check_options(command: Command[Any], method: Method) -> None:
    part = method.edits.replace("_", "-")
    if command.export not in ("pipeline", "changes", part):
        raise ValueError(
            f"{method.title} edits the {part} and leaves the {command.export} as it was: "
            f"--export takes pipeline, {part} or changes."
        )
    if not method.trains and (command.checkpoint_dir or command.mesh):
        raise ValueError(f"{method.title} is a closed form: leave out --checkpoint-dir and --mesh.")
