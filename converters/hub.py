"""Models of the Hugging Face Hub by their ids: only the files that are needed, in the Hub's cache.

An id is `org/name`, with a revision `org/name@revision`, and for one file of a repository
`org/name/path/in/it.safetensors`.  Whatever exists here under the same path is meant first.  The
cache, the token and `HF_HUB_OFFLINE` are huggingface_hub's own.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .architectures import class_in
from .errors import CheckpointError, first_line, listing
from .files.weight_names import ADDITIONS, WeightName, weight_name

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<file>(/[^/@]+)*)(?:@(?P<revision>.+))?"
)
_SETTINGS = (".json", ".txt", ".model", ".jinja")
_NO_FILE = "-"  # a pattern that no file's name matches


class HubId(NamedTuple):
    """A repository, a file in it ("" for all that is needed) and a revision (None: the newest)."""

    repo: str
    file: str
    revision: str | None


def hub_id(path: Path | str) -> HubId | None:
    """The id that a path is, where there is no such file or folder here; None for any other."""
    text = str(path)
    found = _ID.fullmatch(text)
    if found is None or ".." in text or text.startswith(("~", ".")) or os.path.lexists(text):
        return None
    return HubId(found["repo"], found["file"].removeprefix("/"), found["revision"])


def local(
    path: Path | str,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    components: Iterable[str] | None = None,
) -> Path:
    """The path itself, or where the Hub's model of that id lies in the cache, fetched if need be.

    Args:
      path: a path, or an id.
      subfolder: a folder in it, which is returned and alone is fetched.
      variant: of the weights, such as "fp16"; without it, or where there is none, the plain ones.
      components: of a pipeline, the only parts to fetch; the others' settings come too.

    Raises:
      CheckpointError: there is no such model, it cannot be reached and is not in the cache, or it
        needs a token; one sentence says which.
    """
    wanted = hub_id(path)
    if wanted is None:
        folder = Path(path).expanduser()
        return folder / subfolder if subfolder else folder
    names = None if components is None else tuple(sorted(components))
    return _fetched(wanted, str(path), subfolder, variant, names)


@functools.cache  # a command asks for the same model several times
def _fetched(
    wanted: HubId,
    path: str,
    subfolder: str | None,
    variant: str | None,
    components: tuple[str, ...] | None,
) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    repo, file, revision = wanted
    refusals = {
        hub_errors.RevisionNotFoundError: f"{repo} on the Hub has no revision {revision!r}.",
        hub_errors.GatedRepoError: f"{repo} on the Hub is gated: accept its terms on its page, and "
        "log in with `hf auth login` or set HF_TOKEN.",
        hub_errors.RepositoryNotFoundError: f"{path} is no file or folder here, and no model of "
        "that name is on the Hub. Check the path; a private model needs `hf auth login` or "
        "HF_TOKEN.",
    }
    root, reason = None, ""
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(repo, revision=revision)
            files = [each.rfilename for each in info.siblings or ()]
            inside = "/".join(part for part in (subfolder, file) if part)
            chosen = [  # as patterns, each of which only its name matches
                re.sub(r"([*?\[])", r"[\1]", name)
                for name in _needed(wanted, files, inside, variant, components)
            ]
            root = snapshot_download(repo, revision=revision, allow_patterns=chosen)
        except CheckpointError:
            raise
        except Exception as error:  # of several HTTP libraries, by version: what is cached will do
            told = [text for kind, text in refusals.items() if isinstance(error, kind)]
            if told:
                raise CheckpointError(told[0]) from error
            reason = f" ({first_line(error)})"
    if root is None:
        try:
            root = snapshot_download(
                repo, revision=revision, local_files_only=True, allow_patterns=[_NO_FILE]
            )
        except Exception as error:
            offline = "the Hub is not asked (offline)" if not reason else "the Hub did not answer"
            raise CheckpointError(
                f"{path} is no file or folder here, its cache holds no model of that name, and "
                f"{offline}{reason}. Check the path, or fetch it once while online."
            ) from error
    place = Path(root, *PurePosixPath(subfolder or "").parts, *PurePosixPath(file).parts)
    if not place.exists():
        raise CheckpointError(
            f"{path}: {subfolder or file} is not in what the cache holds of {repo}."
        )
    return place if place.is_file() else _single(place)


def _single(folder: Path) -> Path:
    """The folder, or the only weights of one that has no settings: a single file, a LoRA."""
    if any((folder / name).exists() for name in ("model_index.json", "config.json")):
        return folder
    weights = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".ckpt", ".bin"))
    return weights[0] if len(weights) == 1 else folder


def _needed(
    wanted: HubId,
    files: Sequence[str],
    inside: str,
    variant: str | None,
    components: Iterable[str] | None,
) -> list[str]:
    """The files of a repository that loading `inside` of it reads."""
    if inside in files:
        return [inside]
    here = [f.removeprefix(f"{inside}/") for f in files if not inside or f.startswith(f"{inside}/")]
    if not here:
        raise CheckpointError(f"{wanted.repo} on the Hub has no {inside!r}.")
    start = f"{inside}/" if inside else ""
    if "model_index.json" not in here:
        return [start + file for file in _component(wanted, here, variant)]
    from huggingface_hub import hf_hub_download

    index = hf_hub_download(wanted.repo, f"{start}model_index.json", revision=wanted.revision)
    entries = json.loads(Path(index).read_text("utf-8"))
    parts = {name for name, entry in entries.items() if class_in(entry) is not None}
    full = parts if components is None else parts & set(components)
    chosen = _settings(here)
    for part in sorted(parts):
        own = [f.removeprefix(f"{part}/") for f in here if f.startswith(f"{part}/")]
        kept = _component(wanted, own, variant) if part in full else _settings(own)
        chosen += [f"{part}/{file}" for file in kept]
    return [start + file for file in chosen]


def _settings(names: Iterable[str]) -> list[str]:
    return [n for n in names if "/" not in n and n.endswith(_SETTINGS) and weight_name(n) is None]


def _component(wanted: HubId, names: Sequence[str], variant: str | None) -> list[str]:
    """The settings of a folder and one set of its weights."""
    groups: dict[WeightName, list[str]] = {}
    for name in names:
        if "/" not in name and (weights := weight_name(name)):
            whole = weights._replace(index=False, shard=False)
            groups.setdefault(whole, []).append(name)
    known = {key: of for key, of in groups.items() if key.libraries or key.stem in ADDITIONS}
    if not groups:
        return _settings(names)
    if not known and len(groups) > 1 and "config.json" not in names:
        raise CheckpointError(
            f"{wanted.repo} holds several files of weights ({listing(sorted(names))}): name one, "
            f"such as {wanted.repo}/{min(groups.values())[0]}."
        )
    best = min(known or groups, key=lambda weights: weights.rank(variant=variant))
    return _settings(names) + groups[best]
