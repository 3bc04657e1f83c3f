"""`conceptax erase`: edit a pipeline so that concepts are gone, by one of several methods."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import jax
import tyro
from flax import nnx

import conceptax
from conceptax.cli.loading import load_pipeline
from conceptax.cli.options import Mesh, Model, OptionalPath, chosen, device_mesh
from conceptax.cli.report import Number, Table
from conceptax.cli.results import (
    claim_run,
    environment,
    kept_run,
    new_folder,
    scratch_folder,
    training_log,
    write_json,
)
from conceptax.converters import save_changes, save_pytorch
from conceptax.converters.output import CHECKPOINT_FILES
from conceptax.converters.weights import read_json
from conceptax.flax_models.stable_diffusion import StableDiffusionPipeline
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

RECORD = "erasing.json"
_LOG = "training.jsonl"
_SHOWN = 12  # near phrases that are printed; all are recorded

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
                folder, pipeline, concepts, command.settings, seed=command.seed,
                retain=retained, source=str(command.model or "bundled"),
                export=command.export, dtype=command.dtype, mesh=mesh,
                checkpoint_dir=kept.directory, checkpoint_every=kept.every, **kept.options,
            )  # fmt: skip
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


def describe_near(retained: Retained, cap: float) -> str:
    """What to tell about phrases that are not retained; nothing where there is none."""
    if not retained.near:
        return ""
    shown = ", ".join(
        f"{phrase!r} ({similarity:.2f} to {concept!r})"
        for phrase, concept, similarity in retained.near[:_SHOWN]
    )
    more = len(retained.near) - _SHOWN
    rest = f", and {more} more: see {RECORD}" if more > 0 else ""
    return f"not retained, because closer to a concept than {cap}: {shown}{rest}\n"


def erasing_record(edited: Path) -> dict[str, Any] | None:
    """What erasing wrote beside an edited model, a folder or a file; None where it is not there."""
    path = (edited if edited.is_dir() else edited.parent) / RECORD
    return read_json(path) if path.exists() else None


def near_tables(record: Mapping[str, Any] | None) -> list[Table]:
    """For a report: the phrases that an erasing did not retain; no table where there are none."""
    near = (record or {}).get("not_retained", [])
    rows = [(f"“{e['phrase']}”", e["concept"], Number(f"{e['similarity']:.3f}")) for e in near]
    note = (
        "To the original text encoder these phrases are the concept, or nearly so: the cosine of "
        "their pooled states is above the similarity cap. They were free to change."
    )
    table = Table("Not retained", ("phrase", "taken for", "cosine"), rows, note)
    return [table] if rows else []


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
    folder: Path, pipeline: StableDiffusionPipeline, concepts: Sequence[str], config: Any, *,
    seed: int, source: str, retain: Sequence[str] | Retained | None = None,
    export: Export = "pipeline", dtype: str = "float32", mesh: Any = None,
    checkpoint_dir: Path | None = None, checkpoint_every: int = 100, **options: Any,
) -> StableDiffusionPipeline:  # fmt: skip
    """Erase, write the result and its record into an empty `folder`, and return the pipeline.

    Args:
      folder: where to.
      pipeline, concepts, seed, retain: as for `conceptax.methods.erasing.erase`.
      config: settings of one of the methods; they say which.
      source: what to call the model in the record.
      export: what to write.
      dtype: what the pipeline computes in.
      mesh, checkpoint_dir, checkpoint_every, options: of the training loop.
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
    log = None
    with contextlib.ExitStack() as stack:
        if method.trains:
            if checkpoint_dir is None:
                logs = stack.enter_context(scratch_folder())
            else:
                logs = checkpoint_dir
                claim_run(logs / RECORD, record)
                options |= {"checkpoint_dir": logs, "checkpoint_every": checkpoint_every}
            log = logs / _LOG
            rules = RULES["StableDiffusionPipeline"]
            options |= {"mesh": mesh, "rules": rules, "metrics_path": log}
        began = time.perf_counter()
        edited = erase(pipeline, concepts, config, retain=retained, seed=seed, **options)
        record["seconds"] = round(time.perf_counter() - began, 1)
        lines, last = training_log(log)
    parts = {name: _as_stored(getattr(edited, name), getattr(pipeline, name)) for name in edits}
    edited = dataclasses.replace(edited, **parts)
    if export == "changes":
        changed = {
            name: save_changes(
                part, getattr(pipeline, name), folder / f"{name}_changes.safetensors"
            )
            for name, part in parts.items()
        }
        record["changed_tensors"] = changed if len(changed) > 1 else changed[edits[0]]
    else:
        save_pytorch(edited if export == "pipeline" else parts[edits[0]], folder)
    if lines:
        record["last_cycle"] = last
        (folder / _LOG).write_text(lines, encoding="utf-8")
    record["not_retained"] = [near._asdict() for near in retained.near]
    write_json(folder / RECORD, record | environment())
    return edited


def _as_stored(edited: nnx.Module, original: nnx.Module) -> nnx.Module:
    """The edited model with its parameters in the dtypes of the original."""
    graphdef, state = nnx.split(original)
    stored = nnx.to_pure_dict(state)
    trained = nnx.to_pure_dict(nnx.state(edited))
    return nnx.merge(
        graphdef, jax.tree.map(lambda new, old: new.astype(old.dtype), trained, stored)
    )
