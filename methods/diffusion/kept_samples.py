"""A sample that takes long, kept between its steps: after a kill the same call goes on from there.

    with KeptSamples("clip.sampling") as kept:
        videos = text_to_video(pipeline, prompts, kept=kept)
        …  # write them

The folder holds the settings, and of every batch the latents and what the sampler remembers, in
float32, so that the result is that of a run which was never stopped, bit for bit.  It is made with
the first step and removed where the block succeeds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...errors import ConceptaxError
from ...interrupts import noting

_SETTINGS = "conceptax_sample.json"
_SHOWN = 4  # settings that a message names
_SECONDS = 5.0  # between two writes, unless told otherwise


class KeptSamplesError(ConceptaxError, ValueError):
    """What is kept is of another sample, or damaged."""


class SamplingInterrupted(SystemExit):
    """A signal ended a run after completed step `step`; as `SystemExit`, its code is 128 + n."""

    def __init__(self, step: int, total: int, signum: int) -> None:
        self.step, self.signum = step, signum
        self._told = (
            f"{signal.Signals(signum).name} received; stopped after step {step} of {total} and "
            "saved: run the same again to go on."
        )
        super().__init__(128 + signum)

    def __str__(self) -> str:
        return self._told


class KeptSamples:
    """A folder of what is kept of samples in the making; a context manager.

    Args:
      folder: its place, which need not be there.
      every: seconds between two writes of a batch, at least; 0 writes after every step, and the
        default is 5.
    """

    def __init__(self, folder: Path | str, *, every: float | int | None = None) -> None:
        self.folder = Path(os.path.abspath(Path(folder).expanduser()))
        self.every = _SECONDS if every is None else every
        self.settings: Mapping[str, Any] = {}
        self.received: list[int] = []

    def __enter__(self) -> KeptSamples:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None and any(self.folder.glob("*.npz")):
            return
        for file in (*self.folder.glob("*.npz"), *self._made()):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not there, or holds what is not ours
            self.folder.rmdir()

    def _made(self) -> list[Path]:
        """The settings, and what a killed run left half-written."""
        settings = self.folder / _SETTINGS
        return [settings, *self.folder.glob(".*.partial")] if settings.is_file() else []

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Refuse what is kept of another sample; note this one's settings.

        Args:
          settings: all that a sample depends on, values of JSON under the names of arguments.

        Raises:
          KeptSamplesError: the folder is of other settings, which are named; or is somebody's own.
        """
        self.settings = json.loads(json.dumps(settings))
        file = self.folder / _SETTINGS
        if not self.folder.exists() or not any(self.folder.glob("[!.]*")):
            return
        if not file.is_file():
            raise KeptSamplesError(
                f"{self.folder} holds no {_SETTINGS}, so it keeps no sample and is left as it is: "
                "move it away, or choose another output."
            )
        try:
            before = json.loads(file.read_text("utf-8"))
            names = sorted(before.keys() | self.settings.keys())
        except (OSError, ValueError, AttributeError) as error:
            raise KeptSamplesError(
                f"{file} is damaged ({error}): remove {self.folder} to begin anew."
            ) from error
        differing = [
            f"{name}={_short(before.get(name))} (now {_short(self.settings.get(name))})"
            for name in names
            if before.get(name) != self.settings.get(name)
        ]
        if differing and any(self.folder.glob("*.npz")):
            raise KeptSamplesError(
                f"{self.folder} keeps an unfinished sample with other settings: "
                f"{'; '.join(differing[:_SHOWN])}. It goes on with the settings that it began "
                f"with: take those, or remove {self.folder} to begin anew."
            )

    def batch(self, first: int) -> Kept:
        """What is kept of the batch whose first image or video has this number."""
        return Kept(self, self.folder / f"{first:04d}.npz")


class Kept:
    """What is kept of one batch; `KeptSamples.batch` makes it."""

    def __init__(self, samples: KeptSamples, file: Path) -> None:
        self._samples, self._file = samples, file
        self._written = time.monotonic()

    def restore(self, carry: Any) -> tuple[Any, int]:
        """What was kept, in the place of a run's first arrays, and how many steps they have seen.

        Raises:
          KeptSamplesError: the file is damaged, or holds arrays of other shapes.
        """
        if not self._file.exists():
            return carry, 0
        leaves, structure = jax.tree.flatten(carry)
        try:
            with np.load(self._file, allow_pickle=False) as stored:
                step = int(stored["step"])
                found = [stored[str(index)] for index in range(len(leaves))]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise KeptSamplesError(
                f"{self._file} is damaged ({error}): remove it to draw that sample anew."
            ) from error
        if [each.shape for each in found] != [leaf.shape for leaf in leaves]:
            raise KeptSamplesError(
                f"{self._file} is of a sample of another size: remove it to begin anew."
            )
        return jax.tree.unflatten(structure, map(jnp.asarray, found)), step

    def save(self, carry: Any, step: int, total: int) -> None:
        """Keep a run's arrays after completed step `step`, where it is time, and stop if asked to.

        Raises:
          SamplingInterrupted: a signal came meanwhile (`stoppable`).
          KeptSamplesError: the folder cannot be written.
        """
        now = time.monotonic()
        received = self._samples.received
        if not (received or step == total or now - self._written >= self._samples.every):
            return
        content = io.BytesIO()
        arrays = {str(n): np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(carry))}
        np.savez(content, step=np.asarray(step), **arrays)  # type: ignore[arg-type]
        folder = self._samples.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / _SETTINGS, json.dumps(self._samples.settings, indent=1).encode())
            _replace(self._file, content.getbuffer())
        except OSError as error:
            raise KeptSamplesError(
                f"{folder} cannot be written: {error.strerror or error}. What was kept before is "
                "still there."
            ) from error
        self._written = now
        if received:
            raise SamplingInterrupted(step, total, received[0])

    @contextlib.contextmanager
    def stoppable(self, total: int) -> Iterator[None]:
        """Context of steps: the first SIGINT or SIGTERM waits for the end of one.

        Raises:
          SamplingInterrupted: it came with the last one.
        """
        received = self._samples.received
        with noting(received):
            yield
        if received:
            raise SamplingInterrupted(total, total, received[0])


def _replace(file: Path, content: Any) -> None:
    """Write a file that is whole whenever somebody looks, also after a crash of the machine."""
    work = file.with_name(f".{file.name}.partial")
    with work.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    work.replace(file)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
