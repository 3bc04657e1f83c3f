"""Load judges from files: NudeNet and other ONNX networks, Q16's prompts, lists of labels.

Each comes with the record that stands beside its figures: the file, its SHA-256, the versions of
what runs it.  None of these files is part of conceptax.
"""

import hashlib
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from conceptax.converters.errors import CheckpointError, first_line
from conceptax.converters.files.arrays import read_array
from conceptax.converters.files.weights import read_json
from conceptax.errors import MissingPackageError, optional
from conceptax.methods.evaluation.instruments import Clip
from conceptax.methods.evaluation.judges import Q16, LabelJudge, Network, NudeNet
from conceptax.methods.evaluation.preprocessing import Preprocessing
from conceptax.text import read_text

_BATCH = 16  # images at a time


def file_record(path: Path) -> dict[str, Any]:
    """What a file is: its name and SHA-256.

    Raises:
      CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return {"file": path.name, "sha256": digest.hexdigest()}


def open_onnx(path: Path, what: str) -> Network:
    """A network in an ONNX file, run by onnxruntime; `what` it is, for the message.

    Raises:
      CheckpointError: absent, damaged, or not of images.
      MissingPackageError: onnxruntime is not installed.
    """
    record = file_record(path)
    runtime = optional("onnxruntime", "judges", f"{what} ({path.name})")
    try:
        session = runtime.InferenceSession(str(path), providers=runtime.get_available_providers())
    except Exception as error:  # onnxruntime raises types of its own
        raise CheckpointError(f"{path} is no ONNX network: {first_line(error)}.") from error
    entry = session.get_inputs()[0]
    if len(entry.shape) != 4 or (isinstance(entry.shape[1], int) and entry.shape[1] != 3):
        raise CheckpointError(
            f"{path} takes {entry.shape}, and images are wanted: [batch, 3, height, width]."
        )
    *_, height, width = entry.shape
    fixed = isinstance(height, int) and isinstance(width, int)
    step = entry.shape[0] if isinstance(entry.shape[0], int) else _BATCH

    def run(pixels: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(pixels), step):
            batch = pixels[start : start + step]
            filled = np.zeros((step, *pixels.shape[1:]), np.float32)
            filled[: len(batch)] = batch
            parts.append(session.run(None, {entry.name: filled})[0][: len(batch)])
        return np.concatenate(parts)

    versions = {"onnxruntime": runtime.__version__}
    return Network(run, (height, width) if fixed else None, {**record, "versions": versions})


def load_nudenet(path: Path | None, threshold: float, **options: Any) -> NudeNet:
    """NudeNet from an ONNX file; None takes the one in its own package, 320n.

    Raises:
      MissingPackageError: there is none.
      CheckpointError: what is wrong with the file.
    """
    version = None
    if path is None:
        spec = util.find_spec("nudenet")
        if spec is None or spec.origin is None:
            raise MissingPackageError(
                "NudeNet's model comes with its package, which is not installed: pip install "
                "'conceptax[judges]', or pass an ONNX file of it with --nudenet."
            )
        path, version = Path(spec.origin).parent / "320n.onnx", metadata.version("nudenet")
    network = open_onnx(path, "NudeNet")
    if version is not None:
        versions = {**network.record["versions"], "nudenet": version}
        network = network._replace(record={**network.record, "versions": versions})
    return NudeNet(network, threshold, **options)


def load_q16(path: Path, clip: Clip) -> Q16:
    """Q16 from its file of prompts (.p, a pickle; .npy) and the CLIP they were tuned for.

    Raises:
      CheckpointError: what is wrong with the file.
      JudgeError: it is for another CLIP.
    """
    return Q16(clip, read_array(path), file_record(path))


def load_label_judge(path: Path, labels: Path, wanted: list[str], **options: Any) -> LabelJudge:
    """An ONNX classifier, its labels, and those that are the concept.

    Args:
      path: the ONNX file; a preprocessor_config.json beside it says how images are prepared.
      labels: a text file with one a line, or a config.json with `id2label`.
      wanted: labels of the concept.
      options: for `LabelJudge`.

    Raises:
      CheckpointError: what is wrong with a file.
      JudgeError: a label that is none of them.
    """
    network = open_onnx(path, "the classifier")
    names = read_labels(labels)
    beside = path.with_name("preprocessor_config.json")
    if beside.is_file():
        usual = Preprocessing.imagenet(network.size or (224, 224))
        options["preprocessing"] = usual.updated(read_json(beside), str(beside))
    return LabelJudge(network, names, wanted, **options)


def read_labels(path: Path) -> list[str]:
    """Labels in the order of a classifier's outputs, from lines or `id2label`.

    Raises:
      CheckpointError: the file has none.
    """
    if path.suffix.lower() == ".json":
        found = read_json(path).get("id2label")
        if not isinstance(found, dict) or sorted(found, key=_number) != [
            str(n) for n in range(len(found))
        ]:
            raise CheckpointError(f"{path} has no id2label that numbers its labels from 0.")
        return [str(found[str(n)]) for n in range(len(found))]
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not names:
        raise CheckpointError(f"{path} holds no labels: one a line is wanted.")
    return names


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1
