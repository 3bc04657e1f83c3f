"""What a checkpoint is, told from headers; whether PyTorch agrees; differences as files."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy

from conceptax import bundled_model
from conceptax.cli import main
from conceptax.converters import CheckpointError, inspect_checkpoint, load_pytorch, merge_lora
from conceptax.converters.architectures import PIPELINES
from conceptax.converters.inspection import Inspection
from conceptax.reporting.instruments import load_classifier


def parts(found: Inspection):
    return {part.name: part for part in found.parts}


def test_a_pipeline_folder(capsys):
    found = inspect_checkpoint(bundled_model())
    assert found.healthy, found
    assert found.kind == "pipeline (StableDiffusionPipeline)"
    pipeline = load_pytorch(bundled_model(), components=["unet"])
    from conceptax.converters.tensors import tensor_specs

    unet = parts(found)["unet"]
    numbers = sum(int(np.prod(spec.shape)) for spec in tensor_specs(pipeline.unet))
    assert (unet.architecture, unet.parameters) == ("UNet2DConditionModel", numbers)
    assert unet.dtypes == {"F16": numbers}
    assert unet.nbytes == 2 * numbers
    assert main(["inspect", str(bundled_model())]) == 0
    out = capsys.readouterr().out
    assert f"unet: UNet2DConditionModel, {numbers:,} parameters, F16, " in out
    assert "vae: AutoencoderKL" in out


def huge(folder, *, drop=(), extra=()):
    """A text encoder of tens of gigabytes: a header, and a hole where the tensors would be."""
    folder.mkdir()
    config = {
        "architectures": ["CLIPTextModel"],
        "vocab_size": 10_000_000,
        "hidden_size": 1024,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "intermediate_size": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    from flax import nnx

    from conceptax.converters.tensors import tensor_specs
    from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig.from_dict(config)
    model = nnx.eval_shape(lambda: CLIPTextModel(config, rngs=nnx.Rngs(0)))
    shapes = {spec.key: spec.shape for spec in tensor_specs(model) if spec.key not in drop}
    shapes |= dict(extra)
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[f"text_model.{key}"] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder, end


def test_what_goes_into_a_model(tmp_path):
    """One verdict: a LoRA or an embedding is told, none is a model, LoHa is refused."""
    row = np.ones((1, 3), np.float32)
    for name, keys, kind, healthy in (
        ("lora", ["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"], "LoRA", True),
        ("half", ["lora_unet_x.lora_up.weight"], "LoRA", False),
        ("loha", ["lora_unet_x.hada_w1_a"], "LoRA", False),
        ("learned_embeds", ["<cat>"], "personalization", True),
    ):
        folder = tmp_path / name
        folder.mkdir()
        safetensors.numpy.save_file(dict.fromkeys(keys, row), folder / f"{name}.safetensors")
        found = inspect_checkpoint(folder / f"{name}.safetensors")
        assert (found.kind, found.healthy) == (kind, healthy)
        with pytest.raises(
            CheckpointError,
            match=r"is a (LoRA|textual inversion), which is no model",
        ):
            load_pytorch(folder / f"{name}.safetensors")
    assert inspect_checkpoint(tmp_path / "learned_embeds").kind == "personalization"
    with pytest.raises(CheckpointError, match="of LoHa, which is not supported"):
        merge_lora(None, tmp_path / "loha" / "loha.safetensors")


def test_headers_only(tmp_path):
    """Reading this file's 41 GB would take the machine's memory, and more than a moment."""
    folder, size = huge(tmp_path / "huge")
    found = inspect_checkpoint(folder)
    assert found.healthy, found
    assert found.parts[0].nbytes == size > 40e9
    assert inspect_checkpoint(folder / "model.safetensors").parts == found.parts


def test_missing_extra_and_misshapen_are_named(tmp_path, capsys):
    folder, _ = huge(
        tmp_path / "huge",
        drop=("final_layer_norm.bias",),
        extra={"adapter.weight": (2, 2), "final_layer_norm.weight": (3,)}.items(),
    )
    (part,) = inspect_checkpoint(folder).parts
    assert part.problems == {
        "missing": ["text_model.final_layer_norm.bias"],
        "unexpected": ["text_model.adapter.weight"],
        "of the wrong shape": ["text_model.final_layer_norm.weight [3] instead of [1024]"],
    }
    assert main(["inspect", str(folder)]) == 1
    captured = capsys.readouterr()
    assert "1 missing: text_model.final_layer_norm.bias" in captured.out
    assert "cannot be loaded whole" in captured.err


def test_what_is_lost_from_a_pipeline(tmp_path):
    source = bundled_model()
    for name in ("unet", "scheduler", "tokenizer", "text_encoder"):
        (tmp_path / name).symlink_to(source / name)
    index = json.loads((source / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "Checker"], "../up": ["diffusers", "X"]}
    (tmp_path / "safety_checker").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found = inspect_checkpoint(tmp_path)
    assert found.problems == {"missing": ["vae"]}
    assert found.leftovers == {"parts that are not loaded": ["../up", "safety_checker"]}
    (tmp_path / "vae").mkdir()
    (part,) = [part for part in inspect_checkpoint(tmp_path).parts if part.problems]
    assert "vae is not a checkpoint: it holds no config.json" in part.problems["not readable"][0]
    shutil.rmtree(tmp_path / "safety_checker")  # not needed, and so not missed
    absent = inspect_checkpoint(tmp_path).leftovers["parts that are named and not there"]
    assert absent == ["safety_checker"]


def test_other_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds neither model_index"):
        inspect_checkpoint(tmp_path)
    pair = {f"unet.a.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
    safetensors.numpy.save_file(pair, tmp_path / "pytorch_lora_weights.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert (found.kind, found.parts[0].parameters) == ("LoRA", 8)
    safetensors.numpy.save_file({"x": np.arange(3)}, tmp_path / "x.safetensors")
    assert inspect_checkpoint(tmp_path / "x.safetensors").kind == "weight file"


# ---- one verdict ----


def linked(folder, **index):
    """The bundled pipeline in links, with another index."""
    folder.mkdir(parents=True)
    for part in bundled_model().iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    own = json.loads((bundled_model() / "model_index.json").read_text()) | index
    (folder / "model_index.json").write_text(json.dumps(own))
    return folder


def replaced(folder, part, file, content):
    """That pipeline with one file of a part written anew, or removed."""
    linked(folder)
    (folder / part).unlink()
    shutil.copytree(bundled_model() / part, folder / part)
    if content is None:
        (folder / part / file).unlink()
    else:
        (folder / part / file).write_bytes(content)
    return folder


def settings(part, **changes):
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    return json.dumps(json.loads((bundled_model() / part / file).read_text()) | changes).encode()


def cached(folder, *, ref="abc", others=()):
    """As the Hub's cache keeps it."""
    root = folder / "models--org--name"
    linked(root / "snapshots/abc")
    (root / "refs").mkdir()
    (root / "refs/main").write_text(ref)
    for name in others:
        (root / "snapshots" / name).mkdir()
    return root


