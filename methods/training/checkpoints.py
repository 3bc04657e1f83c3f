"""Checkpoints of a `TrainState`: written in the background, atomically, the newest N kept.

One folder per step, in Orbax format: `state` (step, params, opt_state), `data` (position of the
data iterator, JSON) and, to find the best by, `metrics` (JSON). A folder appears under its final
name only when it is complete. With several processes the folder is one that all of them reach.
"""

import base64
import contextlib
import functools
import itertools
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ...errors import CheckpointError
from .paths import dotted
from .processes import any_process, is_first_process, tell_all
from .state import TrainState

# How the libraries below tell that the disk takes no more.
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")
_LATE_SECONDS = 60  # after which a network file system shows every process what one of them wrote


class _Quiet(logging.Filter):
    """Holds back the errors that Orbax logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in Path(record.pathname).parts


@functools.cache
def _hush() -> None:
    """Tell a failed write or read once, as the error that comes of it.

    Orbax logs it in every thread, and each array that was still being written then finds its event
    loop closed, of which tensorstore prints a traceback; so does Orbax of each that was being read.
    """
    logging.getLogger("absl").addFilter(_Quiet())
    hook = sys.unraisablehook

    def without_the_rest(unraisable: Any) -> None:
        error, code = unraisable.exc_value, getattr(unraisable.object, "cr_code", None)
        closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not closed and (code is None or "orbax" not in Path(code.co_filename).parts):
            hook(unraisable)

    sys.unraisablehook = without_the_rest


class _Meetings:
    """Where processes wait for each other while a checkpoint is being written.

    A process that cannot write its part goes on to the last of these, and the others would wait for
    it at the one before, twenty minutes long. So each says where it is; if they differ, all fail.
    """

    _numbers = itertools.count()  # as every process goes to all of them in the same order

    def __init__(self) -> None:
        self._failed = False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if jax.process_count() == 1:
            return
        if not self._failed:
            place = f"conceptax/{next(self._numbers)}"
            client = ocp.multihost.get_jax_distributed_client()
            client.key_value_set(f"{place}/{jax.process_index()}", key)
            client.wait_at_barrier(place, timeout_ms)
            self._failed = len({where for _, where in client.key_value_dir_get(f"{place}/")}) > 1
        if self._failed:
            raise _UnwrittenError("a process of this run could not write its part")


class _UnwrittenError(OSError):
    """A checkpoint lacks the part of a process."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last write when it ends.

    Args:
      directory: folder of the run, created if missing.
      keep: number of newest checkpoints kept.
      best: a metric; the checkpoint with its lowest value is kept besides.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, best: str | None = None) -> None:
        self.directory, self._keep, self._best = Path(directory).absolute(), keep, best
        _hush()
        reason = next(filter(None, tell_all(_made(self.directory))), "")
        if not reason:
            try:
                self._manager = self._open()
            except OSError as error:
                reason = error.strerror or str(error)
        if reason:
            raise CheckpointError(f"checkpoints cannot be kept in {self.directory}: {reason}.")
        self._complete = self.latest_step  # the newest that is known to be written
        self._swept = self._abandoned = False

    def _open(self) -> ocp.CheckpointManager:
        self._wait_until_all_see_the_same()
        policies, best = ocp.checkpoint_managers, self._best
        kept: list[Any] = [policies.LatestN(n=self._keep)]

        def goodness(metrics: Mapping[str, float]) -> float:
            return -metrics.get(best or "", math.inf)

        if best is not None:
            kept.append(
                policies.BestN(get_metric_fn=goodness, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=None if best is None else goodness,  # so metrics are written
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_Meetings()),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _wait_until_all_see_the_same(self) -> None:
        """A network file system shows some processes late what another did."""
        for pause in (0, *[1] * _LATE_SECONDS):
            time.sleep(pause)
            told = tell_all(" ".join(map(str, _steps_in(self.directory))))
            if len(set(told)) == 1:
                return
        raise CheckpointError(
            f"the processes of this run see different checkpoints in {self.directory}: after steps "
            f"{', or '.join(each or 'none' for each in told)}. It must be one folder that all of "
            "them reach."
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint (one still being written counts), or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics of the step that a checkpoint was written after, if `best` was given then."""
        return dict(self._manager.metrics(self._existing(step)) or {})

    def save(
        self,
        state: TrainState,
        iterator: Any = None,
        metrics: Mapping[str, float] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Start writing `state`, the iterator's position if it has `get_state`, and the metrics.

        `length` is the number of steps that the run must have, if a resumed one must have as many.
        `state` may be donated right after. A step that is already there is left as it is.

        Raises:
          CheckpointError: this checkpoint, or the one that was being written, could not be.
          ValueError: `best` is not among the metrics.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        if self._best is not None and self._best not in (metrics or {}):
            raise ValueError(
                f"there is no metric {self._best!r} to find the best checkpoint by; the step gives "
                f"{sorted(metrics or {})}."
            )
        self._sweep()
        position = iterator.get_state() if hasattr(iterator, "get_state") else None
        if isinstance(position, bytes):  # of grain's DataLoader; others are JSON values
            position = {"base64": base64.b64encode(position).decode()}
        self.wait()
        with self._writing():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(jax.tree.map(jnp.copy, state))),
                data=ocp.args.JsonSave({"position": position, "length": length}),
            )
            self._manager.save(step, metrics=dict(metrics or {}), args=items)

    def restore(
        self,
        target: TrainState,
        *,
        step: int | None = None,
        iterator: Any = None,
        length: int | None = None,
    ) -> TrainState:
        """Read a checkpoint into the structure, dtypes and shardings of `target`.

        Args:
          target: of arrays or `jax.ShapeDtypeStruct`, perhaps on another mesh than was saved from.
          step: which checkpoint; default the newest that every process of the run can read. One
            that cannot be is put aside, under the name `damaged-STEP`, with a warning.
          iterator: moved to the saved position if it has `set_state`.
          length: number of steps that the run must have been meant to have, if that matters.

        Raises:
          ValueError: there is no such checkpoint, or it does not fit `target` or `length`.
        """
        if step is not None:
            return self._restore(target, step, iterator, length)
        while True:
            newest, restored, misfit, reason = self._existing(None), None, "", ""
            try:
                restored = self._restore(target, newest, iterator, length)
            except _MisfitError as error:
                misfit = str(error)
            except Exception as error:  # whatever the libraries below make of damaged files
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            misfits = tell_all(misfit)
            if said := misfit or next(filter(None, misfits), ""):
                raise _MisfitError(said)
            if not any_process(restored is None) and restored is not None:
                return restored
            aside = self._put_aside(newest)
            warnings.warn(
                f"the checkpoint after step {newest} cannot be read "
                f"({reason or 'by another process'}); it was moved to {aside}, and the one before "
                "it is used.",
                stacklevel=2,
            )

    def _restore(
        self, target: TrainState, step: int, iterator: Any, length: int | None
    ) -> TrainState:
        step = self._existing(step)
        self._check_fits(step, _as_dict(target))
        folder = self.directory / str(step)
        wanted = ocp.args.StandardRestore(_as_dict(target))
        state = _read(folder / "state", ocp.StandardCheckpointHandler, wanted)
        data = _read(folder / "data", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
        begun = data.get("length")
        if None not in (length, begun) and length != begun:
            raise _MisfitError(
                f"the checkpoint after step {step} in {self.directory} is of a run of {begun} "
                f"steps, and this one is to have {length}: its learning rate, which depends on "
                f"that, would follow neither. Run {begun} steps, or choose another folder."
            )
        if iterator is not None and hasattr(iterator, "set_state"):
            position = data["position"]
            if isinstance(position, dict) and set(position) == {"base64"}:
                position = base64.b64decode(position["base64"])
            if position is None:
                raise _MisfitError(
                    f"the checkpoint after step {step} holds no data position, but the batches "
                    "given now need one: it was written with other batches."
                )
            iterator.set_state(position)
        return TrainState(**state)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
          CheckpointError: it could not be.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._complete = self.latest_step

    def close(self) -> None:
        """Wait until everything is written and release the folder."""
        if self._abandoned:
            return
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # told by `wait`
                self._manager.close()

    def abandon(self) -> int | None:
        """Wait for nothing from now on; the step of the newest complete checkpoint."""
        self._abandoned = True
        return self._complete

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what a failed write means, and leave nothing of it behind."""
        try:
            yield
        except Exception as error:
            text = f"{error} {error.__cause__ or error.__context__ or ''}"
            reason = next((phrase for phrase in _FULL if phrase in text), None)
            if reason is None and isinstance(error, OSError):
                reason = error.strerror or str(error)
            if reason is None:
                raise
            self._abandoned, self._swept = True, False
            self._sweep()
            good = "There is none before it"
            if self._complete is not None:
                good = f"The one after step {self._complete} is good"
            raise CheckpointError(
                f"a checkpoint could not be written to {self.directory}: {reason}. {good}: free "
                "some space and run again."
            ) from error

    def _put_aside(self, step: int) -> Path:
        aside, reason = self.directory / f"damaged-{step}", ""
        if is_first_process():
            shutil.rmtree(aside, ignore_errors=True)
            try:
                (self.directory / str(step)).rename(aside)
            except OSError as error:
                reason = error.strerror or str(error)
        if reason := tell_all(reason)[0]:  # the others look into the folder after that
            raise CheckpointError(
                f"the checkpoint after step {step} cannot be read, nor moved to {aside}: {reason}. "
                "Move it away and run again."
            )
        self._manager.close()
        self._manager = self._open()
        self._complete = self.latest_step
        return aside

    def _sweep(self) -> None:
        """Before the first save, remove what an earlier, killed run left half-written."""
        if not self._swept and is_first_process():
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._swept = True

    def _check_fits(self, step: int, target: dict[str, Any]) -> None:
        saved = _describe(self._manager.item_metadata(step)["state"].tree)
        wanted = _describe(target)
        lines = [
            f"{path}: saved {saved.get(path, 'not')}, needed {wanted.get(path, 'not')}"
            for path in sorted(saved.keys() | wanted.keys())
            if saved.get(path) != wanted.get(path)
        ]
        if lines:
            lines[10:] = [f"and {len(lines) - 10} more"] * (len(lines) > 10)
            raise _MisfitError(
                f"the checkpoint after step {step} in {self.directory} does not fit this model and "
                "optimizer (another architecture, trainable set, precision or optimizer?):\n  "
                + "\n  ".join(lines)
            )

    def _existing(self, step: int | None) -> int:
        self.wait()
        there = self.steps
        if not there or (step is not None and step not in there):
            wanted = "no checkpoint" if step is None else f"no checkpoint after step {step}"
            raise _MisfitError(f"{wanted} in {self.directory}; there are steps {there}.")
        return there[-1] if step is None else step


class _MisfitError(ValueError):
    """A checkpoint that is whole, but not what was asked for."""


def _made(folder: Path) -> str:
    """Make a folder, if it is missing; why it cannot be, or ""."""
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        if not there.is_dir():
            return f"{there} is not a folder"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _steps_in(folder: Path) -> list[int]:
    return sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit())


def _read(path: Path, handler: Any, wanted: ocp.args.CheckpointArgs) -> Any:
    """One item of a checkpoint, without waiting for other processes.

    A process that met damaged files would otherwise leave the rest waiting.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
    )
    with ocp.Checkpointer(
        handler(multiprocessing_options=alone), multiprocessing_options=alone
    ) as checkpointer:
        return checkpointer.restore(path, args=wanted)


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _describe(tree: Any) -> dict[str, str]:
    """`{path: "float32(8, 256)"}` of a tree of arrays or of Orbax's array metadata."""
    return {
        dotted(path): f"{np.dtype(leaf.dtype)}{tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
