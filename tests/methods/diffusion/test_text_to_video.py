"""Videos: motion adapters and their files, the frames of diffusers' AnimateDiff, GIF and MP4."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_toy import SCHEDULER, TEXT, UNET, VAE
from flax import nnx
from oracles import relative_error
from PIL import Image

from conceptax.cli import main
from conceptax.converters import load_pytorch, save_pytorch
from conceptax.converters.tokenizer import write_tokenizer
from conceptax.flax_models.abstract import OneKey
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.flax_models.unet_motion import (
    MotionAdapterConfig,
    UNetMotionConfig,
    UNetMotionModel,
    motion_adapter,
    with_motion,
)
from conceptax.methods.diffusion.text_to_image import TextToImage
from conceptax.methods.diffusion.text_to_video import text_to_video, video_drawer, video_schedule
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.reporting import videos

ADAPTER = {
    "block_out_channels": (8,),
    "motion_layers_per_block": 1,
    "motion_num_attention_heads": 2,
    "motion_norm_num_groups": 4,
    "motion_max_seq_length": 4,
}
PROMPT, FRAMES, STEPS = "a red three on brick", 3, 4


def randomized(module):
    """Biases and norms away from zeros and ones."""
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(scope="module")
def reference(torch, tmp_path_factory):
    """A random AnimateDiff pipeline of diffusers; folders of its image pipeline and adapter."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(max_length=TEXT["max_position_embeddings"])
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **TEXT,
    )
    images = diffusers.StableDiffusionPipeline(
        unet=randomized(diffusers.UNet2DConditionModel(**UNET)),
        vae=diffusers.AutoencoderKL(latent_channels=4, **VAE),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler=diffusers.PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("video")
    images.save_pretrained(folder / "images")
    write_tokenizer(tokenizer, folder / "images" / "tokenizer")
    adapter = randomized(diffusers.MotionAdapter(**ADAPTER))
    adapter.save_pretrained(folder / "adapter")
    scheduler = diffusers.DDIMScheduler.from_pretrained(
        folder / "images",
        subfolder="scheduler",
        clip_sample=False,
        timestep_spacing="linspace",
        beta_schedule="linear",
        steps_offset=1,
    )
    theirs = diffusers.AnimateDiffPipeline(
        vae=images.vae,
        text_encoder=images.text_encoder,
        tokenizer=tokenizer,
        unet=images.unet,
        motion_adapter=adapter,
        scheduler=scheduler,
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs, folder


@pytest.fixture(scope="module")
def parts(reference) -> tuple[StableDiffusionPipeline, nnx.Module]:
    folder = reference[1]
    return load_pytorch(folder / "images"), load_pytorch(folder / "adapter")


def leaves(model):
    return dict(nnx.to_flat_state(nnx.split(model)[1]))


# ---- models and files ----


def test_adapters_and_video_unets_go_to_files_and_back(torch, reference, parts, tmp_path):
    import diffusers

    pipeline, adapter = parts
    save_pytorch(adapter, tmp_path / "adapter")
    again = diffusers.MotionAdapter.from_pretrained(tmp_path / "adapter")
    model = with_motion(pipeline.unet, adapter)
    save_pytorch(model, tmp_path / "unet")
    video, loading = diffusers.UNetMotionModel.from_pretrained(
        tmp_path / "unet", output_loading_info=True
    )
    assert not any(loading.values()), loading
    for received, wanted in ((again, reference[0].motion_adapter), (video, reference[0].unet)):
        received, wanted = received.state_dict(), wanted.state_dict()
        assert received.keys() == wanted.keys()
        assert all(torch.equal(received[key], wanted[key]) for key in wanted)
    reread = load_pytorch(tmp_path / "unet")
    assert isinstance(reread, UNetMotionModel) and reread.config == model.config
    taken = motion_adapter(reread)
    assert taken.config == adapter.config
    wanted = leaves(adapter)
    assert all((value == wanted[path]).all() for path, value in leaves(taken).items())


def test_a_video_unet_shares_its_parts_parameters(parts):
    """Also those of a UNet that was personalized: nothing is copied or changed."""
    pipeline, adapter = parts
    model = leaves(with_motion(pipeline.unet, adapter))
    for part in (pipeline.unet, adapter):
        for path, leaf in leaves(part).items():
            assert model.pop(path).get_value() is leaf.get_value()
    assert not model


def test_the_sinusoids_are_those_of_diffusers(reference):
    """Of a model that is not loaded, of odd width too."""
    import diffusers

    from conceptax.flax_models.unet_motion import SinusoidalPositionalEmbedding

    for width in (8, 320):
        theirs = diffusers.models.embeddings.SinusoidalPositionalEmbedding(width, 32).pe.numpy()
        ours = SinusoidalPositionalEmbedding(width, 32, param_dtype=jnp.float32).pe[...]
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_config_is_read_and_written(reference):
    for model, kind in (
        (reference[0].unet, UNetMotionConfig),
        (reference[0].motion_adapter, MotionAdapterConfig),
    ):
        config = kind.from_dict(dict(model.config))
        assert kind.from_dict(config.to_dict()) == config
    full, keys = UNetMotionConfig(), OneKey()
    model = nnx.eval_shape(lambda: UNetMotionModel(full, rngs=keys))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.split(model, nnx.Param, ...)[1])]
    assert sum(sizes) == 1_312_730_244  # the published model's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_out_channels": (16,)},
            r"\(8,\) and the motion adapter \(16,\)",
        ),
        ({"motion_norm_num_groups": 2}, "norm_num_groups 4 and the motion adapter 2"),
        ({"motion_layers_per_block": 2}, "layers per block"),
    ],
)
def test_an_adapter_of_another_model_is_told(changes, message):
    from conceptax.flax_models.unet_2d_condition import UNet2DConditionConfig

    with pytest.raises(ValueError, match=message):
        UNetMotionConfig.of(UNet2DConditionConfig(**UNET), MotionAdapterConfig(**ADAPTER | changes))


