"""Text to image: equal to diffusers' pipeline, and what people rely on."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_toy import SCHEDULER, TEXT, UNET, VAE
from flax import nnx

from conceptax import bundled_model
from conceptax.converters import load_pytorch
from conceptax.converters.tokenizer import write_tokenizer
from conceptax.flax_models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from conceptax.flax_models.clip import CLIPTextConfig, CLIPTextModel
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.pipelines.tokenizers import tokenize
from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig, UNet2DConditionModel
from conceptax.methods import memory
from conceptax.methods.diffusion import text_to_image as t2i
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.sampling import NoiseSchedule, make_sampler
from conceptax.methods.training import make_mesh

PROMPTS = ["a red three on brick", "a blue seven", "a green zero on grass"]
STEPS = 4


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(max_length=TEXT["max_position_embeddings"])


def random_model(model_class, config, rng):
    """Random weights of unit gain, without running the initializers operation by operation."""
    abstract = nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def fill(leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values if len(leaf.shape) > 1 else 1 + 0.1 * values, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(fill, nnx.to_pure_dict(state)))


def tiny_pipeline(tokenizer, seed):
    rng = np.random.default_rng(seed)
    text = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **TEXT)
    return StableDiffusionPipeline(
        unet=random_model(UNet2DConditionModel, UNet2DConditionConfig(**UNET), rng),
        vae=random_model(AutoencoderKL, AutoencoderKLConfig(**VAE), rng),
        text_encoder=random_model(CLIPTextModel, text, rng),
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER,
    )


@pytest.fixture(scope="module")
def pipeline(tokenizer):
    return tiny_pipeline(tokenizer, 0)


@pytest.fixture(scope="module")
def drawer(pipeline):
    return t2i.TextToImage.from_pipeline(pipeline)


def draw(drawer, prompts=PROMPTS, **options):
    """The one batch size and length that the tests share, so that they compile once."""
    return drawer(prompts, **({"num_inference_steps": STEPS, "batch_size": 2} | options))


# ---- against diffusers ----


@pytest.fixture(scope="module")
def reference(tokenizer, tmp_path_factory):
    """A random diffusers pipeline and the folder it was saved to."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET),
        vae=diffusers.AutoencoderKL(latent_channels=4, **VAE),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    write_tokenizer(tokenizer, folder / "tokenizer")
    return pipeline, folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (None, {}),  # the untouched folder, by its own PNDMScheduler
        ("ddim", {}),
        ("euler", {}),
        ("euler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ],
)
def test_the_same_folder_and_latents_give_the_image_of_diffusers(torch, reference, kind, settings):
    import diffusers

    from conceptax.converters import load_pytorch

    theirs, folder = reference
    classes = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
    ours = load_pytorch(folder)
    if kind is None:
        theirs.scheduler = diffusers.PNDMScheduler.from_pretrained(folder / "scheduler")
    else:
        ours.scheduler_config = {**ours.scheduler_config, "clip_sample": False, **settings}
        theirs.scheduler = classes[kind].from_config(ours.scheduler_config)
    drawer = t2i.TextToImage.from_pipeline(ours)

    latents = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(
            PROMPTS[:2],
            negative_prompt=["grass"] * 2,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="np",
            latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
        ).images
    assert expected.std() > 0.01

    sampler = make_sampler(drawer.schedule, kind, num_inference_steps=STEPS)
    ids = tokenize(drawer.pipeline.tokenizer, PROMPTS[:2])
    negative = tokenize(drawer.pipeline.tokenizer, ["grass"])[0]
    actual = t2i.jitted_generate(
        drawer.static, drawer.params, ids, negative, latents, sampler, 3.0, keys=None
    )
    actual = np.asarray(actual) * 0.5 + 0.5
    # The requirement is 1e-3; float32 rounding through the networks measures below 1e-4.
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()

    images = draw(
        drawer,
        PROMPTS[:2],
        sampler=kind,
        guidance_scale=3.0,
        negative_prompt="grass",
        latents=latents,
    )
    assert np.abs(images - np.round(expected * 255)).max() <= 1


def test_schedules_are_corrected_as_diffusers_corrects_them(torch, reference, pipeline):
    import diffusers

    theirs, _ = reference
    old = {**SCHEDULER, "steps_offset": 0, "_class_name": "DDIMScheduler"}
    with pytest.warns(FutureWarning):
        fixed = diffusers.StableDiffusionPipeline(
            **{**theirs.components, "scheduler": diffusers.DDIMScheduler.from_config(old)},
            requires_safety_checker=False,
        ).scheduler.config
    ours = dataclasses.replace(pipeline, scheduler_config=old)
    schedule = NoiseSchedule.from_config(ours.schedule_config)
    assert (schedule.steps_offset, schedule.clip_sample) == (1, False)
    assert (fixed["steps_offset"], fixed["clip_sample"]) == (1, False)


# ---- what people rely on ----


