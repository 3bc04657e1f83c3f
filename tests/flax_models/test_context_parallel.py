"""Models whose tokens are spread over 8 devices: as on one, forward and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conceptax.flax_models.context_parallel import ContextParallel
from conceptax.flax_models.cosmos_transformer_3d import (
    CosmosCondition,
    CosmosTransformer3DConfig,
    CosmosTransformer3DModel,
)
from conceptax.flax_models.flux_2_transformer_2d import (
    Flux2Transformer2DConfig,
    Flux2Transformer2DModel,
)
from conceptax.flax_models.flux_transformer_2d import (
    FluxTransformer2DConfig,
    FluxTransformer2DModel,
)
from conceptax.flax_models.hunyuan_video_transformer_3d import (
    HunyuanVideoTransformer3DConfig,
    HunyuanVideoTransformer3DModel,
)
from conceptax.flax_models.layers import slabs
from conceptax.flax_models.layers.attention import GNA, with_attention
from conceptax.flax_models.layers.joint_attention import JointTextCondition
from conceptax.flax_models.sd3_transformer_2d import SD3Transformer2DConfig, SD3Transformer2DModel
from conceptax.flax_models.wan_transformer_3d import WanTransformer3DConfig, WanTransformer3DModel
from conceptax.kernels.attention import attention_with_lse


def randomized(model):
    """With parameters none of which is zero, as gates are at first."""
    graphdef, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.2 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, drawn))


def arrays(*shapes):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def flux():
    config = FluxTransformer2DConfig(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    latents, states, pooled = arrays((2, 16, 3, 4), (2, 5, 12), (2, 10))
    attention = (GNA((5, 2), (2, 1)), None)
    model = FluxTransformer2DModel(
        config, attention=attention, attention_scale="proportional", rngs=nnx.Rngs(0)
    )
    return model, latents, 3.0, JointTextCondition(states, pooled, jnp.array([3.5, 1.0]))


def flux_2():
    config = Flux2Transformer2DConfig(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    latents, states = arrays((1, 8, 3, 4), (1, 5, 12))
    model = Flux2Transformer2DModel(config, attention=GNA((3, 2)), rngs=nnx.Rngs(0))
    return model, latents, jnp.array([3.0]), JointTextCondition(states)


def sd3():
    config = SD3Transformer2DConfig(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    latents, states, pooled = arrays((1, 16, 6, 4), (1, 5, 12), (1, 10))
    model = SD3Transformer2DModel(config, attention=GNA((3, 2)), rngs=nnx.Rngs(0))
    return model, latents, 3.0, JointTextCondition(states, pooled)


def hunyuan():
    """Two texts of which the shorter is padded."""
    config = HunyuanVideoTransformer3DConfig(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 8),
    )
    latents, states, pooled = arrays((2, 8, 4, 6, 4), (2, 5, 12), (2, 8))
    mask = jnp.arange(5) < jnp.array([[5], [3]])
    attention = (GNA((3, 2, 2), (2, 1, 1)), None, GNA((3, 2, 2)))
    model = HunyuanVideoTransformer3DModel(config, attention=attention, rngs=nnx.Rngs(0))
    guidance = jnp.array([6.0, 1.0])
    return model, latents, 300.0, JointTextCondition(states, pooled, guidance, mask)


def wan():
    """Times of its own for each token, as of Wan 2.2 TI2V; more frames than devices."""
    config = WanTransformer3DConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=10,
        ffn_dim=20,
        num_layers=2,
        rope_max_seq_len=32,
    )
    latents, states, times = arrays((2, 16, 4, 6, 4), (2, 5, 10), (2, 16, 2, 3))
    attention = (GNA((5, 2, 3), (2, 1, 1), (2, 1, 1)), None)
    model = WanTransformer3DModel(config, attention=attention, rngs=nnx.Rngs(0))
    return model, latents, 500 + 100 * times, states


def cosmos():
    """From video to world: learned positions, frames per second, given frames, a time for each."""
    config = CosmosTransformer3DConfig(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        text_embed_dim=10,
        adaln_lora_dim=4,
        max_size=(16, 16, 16),
    )
    latents, states, times = arrays((2, 8, 4, 6, 4), (2, 5, 10), (2, 8))
    given = jnp.zeros((2, 8)).at[:, :3].set(1)
    attention = (None, GNA((None, 2, 2), (1, 2, 1)))
    model = CosmosTransformer3DModel(config, attention=attention, rngs=nnx.Rngs(0))
    return model, latents, times, CosmosCondition(states, jnp.array([24.0, 10.0]), given)


MODELS = {
    "flux": flux,
    "flux_2": flux_2,
    "sd3": sd3,
    "hunyuan": hunyuan,
    "wan": wan,
    "cosmos": cosmos,
}


def run(model, *inputs):
    """Output, and gradients of parameters and inputs."""
    graphdef, params = nnx.split(model)
    latents, times, condition = inputs
    weights = jnp.cos(jnp.arange(latents.size)).reshape(latents.shape)

    @jax.jit
    def both(params, latents, times, condition):
        def loss(params, latents, condition):
            output = nnx.merge(graphdef, params)(latents, times, condition)
            return jnp.vdot(weights, output), output

        arguments = (params, latents, condition)
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(*arguments)

    with jax.default_matmul_precision("highest"):
        (_, output), gradients = both(params, latents, times, condition)
    return output, *gradients


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each != "hunyuan")) for each in MODELS],
)
def test_on_eight_devices_as_on_one(name):
    model, *inputs = MODELS[name]()
    model = randomized(model)
    spread = ContextParallel(model, mesh_of(context=8))
    (output, of_spread, *others), expected = run(spread, *inputs), run(model, *inputs)
    assert len(output.sharding.device_set) == 8
    received: Any = (output, of_spread["model"], *others)
    for one, other in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        if one.dtype == jax.dtypes.float0:  # of a mask
            continue
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, atol=2e-5 * scale)


def test_neighborhoods_fetch_halos_and_dense_attention_gathers():
    model, *inputs = wan()
    for attention, gathers in ((GNA((3, 2, 2)), False), (None, True)):
        spread = ContextParallel(with_attention(model, attention), mesh_of(context=8))
        program = jax.jit(lambda spread, *x: spread(*x)).lower(spread, *inputs).compile().as_text()
        assert ("all-gather" in program) is gathers
        assert ("collective-permute" in program) is not gathers


def test_beside_other_axes_of_a_mesh():
    model, *inputs = wan()
    mesh = mesh_of(data=2, context=4)
    latents = jax.device_put(inputs[0], NamedSharding(mesh, PartitionSpec("data")))
    output = jax.jit(lambda model, *x: ContextParallel(model, mesh)(*x))(
        model, latents, *inputs[1:]
    )
    np.testing.assert_allclose(output, jax.jit(model.__class__.__call__)(model, *inputs), atol=2e-5)


def test_queries_of_all_slabs_see_the_keys_of_all():
    query, key, value = arrays((1, 3, 2, 4), (1, 16, 2, 4), (1, 16, 2, 4))

    def attend(query, key, value):
        assert slabs.count() == 8 and slabs.whole((2, 3)) == (16, 3)
        everything = slabs.gathered(key)
        assert (
            everything.shape == (1, 16, 2, 4) and slabs.own(everything, axis=1).shape == key.shape
        )
        output, lse = attention_with_lse(query, key, value)
        return slabs.merged(output, lse)

    same, slab = PartitionSpec(), PartitionSpec(None, "context")
    spread = jax.shard_map(
        attend, mesh=mesh_of(context=8), in_specs=(same, slab, slab), out_specs=(same, same)
    )
    for one, other in zip(
        spread(query, key, value), attention_with_lse(query, key, value), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert slabs.count() == 1 and slabs.whole((2, 3)) == (2, 3) and slabs.own(key) is key


@pytest.mark.parametrize(
    ("frames", "remedy"), [(12, "take 8 or 16,"), (7, "take 8,")], ids=["12", "7"]
)
def test_frames_that_devices_cannot_share_are_told(frames, remedy):
    model, latents, _, states = wan()
    spread = ContextParallel(model, mesh_of(context=8))
    message = f"^8 devices cannot share the {frames} frames of these latents alike: {remedy} or"
    with pytest.raises(ValueError, match=message):
        spread(latents[:, :frames], 3.0, states)


def test_what_cannot_be_spread_is_told():
    model, *inputs = wan()
    with pytest.raises(ValueError, match=r"needs an axis 'context' .* received the axes 'data'"):
        ContextParallel(model, mesh_of(data=8))
    with pytest.raises(ValueError, match="a Linear does not spread its tokens over devices"):
        ContextParallel(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), mesh_of(context=8))
    wide = with_attention(model, GNA((17, 1, 1)))
    with pytest.raises(ValueError, match=r"a grid of 16x2x3 tokens: .* it fits is 17x2x3\."):
        jax.eval_shape(ContextParallel(wide, mesh_of(context=8)), *inputs)
    far = with_attention(model, GNA((3, 1, 1), 1, (4, 1, 1)))
    with pytest.raises(ValueError, match="the dilation along the first dimension must divide"):
        jax.eval_shape(ContextParallel(far, mesh_of(context=8)), *inputs)
