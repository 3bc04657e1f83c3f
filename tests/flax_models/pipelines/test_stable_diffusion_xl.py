"""Stable Diffusion XL: its folder, and images equal to those of diffusers' pipeline."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xl_toy
from flax import nnx
from PIL import Image

from conceptax.cli import main
from conceptax.converters import inspect_checkpoint, load_pytorch, save_pytorch
from conceptax.converters.verification import verify
from conceptax.flax_models.pipelines.new_tokens import add_tokens
from conceptax.flax_models.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline
from conceptax.methods.diffusion import text_to_image as t2i
from conceptax.methods.text.phrases import encode_phrases

PROMPTS = ["a red three on brick!", "a blue seven"]
STEPS = 3

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("xl")
    return xl_toy.save_pipeline(folder), folder


def test_inspect_knows_both_tokenizers(folder, tmp_path):
    found = inspect_checkpoint(folder[1])
    assert found.healthy and not found.leftovers, found
    assert [part.name for part in found.parts] == ["text_encoder", "text_encoder_2", "unet", "vae"]
    for part in folder[1].iterdir():
        if part.name != "tokenizer_2":
            (tmp_path / part.name).symlink_to(part)
    assert inspect_checkpoint(tmp_path).problems == {"missing": ["tokenizer_2"]}


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pytorch(folder[1])


@pytest.fixture(scope="module")
def drawer(pipeline):
    return t2i.TextToImage.from_pipeline(pipeline)


@pytest.mark.parametrize(
    ("negative", "sizes"),
    [(None, None), ("grass", [32, 24, 1, 2, 16, 16])],
    ids=["zeros for no negative prompt", "negative prompt and sizes"],
)
def test_the_same_folder_and_latents_give_the_image_of_diffusers(
    torch, folder, drawer, negative, sizes
):
    latents = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    named = {}
    if sizes is not None:
        pairs = np.reshape(sizes, (3, 2)).tolist()
        keys = ("original_size", "crops_coords_top_left", "target_size")
        named = dict(zip(keys, map(tuple, pairs), strict=True))
    with torch.no_grad():
        expected = folder[0](
            PROMPTS,
            negative_prompt=None if negative is None else [negative] * 2,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="np",
            **named,
            latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        ).images
    assert expected.std() > 0.01
    images = drawer(
        PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        latents=latents,
        sizes=sizes,
        negative_prompt=negative,
    )
    assert np.abs(images - np.round(expected * 255)).max() <= 1

    received = t2i.jitted_generate(
        drawer.static,
        drawer.params,
        drawer.pipeline.tokenize(PROMPTS),
        () if negative is None else drawer.pipeline.tokenize([negative]),
        latents,
        t2i.make_sampler(drawer.schedule, num_inference_steps=STEPS),
        3.0,
        keys=None,
        sizes=None if sizes is None else np.asarray(sizes, np.float32),
    )
    received = np.asarray(received) * 0.5 + 0.5
    # The requirement is 1e-3; the rest is float32 rounding.
    assert np.linalg.norm(received - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_second_tokenizer_pads_in_its_own_way(pipeline):
    """Ids of the first tokenizer alone are those of both, but for a "!" in the text."""
    texts = ["a red three", "", "three " * 40]
    first, second = (
        np.asarray(tokenizer(texts, padding="max_length", max_length=20, truncation=True).input_ids)
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    assert pipeline.tokenizer_2.pad_token == "!" and (first != second).any()
    encoder = pipeline.prompt_encoder
    np.testing.assert_array_equal(encoder._ids(jnp.asarray(first))[1], second)
    np.testing.assert_array_equal(encode_phrases(pipeline.tokenizer_2, texts[:2], 20), second[:2])
    # The condition is what diffusers calls it, and the same through the embeddings.
    whole = encoder(jnp.stack([first, second], axis=1))
    embedded = encoder(
        inputs_embeds=encoder.embed_tokens(jnp.asarray(first)),
        eos_positions=jnp.asarray(first.argmax(1)),
    )
    for received in (encoder(jnp.asarray(first)), embedded):
        for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    assert whole.condition.time_ids[0].tolist() == [16, 16, 0, 0, 16, 16]


def test_the_folder_comes_back_bit_for_bit_and_diffusers_loads_it(
    torch, folder, pipeline, tmp_path
):
    import diffusers

    theirs, source = folder
    saved = save_pytorch(pipeline, tmp_path / "saved")
    again = load_pytorch(saved)
    assert type(again) is StableDiffusionXLPipeline
    assert again.scheduler_config == pipeline.scheduler_config
    for name in pipeline.MODELS:
        states = [nnx.to_pure_dict(nnx.state(getattr(p, name))) for p in (pipeline, again)]
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *states)), name
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(saved, local_files_only=True)
    assert loaded.config.force_zeros_for_empty_prompt
    assert loaded.tokenizer_2.pad_token == "!"
    for name in pipeline.MODELS:
        before, after = (getattr(each, name).state_dict() for each in (theirs, loaded))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    old, new = (
        json.loads((path / "text_encoder_2" / "config.json").read_text())
        for path in (source, saved)
    )
    assert old["architectures"] == new["architectures"] == ["CLIPTextModelWithProjection"]


def test_verify_compares_a_unet_that_reads_sizes(torch, folder, pipeline):
    found = verify(pipeline.unet, folder[1] / "unet")
    assert 0 < found["UNet2DConditionModel"] < 1e-4


def test_encoders_of_a_pipeline_without_the_rest(pipeline):
    """New tokens need neither UNet nor autoencoder."""
    partial = dataclasses.replace(pipeline, unet=None, vae=None)
    rows = {"<new>": np.ones(16 + 24, np.float32)}
    added = add_tokens(partial, rows)
    for name in ("text_encoder", "text_encoder_2"):
        model = getattr(added, name)
        table = getattr(model, "text_model", model).embeddings.token_embedding.embedding[...]
        assert (np.asarray(table[-1]) == 1).all()


def test_the_command_samples_it_with_prompts_of_a_file(folder, drawer, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("# two\n\n" + "\n".join(PROMPTS))
    arguments = ["--model", str(folder[1]), "--steps", str(STEPS), "--guidance", "3"]
    where = ["--prompts", str(file), "--output", str(tmp_path / "images")]
    assert main(["sample", *where, *arguments]) == 0
    assert "2 images of 16x16 pixels" in capsys.readouterr().out
    record = json.loads((tmp_path / "images" / "sample.json").read_text())
    assert list(record["files"].values()) == record["prompt"] == PROMPTS
    expected = drawer(PROMPTS, num_inference_steps=STEPS, guidance_scale=3.0)
    for image, name in zip(expected, record["files"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "images" / name)))
    assert main(["sample", *where[2:], *arguments]) == 1
    assert "--prompts FILE" in capsys.readouterr().err
    assert main(["sample", "--prompt", "a", "--devices", "99", *arguments]) == 1
    assert "--devices accepts 1 to 8" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_refused(pipeline, drawer):
    partial = dataclasses.replace(pipeline, text_encoder_2=None)
    with pytest.raises(ValueError, match="needs the pipeline's text_encoder_2"):
        t2i.TextToImage.from_pipeline(partial)
    with pytest.raises(ValueError, match="sizes are six numbers"):
        drawer(PROMPTS, sizes=[1, 2])
    with pytest.raises(ValueError, match=r"takes a TextCondition, received"):
        pipeline.unet(jnp.zeros((1, 8, 8, 4)), 1, jnp.zeros((1, 20, 40)))
    with pytest.raises(ValueError, match=r"share a vocabulary"):
        other = xl_toy.build_tokenizer(words=["three"])
        _ = dataclasses.replace(pipeline, tokenizer_2=other).prompt_encoder
