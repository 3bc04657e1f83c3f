"""What personalizing leaves behind: diffusers reads it, and so do we."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from oracles import relative_error
from personalizing_toy import CELLS, pictures, tiny_pipeline
from PIL import Image

from conceptax.cli import main
from conceptax.converters import (
    CheckpointError,
    OutputError,
    inspect_checkpoint,
    load_personalized,
    load_pytorch,
    save_custom_diffusion,
    save_pytorch,
    save_textual_inversion,
)
from conceptax.converters.formats.compvis_parts import unet_names_of
from conceptax.converters.formats.names import renamed
from conceptax.converters.formats.personalized import CUSTOM_DIFFUSION, read_personalization
from conceptax.converters.tensors import tensor_specs, variables
from conceptax.flax_models.pipelines.new_tokens import add_tokens
from conceptax.flax_models.pipelines.tokenizers import TokenError, expanded, token_ids, tokenize
from conceptax.methods.diffusion.text_to_image import TextToImage, jitted_generate
from conceptax.methods.sampling import make_sampler
from conceptax.methods.subjects.images import image_files, read_class_folders, read_image
from conceptax.methods.text.new_tokens import initial_rows
from conceptax.methods.text.phrases import concept_prompts, encode_phrases
from conceptax.reporting.personalizing import class_image_folder, complete_class_images

PROMPT = "a <new1> seven on brick"
STEPS = ["--steps", "2", "--learning-rate", "0.05"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, text, *arguments):
    assert run(*arguments) == 1
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if not line.endswith("…")]  # but for what it does
    assert len(told) == 1 and "Traceback" not in err, err
    assert text in told[0], err


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]


def same(one, other):
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(one), leaves(other), strict=True))


def by_key(model):
    slots = variables(model)
    return {
        spec.key: spec.to_torch(np.asarray(slots[spec.path].get_value()))
        for spec in tensor_specs(model)
    }


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with a tiny model, photographs, class images and a list of two subjects."""
    folder = tmp_path_factory.mktemp("personalizing")
    save_pytorch(tiny_pipeline(), folder / "base")
    for name, count in (("photos", 3), ("others", 2), ("barn", 1)):
        (folder / name).mkdir()
        for n, image in enumerate(pictures(count, len(name))):
            Image.fromarray(image).save(folder / name / f"{n}.png")
    entries = [
        {
            "instance_prompt": "photo of a <new1> seven",
            "class_prompt": "seven",
            "instance_data_dir": "photos",
            "class_data_dir": "others",
        },
        {
            "instance_prompt": "photo of a <new2> three",
            "class_prompt": "three",
            "instance_data_dir": "barn",
        },
    ]
    (folder / "concepts.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="session")
def learnt(work):
    """All of the cross-attention and one token, by the command."""
    out = work / "learnt"
    arguments = [
        "personalize",
        "--model",
        work / "base",
        "--images",
        work / "photos",
        "--token",
        "<new1>",
        "--class-word",
        "seven",
        "--output",
        out,
        "--trained",
        "crossattn",
        *STEPS,
    ]
    assert run(*arguments) == 0
    return out


@pytest.fixture(scope="session")
def latents():
    return np.random.default_rng(0).normal(size=(1, CELLS, CELLS, 4)).astype(np.float32)


@pytest.fixture(scope="session")
def ours(learnt, latents):
    """Our picture of the subject, in [0, 1]."""
    draw = TextToImage.from_pipeline(load_pytorch(learnt))
    tables = make_sampler(draw.schedule, num_inference_steps=3)
    ids, negative = (tokenize(draw.pipeline.tokenizer, [text]) for text in (PROMPT, ""))
    with jax.default_matmul_precision("highest"):
        image = jitted_generate(
            draw.static, draw.params, ids, negative[0], jnp.asarray(latents), tables, 7.5
        )
    return np.asarray(image)[0] / 2 + 0.5


def theirs(pipe, latents):
    torch = pytest.importorskip("torch")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.tensor(latents.transpose(0, 3, 1, 2))
    return pipe(PROMPT, num_inference_steps=3, latents=noise, output_type="np").images[0]


def diffusers_pipeline(folder):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def close(one, other):
    assert relative_error(one, other) < 1e-3


# ---- the command ----


def test_command_writes_a_pipeline_and_the_small_files(work, learnt):
    names = {file.name for file in learnt.iterdir()}
    assert {
        "model_index.json",
        "unet",
        "text_encoder",
        "tokenizer",
        "<new1>.safetensors",
        "personalizing.json",
        "training.jsonl",
    } <= names
    record = json.loads((learnt / "personalizing.json").read_text())
    assert record["method"] == "ClassDiffusion" and record["settings"]["trained"] == "crossattn"
    assert record["concepts"][0]["images"] == 3 and record["last_step"]["step"] == 2
    assert {"reconstruction", "spl", "loss"} <= record["last_step"].keys()
    base, after = load_pytorch(work / "base"), load_pytorch(learnt)
    assert len(after.tokenizer) == len(base.tokenizer) + 1
    (index,) = token_ids(after.tokenizer, ["<new1>"])
    stored = safetensors.numpy.load_file(learnt / "<new1>.safetensors")
    table = np.asarray(after.text_encoder.embeddings.token_embedding.embedding[...])
    assert stored.keys() == {"<new1>"} and stored["<new1>"].tobytes() == table[index].tobytes()
    old, new = by_key(base.unet), by_key(after.unet)
    assert {key for key in old if (old[key] != new[key]).any()} == {k for k in old if "attn2" in k}
    assert same(base.vae, after.vae)


def test_command_learns_several_subjects_and_goes_on_from_a_checkpoint(work, tmp_path, capsys):
    arguments = [
        "personalize",
        "--model",
        work / "base",
        "--concepts",
        work / "concepts.json",
        "--export",
        "weights",
        "--learning-rate",
        "0.05",
        "--seed",
        "3",
    ]
    assert run(*arguments, "--steps", "3", "--output", tmp_path / "straight") == 0
    kept = ["--checkpoint-dir", tmp_path / "kept"]
    assert run(*arguments, *kept, "--steps", "1", "--output", tmp_path / "one") == 0
    assert run(*arguments, *kept, "--steps", "3", "--output", tmp_path / "three") == 0
    names = {file.name for file in (tmp_path / "three").iterdir()}
    assert not names & {"unet", "model_index.json"} and "<new2>.safetensors" in names
    for token in ("<new1>", "<new2>"):
        one, two = (
            (tmp_path / run_ / f"{token}.safetensors").read_bytes()
            for run_ in ("straight", "three")
        )
        assert one == two
    capsys.readouterr()
    refused(
        capsys, "--seed (3 before, 4 now)", *arguments[:-1], "4", *kept, "--output", tmp_path / "x"
    )


@pytest.mark.parametrize("method", ["custom-diffusion", "dreambooth", "textual-inversion"])
def test_baselines_write_what_they_train(work, tmp_path, method):
    arguments = [
        "personalize",
        "--method",
        method,
        "--model",
        work / "base",
        "--images",
        work / "photos",
        "--token",
        "<new1>",
        "--class-word",
        "seven",
        "--export",
        "weights",
        "--batch-size",
        "2",
    ]
    if method != "textual-inversion":
        arguments += ["--class-images", work / "others"]
    assert run(*arguments, *STEPS, "--output", tmp_path / "out") == 0
    names = {file.name for file in (tmp_path / "out").iterdir()} - {"personalizing.json"}
    expected = {"conceptax.json", "training.jsonl", "<new1>.safetensors"}
    if method == "dreambooth":
        expected |= {"unet_changes.safetensors"}
    torch = pytest.importorskip("torch")
    if method == "custom-diffusion":
        expected |= {CUSTOM_DIFFUSION}
        state = torch.load(tmp_path / "out" / CUSTOM_DIFFUSION, weights_only=True)
        assert sum(len(value) > 0 for value in state.values()) == 2  # one layer's key and value
    assert names == expected


def test_command_explains_what_is_wrong(work, tmp_path, capsys):
    base = ["personalize", "--model", work / "base", "--output", tmp_path / "out"]
    one = [*base, "--images", work / "photos", "--class-word", "seven"]
    refused(capsys, "pass either --images", *base)
    refused(capsys, "takes one --token, received 0", *one)
    refused(capsys, "already has the token 'seven'", *one, "--token", "seven")
    refused(capsys, "name of a file", *one, "--token", "<a/b>")
    zebra = ["--token", "<n>", "--initializer", "zebra"]
    refused(capsys, "initializer 'zebra'", *one, *zebra)
    refused(
        capsys,
        "not a folder",
        *base,
        "--images",
        tmp_path / "no",
        "--token",
        "<n>",
        "--class-word",
        "seven",
    )
    custom = [*one, "--method", "custom-diffusion"]
    refused(capsys, "needs images of the class", *custom, "--token", "<n>", "--class-count", 0)
    refused(capsys, "already has the token 'seven'", *custom, "--token", "seven")
    refused(capsys, "must not be negative", *custom, "--token", "<n>", "--class-count", -1)
    unused = [*one, "--token", "<n>", "--class-count", 2]
    refused(capsys, "nothing takes without prior preservation", *unused)
    listed = [*base, "--concepts", work / "concepts.json"]
    refused(capsys, "holds 2 concepts, but 1 tokens", *listed, "--token", "<n>")
    refused(capsys, "class_data_dir", *listed, "--class-images", work / "others")
    assert list(tmp_path.iterdir()) == []


def test_class_images_that_lack_are_drawn(work, tmp_path):
    pipeline = load_pytorch(work / "base")
    expected = TextToImage.from_pipeline(pipeline)(
        ["seven"] * 3, seed=5, num_inference_steps=2, guidance_scale=3.0, eta=1.0, sampler="ddim"
    )
    folder = tmp_path / "class"
    complete = functools.partial(complete_class_images, pipeline, seed=5, steps=2, guidance=3.0)
    told = []
    estimate = {"on_estimate": lambda *times: told.append(len(times))}
    counted = {"on_progress": lambda *numbers: told.append(numbers)}
    assert complete([(folder, "seven")], 1, **estimate, **counted) == 1 and told == [2, (1, 1)]
    assert complete([(folder, "seven")], 3) == 2 and complete([(folder, "seven")], 2) == 0
    found = image_files(folder)
    assert [file.name for file in found] == [f"drawn_{n:04d}.png" for n in range(3)]
    difference = np.stack([read_image(file) for file in found]).astype(int) - expected
    assert np.abs(difference).max() <= 1  # batches of other sizes round otherwise

    concepts = [
        {
            "instance_prompt": "a <new1> seven",
            "class_prompt": "seven",
            "class_data_dir": "class",
            "instance_data_dir": str(work / "photos"),
        },
        {
            "instance_prompt": "a <new2> three",
            "class_prompt": "three",
            "instance_data_dir": str(work / "photos"),
        },
    ]
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps(concepts))
    assert read_class_folders(file) == [(folder, "seven")]


