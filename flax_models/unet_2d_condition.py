"""`UNet2DConditionModel`: the text-conditioned denoiser of Stable Diffusion 1 and 2 (Rombach et al.
2022) and of SDXL (Podell et al. 2023, arXiv 2307.01952).

Images and latents are `[B, H, W, C]`, text is `[B, L, E]`.  Attribute paths are diffusers'
state-dict keys, so `unet.down_blocks[0].attentions[1].transformer_blocks[0].attn2.to_k` is
`down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from .configs import ModelConfig
from .layers.checks import check_axes
from .layers.embeddings import TimestepEmbedding, sinusoidal_embedding
from .layers.remat import Remat, recomputed
from .layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D, conv3x3, group_norm
from .layers.transformer import Transformer2DModel
from .pretrained import RecomputingModel

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class BlocksConfig(ModelConfig):
    """Settings of which some may differ between resolutions."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)

    def per_block(self, name: str) -> tuple[int, ...]:
        """The value of a setting for each resolution, from the finest to the coarsest."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    def require_per_block(self, *names: str) -> None:
        """Raise ValueError unless settings are positive, one for all resolutions or one each."""
        self.require_positive("block_out_channels", *names)
        depth = len(self.block_out_channels)
        for name in names:
            value = getattr(self, name)
            self.require(
                len(self.per_block(name)) == depth,
                f"{name} needs one entry or {depth}, received {value}.",
            )


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(BlocksConfig):
    """Settings of `UNet2DConditionModel`; the defaults are Stable Diffusion 1.5's.

    `attention_head_dim` is, as in the published files, the *number of heads* per block.
    """

    sample_size: int | tuple[int, ...] | None = 64  # of latents: both sides, or height and width
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    FIXED: ClassVar[Mapping[str, Any]] = {
        "act_fn": "silu",
        "dropout": 0.0,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "class_embed_type": None,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
    }
    # Attention's logits are float32 in any case.
    INERT: ClassVar[frozenset[str]] = frozenset(
        {"upcast_attention", "addition_embed_type_num_heads"}
    )

    def __post_init__(self):
        self.require_positive("in_channels", "out_channels", "norm_num_groups")
        self.require_positive("block_out_channels", "cross_attention_dim")
        self.require_size("sample_size")
        depth = len(self.block_out_channels)
        for name, accepted in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            types = getattr(self, name)
            self.require(len(types) == depth, f"{name} needs {depth} entries, received {types}.")
            unknown = sorted(set(types) - set(accepted))
            self.require(not unknown, f"{name} accepts {accepted}, received {unknown}.")
        self.require_one_of("mid_block_type", ("UNetMidBlock2DCrossAttn", None))
        self.require_per_block(
            "layers_per_block", "transformer_layers_per_block", "attention_head_dim"
        )
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        self.require(not bad, f"channels {bad} do not divide into {self.norm_num_groups} groups.")
        self.require(self.downsample_padding in (0, 1), "downsample_padding must be 0 or 1.")
        self.require_one_of("addition_embed_type", (None, "text_time"))
        if self.addition_embed_type == "text_time":
            self.require_positive(
                "addition_time_embed_dim", "projection_class_embeddings_input_dim"
            )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents it was made for."""
        size = self.sample_size
        if size is None:  # where the file is silent: what its kind was trained on
            size = 128 if self.addition_embed_type == "text_time" else 64
        height, width = size if isinstance(size, tuple) else (size, size)
        return height, width

    @classmethod
    def stable_diffusion_1_5(cls) -> "UNet2DConditionConfig":
        """The published SD 1.x UNet: 859,520,964 parameters."""
        return cls()

    @classmethod
    def stable_diffusion_2_1(cls) -> "UNet2DConditionConfig":
        """The published SD 2.x UNet for 768 x 768 pixels: 865,910,724 parameters."""
        return cls(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )

    @classmethod
    def stable_diffusion_xl(cls) -> "UNet2DConditionConfig":
        """The published SDXL base UNet: 2,567,463,684 parameters."""
        return cls(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


class TextCondition(NamedTuple):
    """All that a UNet with `addition_embed_type="text_time"` (SDXL) is conditioned on.

    Attributes:
      encoder_hidden_states: [B, L, E] states of the text's tokens.
      text_embeds: [B, P] the text's projected, pooled state.
      time_ids: [B, 6] height and width of the original image, top and left of the crop that was
        taken from it, height and width to draw for, in pixels.
    """

    encoder_hidden_states: Float[Array, "B L E"]
    text_embeds: Float[Array, "B P"]
    time_ids: Num[Array, "B T"]


def text_states(condition: Any) -> Float[Array, "B L E"]:
    """The states of the text's tokens in what a UNet reads of it."""
    return condition.encoder_hidden_states if isinstance(condition, TextCondition) else condition


def with_text_states(condition: Any, states: Float[Array, "B L E"]) -> Any:
    """What a UNet reads of a text, with other states of its tokens."""
    if isinstance(condition, TextCondition):
        return condition._replace(encoder_hidden_states=states)
    return states


@dataclasses.dataclass(frozen=True)
class _Level:
    """What the layers of one resolution have in common."""

    config: UNet2DConditionConfig
    level: int
    attends: bool
    remat: Remat
    motion: Callable[..., nnx.Module] | None  # makes what mixes the frames of a video

    @property
    def channels(self) -> int:
        return self.config.block_out_channels[self.level]

    def resnet(self, in_channels: int, **init) -> ResnetBlock2D:
        config = self.config
        shared = {"groups": config.norm_num_groups, "epsilon": config.norm_eps}
        time_features = 4 * config.block_out_channels[0]
        return ResnetBlock2D(
            in_channels, self.channels, time_features=time_features, **shared, **init
        )

    def transformer(self, **init) -> Transformer2DModel:
        config = self.config
        return Transformer2DModel(
            self.channels,
            config.per_block("attention_head_dim")[self.level],
            config.cross_attention_dim,
            layers=config.per_block("transformer_layers_per_block")[self.level],
            groups=config.norm_num_groups,
            linear_projection=config.use_linear_projection,
            **init,
        )


class _Layers(nnx.Module):
    """Resnets, each followed by a transformer where the resolution attends to the text, and by a
    motion module where the images are frames."""

    def __init__(self, in_channels: list[int], level: _Level, **init):
        self.remat = level.remat
        self.resnets = nnx.List([level.resnet(c, **init) for c in in_channels])
        if level.attends:
            self.attentions = nnx.List([level.transformer(**init) for _ in in_channels])
        if level.motion is not None:
            self.motion_modules = nnx.List([level.motion(**init) for _ in in_channels])

    def layer(self, index: int, x: Array, time: Array, context: Array, frames: int) -> Array:
        def run(x: Array, time: Array, context: Array) -> Array:
            x = self.resnets[index](x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[index](x, context)
            if hasattr(self, "motion_modules"):
                x = self.motion_modules[index](x, frames)
            return x

        return recomputed(run, self.remat)(x, time, context)


class DownBlock(_Layers):
    """`CrossAttnDownBlock2D` and `DownBlock2D`: returns the output and the skip connections."""

    def __init__(self, in_channels: list[int], level: _Level, *, downsample: int | None, **init):
        super().__init__(in_channels, level, **init)
        if downsample is not None:
            self.downsamplers = nnx.List([Downsample2D(level.channels, padding=downsample, **init)])

    def __call__(
        self, x: Array, time: Array, context: Array, frames: int
    ) -> tuple[Array, list[Array]]:
        skips = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, context, frames)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """`UNetMidBlock2DCrossAttn`: resnet, transformer, resnet at the coarsest resolution."""

    def __init__(self, level: _Level, **init):
        self.remat = level.remat
        resnet = {"output_scale": level.config.mid_block_scale_factor, **init}
        self.resnets = nnx.List([level.resnet(level.channels, **resnet) for _ in range(2)])
        self.attentions = nnx.List([level.transformer(**init)])
        if level.motion is not None:
            self.motion_modules = nnx.List([level.motion(**init)])

    def __call__(self, x: Array, time: Array, context: Array, frames: int) -> Array:
        def run(x: Array, time: Array, context: Array) -> Array:
            x = self.attentions[0](self.resnets[0](x, time), context)
            if hasattr(self, "motion_modules"):
                x = self.motion_modules[0](x, frames)
            return self.resnets[1](x, time)

        return recomputed(run, self.remat)(x, time, context)


class UpBlock(_Layers):
    """`CrossAttnUpBlock2D` and `UpBlock2D`: consumes skip connections from the end of the list."""

    def __init__(self, in_channels: list[int], level: _Level, *, upsample: bool, **init):
        super().__init__(in_channels, level, **init)
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(level.channels, **init)])

    def __call__(
        self, x: Array, skips: list[Array], time: Array, context: Array, frames: int
    ) -> Array:
        for index in range(len(self.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(index, x, time, context, frames)
        if hasattr(self, "upsamplers"):
            # The next skip connection has the size to reach, also where it is odd.
            height, width = skips[-1].shape[1:3]
            x = self.upsamplers[0](x, (height, width))
        return x


class UNet2DConditionModel(RecomputingModel):
    """Text-conditioned UNet."""

    config: UNet2DConditionConfig
    config_class = UNet2DConditionConfig
    pytorch_class = "UNet2DConditionModel"
    pytorch_library = "diffusers"

    def _build(self, config: UNet2DConditionConfig, *, remat: Remat, **init):
        channels = config.block_out_channels
        time_features = 4 * channels[0]
        layers = config.per_block("layers_per_block")

        self.conv_in = conv3x3(config.in_channels, channels[0], **init)
        self.time_embedding = TimestepEmbedding(channels[0], time_features, **init)
        if config.addition_embed_type is not None:
            features = config.projection_class_embeddings_input_dim
            assert features is not None  # the config has checked it
            self.add_embedding = TimestepEmbedding(features, time_features, **init)

        last = len(channels) - 1
        widths = [channels[0]]  # channels of the skip connections, in the order they are made
        self.down_blocks = nnx.List()
        for n, kind in enumerate(config.down_block_types):
            level = _Level(config, n, kind.startswith("CrossAttn"), remat, self._motion(n))
            inputs = [widths[-1]] + [channels[n]] * (layers[n] - 1)
            downsample = config.downsample_padding if n < last else None
            widths += [channels[n]] * (layers[n] + (downsample is not None))
            self.down_blocks.append(DownBlock(inputs, level, downsample=downsample, **init))

        if config.mid_block_type is not None:
            self.mid_block = MidBlock(_Level(config, last, True, remat, self._motion(None)), **init)

        current = channels[last]
        self.up_blocks = nnx.List()
        for n, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            level = _Level(config, n, kind.startswith("CrossAttn"), remat, self._motion(n))
            before = [current] + [channels[n]] * layers[n]
            inputs = [width + widths.pop() for width in before]
            current = channels[n]
            self.up_blocks.append(UpBlock(inputs, level, upsample=n > 0, **init))

        self.conv_norm_out = group_norm(
            channels[0], config.norm_num_groups, config.norm_eps, **init
        )
        self.conv_out = conv3x3(channels[0], config.out_channels, **init)

    def _motion(self, level: int | None) -> Callable[..., nnx.Module] | None:
        """What makes the motion modules of a resolution, or of the middle (None): for videos."""
        del level

    def __call__(
        self,
        sample: Float[Array, "B H W C"],
        timesteps: Num[Array, "*B"] | float | int,
        encoder_hidden_states: Float[Array, "B L E"] | TextCondition,
    ) -> Float[Array, "B H W O"]:
        """Predict noise (or whatever the checkpoint was trained to predict).

        Args:
          sample: noisy latents [B, H, W, in_channels].
          timesteps: scalar or [B], in units of training timesteps.
          encoder_hidden_states: text states [B, L, cross_attention_dim]; with `text_time` a
            `TextCondition` of them.

        Returns:
          [B, H, W, out_channels] in the computation dtype.
        """
        return self.denoise(self.config, sample, timesteps, encoder_hidden_states, frames=1)

    def denoise(
        self,
        config: UNet2DConditionConfig,
        sample: Float[Array, "N H W C"],
        timesteps: Num[Array, "*N"] | float | int,
        encoder_hidden_states: Float[Array, "N L E"] | TextCondition,
        *,
        frames: int,
    ) -> Float[Array, "N H W O"]:
        """The forward pass over images, or over the frames of videos, one video after the other."""
        name = type(self).__name__
        check_axes(sample, "B H W C", f"{name}'s latents")
        if sample.shape[-1] != config.in_channels:
            raise ValueError(
                f"{name} takes [..., H, W, {config.in_channels}] latents, received {sample.shape}."
            )
        text = encoder_hidden_states
        if isinstance(text, TextCondition) != (config.addition_embed_type is not None):
            raise ValueError(
                f"{name} with addition_embed_type={config.addition_embed_type!r} takes "
                f"{'text states' if config.addition_embed_type is None else 'a TextCondition'}, "
                f"received {type(text).__name__}."
            )
        states = text_states(text)
        check_axes(states, "B L E", f"{name}'s text states")
        if states.shape[-1] != config.cross_attention_dim:
            raise ValueError(
                f"{name} takes [B, L, {config.cross_attention_dim}] text states, received "
                f"{states.shape}."
            )
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), sample.shape[:1])
        time = sinusoidal_embedding(
            timesteps,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        time = self.time_embedding(time.astype(self.dtype))
        if isinstance(text, TextCondition):
            time = time + self._text_time(config, text)
        context = states.astype(self.dtype)
        x = sample.astype(self.dtype)
        if config.center_input_sample:
            x = 2 * x - 1

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context, frames)
            skips += more
        if hasattr(self, "mid_block"):
            x = self.mid_block(x, time, context, frames)
        for block in self.up_blocks:
            x = block(x, skips, time, context, frames)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def _text_time(
        self, config: UNet2DConditionConfig, condition: TextCondition
    ) -> Float[Array, "B T"]:
        """What pooled text and sizes add to the embedding of time (Podell et al. 2023, 2.2)."""
        features = config.addition_time_embed_dim
        assert features is not None
        embeds, sizes = condition.text_embeds, condition.time_ids
        wanted = config.projection_class_embeddings_input_dim
        if embeds.shape[-1] + features * sizes.shape[-1] != wanted:
            raise ValueError(
                f"{type(self).__name__} takes {wanted} features of pooled text and of sizes, "
                f"{features} for each size; received text_embeds {embeds.shape} and time_ids "
                f"{sizes.shape}."
            )
        sizes = sinusoidal_embedding(
            sizes.ravel(),
            features,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        ).reshape(embeds.shape[0], -1)
        added = jnp.concatenate([embeds.astype(jnp.float32), sizes], axis=-1)
        return self.add_embedding(added.astype(self.dtype))
