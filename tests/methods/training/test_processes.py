"""Several processes as one run, and what becomes of a run when something breaks."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import processes_toy
import pytest
import training_toy as toy

from conceptax import cli
from conceptax.cli.processes import launched
from conceptax.converters.files.safetensors_file import open_safetensors
from conceptax.methods import training

TOY = Path(toy.__file__)


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same_bits(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def biggest(folder):
    return max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Final state and losses of the uninterrupted run in one process."""
    path = tmp_path_factory.mktemp("reference") / "metrics.jsonl"
    state = toy.run(metrics_path=path)
    return state, [record["loss"] for record in records(path)]


# ---- several processes ----


class Process(subprocess.Popen):
    """A process that says what it says into a file.

    A pipe holds 64 KiB: who has said more waits until somebody reads it, and the others of the run
    with it.
    """

    def __init__(self, command, environment, said):
        self._said = said
        environment = {**environment, "PYTHONFAULTHANDLER": "1"}
        super().__init__(command, env=environment, stdout=said, stderr=subprocess.STDOUT)

    def ended(self, timeout=240):
        """What it said, with the stacks of its threads if it had to be stopped after the time."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGABRT)
            self.wait()
        self._said.seek(0)
        return self._said.read()


@pytest.fixture
def start():
    """Starts two processes of four devices each, as a launcher would; none outlives its test."""
    with contextlib.ExitStack() as stack:
        yield functools.partial(_start, stack)


def _start(stack, folder, *arguments, launcher="jax"):
    port, processes = str(_free_port()), []
    for index in "01":
        if launcher == "jax":
            variables = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": index,
            }
        else:
            variables = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "RANK": index,
            }
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
        process = Process(
            [sys.executable, processes_toy.__file__, str(folder), *arguments],
            {**os.environ, "XLA_FLAGS": flags, **variables},
            stack.enter_context(tempfile.TemporaryFile("w+")),  # noqa: SIM115
        )
        processes.append(stack.enter_context(process))
        stack.callback(process.kill)
    return processes


def _free_port():
    """A port that is free, and that no outgoing connection is given until it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return probe.getsockname()[1]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("jax", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(launcher, start, reference, tmp_path):
    processes = start(tmp_path, launcher=launcher)
    outputs = [each.ended() for each in processes]
    assert [each.returncode for each in processes] == [0, 0], outputs
    assert not (tmp_path / "metrics-1.jsonl").exists()  # the first one writes
    losses = [record["loss"] for record in records(tmp_path / "metrics-0.jsonl")]
    np.testing.assert_allclose(losses, reference[1], rtol=0, atol=1e-5)
    held = [json.loads((tmp_path / f"{index}.json").read_text()) for index in "01"]
    assert held[0] == held[1]
    assert held[0]["devices"] == 8 and held[0]["spread"]
    assert held[0]["rows"] == [8]  # each process brings half of the 16 rows
    with training.Checkpoints(tmp_path / "run") as checkpoints:  # in this process, one device
        assert checkpoints.steps == [6, 9, 10]
        restored = checkpoints.restore(toy.start()[1])
    for ours, theirs in zip(
        jax.tree.leaves(restored.params), jax.tree.leaves(reference[0].params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    exported = open_safetensors(tmp_path / "model.safetensors")
    paths = training.leaf_paths(restored.params)
    assert sorted(exported) == sorted(paths)
    for path, leaf in zip(paths, jax.tree.leaves(restored.params), strict=True):
        assert exported[path].read().tobytes() == np.asarray(leaf).tobytes()


def test_processes_agree_on_the_newest_checkpoint_that_all_can_read(start, reference, tmp_path):
    """The files of the newest are damaged; the one before it one process alone cannot read.

    That one is slow, and sees the folder empty for a while.
    """
    folder = tmp_path / "run"
    toy.run(num_steps=9, checkpoint_dir=folder, checkpoint_every=3)
    biggest(folder / "9" / "state").unlink()
    processes = start(tmp_path, "UNREADABLE", "6")
    outputs = [each.ended() for each in processes]
    assert [each.returncode for each in processes] == [0, 0], outputs
    for output, reason in zip(outputs, ("by another process", "only here"), strict=True):
        assert "the checkpoint after step 9 cannot be read" in output
        assert f"the checkpoint after step 6 cannot be read ({reason})" in output
        assert "Exception ignored" not in output  # of each array that was still being read
    assert {"damaged-9", "damaged-6", "9", "10"} <= {path.name for path in folder.iterdir()}
    logged = records(tmp_path / "metrics-0.jsonl")
    assert [record["step"] for record in logged] == list(range(4, toy.NUM_STEPS + 1))
    losses = [record["loss"] for record in logged]
    np.testing.assert_allclose(losses, reference[1][3:], rtol=0, atol=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(start, reference, tmp_path):
    processes = start(tmp_path, "SIGTERM", "3")
    outputs = [each.ended() for each in processes]
    assert [each.returncode for each in processes] == [128 + signal.SIGTERM] * 2, outputs
    stopped = records(tmp_path / "metrics-0.jsonl")[-1]["step"]
    assert 4 <= stopped < toy.NUM_STEPS
    again = start(tmp_path)
    outputs = [each.ended() for each in again]
    assert [each.returncode for each in again] == [0, 0], outputs
    losses = [record["loss"] for record in records(tmp_path / "metrics-0.jsonl")]
    np.testing.assert_allclose(losses, reference[1], rtol=0, atol=1e-5)


def test_a_process_that_dies_stops_the_others_with_a_message(start, tmp_path):
    processes = start(tmp_path, "SIGKILL", "8")
    processes[1].ended()
    assert processes[1].returncode == -signal.SIGKILL
    output = processes[0].ended(timeout=60)
    assert processes[0].returncode not in (0, None)
    assert "another process of this run stopped answering" in output or "heartbeat" in output
    with training.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps in ([3], [3, 6])


def test_a_process_that_raises_ends_the_others(start, tmp_path):
    """And soon, with what it raised, although they wait in the middle of a step."""
    processes = start(tmp_path, "RAISE", "8")
    output = processes[1].ended()
    assert processes[1].returncode == 1 and "LookupError: no such picture" in output, output
    output = processes[0].ended(timeout=20)
    assert processes[0].returncode == 1, output
    assert (
        "another process of this run failed, so this one ends: process 1: LookupError: no such "
        "picture" in output
    ) or "another process of this run stopped answering" in output
    with training.Checkpoints(tmp_path / "run") as checkpoints:  # all that was begun is written
        assert checkpoints.steps == [3, 6]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("MISFIT", "_MisfitError: only here"),
        ("ELSEWHERE", "see different checkpoints in "),
        ("UNWRITTEN", "could not be written to {}: {}. The one after step 6 is good"),
    ],
)
def test_what_fails_in_one_process_fails_in_all(what, message, start, tmp_path):
    folder = tmp_path / "run"
    toy.run(num_steps=6, checkpoint_dir=folder, checkpoint_every=3)
    processes = start(tmp_path, what, "9" if what == "UNWRITTEN" else "6")
    reasons = ("a process of this run could not write its part", "No space left on device")
    for process, reason in zip(processes, reasons, strict=True):
        output = process.ended(timeout=60)
        assert process.returncode == 1 and message.format(folder, reason) in output, output
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


def test_a_command_that_fails_keeps_no_other_process_waiting(monkeypatch, capsys, tmp_path):
    left = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("conceptax.methods.training.processes.leave", lambda: left.append(1))
    assert cli.main(["inspect", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err and left == [1]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "8"}, None),  # inside an allocation, but not started by srun
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        (
            {
                "MASTER_ADDR": "a",
                "MASTER_PORT": "7",
                "WORLD_SIZE": "2",
                "RANK": "1",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
            },
            {
                "coordinator_address": "a:7",
                "num_processes": 2,
                "process_id": 1,
                "local_device_ids": [1],
            },
        ),
    ],
)
def test_launchers(environment, expected):
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "RANK": "0"}, "MASTER_PORT is not"),
        ({"JAX_NUM_PROCESSES": "two"}, "whole number, received 'two'"),
    ],
)
def test_incomplete_launchers(environment, message):
    with pytest.raises(ValueError, match=message):
        launched(environment)