@pytest.mark.parametrize("method", ["custom-diffusion", "dreambooth"])
def test_command_draws_class_images(work, tmp_path, capsys, monkeypatch, method):
    """As many as the method takes, with the flags that suffice for ClassDiffusion; only once."""
    monkeypatch.setattr("conceptax.cli.personalize.CLASS_IMAGES", 3)
    arguments = [
        "personalize",
        "--method",
        method,
        "--model",
        work / "base",
        "--images",
        work / "photos",
        "--token",
        "<new1>",
        "--class-word",
        "seven",
        "--output",
        tmp_path / "out",
    ]
    light = ["--export", "weights", "--batch-size", "2", *STEPS, "--force"]

    def counted():
        record = json.loads((tmp_path / "out" / "personalizing.json").read_text())
        assert "prior" in record["last_step"]
        return record["concepts"][0]["class_images"]

    assert run(*arguments, *light) == 0 and counted() == 3
    (kept,) = (tmp_path / "out.class_images").iterdir()
    drawing = f"drawing 3 class images of 'seven' into {kept} (another run takes them again with"
    assert drawing in capsys.readouterr().err
    files = image_files(kept)
    before = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 3 and kept.name.startswith("seven-")
    if method == "dreambooth":
        return
    assert run(*arguments, *light) == 0 and counted() == 3
    assert f"taking 3 class images of 'seven' from {kept}" in capsys.readouterr().err
    assert run(*arguments, *light, "--class-count", 2) == 0 and counted() == 2
    assert run(*arguments, *light, "--class-images", kept) == 0 and counted() == 3
    assert [file.stat().st_mtime_ns for file in image_files(kept)] == before
    named = ["--class-images", tmp_path / "class", "--class-count", 1]
    assert run(*arguments, *light, *named) == 0 and counted() == 1
    assert image_files(tmp_path / "class")[0].read_bytes() == files[0].read_bytes()
    assert list((tmp_path / "out.class_images").iterdir()) == [kept]


