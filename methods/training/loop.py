"""The training loop: one pure step, run many times, on one device or a mesh.

A step is a module-level function

    step(static, state, frozen, batch, key) -> (state, metrics)

of a hashable `static` (graph definitions, config, optimizer), a `TrainState`, frozen arrays, one
batch (None for steps that make their own data) and the key of this step, already folded with the
step's number (`state.step_key`). It returns the state with its step number raised by one
(`state.apply_gradients` does that) and a dict of scalar metrics, among them `loss`.

The loop never waits for the step it has just started: it reads the metrics of earlier steps while
later ones run. A loss or a parameter that is not finite is therefore noticed a few steps late, but
always before anything is saved.

The same loop runs in each of several processes (`processes`): every one brings its part of each
batch, the first writes the logs, and a signal to any of them stops all after the same step.
"""

import collections
import contextlib
import functools
import math
import signal
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from ...errors import ConceptaxError
from ...interrupts import noting
from ...kernels.memory import compiler_options
from ..estimate import OnEstimate, compile_seconds, run_seconds, work
from .checkpoints import Checkpoints
from .paths import dotted
from .processes import ProcessLostError, failing_together, is_first_process, place, spread_flag
from .reporting import Reporter
from .sharding import DEFAULT_RULES, Rules, make_mesh, shard_batch, shard_state, shard_tree
from .state import TrainState, step_key

Step = Callable[[Any, TrainState, Any, Any, PRNGKeyArray], tuple[TrainState, dict[str, Any]]]
# Told of a step: how many are done, the state after it, and metrics of one shortly before.
OnStep = Callable[[int, TrainState, Mapping[str, float]], None]

_ENDED = object()  # there is no batch
_LAG = 2  # steps in flight before the loop reads metrics
# Among the metrics of the loop's own program: whether all parameters are finite, and whether a
# signal came to any process.
_FINITE, _STOP = "_finite", "_stop"


class NonFiniteLossError(ConceptaxError, ArithmeticError):
    """The loss or a parameter became NaN or infinite.

    Attributes:
      step: completed steps, the failed one included; it used batch `step - 1`, from 0.
      value: the loss.
    """

    def __init__(self, step: int, value: float, what: str, saved: int | None, batch: str) -> None:
        self.step, self.value = step, value
        kept = "No checkpoint was written."
        if saved is not None:
            kept = f"The last good checkpoint is the one after step {saved}."
        super().__init__(
            f"{what} at step {step}; training stopped. {batch}{kept} Lower the learning rate, "
            "clip the gradients, or look for bad values in the data."
        )


class TrainingInterrupted(SystemExit):
    """A signal ended the run after completed step `step`; as `SystemExit`, its code is 128 + n."""

    def __init__(self, step: int, signum: int, saved: bool) -> None:
        self.step, self.signum, self.saved = step, signum, saved
        super().__init__(128 + signum)

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        resume = "and saved: run the same again to resume"
        end = resume if self.saved else "(no checkpoints were kept)"
        return f"{name} received; stopped after step {self.step} {end}."


