"""`AutoencoderKL`: the image autoencoder of Stable Diffusion (Rombach et al. 2022, section 3.1).

Images are `[B, H, W, 3]` in [-1, 1], latents `[B, h, w, latent_channels]` *before* scaling:
`scale` brings them to what the diffusion model sees, `unscale` back.  Stable Diffusion 1 to 3 and
FLUX.1 have an `AutoencoderKL`, FLUX.2 an `AutoencoderKLFlux2`, which scales patches by statistics.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .configs import ModelConfig
from .layers.attention import Attention
from .layers.checks import check_axes
from .layers.embeddings import Dtype
from .layers.remat import Remat, recomputed
from .layers.resnet import Downsample2D, ResnetBlock2D, Upsample2D, conv1x1, conv3x3, group_norm
from .layers.tiling import tiled
from .pretrained import Buffer, RecomputingModel

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class _AutoencoderConfig(ModelConfig):
    """What the two autoencoders share."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 512  # in pixels: both sides, or height and width
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    FIXED: ClassVar[Mapping[str, Any]] = {"act_fn": "silu"}
    INERT: ClassVar[frozenset[str]] = frozenset({"force_upcast"})

    def __post_init__(self):
        self.require_positive("in_channels", "out_channels", "block_out_channels")
        self.require_positive("layers_per_block", "latent_channels", "norm_num_groups")
        self.require_size("sample_size")
        depth = len(self.block_out_channels)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            types = getattr(self, name)
            self.require(
                types == (kind,) * depth, f"{name} must be {depth} x {kind!r}, received {types}."
            )
        channels = dict.fromkeys((*self.block_out_channels, *self.decoder_channels))
        bad = [c for c in channels if c % self.norm_num_groups]
        self.require(not bad, f"channels {bad} do not divide into {self.norm_num_groups} groups.")

    @property
    def tile_size(self) -> int:
        """Pixels along a side of a tile: the smaller one of those trained on."""
        return min(self.sample_size) if isinstance(self.sample_size, tuple) else self.sample_size

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """Of the decoder's levels, the finest first."""
        return self.block_out_channels


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(_AutoencoderConfig):
    """Settings of `AutoencoderKL`; the defaults are Stable Diffusion 1.x's."""

    scaling_factor: float = 0.18215
    shift_factor: float | None = None

    FIXED: ClassVar[Mapping[str, Any]] = {
        **_AutoencoderConfig.FIXED,
        "latents_mean": None,
        "latents_std": None,
    }

    @classmethod
    def flux_1(cls) -> "AutoencoderKLConfig":
        """FLUX.1's published one: 83,819,683 parameters."""
        return cls(
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    @classmethod
    def stable_diffusion_3(cls) -> "AutoencoderKLConfig":
        """SD 3's and 3.5's published one, which differs from FLUX.1's in the scaling."""
        return dataclasses.replace(cls.flux_1(), scaling_factor=1.5305, shift_factor=0.0609)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLFlux2Config(_AutoencoderConfig):
    """Settings of `AutoencoderKLFlux2`; the defaults are FLUX.2's: 84,046,115 parameters."""

    latent_channels: int = 32
    sample_size: int | tuple[int, ...] = 1024
    decoder_block_out_channels: tuple[int, ...] | None = None  # as the encoder's
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, ...] = (2, 2)

    INERT: ClassVar[frozenset[str]] = _AutoencoderConfig.INERT | {"batch_norm_momentum"}

    def __post_init__(self):
        self.require_positive("patch_size")
        if self.decoder_block_out_channels is not None:
            self.require_positive("decoder_block_out_channels")
        super().__post_init__()
        patch, channels = self.patch_size, self.decoder_channels
        self.require(
            len(patch) == 2 and patch[0] == patch[1],
            f"patch_size takes two equal numbers, received {patch!r}.",
        )
        self.require(
            len(channels) == len(self.block_out_channels),
            f"decoder_block_out_channels must be {len(self.block_out_channels)}, one per block; "
            f"received {channels!r}.",
        )

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels


def patchify(latents: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w P"]:
    """Patches of `size` x `size` latents as one, their features in the order (C, row, column)."""
    batch, height, width, channels = latents.shape
    if height % size or width % size:
        raise ValueError(
            f"patches of {size} x {size} take latents whose sides are multiples of {size}, "
            f"received {latents.shape}."
        )
    grid = (batch, height // size, size, width // size, size, channels)
    patches = latents.reshape(grid).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, height // size, width // size, -1)


def unpatchify(patches: Float[Array, "B h w P"], size: int) -> Float[Array, "B H W C"]:
    """Inverse of `patchify`."""
    batch, rows, columns, _ = patches.shape
    latents = patches.reshape(batch, rows, columns, -1, size, size).transpose(0, 1, 4, 2, 5, 3)
    return latents.reshape(batch, size * rows, size * columns, -1)


class AttentionBlock(Attention):
    """Single-head self-attention over the pixels, behind a group norm, added to its input."""

    def __init__(self, channels: int, groups: int, **init):
        super().__init__(channels, 1, use_bias=True, **init)
        self.group_norm = group_norm(channels, groups, _EPSILON, **init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])  # [B, H*W, C]
        return x + super().__call__(tokens).reshape(x.shape)


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the coarsest resolution."""

    def __init__(self, channels: int, groups: int, *, attends: bool, **init):
        block = {"groups": groups, "epsilon": _EPSILON, **init}
        self.resnets = nnx.List([ResnetBlock2D(channels, channels, **block) for _ in range(2)])
        if attends:
            self.attentions = nnx.List([AttentionBlock(channels, groups, **init)])

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Block(nnx.Module):
    """`DownEncoderBlock2D` or `UpDecoderBlock2D`: resnets, then halving or doubling, or neither."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        groups: int,
        resample: str | None,
        **init,
    ):
        inputs = (in_channels,) + (channels,) * (layers - 1)
        block = {"groups": groups, "epsilon": _EPSILON, **init}
        self.resnets = nnx.List([ResnetBlock2D(c, channels, **block) for c in inputs])
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(channels, padding=0, **init)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample2D(channels, **init)])

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        elif hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


def _blocks(
    config: _AutoencoderConfig, channels: tuple[int, ...], layers: int, resample: str, **init
) -> Any:
    """One block per resolution; the last one keeps its size."""
    shared = {"layers": layers, "groups": config.norm_num_groups, **init}
    *others, last = zip((channels[0], *channels), channels, strict=False)
    blocks = [Block(*pair, resample=resample, **shared) for pair in others]
    return nnx.List([*blocks, Block(*last, resample=None, **shared)])


def _run(coder: "Encoder | Decoder", blocks: tuple[nnx.Module, ...], x: Array) -> Array:
    x = coder.conv_in(x)
    for block in blocks:
        x = recomputed(block.__call__, coder.remat)(x)
    return coder.conv_out(jax.nn.silu(coder.conv_norm_out(x)))


class Encoder(nnx.Module):
    """Image -> mean and log-variance, before `quant_conv`."""

    def __init__(self, config: _AutoencoderConfig, *, remat: Remat, **init):
        channels, groups = config.block_out_channels, config.norm_num_groups
        attends = config.mid_block_add_attention
        self.remat = remat
        self.conv_in = conv3x3(config.in_channels, channels[0], **init)
        self.down_blocks = _blocks(config, channels, config.layers_per_block, "down", **init)
        self.mid_block = MidBlock(channels[-1], groups, attends=attends, **init)
        self.conv_norm_out = group_norm(channels[-1], groups, _EPSILON, **init)
        self.conv_out = conv3x3(channels[-1], 2 * config.latent_channels, **init)

    def __call__(self, x: Array) -> Array:
        return _run(self, (*self.down_blocks, self.mid_block), x)


class Decoder(nnx.Module):
    """Latents after `post_quant_conv` -> image."""

    def __init__(self, config: _AutoencoderConfig, *, remat: Remat, **init):
        channels, groups = config.decoder_channels[::-1], config.norm_num_groups
        attends = config.mid_block_add_attention
        self.remat = remat
        self.conv_in = conv3x3(config.latent_channels, channels[0], **init)
        self.mid_block = MidBlock(channels[0], groups, attends=attends, **init)
        self.up_blocks = _blocks(config, channels, config.layers_per_block + 1, "up", **init)
        self.conv_norm_out = group_norm(channels[-1], groups, _EPSILON, **init)
        self.conv_out = conv3x3(channels[-1], config.out_channels, **init)

    def __call__(self, x: Array) -> Array:
        return _run(self, (self.mid_block, *self.up_blocks), x)