def test_of_several_subjects_those_without_class_images_have_them_drawn(work, tmp_path, capsys):
    arguments = ["personalize", "--method", "custom-diffusion", "--model", work / "base"]
    arguments += ["--concepts", work / "concepts.json", "--class-count", 2]
    arguments += ["--export", "weights", *STEPS, "--output", tmp_path / "out"]
    assert run(*arguments) == 0
    record = json.loads((tmp_path / "out" / "personalizing.json").read_text())
    assert [each["class_images"] for each in record["concepts"]] == [2, 2]
    (kept,) = (tmp_path / "out.class_images").iterdir()
    assert kept.name.startswith("three-") and "of 'seven'" not in capsys.readouterr().err


def test_each_model_prompt_and_seed_has_its_class_images(tmp_path):
    given = [("a", "dog", 0), ("b", "dog", 0), ("a", "cat", 0), ("a", "dog", 1)]
    folders = [class_image_folder(tmp_path / "out", *each) for each in given]
    assert len(set(folders)) == 4 and {f.parent for f in folders} == {tmp_path / "out.class_images"}
    assert class_image_folder(tmp_path / "out", *given[0]) == folders[0]


# ---- diffusers ----


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_diffusers_draws_the_same_picture_from_the_merged_folder(learnt, latents, ours):
    pipe = diffusers_pipeline(learnt)
    assert len(pipe.tokenizer("<new1>", add_special_tokens=False).input_ids) == 1
    close(ours, theirs(pipe, latents))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_diffusers_draws_the_same_picture_from_the_small_files(work, learnt, latents, ours):
    pipe = diffusers_pipeline(work / "base")
    pipe.load_textual_inversion(
        learnt, weight_name="<new1>.safetensors", local_files_only=True, use_safetensors=True
    )
    with pytest.raises(AssertionError):
        close(ours, theirs(pipe, latents))
    pipe.unet.load_attn_procs(learnt, weight_name=CUSTOM_DIFFUSION, _pipeline=pipe)
    close(ours, theirs(pipe, latents))