def train(
    step: Step,
    static: Hashable,
    state: TrainState,
    frozen: Any = None,
    batches: Iterable[Any] | None = None,
    *,
    key: PRNGKeyArray,
    num_steps: int,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 3,
    keep_best: str | None = None,
    save_last: bool = True,
    fixed_length: bool = False,
    resume: bool = True,
    metrics_path: str | Path | None = None,
    tensorboard_dir: str | Path | None = None,
    log_every: int = 1,
    progress: bool = True,
    on_estimate: OnEstimate | None = None,
    on_step: OnStep | None = None,
) -> TrainState:
    """Run `step` until `num_steps` steps are complete and return the final state.

    Args:
      step: the pure step (see the module's description).
      static: its hashable first argument.
      state: the initial state; copied, so the caller's arrays survive the donation.
      frozen: arrays the step reads and never changes.
      batches: iterable of batches (nested dicts of arrays, first dimension the batch), or None. If
        its iterator has `get_state` and `set_state` (grain), its position is checkpointed; others
        must start anew in each run, and a resumed run skips the batches that were used.
      key: the run's key; step n uses `fold_in(key, n)`.
      num_steps: total number of steps, those before a resume included.
      mesh: to shard over (`sharding.make_mesh`); None runs on the default device, and with several
        processes splits the batch over the devices of all.
      rules: sharding table for the trained and the frozen parameters; used with `mesh` only.
      checkpoint_dir: for checkpoints of the last step, and of the one at which a signal came.
      checkpoint_every: save also after every n-th step.
      keep: number of newest checkpoints kept.
      keep_best: a metric; the checkpoint whose step had its lowest value is kept besides.
      save_last: whether the last step is saved.
      fixed_length: whether the step depends on `num_steps`, as a falling learning rate does:
        checkpoints of a run of another length are then refused.
      resume: continue from the newest checkpoint in `checkpoint_dir`, if there is one.
      metrics_path: JSONL file, one record per logged step.
      tensorboard_dir: folder for TensorBoard curves.
      log_every: log every n-th step.
      progress: show a progress bar, or plain lines where there is no terminal.
      on_estimate: called with about how long compiling and all steps will take, before either.
      on_step: called with (steps done, the state, the newest metrics, {} at first) after each step.
        The state's arrays are there until it returns; what it raises ends the run.

    Raises:
      NonFiniteLossError: the loss or a parameter is NaN or infinite; nothing is saved after that.
      TrainingInterrupted: SIGTERM or SIGINT came, here or to another process of the run; the
        current step was finished and saved.  While the first step is compiled, and at the second
        signal, they act as they do outside.
      CheckpointError: a checkpoint could not be written; earlier ones stay.
      ProcessLostError: another process of the run ended. What is raised in one process alone ends
        all of them within seconds (`processes.failing_together`), whatever they wait for.
      ValueError: the arguments do not fit together or to the checkpoints, the batches end early,
        or the step returns a wrong step number or metrics.
    """
    for name, value in (("num_steps", num_steps), ("keep", keep), ("log_every", log_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if checkpoint_every is not None and (checkpoint_every < 1 or checkpoint_dir is None):
        raise ValueError(
            f"checkpoint_every={checkpoint_every} needs a checkpoint_dir (got {checkpoint_dir}) "
            "and must be at least 1."
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(failing_together(TrainingInterrupted))
        if mesh is None and jax.process_count() > 1:
            mesh = make_mesh()
        shardings = shard_state(state, mesh, rules) if mesh is not None else None
        iterator = None if batches is None else iter(batches)
        length = num_steps if fixed_length else None
        checkpoints = None
        if checkpoint_dir is not None:
            with _lost_processes():
                opened = Checkpoints(checkpoint_dir, keep=keep, best=keep_best)
            checkpoints = stack.enter_context(opened)
        with _lost_processes(None, checkpoints):
            state = _start(state, shardings, checkpoints, iterator, resume, length)
        first = int(state.step)
        if first > num_steps:
            raise ValueError(
                f"the state is already at step {first}, beyond num_steps={num_steps}. Raise "
                "num_steps, or choose an empty checkpoint folder."
            )
        if mesh is not None:
            frozen = place(frozen, shard_tree(frozen, mesh, rules))
            stack.enter_context(jax.set_mesh(mesh))
        if not is_first_process():
            metrics_path, tensorboard_dir, progress = None, None, False
        files: dict[str, Any] = {"metrics_path": metrics_path, "tensorboard_dir": tensorboard_dir}
        reporter = Reporter(first, num_steps, **files, log_every=log_every, progress=progress)
        stack.enter_context(reporter)
        received: list[int] = []
        run = _compile_step(step, static, *_hashable(shardings), watched=True)
        watcher = _Watcher(reporter, checkpoints)
        alone = jax.process_count() == 1
        if not alone:  # the others would wait for a process that just ended
            stack.enter_context(noting(received))
        stack.enter_context(_lost_processes(watcher, checkpoints))

        for n in range(first, num_steps):
            batch = None if iterator is None else next(iterator, _ENDED)
            if batch is _ENDED:
                raise ValueError(
                    f"the batches ended after {n} steps, but num_steps is {num_steps}. Repeat the "
                    "data or lower num_steps."
                )
            told = None if mesh is None else spread_flag(bool(received), mesh)
            placed = _on_devices(batch, mesh)
            if n == first and on_estimate is not None and is_first_process():
                found = work(run, state, frozen, placed, key, told)
                devices = 1 if mesh is None else mesh.size
                seconds = run_seconds(found.flops) * (num_steps - first) / devices
                on_estimate(compile_seconds(found.equations), seconds)
            if n == first:
                reporter.start()
            state, metrics = run(state, frozen, placed, key, told)
            if n == first and alone:  # until here a signal stops at once: nothing is lost
                stack.enter_context(noting(received))
            watcher.started(n + 1, state.step, metrics, batch)
            stop = bool(received) if alone else watcher.stop  # known to all after the same step
            last = n + 1 == num_steps
            due = bool(checkpoint_every) and (n + 1) % checkpoint_every == 0
            if stop or due or last:
                values = watcher.finish()
                if checkpoints is not None and (stop or due or save_last):
                    checkpoints.save(state, iterator, values, length=length)
            if on_step is not None:
                on_step(n + 1, state, watcher.values)
            if stop:
                signum = received[0] if received else signal.SIGTERM  # another process's
                raise TrainingInterrupted(n + 1, signum, checkpoints is not None)
    return state


def compile_step(
    step: Step, static: Hashable, shardings: TrainState | None = None
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Jit `run(state, frozen, batch, key) -> (state, metrics)` with `state` donated.

    `key` is the run's key: the compiled function folds in the step's number. The same arguments
    give the same compiled function. The result keeps the `shardings` (`sharding.shard_state`).
    """
    return _compile_step(step, static, *_hashable(shardings), watched=False)


def _hashable(shardings: TrainState | None) -> tuple[Any, tuple[Any, ...]]:
    leaves, treedef = jax.tree.flatten(shardings)
    return treedef, tuple(leaves)


@functools.lru_cache(maxsize=32)
def _compile_step(
    step: Step, static: Hashable, treedef: Any, leaves: tuple[Any, ...], *, watched: bool
) -> Any:
    def run(
        state: TrainState, frozen: Any, batch: Any, key: PRNGKeyArray, told: Any = None
    ) -> tuple[TrainState, dict[str, Any]]:
        state, metrics = step(static, state, frozen, batch, step_key(key, state.step))
        if watched:
            stop = jnp.zeros((), bool) if told is None else jnp.any(told)
            metrics = {**metrics, _FINITE: _all_finite(state.params), _STOP: stop}
        return state, metrics

    jit = functools.partial(jax.jit, run, donate_argnums=0, compiler_options=compiler_options())
    if not leaves:
        return jit()
    replicated = NamedSharding(leaves[0].mesh, PartitionSpec())
    return jit(out_shardings=(jax.tree.unflatten(treedef, leaves), replicated))


class _Watcher:
    """Reads the metrics of started steps, oldest first, a few steps behind.

    Attributes:
      step: how many steps are known to have succeeded, or None.
      values: the metrics of the last of them.
      stop: whether a signal came to any process, as the metrics that were read say.
    """

    def __init__(self, reporter: Reporter, checkpoints: Checkpoints | None) -> None:
        self._reporter, self._checkpoints = reporter, checkpoints
        self._pending = collections.deque[tuple[int, Any, dict[str, Any], Any]]()
        self.values: dict[str, float] = {}
        self.step: int | None = None
        self.stop = False

    def started(self, step: int, counter: jax.Array, metrics: dict[str, Any], batch: Any) -> None:
        counter = jnp.copy(counter)  # the state's own buffer is donated to the next step
        for leaf in jax.tree.leaves((counter, metrics)):
            leaf.copy_to_host_async()
        self._pending.append((step, counter, metrics, batch))
        while len(self._pending) > _LAG:
            self._read()

    def finish(self) -> dict[str, float]:
        """Wait for all started steps; the metrics of the last."""
        while self._pending:
            self._read()
        return self.values

    def _read(self) -> None:
        step, counter, metrics, batch = self._pending.popleft()
        metrics = dict(metrics)
        finite, stop = metrics.pop(_FINITE), metrics.pop(_STOP)
        self.stop |= bool(stop)
        values = _scalars(metrics)
        self._reporter.step(step, values)
        loss = values["loss"]
        if not math.isfinite(loss) or not bool(finite):
            bad = not math.isfinite(loss)
            what = f"the loss is {loss}" if bad else "a parameter is NaN or infinite"
            saved = self._checkpoints.latest_step if self._checkpoints else None
            raise NonFiniteLossError(step, loss, what, saved, _describe_batch(batch, step - 1))
        self.step, self.values = step, values
        if int(counter) != step:
            raise ValueError(
                f"the step returned a state with step number {int(counter)}, expected {step}: a "
                "step must raise it by one (apply_gradients does)."
            )


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    if "loss" not in metrics:
        raise ValueError(f"the step's metrics need 'loss'; received {sorted(metrics)}.")
    wrong = {name: np.shape(value) for name, value in metrics.items() if np.size(value) != 1}
    if wrong:
        raise ValueError(f"metrics must be scalars; these are not (name: shape): {wrong}.")
    return {name: float(np.asarray(value).reshape(())) for name, value in metrics.items()}


def _start(
    state: TrainState,
    shardings: TrainState | None,
    checkpoints: Checkpoints | None,
    iterator: Iterator[Any] | None,
    resume: bool,
    length: int | None,
) -> TrainState:
    """The state to begin with, on its devices, and the iterator moved to its place."""
    if checkpoints is not None and checkpoints.latest_step is not None:
        if not resume:
            raise ValueError(
                f"{checkpoints.directory} already holds checkpoints and resume is off. Choose "
                "another folder, remove this one, or resume."
            )
        target = abstract_state(state, shardings)
        state = checkpoints.restore(target, iterator=iterator, length=length)
        if iterator is not None and not hasattr(iterator, "set_state"):
            for _ in range(int(state.step)):
                next(iterator, None)
        return state
    if shardings is None:
        return jax.tree.map(jnp.array, state)  # copies
    # device_put alone may hand out the caller's own buffer on the device that holds it already,
    # may_alias=False or not; donating that buffer would take it from the caller.
    return jax.tree.map(jnp.copy, place(state, shardings))


def abstract_state(state: TrainState, shardings: TrainState | None = None) -> TrainState:
    """`state` as shapes, dtypes and shardings only: the target of `Checkpoints.restore`."""

    def abstract(leaf: Any, where: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(abstract, state, *([] if shardings is None else [shardings]))


def _on_devices(batch: Any, mesh: Mesh | None) -> Any:
    if mesh is None or batch is None:
        return batch
    shardings = shard_batch(batch, mesh)
    if jax.process_count() > 1:  # each host brings its part of the batch
        return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)
    return jax.device_put(batch, shardings)


def _all_finite(tree: Any) -> jax.Array:
    """A finite loss can still give NaN gradients: they show in the parameters."""
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in floating]))


def _describe_batch(batch: Any, number: int) -> str:
    """Which batch a failed step used, and what in it is not finite."""
    if batch is None:
        return ""
    bad = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        values = np.asarray(leaf)
        if values.ndim and jnp.issubdtype(values.dtype, jnp.inexact):
            finite = np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1)
            if not finite.all():
                bad.append(f"{dotted(path)}, rows {np.flatnonzero(~finite).tolist()}")
    found = f"holds NaN or infinite values in {'; '.join(bad)}" if bad else "is finite"
    return f"Batch {number}, counted from 0, {found}. "


@contextlib.contextmanager
def _lost_processes(
    watcher: _Watcher | None = None, checkpoints: Checkpoints | None = None
) -> Iterator[None]:
    """Say plainly that a collective operation failed because another process is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:300]
        saved = checkpoints.abandon() if checkpoints else None
        step = watcher.step if watcher else None
        raise ProcessLostError(step or 0, saved, reason) from error
