"""Context parallelism: the tokens of one video, or image, spread over devices in a whole model.

Each device has some frames of the video (or rows of the image) and all of the text.  Within
neighborhoods attention fetches from the neighbors what its windows reach (`kernels.gna`'s halo
exchange); dense attention gathers all keys; what is done token by token needs no one else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Num

from .layers.slabs import AXIS
from .streaming import is_streamed


class ContextParallel(nnx.Module):
    """A transformer that runs on several devices at once, to be called as itself.

    Its result is that of the model, gradients included, but for float rounding. Parameters are on
    all devices, unless other axes of the mesh divide them.

    Args:
      model: a transformer of images or videos whose attention is a `JointSequence`'s.
      mesh: devices, along its axis `context`; what other axes divide stays so, under `jax.jit`.

    Raises:
      ValueError: a model that cannot be spread, or a mesh without such an axis.
    """

    def __init__(self, model: Any, mesh: Mesh):
        if not getattr(model, "SPREADS", False):
            raise ValueError(
                f"a {type(model).__name__} does not spread its tokens over devices: transformers "
                "of FLUX, Stable Diffusion 3 and videos do."
            )
        if is_streamed(model):
            raise ValueError("streamed models run on one device: load this one without stream.")
        if AXIS not in mesh.shape:
            raise ValueError(
                f"the mesh needs an axis {AXIS!r} to spread tokens over; received the axes "
                f"{', '.join(map(repr, mesh.axis_names))}."
            )
        self.model, self.mesh = model, mesh

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def __call__(
        self,
        latents: Float[Array, "B n *X C"],
        timesteps: Num[Array, "..."] | float | int,
        condition: Any,
    ) -> Float[Array, "B n *X O"]:
        """What the model makes of the same arguments.

        Raises:
          ValueError: as the model, and where its devices do not divide the tokens.
        """
        require_shares(self.mesh, latents.shape[1:], _patch(self.config))
        graphdef, state = nnx.split(self.model)
        times = jnp.asarray(timesteps)
        same, slab = PartitionSpec(), PartitionSpec(None, AXIS)

        def run(state: Any, latents: Array, times: Array, condition: Any) -> Array:
            return nnx.merge(graphdef, state)(latents, times, condition)

        spread = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(same, slab, slab if times.ndim > 1 else same, same),
            out_specs=slab,
            axis_names={AXIS},
        )
        return spread(state, latents, times, condition)


def require_shares(
    mesh: Mesh, shape: tuple[int, ...], patch: int, frames: int | None = None
) -> None:
    """Raise ValueError unless the devices of a mesh can have as many tokens each.

    Args:
      mesh: with an axis `context`.
      shape: of the latents of a video [T, h, w, C], or an image [h, w, C].
      patch: latents along the first dimension that are a token.
      frames: of a video, for each of its latents but the first, where it is asked for by them.
    """
    devices, count = mesh.shape[AXIS], shape[0]
    each = devices * patch
    if count % each:
        fitting = [n for n in (count // each * each, (count // each + 1) * each) if n]
        said = " or ".join(map(str, fitting))
        if frames is not None:
            said += f", {' or '.join(str((n - 1) * frames + 1) for n in fitting)} frames of video"
        raise ValueError(
            f"{devices} devices cannot share the {count} {'frames' if len(shape) == 4 else 'rows'} "
            f"of these latents alike: take {said}, or another number of devices."
        )


def _patch(config: Any) -> int:
    patch = getattr(config, "patch_size_t", None) or getattr(config, "patch_size", 1)
    return patch[0] if isinstance(patch, tuple) else patch