@pytest.mark.parametrize("trained", ["crossattn_kv", "crossattn"])
def test_custom_diffusion_file_is_the_one_diffusers_writes(work, learnt, tmp_path, trained):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    processors = pytest.importorskip("diffusers.models.attention_processor")
    unet = diffusers.UNet2DConditionModel.from_pretrained(learnt / "unet", local_files_only=True)
    everything = unet.state_dict()
    made = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        cross = layer.endswith("attn2")
        key = everything[f"{layer}.to_k.weight"]
        made[name] = processors.CustomDiffusionAttnProcessor(
            train_kv=cross,
            train_q_out=cross and trained == "crossattn",
            hidden_size=key.shape[0],
            cross_attention_dim=key.shape[1] if cross else None,
        )
        if cross:
            own = {
                name: everything[f"{layer}.{name.replace('_custom_diffusion', '')}"]
                for name in made[name].state_dict()
            }
            made[name].load_state_dict(own)
    unet.set_attn_processor(made)
    unet.save_attn_procs(tmp_path, safe_serialization=False)
    expected = torch.load(tmp_path / CUSTOM_DIFFUSION, weights_only=True)

    after = load_pytorch(learnt)
    save_custom_diffusion(after.unet, tmp_path / "ours.bin", trained=trained)
    received = torch.load(tmp_path / "ours.bin", weights_only=True)
    assert received.keys() == expected.keys()
    for key, value in expected.items():
        if len(value):
            assert torch.equal(received[key], value)
        else:
            assert received[key] == {}

    base = load_pytorch(work / "base")  # and back, from diffusers' own file
    imported = load_personalized(base, tmp_path / CUSTOM_DIFFUSION)
    changed = {k for k, v in by_key(imported.unet).items() if (v != by_key(base.unet)[k]).any()}
    layers = ("to_k", "to_v") if trained == "crossattn_kv" else ("to_",)
    assert changed == {k for k in by_key(base.unet) if any(f"attn2.{at}" in k for at in layers)}
    assert all((by_key(imported.unet)[k] == by_key(after.unet)[k]).all() for k in changed)


# ---- and back ----


