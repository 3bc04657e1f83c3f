"""Vocabularies: classes with their synonyms, and the text classifiers made of them.

A class file has one line per class, `id:name,synonym,...`; on a command line classes are separated
by `;` and synonyms by `,`.  Every synonym becomes one row of the classifier: the mean direction of
its embeddings in the 14 sentences of ViLD (Gu et al. 2022), as FC-CLIP and MAFT+ use them.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...flax_models.maft_plus import ensemble
from ...flax_models.open_clip import OpenCLIP
from ...text import read_text

_SIZED = (
    "a photo of a {} {{}}.",
    "This is a photo of a {} {{}}.",
    "There is a {} {{}} in the scene.",
)
TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(template.format(size) for template in _SIZED for size in ("small", "medium", "large")),
)
_INVALID = "invalid_class_id"
_CHUNK = 128  # prompts that are encoded at once


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Classes in the order of their labels, each a tuple of synonyms, the name first."""

    classes: tuple[tuple[str, ...], ...]

    def __post_init__(self):
        for number, names in enumerate(self.classes):
            if not names or not all(name.strip() for name in names):
                raise ValueError(f"class {number} has an empty name among {list(names)}.")
        if not self.classes:
            raise ValueError("a vocabulary needs at least one class, received none.")

    @classmethod
    def parse(cls, text: str) -> "Vocabulary":
        """From `cat; sofa, couch; wall`."""
        parts = [part for part in text.split(";") if part.strip()]
        return cls(tuple(_names(part) for part in parts))

    @classmethod
    def read(cls, path: Path | str, *, background: bool = False) -> "Vocabulary":
        """From a class file; the k-th line that is kept is class k.

        Args:
          path: a text file of lines `id:name,synonym,...`.
          background: keep the line with id 0, unless it is named `invalid_class_id`.

        Raises:
          ValueError: a line of another form; the message names up to ten.
          TextError: the file is not in UTF-8.
          OSError: the file cannot be read.
        """
        classes, wrong = [], []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            index, colon, text = line.partition(":")
            if not colon or not index.strip().isdigit() or not text.strip():
                wrong.append(f"line {number} {line[:40]!r}")
                continue
            names = _names(text)
            if _INVALID in names or (int(index) == 0 and not background):
                continue
            classes.append(names)
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(
                f"{path}: lines have the form id:name,synonym; received {', '.join(wrong[:10])}"
                f"{more}."
            )
        return cls(tuple(classes))

    @classmethod
    def named(cls, text: str) -> "Vocabulary":
        """From a class file if the text ends with .txt, otherwise from `cat; sofa, couch`."""
        return cls.read(text) if text.endswith(".txt") else cls.parse(text)

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Each class by its first synonym."""
        return tuple(names[0] for names in self.classes)

    @property
    def rows(self) -> tuple[str, ...]:
        """All synonyms, those of a class side by side."""
        return tuple(name for names in self.classes for name in names)

    def synonyms(self) -> Int[np.ndarray, "K S"]:
        """The rows of each class; where there are fewer than S, the first is repeated."""
        counts = np.asarray([len(names) for names in self.classes])[:, None]
        first, places = np.cumsum(counts)[:, None] - counts, np.arange(counts.max())
        return (first + np.where(places < counts, places, 0)).astype(np.int32)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> Int[np.ndarray, "N L"]:
    """Token ids as OpenCLIP pads them: zeros behind the end of the text, which is always there."""
    rows = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    ids = np.zeros((len(rows), length), np.int32)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    return ids


def text_rows(
    clip: OpenCLIP,
    tokenizer: Any,
    vocabulary: Vocabulary,
    *,
    templates: Sequence[str] = TEMPLATES,
    cache: Path | None = None,
) -> Float[Array, "R D"]:
    """The rows of a text classifier, of unit length, without void.

    Args:
      clip: its text tower is read.
      tokenizer: CLIP's.
      vocabulary: R synonyms in all.
      templates: sentences with `{}` for a synonym.
      cache: a folder that keeps rows, by a digest of the prompts and of the text tower: a large
        vocabulary takes minutes on a CPU.
    """
    prompts = [template.format(name) for name in vocabulary.rows for template in templates]
    ids = tokenize(tokenizer, prompts, clip.config.text_config.context_length)
    if cache is None:
        return _rows(clip, ids, len(templates))
    file = cache / f"{_digest(clip, ids, len(templates))}.npy"
    if file.is_file():
        return jnp.asarray(np.load(file))
    rows = _rows(clip, ids, len(templates))
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.stem}.{os.getpid()}.npy")
    np.save(partial, np.asarray(rows))
    partial.replace(file)
    return rows


def _rows(clip: OpenCLIP, ids: Int[np.ndarray, "N L"], templates: int) -> Float[Array, "R D"]:
    padded = np.resize(ids, (-(-len(ids) // _CHUNK) * _CHUNK, ids.shape[1]))  # one shape to compile
    graphdef, state = nnx.split(clip)
    parts = [
        _encode(graphdef, state, jnp.asarray(padded[start : start + _CHUNK]))
        for start in range(0, len(padded), _CHUNK)
    ]
    embeddings = jnp.concatenate(parts)[: len(ids)].astype(jnp.float32)
    return ensemble(embeddings.reshape(len(ids) // templates, templates, -1))


def _digest(clip: OpenCLIP, ids: Int[np.ndarray, "N L"], templates: int) -> str:
    digest = hashlib.sha256(repr((ids.shape, templates)).encode() + ids.tobytes())
    towers = nnx.to_pure_dict(nnx.state(clip))
    for leaf in jax.tree.leaves([part for name, part in towers.items() if name != "visual"]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:32]


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef[Any], state: Any, ids: Array) -> Array:
    return nnx.merge(graphdef, state).encode_text(ids)
