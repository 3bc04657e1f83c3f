"""Models by their ids on the Hub: what is fetched, where it lies, and what is said without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serving

import conceptax
from conceptax.converters import hub

ASK = """
import json, sys
from conceptax.converters.hub import local
answers = []
for path, options in json.loads(sys.argv[1]):
    try:
        answers.append(str(local(path, **options)))
    except ValueError as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A pipeline with weights in two variants, one that is gated, and a LoRA without settings."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(conceptax.bundled_model(), root / "glyphs")
    unet = root / "glyphs" / "unet"
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        (unet / name).write_bytes(name.encode())
    (root / "glyphs" / "README.md").write_text("A model.")
    (root / "lora").mkdir()
    (root / "lora" / "style.safetensors").write_bytes(b"lora")
    return {"org/glyphs": root / "glyphs", "org/gated": root / "glyphs", "org/lora": root / "lora"}


def ask(cache: Path, url: str, *questions, offline: bool = False) -> list[str]:
    """What `local` answers in a process of its own, whose Hub is at `url`."""
    environment = os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    told = json.dumps([[path, options] for path, options in questions])
    done = subprocess.run(
        [sys.executable, "-c", ASK, told], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_only_what_is_needed_is_fetched_and_stays(repositories, tmp_path):
    with serving(Hub(repositories, gated=("org/gated",))) as server:
        found = ask(
            tmp_path,
            server.url,
            ("org/glyphs", {}),
            ("org/none", {}),
            ("org/glyphs@nope", {}),
            ("org/gated", {}),
            ("org/lora", {}),
        )
        fetched = sorted(server.fetched)
    snapshots = tmp_path / "hub/models--org--glyphs/snapshots"
    assert found[0] == str(snapshots / COMMIT)
    assert (snapshots / COMMIT / "unet/config.json").is_symlink()  # the Hub's layout: into blobs
    assert "no model of that name is on the Hub" in found[1]
    assert "no revision 'nope'" in found[2]
    assert "is gated" in found[3] and "HF_TOKEN" in found[3]
    assert found[4].endswith("style.safetensors")
    of_unet = [f for f in fetched if f.startswith("org/glyphs/unet/")]
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    assert of_unet == [f"org/glyphs/unet/{name}" for name in names]
    assert not [f for f in fetched if f.startswith(("org/glyphs/clip/", "org/glyphs/judge/"))]
    assert "org/glyphs/README.md" not in fetched
    # Once more, from the cache alone: without asking, and with nobody answering.
    for offline in (True, False):
        again = ask(tmp_path, server.url, ("org/glyphs", {}), ("org/none", {}), offline=offline)
        assert again[0] == found[0]
        assert again[1].startswith("CheckpointError: org/none is no file or folder here")
        assert ("offline" in again[1]) == offline


def test_variants_subfolders_revisions_and_files(repositories, tmp_path):
    with serving(Hub(repositories)) as server:
        found = ask(
            tmp_path,
            server.url,
            ("org/glyphs@v1", {"subfolder": "unet", "variant": "fp16"}),
            ("org/glyphs/vae/config.json", {}),
            ("org/glyphs", {"subfolder": "nowhere"}),
        )
        fetched = sorted(server.fetched)
    snapshot = f"models--org--glyphs/snapshots/{COMMIT}"
    assert found[0].endswith(f"{snapshot}/unet")
    assert found[1].endswith(f"{snapshot}/vae/config.json")
    assert "has no 'nowhere'" in found[2]
    assert fetched == [
        "org/glyphs/unet/config.json",
        "org/glyphs/unet/diffusion_pytorch_model.fp16.safetensors",
        "org/glyphs/vae/config.json",
    ]


def test_of_a_pipeline_only_the_parts_asked_for_are_fetched(repositories, tmp_path):
    with serving(Hub(repositories)) as server:
        (found,) = ask(tmp_path, server.url, ("org/glyphs", {"components": ["unet"]}))
        weights = [name for name in server.fetched if name.endswith((".safetensors", ".bin"))]
    assert Path(found, "vae/config.json").exists()
    assert weights == ["org/glyphs/unet/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    "path, expected",
    [
        ("org/name", ("org/name", "", None)),
        ("org/name@refs/pr/1", ("org/name", "", "refs/pr/1")),
        ("org/name/a/b.safetensors@v1", ("org/name", "a/b.safetensors", "v1")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../org/name", None),
        ("org/../name", None),
    ],
)
def test_ids(path, expected):
    assert hub.hub_id(path) == expected


def test_what_is_here_is_meant_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.hub_id("org/name") is None
    assert hub.local("org/name", subfolder="unet") == Path("org/name/unet")


@pytest.mark.parametrize("form", ["{}.fp16-0000{}-of-00002{}", "{}-0000{}-of-00002.fp16{}"])
def test_all_shards_of_a_variant_are_fetched(form):
    """Behind the variant's name is where diffusers numbers shards today, before it until 0.27."""
    stem = "diffusion_pytorch_model"
    index = f"{stem}.safetensors.index.fp16.json"
    shards = [form.format(stem, number, ".safetensors") for number in (1, 2)]
    files = [*shards, index, f"{stem}.safetensors", "config.json"]
    wanted = hub.HubId("org/name", "", None)
    assert {*hub._component(wanted, files, "fp16")} == {*shards, index, "config.json"}
    assert {*hub._component(wanted, files, None)} == {f"{stem}.safetensors", "config.json"}
