"""Tables of names between two layouts of one model, read in both directions.

A table maps what keys begin with, module paths or whole keys, to what they begin with in the other
layout.  Where one tensor of the first layout holds several of the second, row upon row, or where
its halves have changed places, the entry is a `Rows`; everything else is a plain path.  From the
same table files are read (`split`) and written (`joined`), and LoRAs of fused layers taken apart.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ..errors import OutputError
from ..files.safetensors_file import PendingTensor, StoredTensor

Stored = dict[str, StoredTensor]
Shapes = Mapping[str, tuple[int, ...]]


class Rows(NamedTuple):
    """How the rows of a tensor correspond.

    Attributes:
      parts: the paths whose rows follow one another in it -> the shares of its rows that they have.
      swapped: whether its two halves change places.
    """

    parts: Mapping[str, int]
    swapped: bool = False

    def cut(self, rows: int) -> dict[str, slice]:
        """Each path's rows of so many.

        Raises:
          ValueError: they do not divide so.
        """
        whole = sum(self.parts.values())
        if rows % (2 if self.swapped else whole):
            raise ValueError(f"{rows} rows of {', '.join(self.parts)}")
        slices, start = {}, 0
        for path, share in self.parts.items():
            stop = start + share * rows // whole
            slices[path], start = slice(start, stop), stop
        return slices


Names = dict[str, str]  # path -> path
Table = Mapping[str, str | Rows]


def equal_rows(*paths: str) -> Rows:
    """Paths with as many rows each."""
    return Rows(dict.fromkeys(paths, 1))


def swapped(path: str) -> Rows:
    """A path whose halves change places."""
    return Rows({path: 1}, swapped=True)


def swap(values: np.ndarray) -> np.ndarray:
    """The second half of the rows before the first."""
    return np.concatenate(np.split(values, 2)[::-1])


def prefixed(old: str, new: str, table: Table) -> dict[str, str | Rows]:
    """A table of modules inside `old` and `new`."""
    return {
        f"{old}.{a}": Rows({f"{new}.{path}": n for path, n in b.parts.items()}, b.swapped)
        if isinstance(b, Rows)
        else f"{new}.{b}"
        for a, b in table.items()
    }


def found(key: str, table: Mapping[str, object]) -> tuple[str, str] | None:
    """A key's longest beginning that a table knows, and the rest."""
    end = len(key)
    while end > 0:
        if key[:end] in table:
            return key[:end], key[end:]
        end = key.rfind(".", 0, end)
    return None


def renamed(key: str, names: Mapping[str, str]) -> str | None:
    """A key under the other names: its longest beginning that the table knows is replaced."""
    place = found(key, names)
    return place and names[place[0]] + place[1]


def split(tensors: Stored, table: Table) -> tuple[Stored, list[str]]:
    """The tensors under their names in the second layout, and the keys that have none.

    Raises:
      ValueError: rows that do not divide.
    """
    new: Stored = {}
    odd = []
    for key, tensor in tensors.items():
        if (place := found(key, table)) is None:
            odd.append(key)
            continue
        entry, rest = table[place[0]], place[1]
        if isinstance(entry, str):
            new[entry + rest] = tensor
            continue
        for path, rows in entry.cut(tensor.shape[0] if tensor.shape else 0).items():
            own = tensor.then(tensor.shape, swap) if entry.swapped else tensor.rows(rows)
            new[path + rest] = own
    return new, odd


def joined(tensors: Iterable[PendingTensor], table: Table) -> list[PendingTensor]:
    """The tensors under their names in the first layout.

    Raises:
      OutputError: one that has no place there, or that lacks those that share its place.
    """
    back: dict[str, tuple[str, Rows | None]] = {}
    for old, entry in table.items():
        if isinstance(entry, str):
            back[entry] = old, None
        else:
            back |= dict.fromkeys(entry.parts, (old, entry))
    result: list[PendingTensor] = []
    groups: dict[tuple[str, str], dict[str, PendingTensor]] = {}
    for tensor in tensors:
        if (place := found(tensor.key, back)) is None:
            raise OutputError(f"{tensor.key} has no place in a single file. Write a folder.")
        path, rest = place
        old, entry = back[path]
        if entry is None:
            result.append(dataclasses.replace(tensor, key=old + rest))
        elif entry.swapped:
            result.append(tensor.then(old + rest, tensor.shape, swap))
        else:
            groups.setdefault((old, rest), {})[path] = tensor
    for (old, rest), parts in groups.items():
        entry = table[old]
        assert isinstance(entry, Rows)
        rows = sum(tensor.shape[0] for tensor in parts.values())
        whole = sum(entry.parts.values())
        for path, share in entry.parts.items():
            if path not in parts or parts[path].shape[0] * whole != share * rows:
                raise OutputError(
                    f"{old}{rest} of a single file holds {', '.join(entry.parts)}, whose sizes do "
                    "not fit together here. Write a folder."
                )
        result.append(_stacked(old + rest, [parts[path] for path in entry.parts], rows))
    return result


def _stacked(key: str, tensors: list[PendingTensor], rows: int) -> PendingTensor:
    first = tensors[0]
    produce = lambda: np.concatenate([each.produce() for each in tensors])  # noqa: E731
    return PendingTensor(key, first.dtype, (rows, *first.shape[1:]), produce)


def shapes_of(tensors: Stored) -> Shapes:
    """Name -> shape."""
    return {key: tensor.shape for key, tensor in tensors.items()}


def count(shapes: Shapes, form: str) -> int:
    """How many of the keys `form.format(0)`, `form.format(1)`, ... there are without a gap."""
    number = 0
    while form.format(number) in shapes:
        number += 1
    return number
