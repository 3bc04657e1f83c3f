"""Training in several processes: what each reads, where arrays go, and what all of them learn.

Every process runs the same program (`jax.distributed.initialize` has made them one run); arrays are
spread over the devices of all.  With one process each function here does the plain thing.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...errors import ConceptaxError


class ProcessLostError(ConceptaxError, ConnectionError):
    """Another process of the run no longer answers; what was saved lets the run go on."""

    def __init__(self, step: int, saved: int | None, reason: str) -> None:
        self.step, self.saved = step, saved
        rest = "No checkpoint was written."
        if saved is not None:
            rest = f"Start all processes again: they go on after step {saved}."
        super().__init__(
            f"another process of this run stopped answering after step {step}. {rest} "
            f"The reason given is: {reason}"
        )


def is_first_process() -> bool:
    """Whether this process writes what the run writes once: logs, records, exported models."""
    return jax.process_index() == 0


def local_rows(batch_size: int) -> slice:
    """The rows that this process reads of each batch of all: equal parts, in order of processes.

    Raises:
      ValueError: the processes cannot share them equally.
    """
    count, index = jax.process_count(), jax.process_index()
    if batch_size % count:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared by {count} processes; choose a multiple."
        )
    part = batch_size // count
    return slice(index * part, (index + 1) * part)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process of the run. Waits until all of them have asked.

    A program of its own, so only for where no other runs (see `spread_flag`).
    """
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def place(tree: Any, shardings: Any) -> Any:
    """Arrays onto their devices; `shardings` is one sharding or a tree of them.

    With several processes each gives its own copy of the values, of which only the shards of its
    devices are used: nothing is sent, and nothing is compared.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf: Any, where: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, where)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, where, lambda index: values[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def gather(tree: Any) -> Any:
    """A tree with every array whole on this process: what lies on one device stays there."""

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def spread_flag(flag: bool, mesh: Mesh) -> jax.Array | None:
    """This process's flag on each of its devices of the mesh, to be joined inside a program.

    A program of its own would not do: two that do not depend on each other may run their collective
    operations in another order in another process. None where there is one process.
    """
    if jax.process_count() == 1:
        return None
    mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_process_local_data(where, np.full(mine, flag))