def test_small_files_give_back_the_merged_pipeline(work, learnt, tmp_path):
    pytest.importorskip("torch")
    merged = load_pytorch(learnt)
    base = load_pytorch(work / "base")
    imported = load_personalized(base, learnt)
    assert same(imported.unet, merged.unet) and same(imported.text_encoder, merged.text_encoder)
    assert imported.tokenizer.get_vocab() == merged.tokenizer.get_vocab()
    assert run("convert", work / "base", tmp_path / "out", "--add", learnt) == 0
    converted = load_pytorch(tmp_path / "out")
    assert same(converted.unet, merged.unet)
    assert same(converted.text_encoder, merged.text_encoder)
    with pytest.raises(TokenError, match="already has the token '<new1>'"):
        load_personalized(merged, learnt)


def test_layouts_of_others_are_read(learnt, tmp_path, torch):
    stored = safetensors.numpy.load_file(learnt / "<new1>.safetensors")
    row = stored["<new1>"]
    save = safetensors.numpy.save_file

    def read(name):
        return read_personalization(tmp_path / name)

    save(stored, tmp_path / "<new1>.bin")  # safetensors bytes under another name
    assert read("<new1>.bin").rows["<new1>"].tobytes() == row.tobytes()
    torch.save({"<new1>": torch.tensor(row)}, tmp_path / "learned_embeds.bin")
    assert read("learned_embeds.bin").rows["<new1>"].tobytes() == row.tobytes()
    save({"<cat>": np.stack([row, row + 1])}, tmp_path / "<cat>.safetensors")
    assert read("<cat>.safetensors").rows.keys() == {"<cat>", "<cat>_1"}
    save({"emb_params": row[None]}, tmp_path / "<dog>.safetensors")
    assert read("<dog>.safetensors").rows.keys() == {"<dog>"}
    half = {"<bf>": torch.tensor(row).to(torch.bfloat16)}
    torch.save(half, tmp_path / "<bf>.bin")
    assert read("<bf>.bin").rows["<bf>"].dtype == jnp.bfloat16

    whole = torch.load(learnt / CUSTOM_DIFFUSION, weights_only=True)
    unet = {
        key.replace(".processor", "").replace("_custom_diffusion", ""): value
        for key, value in whole.items()
        if len(value)
    }
    delta = {"unet": unet, "modifier_token": {"<new1>": torch.tensor(row)}}
    torch.save(delta, tmp_path / "delta-500.bin")
    received, expected = read("delta-500.bin"), read_personalization(learnt)
    assert received.rows["<new1>"].tobytes() == row.tobytes()
    assert received.unet.keys() == expected.unet.keys()
    with pytest.raises(CheckpointError, match="'<new1>' in more than one file"):
        read_personalization(tmp_path)