def test_unfit_configs_are_told():
    with pytest.raises(ValueError, match="end in 'Motion'"):
        UNetMotionConfig(down_block_types=("DownBlock2D",) * 4)
    with pytest.raises(ValueError, match=r"UNetMotionConfig: .* do not divide"):
        UNetMotionConfig(norm_num_groups=7)
    with pytest.raises(ValueError, match="8 channels do not divide into 3 heads"):
        MotionAdapterConfig(**ADAPTER | {"motion_num_attention_heads": 3})
    with pytest.raises(ValueError, match="needs one entry or 1"):
        MotionAdapterConfig(**ADAPTER | {"motion_layers_per_block": (1, 1)})
    with pytest.raises(ValueError, match="conv_in_channels=9"):
        MotionAdapterConfig.from_dict({"conv_in_channels": 9})


# ---- sampling ----


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_same_latents_give_the_video_of_diffusers(torch, reference, parts):
    latents = np.random.default_rng(0).normal(size=(1, FRAMES, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        expected = reference[0](
            PROMPT,
            negative_prompt="grass",
            num_frames=FRAMES,
            height=16,
            width=16,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="np",
            latents=torch.tensor(latents).permute(0, 4, 1, 2, 3),
        ).frames
    received = text_to_video(
        *parts,
        PROMPT,
        frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        negative_prompt="grass",
        latents=latents,
    )
    assert received.shape == (1, FRAMES, 16, 16, 3) and expected.std() > 0.02
    assert np.abs(received / 255.0 - expected).max() < 0.51 / 255 + 1e-4
    # Frames depend on each other: another start of the last one changes the first.
    latents[:, -1] += 1
    other = text_to_video(
        *parts,
        PROMPT,
        frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        negative_prompt="grass",
        latents=latents,
    )
    assert (other[0, 0] != received[0, 0]).any()


@pytest.mark.slow
def test_without_motion_frames_are_the_images_of_the_unet(parts):
    """A motion module whose last layer is zero changes nothing: frames are images."""
    pipeline, adapter = parts
    still = nnx.clone(adapter)
    for _, node in nnx.iter_graph(still):
        if hasattr(node, "proj_out"):
            for name in ("kernel", "bias"):
                leaf = getattr(node.proj_out, name)
                leaf.set_value(jnp.zeros_like(leaf[...]))
    noise = np.random.default_rng(1).normal(size=(FRAMES, 8, 8, 4)).astype(np.float32)
    video = video_drawer(pipeline, still, frames=FRAMES, beta_schedule=None)
    images = dataclasses.replace(TextToImage.from_pipeline(pipeline), schedule=video.schedule)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "sampler": "ddim"}
    one = video([PROMPT], latents=noise[None], **settings)[0]
    many = images([PROMPT] * FRAMES, latents=noise, **settings)
    assert np.abs(one.astype(int) - many).max() <= 1


def test_the_schedule_is_animatediffs():
    schedule = video_schedule({**SCHEDULER, "clip_sample": True})
    assert (schedule.beta_schedule, schedule.timestep_spacing) == ("linear", "linspace")
    assert schedule.steps_offset == 1 and not schedule.clip_sample
    assert schedule.beta_end == SCHEDULER["beta_end"]
    assert video_schedule(SCHEDULER, None).beta_schedule == "scaled_linear"


def test_too_many_frames_are_told(parts):
    for frames in (0, 5):
        with pytest.raises(ValueError, match=f"1 to 4 frames, received {frames}"):
            text_to_video(*parts, PROMPT, frames=frames)
    model = with_motion(parts[0].unet, parts[1])
    with pytest.raises(ValueError, match="knows 4 frames, received 5"):
        model(jnp.zeros((1, 5, 8, 8, 4)), 3, jnp.zeros((1, 20, 16)))


# ---- files ----


def frames_of(file, height, width):
    command = [
        videos.encoder(),
        "-loglevel",
        "error",
        "-i",
        str(file),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def test_videos_are_written_and_read_again(tmp_path):
    ramp = np.linspace(0, 255, 5).astype(np.uint8)
    video = np.broadcast_to(ramp[:, None, None, None], (5, 17, 30, 3)).copy()
    video[:, :, 15:] = (255, 0, 0)
    videos.save_video(video, tmp_path / "a.gif", 8)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 5 and image.info["duration"] == 120 and image.info["loop"] == 0
        for index in range(5):
            image.seek(index)
            assert np.abs(np.asarray(image.convert("RGB"), int) - video[index]).max() <= 8
    pytest.importorskip("imageio_ffmpeg")
    videos.save_video(video, tmp_path / "a.mp4", 8)
    received = frames_of(tmp_path / "a.mp4", 18, 30)  # the odd side is repeated
    assert len(received) == 5
    assert np.abs(received[:, :17].astype(int) - video).mean() < 8


def sample(capsys, *arguments):
    status = main(["sample", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_draws_videos(reference, parts, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg")
    folder = reference[1]
    command = [
        "--model",
        folder / "images",
        "--motion-adapter",
        folder / "adapter",
        "--frames",
        FRAMES,
        "--steps",
        STEPS,
        "--guidance",
        3,
        "--prompt",
        PROMPT,
        "--seed",
        4,
    ]
    status, out, err = sample(
        capsys, *command, "--prompt", "a blue seven", "--output", tmp_path / "out", "--fps", 5
    )
    assert status == 0, err
    assert "2 videos of 3 frames of 16x16 pixels" in out
    record = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert record["frames"] == FRAMES and record["betas"] == "linear"
    names = [
        f"{n}.{kind}"
        for n in ("0000_a-red-three-on-brick", "0001_a-blue-seven")
        for kind in ("gif", "mp4")
    ]
    assert list(record["files"]) == names
    expected = text_to_video(
        *parts, [PROMPT], frames=FRAMES, num_inference_steps=STEPS, guidance_scale=3.0, seed=4
    )[0]
    received = frames_of(tmp_path / "out" / names[1], 16, 16)
    assert (
        received.shape == expected.shape
        and relative_error(received.astype(int), expected.astype(int)) < 0.2
    )
    status, _, err = sample(capsys, *command, "--output", tmp_path / "one.gif")
    assert status == 0, err
    with Image.open(tmp_path / "one.gif") as image:
        assert image.n_frames == FRAMES
        received = np.asarray(image.convert("RGB"), int)
    assert relative_error(received, expected[0].astype(int)) < 0.1  # 256 colors


def test_unfit_wishes_are_told(reference, tmp_path, capsys, monkeypatch):
    folder = reference[1]
    one = ["--model", folder / "images", "--prompt", PROMPT]
    adapter = ["--motion-adapter", folder / "adapter"]
    for arguments, message in (
        ([*one, "--output", tmp_path / "a.gif"], "videos need a --motion-adapter"),
        ([*one, *adapter, "--output", tmp_path / "a.png"], "a .gif or .mp4"),
        ([*one, *adapter, "--count", 2, "--output", tmp_path / "a.gif"], "a .gif or .mp4"),
        ([*one, *adapter, "--sampler", "unipc"], "one by one, whole: leave out --sampler."),
        ([*one, *adapter, "--devices", 1, "--vae-tiling"], "leave out --devices, --vae-tiling."),
        ([*one, *adapter, "--fps", 0], "--fps must be at least 1"),
        ([*one, *adapter, "--frames", 9, "--output", tmp_path / "a.gif"], "1 to 4 frames"),
        (
            [*one, "--motion-adapter", folder / "images" / "unet", "--output", tmp_path / "a.gif"],
            "not a motion adapter",
        ),
    ):
        status, _, err = sample(capsys, *arguments)
        assert status == 1 and message in err, (message, err)

    def absent(name):
        raise ImportError(name)

    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(ValueError, match=r"ffmpeg could not write .*No such file"):
        videos.save_mp4(np.zeros((2, 4, 4, 3), np.uint8), tmp_path / "no" / "a.mp4", 8)
    monkeypatch.setattr(videos.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"install conceptax\[video\]"):
        videos.encoder()
    assert not list(tmp_path.iterdir())
