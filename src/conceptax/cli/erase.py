"""`conceptax erase`: edit a pipeline so that concepts are gone, by one of several methods."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import jax
import tyro
from flax import nnx

import conceptax
from conceptax.cli.loading import load_pipeline
from conceptax.cli.options import Mesh, Model, OptionalPath, chosen, device_mesh
from conceptax.cli.runs import NOT_KEPT, Kept, Run, kept_run, new_folder
from conceptax.converters import save_changes, save_pytorch
from conceptax.converters.files.output import CHECKPOINT_FILES
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.erasing import METHODS, Method, erase, method_of
from conceptax.methods.memory import flags
from conceptax.methods.text.phrases import (
    ConceptError,
    Retained,
    edited_encoders,
    read_phrases,
    retained_phrases,
)
from conceptax.methods.training import RULES
from conceptax.reporting.erasing import RECORD, describe_near

Config = TypeVar("Config")
Export = Literal["pipeline", "text-encoder", "unet", "changes"]


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
      checkpoint_dir: keep checkpoints here, and go on from the newest one. Without it they are kept
        beside the output, as .OUTPUT.checkpoints, until the output is there: after Ctrl-C the same
        command goes on where it was.
      checkpoint_every: save after every n-th cycle, and when interrupted; 0 keeps none.
      mesh: devices that split the batch, and devices that split the parameters.
      dtype: computation dtype; parameters keep the dtype they are stored in.
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
    checkpoint_dir: OptionalPath = None
    checkpoint_every: int = 100
    mesh: Mesh = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False
    settings: Annotated[Config, tyro.conf.arg(name="")]


def command_type(arguments: Sequence[str]) -> Any:
    """The command with the settings of the method that the arguments name; SAGE without one."""
    method = METHODS.get(chosen(arguments, "--method", "sage"), METHODS["sage"])
    return Command[method.config]  # the parser tells an unknown name


def run(command: Command[Any]) -> None:
    """Load, erase, save; the output is claimed first."""
    concepts = concepts_to_erase(command.concept)
    method = METHODS[command.method]
    _check_options(command, method)
    retain = None if command.retain is None else read_phrases(command.retain)
    mesh = device_mesh(command.mesh)
    markers = (*CHECKPOINT_FILES, RECORD)
    steps = command.settings.cycles if method.trains else 0
    with (
        kept_run(command, steps) as kept,
        new_folder(command.output, force=command.force, command=command, markers=markers) as folder,
    ):
        source = command.model or conceptax.bundled_model()
        pipeline = load_pipeline(source, command.dtype, "erasing")
        began = time.perf_counter()
        retained = retained_phrases(pipeline, concepts, command.settings, retain)
        print(describe_near(retained, command.settings.similarity_cap), end="")
        with flags(("prompts", "local_rows")):
            erase_into(
                folder,
                pipeline,
                concepts,
                command.settings,
                seed=command.seed,
                retain=retained,
                source=str(command.model or "bundled"),
                export=command.export,
                dtype=command.dtype,
                mesh=mesh,
                kept=kept,
            )
    names = ", ".join(repr(concept) for concept in concepts)
    seconds = time.perf_counter() - began
    print(f"{command.output}: erased {names} with {method.title} in {seconds:.0f} s")


def concepts_to_erase(given: Sequence[str]) -> list[str]:
    """The concepts that arguments name, each once; one ending in .txt is a file of them.

    Raises:
      ConceptError: there is none, or a file cannot be read or holds none.
    """
    concepts: list[str] = []
    for each in given:
        concepts += read_phrases(each) if each.endswith(".txt") else [each]
    if not [concept for concept in concepts if concept.strip()]:
        raise ConceptError("no concept was given: name one with --concept, for example 'three'.")
    return list(dict.fromkeys(concepts))


def _check_options(command: Command[Any], method: Method) -> None:
    part = method.edits.replace("_", "-")
    if command.export not in ("pipeline", "changes", part):
        raise ValueError(
            f"{method.title} edits the {part} and leaves the {command.export} as it was: "
            f"--export takes pipeline, {part} or changes."
        )
    if not method.trains and (command.checkpoint_dir or command.mesh):
        raise ValueError(f"{method.title} is a closed form: leave out --checkpoint-dir and --mesh.")


def erase_into(
    folder: Path,
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: Any,
    *,
    seed: int,
    source: str,
    retain: Sequence[str] | Retained | None = None,
    export: Export = "pipeline",
    dtype: str = "float32",
    mesh: Any = None,
    kept: Kept = NOT_KEPT,
) -> StableDiffusionPipeline:
    """Erase, write the result and its record into an empty `folder`, and return the pipeline.

    Args:
      folder: where to.
      pipeline, concepts, seed, retain: as for `conceptax.methods.erasing.erase`.
      config: settings of one of the methods; they say which.
      source: what to call the model in the record.
      export: what to write.
      dtype: what the pipeline computes in.
      mesh, kept: of the training loop.
    """
    method = method_of(config)
    edits = (method.edits,)
    if method.edits == "text_encoder":
        edits = edited_encoders(pipeline, config.edit)
    if export not in ("pipeline", "changes") and len(edits) > 1:
        raise ValueError(
            f"{method.title} edits {' and '.join(edits)} here: --export takes pipeline or changes, "
            "or --edit one of them."
        )
    retained = retained_phrases(pipeline, concepts, config, retain)
    words = "the tokenizer's words" if retained.own else list(retained.kept)
    record: dict[str, Any] = {
        "method": method.title,
        "concepts": list(concepts),
        "model": source,
        "seed": seed,
        "dtype": dtype,
        "settings": dataclasses.asdict(config),
        "retained_phrases": words,
    }
    if not method.retains:
        record["retained_phrases"] = "none: the method retains nothing"
        record["words_beside_the_concept"] = words
    run = Run(folder, RECORD, record)
    rules = RULES["StableDiffusionPipeline"]
    with run.training(kept, mesh=mesh, rules=rules) if method.trains else run.timed() as options:
        edited = erase(pipeline, concepts, config, retain=retained, seed=seed, **options)
    parts = {name: _as_stored(getattr(edited, name), getattr(pipeline, name)) for name in edits}
    edited = dataclasses.replace(edited, **parts)
    if export == "changes":
        changed = {
            name: save_changes(
                part, getattr(pipeline, name), folder / f"{name}_changes.safetensors"
            )
            for name, part in parts.items()
        }
        run.record["changed_tensors"] = changed if len(changed) > 1 else changed[edits[0]]
    else:
        save_pytorch(edited if export == "pipeline" else parts[edits[0]], folder)
    run.write(last="last_cycle", not_retained=[near._asdict() for near in retained.near])
    return edited


def _as_stored(edited: nnx.Module, original: nnx.Module) -> nnx.Module:
    """The edited model with its parameters in the dtypes of the original."""
    graphdef, state = nnx.split(original)
    stored = nnx.to_pure_dict(state)
    trained = nnx.to_pure_dict(nnx.state(edited))
    return nnx.merge(
        graphdef, jax.tree.map(lambda new, old: new.astype(old.dtype), trained, stored)
    )
