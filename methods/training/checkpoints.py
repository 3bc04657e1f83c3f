"""Checkpoints of a `TrainState`: written in the background, atomically, the newest N kept.

One folder per step, in Orbax format: ``state`` (step, params, opt_state) and ``data`` (position of
the data iterator, JSON). A folder appears under its final name only when it is complete.
"""

import base64
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from .paths import dotted
from .state import TrainState


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last write when it ends.

    Args:
        directory: folder of the run, created if missing.
        keep: number of newest checkpoints kept.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )
        self._swept = False

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

    def save(self, state: TrainState, iterator: Any = None) -> None:
        """Start writing `state`, and the iterator's position if it has ``get_state``.

        Returns as soon as the arrays are copied: `state` may be donated right after. A step that
        is already there is left as it is.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        self._sweep()
        position = iterator.get_state() if hasattr(iterator, "get_state") else None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(jax.tree.map(jnp.copy, state))),
                data=ocp.args.JsonSave({"position": _to_json(position)}),
            ),
        )

    def restore(
        self,
        target: TrainState,
        *,
        step: int | None = None,
        iterator: Any = None,
    ) -> TrainState:
        """Read a checkpoint into the structure, dtypes and shardings of `target`.

        Args:
            target: a state of arrays or `jax.ShapeDtypeStruct`; its shardings may be those of
                another mesh than the one the checkpoint was written from.
            step: which checkpoint; default the newest.
            iterator: moved to the saved position if it has ``set_state``.

        Raises:
            ValueError: there is no such checkpoint, or it does not fit `target`.
        """
        step = self._existing(step)
        self._check_fits(step, _as_dict(target))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_as_dict(target)), data=ocp.args.JsonRestore()
            ),
        )
        if iterator is not None and hasattr(iterator, "set_state"):
            position = _from_json(restored["data"]["position"])
            if position is None:
                raise ValueError(
                    f"the checkpoint after step {step} holds no data position, but the batches "
                    "given now need one: it was written with other batches."
                )
            iterator.set_state(position)
        return TrainState(**restored["state"])

    def restore_params(self, *, step: int | None = None) -> dict[Any, Any]:
        """Read the trained parameters alone, without a target, as a nested dict of NumPy arrays."""
        step = self._existing(step)
        path = self.directory / str(step) / "state"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            tree = checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
        return nnx.restore_int_paths(tree["params"])

    def wait(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until everything is written and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _sweep(self) -> None:
        """Before the first save, remove what an earlier, killed run left half-written."""
        if not self._swept and jax.process_index() == 0:
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
            more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise ValueError(
                f"the checkpoint after step {step} in {self.directory} does not fit this model and "
                "optimizer (another architecture, trainable set, precision or optimizer?):\n  "
                + "\n  ".join(lines[:10])
                + more
            )

    def _existing(self, step: int | None) -> int:
        self.wait()
        there = self.steps
        if not there or (step is not None and step not in there):
            wanted = "no checkpoint" if step is None else f"no checkpoint after step {step}"
            raise ValueError(f"{wanted} in {self.directory}; there are steps {there}.")
        return there[-1] if step is None else step


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _describe(tree: Any) -> dict[str, str]:
    """``{path: "float32(8, 256)"}`` of a tree of arrays or of Orbax's array metadata."""
    return {
        dotted(path): f"{np.dtype(leaf.dtype)}{tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _to_json(position: Any) -> Any:
    """Data positions are JSON values, or bytes (grain's DataLoader)."""
    if isinstance(position, bytes):
        return {"base64": base64.b64encode(position).decode()}
    return position


def _from_json(position: Any) -> Any:
    if isinstance(position, dict) and set(position) == {"base64"}:
        return base64.b64decode(position["base64"])
    return position