def test_embeddings_of_every_program(work, tmp_path, torch, capsys):
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    table, save = torch.tensor(rows), safetensors.numpy.save_file

    def read(name):
        return {
            token: row.tolist() for token, row in read_personalization(tmp_path / name).rows.items()
        }

    a1111 = {"string_to_token": {"*": 265}, "name": "cat", "step": 9, "sd_checkpoint": None}
    for content, file, token in (
        (a1111 | {"string_to_param": {"*": table}}, "x.pt", "cat"),
        (a1111 | {"string_to_param": {"*": torch.nn.Parameter(table)}}, "x.pt", "cat"),
        (a1111 | {"string_to_param": {"*": table}, "name": "big cat"}, "dog.pt", "dog"),
        (
            {
                "string_to_token": {"*": torch.tensor(265)},
                "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(table)}),
            },
            "embeddings_gs-500.pt",
            "embeddings_gs-500",
        ),
        ({"<cat-toy>": table}, "learned_embeds.bin", "<cat-toy>"),
        ({"cat": table.to(torch.float64)}, "x.bin", "cat"),
        (table, "bare.pt", "bare"),
        (torch.nn.Parameter(table), "bare.bin", "bare"),
    ):
        torch.save(content, tmp_path / file)
        assert read(file) == {token: rows[0].tolist(), f"{token}_1": rows[1].tolist()}
        assert inspect_checkpoint(tmp_path / file).kind == "personalization"
    save({"emb_params": rows[0]}, tmp_path / "bad-hands.SAFETENSORS")
    assert read("bad-hands.SAFETENSORS") == {"bad-hands": rows[0].tolist()}
    save({"clip_g": rows + 6, "clip_l": rows}, tmp_path / "xl.safetensors")
    both = np.concatenate([rows, rows + 6], axis=1).tolist()
    assert read("xl.safetensors") == {"xl": both[0], "xl_1": both[1]}

    save({"text_encoders_1": rows + 6, "text_encoders_0": rows}, tmp_path / "xl.safetensors")
    assert read("xl.safetensors") == {"xl": both[0], "xl_1": both[1]}
    (tmp_path / "two").mkdir()
    save({"<cat>": rows}, tmp_path / "two/learned_embeds.safetensors")
    save({"<cat>": rows + 6}, tmp_path / "two/learned_embeds_2.safetensors")
    assert read("two") == {"<cat>": both[0], "<cat>_1": both[1]}
    save({"<dog>": rows + 6}, tmp_path / "two/learned_embeds_2.safetensors")
    with pytest.raises(CheckpointError, match="has the token '<dog>', and the learned_embeds"):
        read("two")

    for content, file, told in (
        ({"clip_l": rows}, "a.safetensors", "has clip_l and no clip_g"),
        ({"clip_g": rows}, "a.safetensors", "has clip_g and no clip_l"),
        ({"clip_g": rows, "clip_l": rows[:1]}, "a.safetensors", r"clip_l is \[1, 3\] and clip_g"),
        ({"emb_params": rows, "clip_l_out": rows}, "a.safetensors", "holds clip_l_out too"),
        ({"emb_params": rows}, "a b.safetensors", "rename the file"),
        ({"a.weight": rows}, "a.safetensors", "no textual inversion.* it holds a.weight"),
        ({"cat": rows, "dog": rows}, "a.safetensors", "it holds cat, dog"),
        ({"first_stage_model.x": rows}, "a.safetensors", "is a whole model"),
        ({"unet.x.lora_A.weight": rows}, "a.safetensors", "is a LoRA"),
        ({"<a>": rows, "<a>_1": rows[0]}, "a.safetensors", "has the token '<a>_1' twice"),
    ):
        save(content, tmp_path / file)
        with pytest.raises(CheckpointError, match=told):
            read(file)
    base = load_pytorch(work / "base", components=["text_encoder", "tokenizer"])
    with pytest.raises(TokenError, match=r"the embedding of 'xl' has shape \(6,\)"):
        load_personalized(base, tmp_path / "xl.safetensors")
    with pytest.raises(CheckpointError, match="is a textual inversion, which is no model"):
        load_pytorch(tmp_path / "xl.safetensors")
    refused(
        capsys,
        "--add-scale is for LoRA files",
        "convert",
        work / "base",
        tmp_path / "out",
        "--add",
        tmp_path / "x.pt",
        "--add-scale",
        "0.5",
    )
    alone = ("convert", work / "base", tmp_path / "out", "--add-settings", "urae-4k")
    refused(capsys, "--add-settings is for LoRA files", *alone)


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_changed_weights_are_no_tokens(work, tmp_path, prefix):
    """As ESD and UCE are published: keys of the UNet, with a prefix or CompVis's names."""
    base = load_pytorch(work / "base")
    names = {new: old for old, new in unet_names_of(base.unet.config.to_dict()).items()}
    unet = {key: value for key, value in by_key(base.unet).items() if "attn2.to_k" in key}
    text = {key: value for key, value in by_key(base.text_encoder).items() if "fc1" in key}
    content = {
        prefix + (renamed(key, names) if "model" in prefix else key): value + 1
        for key, value in unet.items()
    }
    content |= {f"text_encoder.text_model.{key}": value + 1 for key, value in text.items()}
    content = {key: np.array(value, order="C") for key, value in content.items()}
    safetensors.numpy.save_file(content, tmp_path / "uce.safetensors")
    after = load_personalized(base, tmp_path / "uce.safetensors")
    assert after.tokenizer is base.tokenizer
    for name, changed in (("unet", unet), ("text_encoder", text)):
        old, new = by_key(getattr(base, name)), by_key(getattr(after, name))
        assert {key for key in old if (old[key] != new[key]).any()} == changed.keys()
        assert all((new[key] == old[key] + 1).all() for key in changed)
    wrong = {f"{prefix}down_blocks.9.attn2.to_k.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(wrong, tmp_path / "uce.safetensors")
    with pytest.raises(CheckpointError, match=r"pipeline's unet: 1 unexpected: down_blocks\.9"):
        load_personalized(base, tmp_path / "uce.safetensors")
    if not prefix:
        second = {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.bias": np.ones(2)}
        safetensors.numpy.save_file(second, tmp_path / "uce.safetensors")
        with pytest.raises(CheckpointError, match="changes a text_encoder_2"):
            load_personalized(base, tmp_path / "uce.safetensors")


def test_words_of_several_vectors_stand_for_all_of_them(work, tmp_path):
    """As diffusers reads them, also where a prompt names a later vector; folders keep it."""
    diffusers = pytest.importorskip("diffusers")
    base = load_pytorch(work / "base")
    rows = np.eye(3, base.text_encoder.config.hidden_size, dtype=np.float32)
    safetensors.numpy.save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    safetensors.numpy.save_file({"emb_params": rows[:2]}, tmp_path / "EasyNegative.safetensors")
    both = load_personalized(base, tmp_path / "cat.safetensors")
    both = load_personalized(both, tmp_path / "EasyNegative.safetensors")
    save_pytorch(both, tmp_path / "out")
    tokenizer = load_pytorch(tmp_path / "out", components=["tokenizer"]).tokenizer
    theirs = diffusers.loaders.TextualInversionLoaderMixin()
    prompts = ["a <cat>", "seven", "a <cat> and <cat>_1", "<cat><cat>_2, seven", "a <Cat>"]
    assert expanded(tokenizer, ["(EasyNegative)"]) == ["(EasyNegative EasyNegative_1)"]
    prompts += ["EasyNegative, a <cat>", "easynegative"]
    assert expanded(tokenizer, prompts) == theirs.maybe_convert_prompt(prompts, tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])
    assert tokenize(tokenizer, ["a <cat>"])[0, 2:5].tolist() == ids
    assert encode_phrases(tokenizer, ["a <cat>"], 12)[0, 2:5].tolist() == ids
    with pytest.raises(TokenError, match="<cat>_2, <cat>_3 for the vectors of one token '<cat>'"):
        add_tokens(both, {"<cat>_3": rows[0]})
    prompts = concept_prompts(tokenizer, "<cat>", 12, ["a {}", "{} seven"])
    assert prompts.tokens[prompts.concept].tolist() == 2 * ids
    with pytest.raises(TokenError, match="'<cat>' of '<dog>' is 3 tokens"):
        initial_rows(dataclasses.replace(base, tokenizer=tokenizer), ["<dog>"], ["<cat>"])


def test_files_that_do_not_fit_are_explained(work, learnt, tmp_path, torch):
    base = load_pytorch(work / "base")
    whole = torch.load(learnt / CUSTOM_DIFFUSION, weights_only=True)
    tensors = {key: value for key, value in whole.items() if len(value)}
    key = next(key for key in tensors if "to_k" in key)
    nan = tensors[key].clone()
    nan[0, 0] = torch.nan
    path = tmp_path / CUSTOM_DIFFUSION
    for content, message in (
        ({k: v for k, v in tensors.items() if k != key}, "1 missing: .*attn2.to_k.weight"),
        (tensors | {f"mid_{key}": tensors[key]}, "1 unexpected: mid_"),
        (tensors | {key: tensors[key][:, :3]}, r"wrong shape: .* \[8, 3\] instead of \[8, 16\]"),
        (tensors | {key: nan}, "NaN"),
        ({"<a>": torch.zeros(2, 3, 4)}, "no textual inversion"),
        ({"<a>": "text"}, "is str, expected a tensor"),
        ({"<a>": torch.zeros(3, dtype=torch.int64)}, "is I64, expected"),
        ({}, "holds no tensors"),
        ([1], "must hold a dict"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_personalized(base, path)
    path.write_bytes(b"\x80\x04c__builtin__\nexec\n")
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        load_personalized(base, path)
    path.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_personalized(base, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_personalized(base, tmp_path / "absent.bin")
    with pytest.raises(OutputError, match="NaN"):
        save_textual_inversion({"<a>": np.full(4, np.nan, np.float32)}, tmp_path)
    with pytest.raises(ValueError, match="trained accepts"):
        save_custom_diffusion(base.unet, tmp_path / "x.bin", trained="unet")
    shutil.rmtree(tmp_path)
