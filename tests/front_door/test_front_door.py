"""What `import conceptax` offers, how light it is, and `from_pretrained` on every model."""

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import conceptax
from conceptax.converters import CheckpointError
from conceptax.converters.architectures import MODULES, PIPELINES, model_class, pipeline_class
from conceptax.flax_models.autoencoder_kl import AutoencoderKL
from conceptax.flax_models.pretrained import WrongModelError
from conceptax.flax_models.unet_2d_condition import UNet2DConditionModel
from conceptax.moved import MOVED

PROMISED = [
    *("load", "save", "text_to_image", "text_to_video", "erase", "personalize", "segment"),
    *("evaluate", "train", "neighborhood_attention", "simulate", "bundled_model", "merge_parts"),
    "bundled_segmenter",
    *("ConceptaxError", "StableDiffusionPipeline", "StableDiffusionXLPipeline"),
]


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PROMISED)
def test_public_names_are_there(name):
    assert name in dir(conceptax) and name in conceptax.__all__
    assert callable(getattr(conceptax, name))


def test_unknown_names_are_refused():
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        importlib.import_module("conceptax.nonsense")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = conceptax.nonsense


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(conceptax.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: (f"{node.module}".removeprefix("."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    told = {name: (room, *(other or [name])) for name, (room, *other) in conceptax._LAZY.items()}
    assert seen == told
    assert (Path(conceptax.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_is_found_under_its_old_name(old):
    new, names = MOVED[old]
    with pytest.warns(DeprecationWarning, match=rf"is now conceptax\.{new};"):
        module = importlib.reload(importlib.import_module(f"conceptax.{old}"))
    current = importlib.import_module(f"conceptax.{new}")
    public = {name: name for name in vars(current) if not name.startswith("_")} | names
    assert all(getattr(module, a) is getattr(current, b) for a, b in public.items())


def test_import_is_light_and_completion_stays_so():
    out = run(
        "import sys, conceptax; dir(conceptax); conceptax.bundled_model();"
        "print(sorted({'jax', 'flax', 'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert out.strip() == "[]"


def test_everything_imports_without_the_optional_packages():
    out = run(
        "import importlib, pkgutil, sys\n"
        "for name in ('sklearn', 'skimage', 'matplotlib', 'torch', 'diffusers', 'jax_triton'):\n"
        "    sys.modules[name] = None\n"
        "import conceptax\n"
        "names = [m.name for m in pkgutil.walk_packages(conceptax.__path__, 'conceptax.')]\n"
        "allowed = ('__main__', 'gna_pictures', 'triton_kernels')\n"
        "left = [n for n in names if not n.endswith(allowed)]\n"
        "for name in left: importlib.import_module(name)\n"
        "print(len(left))"
    )
    assert int(out) > 150


def test_a_missing_package_is_named(monkeypatch):
    from conceptax.errors import MissingPackageError
    from conceptax.methods.glyphs import world

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    world.load_split.cache_clear()
    with pytest.raises(MissingPackageError, match=r"sklearn.*pip install 'conceptax\[demo\]'"):
        world.load_split(world.SPLITS[0])


def test_every_model_and_pipeline_loads_and_saves_itself():
    kinds = [model_class(name, "here") for name in MODULES] + [pipeline_class(n) for n in PIPELINES]
    for kind in kinds:
        assert callable(kind.from_pretrained) and callable(kind.save_pretrained)


def test_from_pretrained_and_back(tmp_path):
    vae = AutoencoderKL.from_pretrained(conceptax.bundled_model(), subfolder="vae")
    vae.save_pretrained(tmp_path / "vae")
    again = AutoencoderKL.from_pretrained(str(tmp_path / "vae"), dtype="bfloat16")
    assert again.config == vae.config
    kernel = vae.decoder.conv_in.kernel[...]
    np.testing.assert_array_equal(again.decoder.conv_in.kernel[...], kernel)
    assert again.decoder.conv_in.dtype == "bfloat16"


def test_another_model_is_refused_by_name():
    with pytest.raises(WrongModelError, match=r"holds a AutoencoderKL, not a UNet2DConditionModel"):
        UNet2DConditionModel.from_pretrained(conceptax.bundled_model() / "vae")


def test_a_variant_is_picked_where_there_is_one(tmp_path):
    folder = tmp_path / "vae"
    conceptax.load(conceptax.bundled_model() / "vae").save_pretrained(folder)
    plain = folder / "diffusion_pytorch_model.safetensors"
    plain.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert isinstance(AutoencoderKL.from_pretrained(folder, variant="fp16"), AutoencoderKL)
    with pytest.raises(CheckpointError, match="bf16"):
        AutoencoderKL.from_pretrained(folder, variant="bf16")


def test_errors_have_one_base():
    assert issubclass(CheckpointError, conceptax.ConceptaxError)
    with pytest.raises(conceptax.ConceptaxError, match=r"does not exist|no file or folder"):
        conceptax.load("nowhere-at-all")


def test_equal_architectures_compile_once_whatever_their_folders_say(tmp_path):
    folders = [conceptax.bundled_model() / "vae", tmp_path / "vae"]
    shutil.copytree(*folders)
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.0.1"}))
    traced = []
    compiled = jax.jit(lambda static, x: traced.append(static) or x + 1, static_argnums=0)
    for folder in folders:
        graphdef, _ = nnx.split(conceptax.load(folder))
        compiled(graphdef, 0)
    assert len(traced) == 1
    again = conceptax.load(folders[1])
    graphdef, state = nnx.split(again)
    nnx.merge(graphdef, state).save_pretrained(tmp_path / "written")  # with its own settings
    written = json.loads((tmp_path / "written/config.json").read_text())
    assert written["_diffusers_version"] == "0.0.1"


def test_checkpoints_of_models_and_of_training_share_one_error():
    from conceptax import converters, errors
    from conceptax.methods import training

    assert converters.CheckpointError is training.CheckpointError is errors.CheckpointError
    assert converters.OutputError is errors.OutputError
    assert issubclass(errors.CheckpointError, errors.ConceptaxError)
    assert issubclass(errors.CheckpointError, ValueError)