class _Autoencoder(RecomputingModel):
    """What the two autoencoders share: all between images and unscaled latents."""

    config: _AutoencoderConfig
    pytorch_library = "diffusers"
    pytorch_renames: ClassVar[Mapping[str, str]] = {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
    }

    def _build(self, config: _AutoencoderConfig, *, remat: Remat, **init):
        latent = config.latent_channels
        self.encoder = Encoder(config, remat=remat, **init)
        self.decoder = Decoder(config, remat=remat, **init)
        if config.use_quant_conv:
            self.quant_conv = conv1x1(2 * latent, 2 * latent, **init)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv1x1(latent, latent, **init)

    def encode(
        self, images: Float[Array, "B H W C"], *, tiling: bool = False
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Posterior of the latents.

        Args:
          images: [B, H, W, in_channels] in [-1, 1]; H and W multiples of `config.downsampling`.
          tiling: whether images larger than `config.sample_size` are encoded in tiles of that size.

        Returns:
          mean and log-variance (clipped to [-30, 20]), each [B, h, w, latent_channels], unscaled.
        """
        factor = self.config.downsampling
        name = type(self).__name__
        check_axes(images, "B H W C", f"{name}'s images")
        if images.shape[-1] != self.config.in_channels or any(
            s % factor for s in images.shape[1:3]
        ):
            raise ValueError(
                f"{name} encodes [B, H, W, {self.config.in_channels}] images whose sides "
                f"are multiples of {factor}, received {images.shape}."
            )

        def encode(images: Array) -> Array:
            moments = self.encoder(images)
            return self.quant_conv(moments) if self.config.use_quant_conv else moments

        images, size = images.astype(self.dtype), self.config.tile_size
        if tiling and max(images.shape[1:3]) > size:
            moments = tiled(encode, images, tile=size, output=size // factor)
        else:
            moments = encode(images)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(
        self, latents: Float[Array, "B h w Z"], *, tiling: bool = False
    ) -> Float[Array, "B H W C"]:
        """Images [B, H, W, out_channels], nominally in [-1, 1], from unscaled latents.

        Args:
          latents: [B, h, w, latent_channels].
          tiling: whether images larger than `config.sample_size` are decoded in tiles of that size,
            and images one at a time, in the memory that one tile takes.
        """
        name = type(self).__name__
        check_axes(latents, "B h w C", f"{name}'s latents")
        if latents.shape[-1] != self.config.latent_channels:
            raise ValueError(
                f"{name} decodes [B, h, w, {self.config.latent_channels}] latents, "
                f"received {latents.shape}."
            )

        def decode(latents: Array) -> Array:
            if self.config.use_post_quant_conv:
                latents = self.post_quant_conv(latents)
            return self.decoder(latents)

        latents, size = latents.astype(self.dtype), self.config.tile_size
        if not tiling:
            return decode(latents)
        tile = size // self.config.downsampling

        def decode_one(latents: Array) -> Array:
            if max(latents.shape[:2]) <= tile:
                return decode(latents[None])[0]
            return tiled(decode, latents[None], tile=tile, output=size)[0]

        return jax.lax.map(decode_one, latents)


class AutoencoderKL(_Autoencoder):
    """Variational autoencoder between images and latents."""

    config: AutoencoderKLConfig
    config_class = AutoencoderKLConfig
    pytorch_class = "AutoencoderKL"

    def scale(self, latents: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Autoencoder latents -> the unit-variance latents that the diffusion model sees."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, latents: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Inverse of `scale`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


class BatchStatistics(nnx.Module):
    """Mean and variance of each channel, as training found them."""

    def __init__(self, channels: int, *, param_dtype: Dtype):
        self.running_mean = Buffer(jnp.zeros((channels,), param_dtype))
        self.running_var = Buffer(jnp.ones((channels,), param_dtype))


class AutoencoderKLFlux2(_Autoencoder):
    """FLUX.2's autoencoder: the diffusion model sees normalized patches of latents."""

    config: AutoencoderKLFlux2Config
    config_class = AutoencoderKLFlux2Config
    pytorch_class = "AutoencoderKLFlux2"
    pytorch_unread = ("bn.num_batches_tracked",)

    def _build(self, config: AutoencoderKLFlux2Config, *, remat: Remat, **init):
        super()._build(config, remat=remat, **init)
        channels = math.prod(config.patch_size) * config.latent_channels
        self.bn = BatchStatistics(channels, param_dtype=init["param_dtype"])

    def _statistics(self) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
        """Mean and standard deviation of each channel of the patches, float32."""
        mean, variance = (
            each[...].astype(jnp.float32) for each in (self.bn.running_mean, self.bn.running_var)
        )
        return mean, jnp.sqrt(variance + self.config.batch_norm_eps)

    def scale(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B p q P"]:
        """Autoencoder latents -> the patches of unit variance that the diffusion model sees.

        Args:
          latents: [B, h, w, latent_channels], h and w multiples of the patch size.

        Returns:
          [B, h / patch, w / patch, patch * patch * latent_channels].

        Raises:
          ValueError: sides that do not divide into patches.
        """
        mean, deviation = self._statistics()
        patches = patchify(latents, self.config.patch_size[0])
        return ((patches - mean) / deviation).astype(latents.dtype)

    def unscale(self, latents: Float[Array, "B p q P"]) -> Float[Array, "B h w Z"]:
        """Inverse of `scale`."""
        mean, deviation = self._statistics()
        patches = (latents * deviation + mean).astype(latents.dtype)
        return unpatchify(patches, self.config.patch_size[0])
