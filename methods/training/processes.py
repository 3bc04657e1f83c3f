"""Training in several processes: what each reads, where arrays go, and what all of them learn.

Every process runs the same program (`jax.distributed.initialize` has made them one run); arrays are
spread over the devices of all.  With one process each function here does the plain thing.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...errors import ConceptaxError
from ...interrupts import end, say

_TOLD = 1000  # bytes of what a process tells the others
_LOOK_SECONDS, _END_SECONDS = 1.0, 3.0
_runs = itertools.count()


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


def tell_all(text: str) -> list[str]:
    """What each process of the run tells the others, in their order; cut after 1000 bytes.

    Waits until all have told. What the file system shows, and whether something failed, may differ
    between processes: they act on what all were told, not on their own look, or one of them would
    wait in an operation that another does not take part in. A program of its own, so only for where
    no other runs (see `spread_flag`).
    """
    if jax.process_count() == 1:
        return [text]
    mine = np.zeros(_TOLD, np.uint8)
    data = np.frombuffer(text.encode()[:_TOLD], np.uint8)
    mine[: len(data)] = data
    told = multihost_utils.process_allgather(mine)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in told]


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process of the run, as `tell_all`."""
    return any(tell_all("x" if flag else ""))


def leave() -> None:
    """Have this process end, soon after its main thread, without waiting for the others.

    For one that failed alone: the others may be waiting for it in the middle of an operation; and
    JAX, and the threads that write a checkpoint, would have it wait for them, minutes long. If all
    fail together, they end in the usual way before that.
    """

    patience = _patience()  # asks JAX, which must not be asked once it has cleaned up

    def end_soon() -> None:
        threading.main_thread().join()
        time.sleep(patience)
        end(1)

    if jax.process_count() > 1:
        threading.Thread(target=end_soon, name="leave", daemon=True).start()


@contextlib.contextmanager
def failing_together(stopped: type[BaseException]) -> Iterator[None]:
    """Within, a process that fails tells the others, and ends; so do they, which may wait for it.

    What waits in an operation of several processes cannot be woken. So a thread of each looks for
    word of the others; having had it, the process is given some seconds to fail by itself. All
    processes enter this in the same order.

    Args:
      stopped: what is no failure, and is raised in all of them.
    """
    if jax.process_count() == 1:
        yield
        return
    key, over, patience = f"conceptax/failed/{next(_runs)}", threading.Event(), _patience()
    client = ocp.multihost.get_jax_distributed_client()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is no word
                word = client.key_value_try_get(key)
                if not over.wait(patience):
                    say(f"another process of this run failed, so this one ends: {word}")
                    end(1)

    threading.Thread(target=watch, name="failing together", daemon=True).start()
    try:
        yield
    except stopped:
        raise
    except BaseException as error:
        word = " ".join(f"{type(error).__name__}: {error}".split())[:_TOLD]
        if not isinstance(error, ProcessLostError):  # the one that is lost has told, if it could
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
                client.key_value_set(key, f"process {jax.process_index()}: {word}")
        leave()
        raise
    finally:
        over.set()


def _patience() -> float:
    """Seconds for a process to end in the usual way; the others need the first one until then."""
    return 2 * _END_SECONDS if is_first_process() else _END_SECONDS


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
