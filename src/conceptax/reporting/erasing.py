"""Erasures as folders with a record: written, and what they say in the terminal and in reports."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from conceptax.converters import save_changes, save_lora, save_pytorch
from conceptax.converters.files.weights import read_json
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.erasing import erase, method_of
from conceptax.methods.text.phrases import Retained, edited_encoders, retained_phrases
from conceptax.methods.training import RULES
from conceptax.reporting.report import Number, Table
from conceptax.reporting.runs import NOT_KEPT, Kept, Run

RECORD = "erasing.json"
_SHOWN = 12  # near phrases that are printed; all are recorded

_LORA = "pytorch_lora_weights.safetensors"

Export = Literal["pipeline", "text-encoder", "unet", "changes", "lora"]


class Erased(NamedTuple):
    """An erasure that is done, and not written yet.

    Attributes:
      pipeline: the edited one; its edited parts have the dtypes of the original's.
      edits: names of these parts.
      unet: before it was rounded to those.
      run: with the record.
      retained: what was retained, and what was too near to a concept.
      rank: of a LoRA, if the method's settings have one.
    """

    pipeline: StableDiffusionPipeline
    edits: tuple[str, ...]
    unet: nnx.Module
    run: Run
    retained: Retained
    rank: int


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
      kept: how the training is run.
    """
    method, edits = method_of(config), edited_parts(pipeline, config)
    if export not in ("pipeline", "changes") and len(edits) > 1:
        raise ValueError(
            f"{method.title} edits {' and '.join(edits)} here: --export takes pipeline or changes, "
            "or --edit one of them."
        )
    options: dict[str, Any] = {"seed": seed, "source": source, "retain": retain}
    erased = erase_recorded(pipeline, concepts, config, dtype=dtype, kept=kept, **options)
    write_erased(folder, pipeline, erased, export)
    return erased.pipeline


def edited_parts(pipeline: StableDiffusionPipeline, config: Any) -> tuple[str, ...]:
    """Names of the parts that a method with these settings edits."""
    method = method_of(config)
    if method.edits == "text_encoder":
        return tuple(edited_encoders(pipeline, config.edit))
    return (method.edits,)


def erase_recorded(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: Any,
    *,
    seed: int,
    source: str,
    retain: Sequence[str] | Retained | None = None,
    dtype: str = "float32",
    kept: Kept = NOT_KEPT,
) -> Erased:
    """Erase and keep the record; arguments as for `erase_into`."""
    method, edits = method_of(config), edited_parts(pipeline, config)
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
    run = Run(None, RECORD, record)
    rules = RULES["StableDiffusionPipeline"]
    with run.training(kept, rules=rules) if method.trains else run.timed() as options:
        edited = erase(pipeline, concepts, config, retain=retained, seed=seed, **options)
    exact = edited.unet  # before the sums are rounded to what the original is stored in
    parts = {name: _as_stored(getattr(edited, name), getattr(pipeline, name)) for name in edits}
    edited = dataclasses.replace(edited, **parts)
    return Erased(edited, edits, exact, run, retained, getattr(config, "rank", 0))


def write_erased(
    folder: Path, pipeline: StableDiffusionPipeline, erased: Erased, export: Export = "pipeline"
) -> None:
    """Write an erasure and its record into an empty folder.

    Args:
      folder: where to.
      pipeline: the original.
      erased: what was made of it.
      export: what to write.
    """
    edits, run = erased.edits, erased.run
    run.folder = folder
    parts = {name: getattr(erased.pipeline, name) for name in edits}
    if export == "lora":
        found = save_lora(erased.unet, pipeline.unet, folder / _LORA, rank=erased.rank)
        run.record["lora"] = {"rank": erased.rank, "relative_error": found.error}
    elif export == "changes":
        changed = {
            name: save_changes(
                part, getattr(pipeline, name), folder / f"{name}_changes.safetensors"
            )
            for name, part in parts.items()
        }
        run.record["changed_tensors"] = changed if len(changed) > 1 else changed[edits[0]]
    else:
        save_pytorch(erased.pipeline if export == "pipeline" else parts[edits[0]], folder)
    near = [each._asdict() for each in erased.retained.near]
    run.write(last="last_cycle", not_retained=near)


def _as_stored(edited: nnx.Module, original: nnx.Module) -> nnx.Module:
    """The edited model with its parameters in the dtypes of the original."""
    graphdef, state = nnx.split(original)
    stored = nnx.to_pure_dict(state)
    trained = nnx.to_pure_dict(nnx.state(edited))
    return nnx.merge(
        graphdef, jax.tree.map(lambda new, old: new.astype(old.dtype), trained, stored)
    )


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
