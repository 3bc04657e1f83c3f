"""Several processes as one run: what each reads, where arrays go, and when all of them stop.

Every process runs the same program (`jax.distributed.initialize` has made them one run); arrays are
spread over the devices of all.  With one process each function here does the plain thing.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class ProcessLostError(ConnectionError):
    """Another process of the run no longer answers; what was saved lets the run go on."""

    def __init__(self, step: int, saved: int | None, reason: str) -> None:
        self.step, self.saved = step, saved
        rest = (
            f"Start all processes again: they go on after step {saved}."
            if saved is not None
            else "No checkpoint was written."
        )
        super().__init__(
            f"another process of this run stopped answering after step {step}. {rest} "
            f"The reason given is: {reason}"
        )


def is_first_process() -> bool:
    """Whether this process writes what the run writes once: logs, records, exported models."""
    return jax.process_index() == 0


def local_rows(batch_size: int) -> slice:
    """The rows of each batch that this process reads: an equal part, in the order of processes.

    Args:
        batch_size: rows of a batch, over all processes.

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


class StopVote:
    """Whether any process was told to stop; all learn it after the same step.

    A vote takes part in the devices' queue like a step, so that no process waits for it: its result
    is read `lag` steps later.
    """

    def __init__(self, lag: int) -> None:
        self._lag, self._votes = lag, collections.deque[jax.Array]()
        firsts = {device.process_index: device for device in reversed(jax.devices())}
        devices = np.array([firsts[index] for index in sorted(firsts)])
        self._mesh = Mesh(devices, ("process",))
        self._spread = NamedSharding(self._mesh, PartitionSpec("process"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def stop(self, mine: bool) -> bool:
        """Give this process's vote for a step, and learn the result of an earlier one."""
        if jax.process_count() == 1:
            return mine
        votes = jax.make_array_from_process_local_data(self._spread, np.array([mine]))
        with jax.set_mesh(self._mesh):
            self._votes.append(self._any(votes))
        return len(self._votes) > self._lag and bool(self._votes.popleft())
