"""What the record of an erasing says: for the terminal, and for reports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conceptax.converters.files.weights import read_json
from conceptax.methods.text.phrases import Retained
from conceptax.reporting.report import Number, Table

RECORD = "erasing.json"
_SHOWN = 12  # near phrases that are printed; all are recorded


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