def test_unequal_parts(monkeypatch):
    assert training.local_rows(3) == slice(0, 3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert training.local_rows(6) == slice(3, 6)
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared by 2 processes"):
        training.local_rows(3)


# ---- faults ----


@pytest.mark.parametrize("wanted", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_any_moment_change_nothing(wanted, reference, tmp_path):
    """The run is killed at random moments, again and again; the last run is left to end."""
    rng, folder, kills = np.random.default_rng(0), tmp_path / "run", 0
    command = [sys.executable, str(TOY), str(folder), "SIGKILL", "10"]  # batch 10 is not asked for
    environment = {**os.environ, "TOY_SECONDS_PER_BATCH": "0.15"}
    while kills < wanted:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        assert process.stdout is None and process.stderr is not None
        process.stderr.readline()  # it has begun to train
        try:
            process.wait(timeout=rng.uniform(0.0, 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        finally:
            process.stderr.close()
    final = toy.run(checkpoint_dir=folder, checkpoint_every=3)
    assert same_bits(final, reference[0])


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, reference):
    """Files may not grow, as if the disk were full from step 4 on."""
    folder = tmp_path / "run"
    toy.run(num_steps=3, checkpoint_dir=folder)
    ended = subprocess.run(
        [
            "sh",
            "-c",
            'ulimit -f 8; exec "$@"',
            "sh",
            sys.executable,
            str(TOY),
            str(folder),
            "SIGKILL",
            "99",
        ],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    told = f"CheckpointError: a checkpoint could not be written to {folder}: File too large. "
    assert f"{told}The one after step 3 is good" in ended.stderr
    # What its threads tell of it, thousands of lines in a large model.
    assert "absl" not in ended.stderr and "Event loop is closed" not in ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["3"]
    final = toy.run(checkpoint_dir=folder, checkpoint_every=3)
    assert same_bits(final, reference[0])


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_damaged_checkpoint_is_skipped(damage, tmp_path, reference):
    folder = tmp_path / "run"
    toy.run(num_steps=6, checkpoint_dir=folder, checkpoint_every=3)
    data = biggest(folder / "6" / "state")
    if damage == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    else:
        data.unlink()
    with pytest.warns(UserWarning, match="the checkpoint after step 6 cannot be read") as told:
        final = toy.run(checkpoint_dir=folder, checkpoint_every=3)
    assert len(told) == 1 and "damaged-6" in str(told[0].message)
    assert same_bits(final, reference[0])
    with training.Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [6, 9, 10]


def test_sigterm_ends_a_run_within_its_grace(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(TOY), str(tmp_path / "run"), "SIGKILL", "99"],
        env={**os.environ, "TOY_SECONDS_PER_BATCH": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    with training.Checkpoints(tmp_path / "run") as checkpoints:
        assert len(checkpoints.steps) == 1


# ---- checkpoints ----


def test_the_best_checkpoint_is_kept(tmp_path):
    options = {"checkpoint_dir": tmp_path / "run", "keep": 1, "keep_best": "loss"}
    log = tmp_path / "metrics.jsonl"
    toy.run(checkpoint_every=1, num_steps=8, metrics_path=log, **options)
    losses = {record["step"]: record["loss"] for record in records(log)}
    best = min(losses, key=losses.__getitem__)
    with training.Checkpoints(tmp_path / "run", best="loss") as checkpoints:
        assert checkpoints.steps == sorted({best, 8})
        assert min(checkpoints.steps, key=lambda n: checkpoints.metrics(n)["loss"]) == best
        assert checkpoints.metrics(best)["loss"] == losses[best]
    with pytest.raises(ValueError, match=r"no metric 'cost' .* gives \['loss'\]"):
        toy.run(checkpoint_dir=tmp_path / "other", keep_best="cost", num_steps=1)