def test_images_do_not_depend_on_batch_size_or_position(drawer):
    images = draw(drawer, seed=3)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 1
    progress = []
    one_by_one = draw(drawer, seed=3, batch_size=1, on_progress=lambda *done: progress.append(done))
    assert progress == [(1, 3), (2, 3), (3, 3)]
    # Equal noise; another batch size may only round differently.
    assert np.abs(images.astype(int) - one_by_one).max() <= 1
    last_two = draw(drawer, PROMPTS[1:], seed=3, first_index=1)
    assert np.abs(images[1:].astype(int) - last_two).max() <= 1
    assert (draw(drawer, seed=3) == images).all()
    assert (draw(drawer, seed=4) != images).any()


_ONE_DEVICE = """
import sys
import jax, numpy as np
from conceptax.converters import load_pytorch
from conceptax.methods import memory
from conceptax.methods import text_to_image as t2i

assert jax.device_count() == 1
folder, file, prompts = sys.argv[1], sys.argv[2], sys.argv[3:]
drawer = t2i.TextToImage.from_pipeline(load_pytorch(folder))
np.savez(
    file,
    noise=t2i.initial_noise(
        t2i.image_keys(7, np.arange(len(prompts))), drawer.pipeline.latent_shape
    ),
    images=drawer(prompts, seed=7, num_inference_steps=2, batch_size=3),
)
"""


def test_images_do_not_depend_on_the_devices(pipeline, drawer, tmp_path):
    """One device with batches of three, in a process of its own, against eight with shares of two
    (one, for the last of them, and padding)."""
    from conceptax.converters import save_pytorch

    prompts = [*PROMPTS, *PROMPTS, *PROMPTS, "three"]
    folder = save_pytorch(pipeline, tmp_path / "model")
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    subprocess.run(
        [sys.executable, "-c", _ONE_DEVICE, folder, tmp_path / "one.npz", *prompts],
        check=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    one = np.load(tmp_path / "one.npz")
    noise = t2i.initial_noise(t2i.image_keys(7, np.arange(10)), drawer.pipeline.latent_shape)
    np.testing.assert_array_equal(noise, one["noise"])
    half = t2i.initial_noise(t2i.image_keys(7, np.arange(5, 10)), drawer.pipeline.latent_shape)
    np.testing.assert_array_equal(noise[5:], half)

    options = {"seed": 7, "num_inference_steps": 2, "batch_size": 2}
    images = drawer(prompts, mesh=make_mesh(8), **options)
    assert len({image.tobytes() for image in images}) == len(prompts)
    # Another share may round differently, where a value lies between two bytes.
    for other in (one["images"], drawer(prompts, **options)):
        difference = np.abs(images.astype(int) - other)
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    np.testing.assert_array_equal(images, drawer(prompts, mesh=make_mesh(2), **options))


def test_edited_and_equal_pipelines_share_the_compiled_program(drawer, tokenizer):
    before = draw(drawer)
    compiled = t2i.jitted_generate._cache_size()
    edited = jax.tree.map(lambda leaf: leaf * 1.5, drawer.params["text_encoder"])
    after = draw(dataclasses.replace(drawer, params={**drawer.params, "text_encoder": edited}))
    other = draw(t2i.TextToImage.from_pipeline(tiny_pipeline(tokenizer, 1)))
    assert t2i.jitted_generate._cache_size() == compiled
    assert (after != before).any() and (other != before).any()


def test_guidance_combines_the_two_predictions(drawer):
    """g = 1 is the conditional model; the sampler's input x enters both halves."""
    sampler = make_sampler(drawer.schedule, num_inference_steps=STEPS)
    ids = tokenize(drawer.pipeline.tokenizer, PROMPTS[:2])
    negative = tokenize(drawer.pipeline.tokenizer, [""])[0]
    noise = t2i.initial_noise(t2i.image_keys(0, np.arange(2)), drawer.pipeline.latent_shape)
    arguments = (drawer.static, drawer.params, ids)
    plain = t2i.jitted_generate(*arguments, None, noise, sampler, 1.0, keys=None)
    one = t2i.jitted_generate(*arguments, negative, noise, sampler, 1.0, keys=None)
    strong = t2i.jitted_generate(*arguments, negative, noise, sampler, 7.5, keys=None)
    np.testing.assert_allclose(plain, one, atol=1e-4)
    assert np.abs(strong - plain).max() > 1e-2
    # Prompt and negative prompt alike: no direction to follow, whatever the strength.
    same = t2i.jitted_generate(*arguments, ids[0], noise, sampler, 7.5, keys=None)
    np.testing.assert_allclose(same[0], plain[0], atol=1e-4)


def test_fresh_noise_belongs_to_the_image(drawer):
    options = {"eta": 1.0, "seed": 5, "sampler": "ddim"}
    images = draw(drawer, **options)
    assert (images != draw(drawer, seed=5, sampler="ddim")).any()
    np.testing.assert_array_equal(images[:2], draw(drawer, PROMPTS[:2], **options))
    sampler = make_sampler(drawer.schedule, "ddim", num_inference_steps=STEPS, eta=1.0)
    with pytest.raises(ValueError, match="pass `keys`"):
        t2i.generate(
            drawer.static,
            drawer.params,
            jnp.zeros((1, 20), jnp.int32),
            None,
            jnp.zeros((1, 8, 8, 4)),
            sampler,
        )


def test_long_prompts_are_cut_with_a_warning_that_names_the_rest(drawer):
    with pytest.warns(UserWarning, match=r"is 42 tokens long .* reads 20; ignored: 'three"):
        ids = tokenize(drawer.pipeline.tokenizer, ["three " * 40, "three"])
    assert ids.shape == (2, 20) and ids.dtype == np.int32
    assert ids[0, -1] == drawer.pipeline.tokenizer.eos_token_id
    np.testing.assert_array_equal(
        ids[1, :3],
        [drawer.pipeline.tokenizer.bos_token_id, ids[0, 1], drawer.pipeline.tokenizer.eos_token_id],
    )
    assert tokenize(drawer.pipeline.tokenizer, ["three"], max_length=5).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"height": 15}, "height=15 must be a positive multiple of 2"),
        ({"width": 0}, "width=0"),
        ({"sampler": "dpm"}, "accepted: ddim, ddpm"),
        ({"num_inference_steps": 0}, "between 1 and"),
        ({"latents": np.zeros((3, 4, 8, 8), np.float32)}, r"latents must be \(3, 8, 8, 4\)"),
    ],
)
def test_wrong_calls_say_what_is_accepted(drawer, options, message):
    with pytest.raises(ValueError, match=message):
        draw(drawer, **options)


