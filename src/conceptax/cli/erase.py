"""`conceptax erase`: edit a pipeline's text encoder so that concepts are gone."""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

import conceptax
from conceptax.cli.options import Model, OptionalPath
from conceptax.cli.results import environment, new_folder, write_json
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.flax_models.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.concepts import ConceptError, read_phrases
from conceptax.methods.sage import SageConfig, erase
from conceptax.methods.training import RULES, make_mesh

RECORD = "erasing.json"
_LOG = "training.jsonl"


@dataclasses.dataclass(frozen=True)
class Command:
    """Erase concepts from a text-to-image model with SAGE; only its text encoder changes.

    Writes the whole pipeline (or the text encoder alone) as a folder that diffusers loads, with
    erasing.json, which records settings, seed, versions and the last losses, and training.jsonl.

    Attributes:
      concept: what to erase, in words; repeat for several concepts.
      output: the folder to write.
      model: a Stable Diffusion 1.x folder.
      retain: file of phrases to preserve, one a line; by default the tokenizer's own words.
      export: what to write.
      seed: of everything random in the run.
      checkpoint_dir: keep checkpoints here, and go on from the newest one.
      checkpoint_every: save after every n-th cycle, and at the end.
      mesh: devices that split the batch, and devices that split the parameters.
      dtype: computation dtype; parameters keep the dtype they are stored in.
      force: replace an earlier checkpoint at the output.
      sage: settings of the method.
    """

    concept: tyro.conf.UseAppendAction[tuple[str, ...]]
    output: Path = Path("erased")
    model: Model = None
    retain: OptionalPath = None
    export: Literal["pipeline", "text-encoder"] = "pipeline"
    seed: int = 0
    checkpoint_dir: OptionalPath = None
    checkpoint_every: int = 100
    mesh: Annotated[
        tuple[int, int] | None,
        tyro.conf.arg(metavar="DATA FSDP", help_behavior_hint="(optional)"),
    ] = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    force: bool = False
    sage: Annotated[SageConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SageConfig
    )


def run(command: Command) -> None:
    """Load, erase, save; the output is claimed first."""
    if not [concept for concept in command.concept if concept.strip()]:
        raise ConceptError("no concept was given: name one with --concept, for example 'three'.")
    retain = None if command.retain is None else read_phrases(command.retain)
    mesh = None if command.mesh is None else make_mesh(*command.mesh)
    with new_folder(command.output, force=command.force) as folder:
        source = command.model or conceptax.bundled_model()
        pipeline = load_pytorch(source, dtype=jnp.dtype(command.dtype))
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise ConceptError(
                f"{source} holds one component, and erasing needs the whole pipeline: pass the "
                "folder with model_index.json."
            )
        began = time.perf_counter()
        erase_into(
            folder, pipeline, command.concept, command.sage, seed=command.seed, retain=retain,
            source=str(command.model or "bundled"), export=command.export, mesh=mesh,
            checkpoint_dir=command.checkpoint_dir, checkpoint_every=command.checkpoint_every,
        )  # fmt: skip
    names = ", ".join(repr(concept) for concept in command.concept)
    print(f"{command.output}: erased {names} in {time.perf_counter() - began:.0f} s")


def erase_into(
    folder: Path, pipeline: StableDiffusionPipeline, concepts: Sequence[str], config: SageConfig,
    *, seed: int, source: str, retain: Sequence[str] | None = None, export: str = "pipeline",
    mesh: Any = None, checkpoint_dir: Path | None = None, checkpoint_every: int = 100,
) -> StableDiffusionPipeline:  # fmt: skip
    """Erase, write the result and its record into an empty `folder`, and return the pipeline."""
    record: dict[str, Any] = {
        "method": "SAGE",
        "concepts": list(concepts),
        "model": source,
        "seed": seed,
        "settings": dataclasses.asdict(config),
        "retained_phrases": "the tokenizer's words" if retain is None else list(retain),
    }
    options: dict[str, Any] = {"mesh": mesh, "rules": RULES["StableDiffusionPipeline"]}
    with contextlib.ExitStack() as stack:
        if checkpoint_dir is None:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            logs = checkpoint_dir
            _check_same_run(logs / RECORD, record)
            options |= {"checkpoint_dir": logs, "checkpoint_every": checkpoint_every}
        began = time.perf_counter()
        edited = erase(
            pipeline, concepts, config, retain=retain, seed=seed, metrics_path=logs / _LOG,
            **options,
        )  # fmt: skip
        record["seconds"] = round(time.perf_counter() - began, 1)
        edited = dataclasses.replace(
            edited, text_encoder=_as_stored(edited.text_encoder, pipeline.text_encoder)
        )
        log = (logs / _LOG).read_text(encoding="utf-8")
    save_pytorch(edited if export == "pipeline" else edited.text_encoder, folder)
    record["last_cycle"] = json.loads(log.splitlines()[-1])
    write_json(folder / RECORD, record | environment())
    (folder / _LOG).write_text(log, encoding="utf-8")
    return edited


def _as_stored(edited: nnx.Module, original: nnx.Module) -> nnx.Module:
    """The edited model with its parameters in the dtypes of the original."""
    graphdef, state = nnx.split(original)
    stored = nnx.to_pure_dict(state)
    trained = nnx.to_pure_dict(nnx.state(edited))
    return nnx.merge(
        graphdef, jax.tree.map(lambda new, old: new.astype(old.dtype), trained, stored)
    )


def _check_same_run(path: Path, record: dict[str, Any]) -> None:
    """Refuse checkpoints of another run; note this one's settings beside them."""
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); choose another folder.") from error
        here = json.loads(json.dumps(record))
        differing = {name for name in here if here[name] != earlier.get(name)}
        for settings in (here["settings"], earlier.get("settings", {})):
            settings.pop("cycles", None)  # a run may be continued for longer
        if here["settings"] == earlier.get("settings"):
            differing.discard("settings")
        if differing:
            raise ValueError(
                f"{path.parent} holds checkpoints of a run with another {sorted(differing)}. "
                "Choose another --checkpoint-dir, or remove this one."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