def tensors(path, **arrays):
    safetensors.numpy.save_file(arrays, path)
    return path


def written(path, content):
    path.write_bytes(content)
    return path


PAIR = {f"unet.a.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
EMA = {
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 5,
    "power": 0.75,
    "update_after_step": 0,
    "use_ema_warmup": False,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What a path is -> how to make it, and what is said about it; None where it is read.
ZOO = {
    "bundled": (lambda t: bundled_model(), None),
    "component": (lambda t: bundled_model() / "unet", None),
    "weights beside config": (lambda t: bundled_model() / "unet" / WEIGHTS, None),
    "the Hub's cache": (cached, None),
    "a lost version": (lambda t: cached(t, ref="xyz"), "version 'xyz' is not there"),
    "custom class": (lambda t: linked(t / "m", _class_name=["pipeline", "MyPipeline"]), None),
    "latent consistency": (
        lambda t: linked(t / "m", _class_name="LatentConsistencyModelPipeline"),
        None,
    ),
    "no class": (lambda t: linked(t / "m", _class_name=None), None),
    "number for a class": (lambda t: linked(t / "m", _class_name=5), "has 5 as its _class_name"),
    "another model": (
        lambda t: linked(t / "m", _class_name="ChromaPipeline", unet=[None, None]),
        "'ChromaPipeline' pipeline; known are those with the models of "
        f"{', '.join(PIPELINES)}, and its unet (none) differ",
    ),
    "checker not there": (lambda t: linked(t / "m", safety_checker=["a", "Checker"]), None),
    "moving average": (
        lambda t: replaced(t / "m", "unet", "config.json", settings("unet", **EMA)),
        None,
    ),
    "two sizes": (
        lambda t: replaced(t / "m", "unet", "config.json", settings("unet", sample_size=[8, 16])),
        None,
    ),
    "no size": (
        lambda t: replaced(t / "m", "unet", "config.json", settings("unet", sample_size=[8, 0])),
        "sample_size must be positive, received (8, 0)",
    ),
    "odd setting": (
        lambda t: replaced(t / "m", "vae", "config.json", settings("vae", act_fn="gelu")),
        "act_fn='gelu'",
    ),
    "no weights": (lambda t: replaced(t / "m", "vae", WEIGHTS, None), "holds no weights"),
    "pointer inside": (
        lambda t: replaced(t / "m", "vae", WEIGHTS, b"version https://git-lfs.github.com/spec/v1"),
        "is a pointer of Git LFS",
    ),
    "page inside": (
        lambda t: replaced(t / "m", "unet", WEIGHTS, b"<!DOCTYPE html>\n"),
        "is a web page",
    ),
    "no tokenizer": (
        lambda t: replaced(t / "m", "tokenizer", "tokenizer.json", b"{"),
        "not a CLIP tokenizer",
    ),
    "no scheduler": (
        lambda t: replaced(t / "m", "scheduler", "scheduler_config.json", None),
        "scheduler_config.json does not exist",
    ),
    "other scheduler": (
        lambda t: replaced(
            t / "m",
            "scheduler",
            "scheduler_config.json",
            settings("scheduler", _class_name="HeunDiscreteScheduler"),
        ),
        None,
    ),
    "absent": (lambda t: t / "none", "does not exist"),
    "picture": (lambda t: written(t / "a.png", b"\x89PNG\r\n\x1a\n" + bytes(9)), "is a picture"),
    "picture in disguise": (
        lambda t: written(t / "model.safetensors", b"\xff\xd8\xff\xe0" + bytes(9)),
        "is a picture",
    ),
    "text": (lambda t: written(t / "prompts.txt", b"a cat\n"), "is a text, no model"),
    "settings": (lambda t: bundled_model() / "unet/config.json", "is a file of settings"),
    "empty": (lambda t: written(t / "model.ckpt", b""), "is empty"),
    "lora": (lambda t: tensors(t / "l.safetensors", **PAIR), "is a LoRA, which is no model"),
    "lora's folder": (
        lambda t: tensors(t / "pytorch_lora_weights.safetensors", **PAIR).parent,
        "is a LoRA, which is no model",
    ),
    "embedding": (
        lambda t: tensors(t / "e.safetensors", **{"<new>": np.ones(4, np.float32)}),
        "is a textual inversion, which is no model",
    ),
    "weights alone": (
        lambda t: tensors(t / "w.safetensors", **{"x.weight": np.ones(4, np.float32)}),
        "No config.json beside it",
    ),
    "nothing": (lambda t: t, "(found nothing)"),
    "only temporary": (lambda t: (t / ".out.x.partial").mkdir() or t, "(found nothing)"),
    "folder of a file": (
        lambda t: tensors(t / "w.safetensors", x=np.ones(4, np.float32)).parent,
        "Pass the weight file itself",
    ),
}


@pytest.mark.parametrize("where", [".", "vae"])
def test_options_of_single_files_are_refused_for_folders(where):
    with pytest.raises(ValueError, match="is no single file, for which prediction_type= is"):
        load_pytorch(bundled_model() / where, prediction_type="epsilon")


def test_weights_that_are_only_converted_are_told(tmp_path, capsys):
    """They are whole, and what loads them has to convert: inspect says what load says."""
    folder = tmp_path / "vae"
    shutil.copytree(bundled_model() / "vae", folder)
    stored = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(
        {key: value.astype(np.float64) for key, value in stored.items()}, folder / WEIGHTS
    )
    assert main(["inspect", str(folder)]) == 0
    told = "Convert such weights: conceptax convert SOURCE DEST --dtype float32"
    assert told in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=re.escape(told)):
        load_pytorch(folder)


@pytest.mark.parametrize("name", ZOO)
def test_inspect_and_load_say_the_same(tmp_path, name):
    make, reason = ZOO[name]
    path = make(tmp_path)
    try:
        found = inspect_checkpoint(path)
        told = [found.advice] if found.advice else []
        for problems in (found.problems, *(part.problems for part in found.parts)):
            told += [each for names in problems.values() for each in names]
    except CheckpointError as error:
        told = [str(error)]
    try:
        load_pytorch(path, sharding="mapped")
        raised = None
    except CheckpointError as error:
        raised = str(error)
    if reason is None:
        assert (told, raised) == ([], None)
    else:
        assert told == [raised]
        assert reason in raised and ".partial" not in raised


def test_a_pipeline_is_no_classifier():
    with pytest.raises(CheckpointError, match="is a pipeline, no classifier"):
        load_classifier(bundled_model(), None, "x")


def test_what_personalizing_leaves(tmp_path, torch, capsys):
    row, kernel = torch.ones(4), torch.ones(3, 2)
    processor = "a.attn2.processor.to_k_custom_diffusion.weight"
    files = {
        "<new1>.bin": {"<new1>": row},
        "pytorch_custom_diffusion_weights.bin": {processor: kernel, "a.attn1.processor": {}},
        "delta.bin": {"unet": {"a.attn2.to_k.weight": kernel}, "modifier_token": {"<new1>": row}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    safetensors.numpy.save_file({"<new2>": np.ones(4, np.float32)}, tmp_path / "e.safetensors")
    found = {
        name: [
            (part.name, part.architecture, part.parameters)
            for part in inspect_checkpoint(tmp_path / name).parts
        ]
        for name in (*files, "e.safetensors")
    }
    tokens, unet = ("new tokens", "<new1>", 4), ("UNet", "1 tensors", 6)
    assert list(found.values()) == [[tokens], [unet], [tokens, unet], [("new tokens", "<new2>", 4)]]
    assert main(["inspect", str(tmp_path / "delta.bin")]) == 0
    assert "new tokens: <new1>, 4 parameters, F32" in capsys.readouterr().out


def test_verify(tmp_path, capsys, torch):
    pytest.importorskip("diffusers")
    out = str(tmp_path / "out")
    assert main(["convert", str(bundled_model()), out, "--verify", "--dtype", "float32"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "relative difference" in line]
    assert [line.split(":")[0] for line in told] == ["unet", "vae", "text_encoder"]
    assert all(float(line.split()[-1]) < 1e-4 for line in told), told


def test_differences_become_files(tmp_path, capsys):
    source, other = bundled_model(), tmp_path / "other"
    scaled = {}
    for key, value in safetensors.numpy.load_file(
        source / "unet/diffusion_pytorch_model.safetensors"
    ).items():
        scaled[key] = value * np.float16(1.5) if key.endswith("attn2.to_k.weight") else value
    other.mkdir()
    (other / "config.json").write_bytes((source / "unet/config.json").read_bytes())
    safetensors.numpy.save_file(scaled, other / "diffusion_pytorch_model.safetensors")
    original = ["--original", str(source / "unet")]
    changes, lora = str(tmp_path / "c.safetensors"), str(tmp_path / "l.safetensors")
    assert main(["convert", str(other), changes, "--form", "changes", *original]) == 0
    keys = set(safetensors.numpy.load_file(changes))
    assert keys == {key for key in scaled if key.endswith("attn2.to_k.weight")}
    options = ["--form", "lora", "--energy", "0.9"]
    assert main(["convert", str(other), lora, *options, *original]) == 0
    assert f"{len(keys)} modules, rank " in capsys.readouterr().out
    merged = ["--add", lora, "--add-scale", "0.5"]
    assert main(["convert", str(source), str(tmp_path / "merged"), *merged]) == 0
    wrong = [
        (["--form", "lora", "--rank", "4"], "--original goes with"),
        (["--rank", "4"], "takes --rank or --energy"),
        (["--form", "single", "--verify"], "name one in .safetensors"),
    ]
    capsys.readouterr()
    for arguments, message in wrong:
        assert main(["convert", str(other), str(tmp_path / "x"), *arguments]) == 1
        assert message in capsys.readouterr().err