def test_token_ids_take_the_place_of_texts(drawer, tokenizer):
    ids = tokenize(tokenizer, PROMPTS)
    np.testing.assert_array_equal(draw(drawer, ids.astype(np.int64)), draw(drawer))
    for wrong in (ids[:, :-1], ids + len(tokenizer), -ids):
        with pytest.raises(ValueError, match=r"token ids must be \[N, 20\], from 0 to"):
            draw(drawer, wrong)
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(drawer, ids[:0])


def test_pipelines_that_cannot_draw_are_refused(pipeline):
    for part, missing in (("unet", None), ("tokenizer", None), ("scheduler_config", {})):
        with pytest.raises(ValueError, match=f"needs the pipeline's {part}"):
            t2i.text_to_image(dataclasses.replace(pipeline, **{part: missing}), "three")
    config = UNet2DConditionConfig(**UNET, in_channels=9)
    inpainting = random_model(UNet2DConditionModel, config, np.random.default_rng(0))
    with pytest.raises(ValueError, match="in_channels=9"):
        t2i.text_to_image(dataclasses.replace(pipeline, unet=inpainting), "three")


def test_a_pair_of_sizes_is_height_and_width(pipeline):
    def shape(**sizes):
        config = UNet2DConditionConfig(**UNET | sizes)
        unet = nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=nnx.Rngs(0)))
        replaced = dataclasses.replace(pipeline, unet=unet)
        return t2i.TextToImage.from_pipeline(replaced).pipeline.latent_shape

    assert shape(sample_size=(6, 8)) == (6, 8, 4)
    assert shape(sample_size=5) == (5, 5, 4)
    assert shape(sample_size=None) == (64, 64, 4)
    assert AutoencoderKLConfig(**VAE | {"sample_size": (32, 16)}).tile_size == 16
    with pytest.raises(ValueError, match="height and width"):
        UNet2DConditionConfig.from_dict(UNET | {"sample_size": [8]})


def test_not_a_number_is_an_error_not_a_black_image(drawer):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, drawer.params["vae"])
    with pytest.raises(FloatingPointError, match="images 0 to 1"):
        draw(dataclasses.replace(drawer, params={**drawer.params, "vae": broken}))


def test_bytes_round_to_the_nearest():
    values = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0], np.float32).reshape(1, 2, 3)
    assert t2i.to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize(
    ("free", "count", "remedy"),
    [
        (5.5, 8, "8 at a time, takes at least 27.4 GB .* 18.8 GB are free: batch_size 5 may do"),
        (0.5, 1, "vae_tiling with batch_size 1 may do"),
        (0.1, 1, r"with batch_size 1, a height and width of up to 1292 may do"),
    ],
)
def test_what_cannot_fit_is_told_before_it_is_tried(monkeypatch, free, count, remedy):
    drawer = t2i.TextToImage.from_pipeline(load_pytorch(bundled_model()))
    # Of one image: 32 channels that the last layers of the decoder read, 16 that they write, and
    # three floats with their copy.
    one = 4096**2 * (4 * (32 + 16) + 12)
    for module in (memory, t2i):
        monkeypatch.setattr(module, "available_memory", lambda **_: int(free * one))
    with pytest.raises(memory.NotEnoughMemoryError, match=remedy):
        drawer(["three"] * count, height=4096, width=4096)


def test_memory_is_found_out():
    free = memory.available_memory(host=True)
    assert free is not None and 1e6 < free < 1e15
    assert [memory.describe_bytes(n) for n in (0, 999, 1.5e9)] == ["0 B", "999 B", "1.5 GB"]
