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
from typing import Any, NamedTuple

from .errors import CheckpointError, listing

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<file>(/[^/@]+)*)(?:@(?P<revision>.+))?"
)
_WEIGHTS = re.compile(r"(?P<stem>.+?)\.(?P<type>safetensors|bin|msgpack)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")  # before the variant or, in later names, behind it
_INDEX = re.compile(
    r"(?P<stem>.+?)\.(?P<type>safetensors|bin|msgpack)\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
# Stems of weights that diffusers and transformers load; what else lies beside them is not needed.
_STEMS = ("diffusion_pytorch_model", "diffusion_flax_model", "model", "pytorch_model", "flax_model")
_ADDITIONS = ("pytorch_lora_weights", "adapter_model", "learned_embeds")
_TYPES = ("safetensors", "bin", "msgpack")  # best first
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

    root: str | None = None
    reason = ""
    if not constants.HF_HUB_OFFLINE:
        try:
            info = HfApi().model_info(wanted.repo, revision=wanted.revision)
            files = [each.rfilename for each in info.siblings or ()]
            inside = "/".join(part for part in (subfolder, wanted.file) if part)
            chosen = _needed(wanted, files, inside, variant, components)
            root = snapshot_download(
                wanted.repo, revision=wanted.revision, allow_patterns=[_escaped(f) for f in chosen]
            )
        except hub_errors.RevisionNotFoundError as error:
            raise CheckpointError(
                f"{wanted.repo} on the Hub has no revision {wanted.revision!r}."
            ) from error
        except hub_errors.GatedRepoError as error:
            raise CheckpointError(
                f"{wanted.repo} on the Hub is gated: accept its terms on its page, and log in with "
                "`hf auth login` or set HF_TOKEN."
            ) from error
        except hub_errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{path} is no file or folder here, and no model of that name is on the Hub. Check "
                "the path; a private model needs `hf auth login` or HF_TOKEN."
            ) from error
        except CheckpointError:
            raise
        except Exception as error:  # of several HTTP libraries, by version: what is cached will do
            reason = f" ({_first_line(error)})"
    if root is None:
        try:
            root = snapshot_download(
                wanted.repo,
                revision=wanted.revision,
                local_files_only=True,
                allow_patterns=[_NO_FILE],
            )
        except Exception as error:
            offline = "the Hub is not asked (offline)" if not reason else "the Hub did not answer"
            raise CheckpointError(
                f"{path} is no file or folder here, its cache holds no model of that name, and "
                f"{offline}{reason}. Check the path, or fetch it once while online."
            ) from error
    place = Path(root, *PurePosixPath(subfolder or "").parts, *PurePosixPath(wanted.file).parts)
    if not place.exists():
        raise CheckpointError(
            f"{path}: {subfolder or wanted.file} is not in what the cache holds of {wanted.repo}."
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

    index = json.loads(
        Path(
            hf_hub_download(wanted.repo, f"{start}model_index.json", revision=wanted.revision)
        ).read_text("utf-8")
    )
    parts = {name for name, entry in index.items() if _is_part(entry)}
    full = parts if components is None else parts & set(components)
    chosen = [file for file in here if "/" not in file and file.endswith(_SETTINGS)]
    for part in sorted(parts):
        own = [f.removeprefix(f"{part}/") for f in here if f.startswith(f"{part}/")]
        kept = _component(wanted, own, variant) if part in full else _settings(own)
        chosen += [f"{part}/{file}" for file in kept]
    return [start + file for file in chosen]


def _is_part(entry: Any) -> bool:
    """Whether an entry of a model_index.json names a part: [library, class]."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def _settings(names: Iterable[str]) -> list[str]:
    return [n for n in names if "/" not in n and n.endswith(_SETTINGS) and not _INDEX.fullmatch(n)]


def _component(wanted: HubId, names: Sequence[str], variant: str | None) -> list[str]:
    """The settings of a folder and one set of its weights."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        index, weights = _INDEX.fullmatch(name), _WEIGHTS.fullmatch(_SHARD.sub("", name))
        if "/" in name or not (index or weights):
            continue
        found = index or weights
        assert found is not None
        stem, kind = found["stem"], ""
        if index and index["variant"]:
            kind = index["variant"]
        elif stem not in (*_STEMS, *_ADDITIONS) and "." in stem:
            stem, _, kind = stem.rpartition(".")
        groups.setdefault((stem, kind, found["type"]), []).append(name)
    known = {key: group for key, group in groups.items() if key[0] in (*_STEMS, *_ADDITIONS)}
    if not known and not groups:
        return _settings(names)
    if not known and len(groups) > 1 and "config.json" not in names:
        raise CheckpointError(
            f"{wanted.repo} holds several files of weights ({listing(sorted(names))}): name one, "
            f"such as {wanted.repo}/{min(groups.values())[0]}."
        )

    def rank(key: tuple[str, str, str]) -> tuple[bool, bool, int]:
        return key[1] != (variant or ""), key[1] != "", _TYPES.index(key[2])

    best = min(known or groups, key=rank)
    return _settings(names) + (known or groups)[best]


def _escaped(name: str) -> str:
    """A pattern that only this name matches."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
