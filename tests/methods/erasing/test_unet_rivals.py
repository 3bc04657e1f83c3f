"""Rivals that train the UNet, or adapters of it: losses and gradients against their equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from erasing_toy import PHRASES, agree, moved, one, tiny_pipeline
from flax import nnx

from conceptax.converters import merge_parts, save_lora
from conceptax.methods.erasing import (
    ConceptAblationConfig,
    MaceConfig,
    RecelerConfig,
    SalUnConfig,
    SpmConfig,
    StereoConfig,
    adapters,
    attention_maps,
    common,
    concept_ablation,
    mace,
    receler,
    salun,
    spm,
    stereo,
)
from conceptax.methods.erasing.common import drawn_images
from conceptax.methods.sampling import NoiseSchedule, alphas_cumprod, make_sampler
from conceptax.methods.text.phrases import (
    Retained,
    empty_condition,
    encode_phrases,
    stacked_prompts,
)
from conceptax.methods.training import init_state, leaf_paths

RUN = {**PHRASES, "contexts": 0, "cycles": 2, "prompts": 2}
IMAGES = {**RUN, "ddim_steps": 2}
RETAIN = Retained(("four", "red", "brick"))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def loss_and_gradient(step, static, state, frozen, key, params):
    """Those of a step's one update: by an optimizer that subtracts the gradient as it is."""
    plain = dataclasses.replace(static, optimizer=optax.sgd(1.0))
    run = jax.jit(lambda start, frozen, key: step(plain, start, frozen, None, key))
    with jax.default_matmul_precision("highest"):
        after, metrics = run(init_state(params, plain.optimizer), frozen, key)
    assert int(after.step) == 1
    return metrics, jax.tree.map(jnp.subtract, params, after.params)


def transcribed(loss, params):
    """Value and gradient of an equation."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss))(params)


def squares(unet, *terms):
    """Means of |e - target|^2, of (target, x, t, c) each, every prompt alone."""
    target, *inputs = (jnp.concatenate(parts) for parts in zip(*terms, strict=True))
    every = (predictions(unet, *inputs) - target) ** 2
    ends = np.cumsum([len(term[0]) for term in terms])[:-1]
    return [jnp.mean(part) for part in jnp.split(every, ends)]


def noised(pipeline, images, key, size):
    """x_t = sqrt(abar) x + sqrt(1 - abar) noise, t and the noise."""
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, (size,), 0, 1000)
    noise = jax.random.normal(noise_key, (size, 4, 4, 4))
    table = alphas_cumprod(NoiseSchedule.from_config(pipeline.scheduler_config))
    alpha = jnp.asarray(table)[t][:, None, None, None]
    return jnp.sqrt(alpha) * images + jnp.sqrt(1 - alpha) * noise, t, noise


def predictions(unet, *inputs):
    return jax.lax.map(lambda each: one(unet, *each), inputs)


def test_images_are_drawn_by_guided_ddim(pipeline):
    config = ConceptAblationConfig(**RUN, ddim_steps=3, guidance=2.5)
    rows = encode_phrases(pipeline.tokenizer, ["three", "four", "red"], pipeline.max_length)
    images = drawn_images(pipeline, rows[None], config, seed=4)
    assert images.shape == (1, 3, 4, 4, 4)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(schedule, "ddim", num_inference_steps=3)
    states, empty = pipeline.text_encoder(jnp.asarray(rows))[0], empty_condition(pipeline)
    unet = jax.jit(pipeline.unet.__call__)
    for start in (0, 2):  # two at a time
        key = jax.random.fold_in(jax.random.key(4), start)
        x = jax.random.normal(key, (2, 4, 4, 4)) * sampler.init_noise_sigma
        context = states[np.minimum([start, start + 1], 2)]
        memory = sampler.memory(x)
        for i in range(3):
            time = int(sampler.timesteps[i])
            with_, without = unet(x, time, context), unet(x, time, jnp.stack([empty, empty]))
            x, memory = sampler.advance(x, without + 2.5 * (with_ - without), i, None, memory)
        np.testing.assert_allclose(images[0, start : start + 2], x[: 3 - start], atol=2e-4)


# ---- Concept Ablation ----


@pytest.mark.parametrize("objective", ["model", pytest.param("noise", marks=pytest.mark.slow)])
def test_concept_ablation_follows_its_equations(pipeline, objective):
    config = ConceptAblationConfig(**IMAGES, objective=objective, anchor_weight=0.7)
    static, state, frozen = concept_ablation.prepare(pipeline, ["three"], config, retain=RETAIN)
    params, key = moved(state.params), jax.random.key(5)
    metrics, gradient = loss_and_gradient(
        concept_ablation.ablation_step, static, state, frozen, key, params
    )
    _, prompt_key, noise_key = jax.random.split(key, 3)
    rows = jax.random.choice(prompt_key, 2, (2,))
    c_star, c, x = (frozen[name][0, rows] for name in ("states", "anchor_states", "images"))
    xt, t, noise = noised(pipeline, x, noise_key, 2)
    fixed = static.edited(params, frozen)

    def loss(params):
        now = nnx.merge(static.unet, params, frozen["unet"])
        target = noise if objective == "noise" else predictions(fixed, xt, t, c)
        erase, keep = squares(now, (target, xt, t, c_star), (noise, xt, t, c))
        return erase + 0.7 * keep

    value, expected = transcribed(loss, params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    agree(gradient, expected)


# ---- SalUn ----


def test_saliency_is_that_of_the_largest_gradients():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=8)}
    mask = salun.saliency_mask(jax.tree.map(jnp.asarray, tree), 0.25)
    every = np.sort(np.abs(np.concatenate([tree["a"].ravel(), tree["b"]])))[-5:]
    for name in tree:
        np.testing.assert_array_equal(mask[name], np.abs(tree[name]) >= every[0])
    whole = salun.saliency_mask(jax.tree.map(jnp.asarray, tree), 1.0)
    assert all(leaf.all() for leaf in jax.tree.leaves(whole))


def test_salun_follows_its_equations_and_moves_salient_weights_alone(pipeline):
    config = SalUnConfig(
        **IMAGES,
        frames=0,
        saliency_batches=2,
        retain_images=3,
        retain_rows=2,
        retain_weight=0.7,
    )
    static, state, frozen = salun.prepare(pipeline, ["three"], config, retain=RETAIN)
    # The mask: gradients of the guided denoising loss over two batches, summed.
    empty, total = empty_condition(pipeline), None
    for n in range(2):
        _, prompt_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(0), n), 3)
        rows = jax.random.choice(prompt_key, 2, (2,))
        c, x = (frozen[name][0, rows] for name in ("states", "images"))
        xt, t, noise = noised(pipeline, x, noise_key, 2)

        def forgetting(params, c=c, xt=xt, t=t, noise=noise):
            now = nnx.merge(static.unet, params, frozen["unet"])
            context = jnp.concatenate([c, jnp.stack([empty, empty])])
            twice = jnp.concatenate([xt, xt]), jnp.concatenate([t, t])
            with_, without = jnp.split(predictions(now, *twice, context), 2)
            return jnp.mean((8.5 * with_ - 7.5 * without - noise) ** 2)

        slope = transcribed(forgetting, state.params)[1]
        total = slope if total is None else jax.tree.map(jnp.add, total, slope)
    expected = salun.saliency_mask(total, 0.5)
    same = [
        np.mean(np.asarray(one_ == other))
        for one_, other in zip(
            jax.tree.leaves(frozen["mask"]), jax.tree.leaves(expected), strict=True
        )
    ]
    assert np.mean(same) > 0.99  # but for those at the threshold

    params, key = moved(state.params), jax.random.key(5)
    metrics, gradient = loss_and_gradient(salun.salun_step, static, state, frozen, key, params)
    _, prompt_key, noise_key, row_key = jax.random.split(key, 4)
    rows, others = jax.random.choice(prompt_key, 2, (2,)), jax.random.choice(row_key, 3, (2,))
    c, c_other, x = (frozen[name][0, rows] for name in ("states", "anchor_states", "images"))
    kept = frozen["retained_states"][others]
    images = jnp.concatenate([x, frozen["retained_images"][others]])
    xt, t, noise = noised(pipeline, images, noise_key, 4)
    target = predictions(static.edited(params, frozen), xt[:2], t[:2], c_other)

    def loss(params):
        now = nnx.merge(static.unet, params, frozen["unet"])
        terms = (target, xt[:2], t[:2], c), (noise[2:], xt[2:], t[2:], kept)
        erase, keep = squares(now, *terms)
        return erase + 0.7 * keep

    value, expected = transcribed(loss, params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    agree(gradient, jax.tree.map(jnp.multiply, expected, frozen["mask"]))


# ---- adapters, SPM ----


def test_adapters_add_their_products(pipeline):
    params = nnx.to_pure_dict(nnx.state(pipeline.unet))
    config = SpmConfig(rank=2)
    fresh = adapters.fresh(params, config, 0)
    assert all(".attentions." in path and path.endswith(".kernel") for path in fresh)
    assert any(leaf["down"].ndim == 4 for leaf in fresh.values())  # 1x1 convolutions too
    jax.tree.map(
        np.testing.assert_array_equal, adapters.added(params, fresh), dict(params)
    )  # nothing yet
    grown = moved(fresh)
    sums = adapters.added(params, grown)
    attention = ("down_blocks", 0, "attentions", 0)
    ours, before = sums, params
    for name in attention:
        ours, before = ours[name], before[name]
    path = "down_blocks.0.attentions.0."
    adapter = grown[path + "transformer_blocks.0.attn2.to_v.kernel"]
    pick = lambda tree: tree["transformer_blocks"][0]["attn2"]["to_v"]["kernel"]  # noqa: E731
    np.testing.assert_allclose(
        pick(ours) - pick(before), np.asarray(adapter["down"]) @ adapter["up"], atol=1e-6
    )
    adapter = grown[path + "proj_in.kernel"]  # [1, 1, in, out]
    outer = np.einsum("hwir,ro->hwio", adapter["down"], adapter["up"])
    np.testing.assert_allclose(
        ours["proj_in"]["kernel"] - before["proj_in"]["kernel"], outer, atol=1e-6
    )
    with pytest.raises(ValueError, match="selects no kernel"):
        adapters.fresh(params, dataclasses.replace(config, trainable=("*.bias",)), 0)


def test_spm_follows_its_equations(pipeline):
    config = SpmConfig(
        **RUN, latents="noise", eta=1.5, anchors=3, anchor_rows=3, anchor_weight=0.7, frames=0
    )
    static, state, frozen = spm.prepare(pipeline, ["three"], config, retain=RETAIN)
    params, key = moved(state.params), jax.random.key(5)
    metrics, gradient = loss_and_gradient(spm.spm_step, static, state, frozen, key, params)
    _, prompt_key, latent_key, row_key = jax.random.split(key, 4)
    rows, others = jax.random.choice(prompt_key, 2, (2,)), jax.random.choice(row_key, 3, (3,))
    c, c0 = (frozen[name][0, rows] for name in ("states", "anchor_states"))
    a = frozen["retained_states"][others]
    time_key, noise_key = jax.random.split(latent_key)
    t = jax.random.randint(time_key, (2,), 500, 1000)
    x = jax.random.normal(noise_key, (2, 4, 4, 4))
    shared = jnp.array([0, 1, 0])
    every = jnp.concatenate([jnp.arange(2), jnp.arange(2), shared])
    context = jnp.concatenate([c0, c, a])
    original = jax.jit(lambda *inputs: predictions(pipeline.unet, *inputs))
    surrogate, concept, anchored = jnp.split(original(x[every], t[every], context), [2, 4])
    target = surrogate - 1.5 * (concept - surrogate)

    def loss(params):
        now = nnx.merge(static.unet, adapters.added(frozen["original"], params))
        erase, keep = squares(now, (target, x, t, c), (anchored, x[shared], t[shared], a))
        return erase + 0.7 * keep

    value, expected = transcribed(loss, params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    agree(gradient, expected)


def test_a_membrane_is_exported_as_the_lora_that_it_is(pipeline, tmp_path):
    config = SpmConfig(**RUN, rank=1)
    static, state, frozen = adapters.with_adapters(pipeline, config, 0)
    edited = static.result(moved(state.params, 0.2), frozen)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    summary = save_lora(edited, pipeline.unet, file, rank=1)
    assert summary.error < 1e-3 and not summary.left_out and set(summary.ranks.values()) == {1}
    merged = merge_parts(pipeline, tmp_path).unet
    leaves = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))) for model in (edited, merged))
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_spm_anchors_what_is_far_from_the_concept(pipeline):
    phrases = ["three", "four", "brick"]
    rows = encode_phrases(pipeline.tokenizer, phrases, pipeline.max_length)
    pooled = np.asarray(pipeline.text_encoder(jnp.asarray(rows)).pooled)
    pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    weights = spm.anchor_weights(pipeline, ["three", "four"], rows, 2.0)
    cosines = (pooled @ pooled[:2].T).max(axis=1)
    np.testing.assert_allclose(weights, np.clip(1 - cosines, 1e-6, None) ** 2, atol=1e-5)
    assert weights[0] == pytest.approx(weights[1]) == pytest.approx(1e-12)


# ---- attention maps ----


def maps_of(attention, x, context):
    """softmax(q k / sqrt(d)) of one image [L, C] and text [K, E], head by head: [H, L, K]."""
    q, k = (np.asarray(f(y)) for f, y in ((attention.to_q, x), (attention.to_k, context)))
    size, found = q.shape[-1] // attention.heads, []
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[:, part] @ k[:, part].T / np.sqrt(size)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        found.append(weights / weights.sum(axis=1, keepdims=True))
    return np.stack(found)


def test_watched_attention_does_the_same_and_tells_what_it_saw(pipeline):
    graphdef, state = nnx.split(pipeline.unet)
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, 24, 16)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(lambda *inputs: nnx.merge(graphdef, state)(*inputs))
        expected = plain(latents, 300, text)

        def watching(*inputs):
            unet = nnx.merge(graphdef, state)
            seen = attention_maps.watched(unet)
            return unet(*inputs), seen

        output, seen = jax.jit(watching)(latents, 300, text)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    names = {path.rpartition(".to_q.")[0] for path in leaf_paths(pipeline.unet) if ".to_q." in path}
    assert set(seen) == {name for name in names if name.endswith("attn2")}
    attention = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    x = jnp.asarray(rng.normal(size=(1, 16, attention.to_q.kernel.shape[0])), jnp.float32)
    notes = {}
    attention_maps._Watched(attention, "here", notes)(x, text[:1])
    weights = maps_of(attention, x[0], text[0])
    np.testing.assert_allclose(notes["here"].weights[0], weights, atol=1e-5)
    size = x.shape[-1] // attention.heads
    values = np.asarray(attention.to_v(text[0])).reshape(24, attention.heads, size)
    gathered = np.einsum("hlk,khd->lhd", weights, values).reshape(16, -1)
    np.testing.assert_allclose(notes["here"].gathered[0], gathered, atol=1e-5)


def test_masks_are_where_a_word_is():
    rng = np.random.default_rng(1)
    fine, coarse = rng.random((1, 2, 64, 5)), rng.random((1, 2, 16, 5))  # of latents of 16 x 16
    seen = {
        name: attention_maps.Seen(jnp.asarray(maps), jnp.zeros((1, maps.shape[2], 1)))
        for name, maps in (("a", fine), ("b", coarse), ("c", coarse[:, ::-1] ** 2))
    }
    places = jnp.array([[False, True, True, False, False]])
    mask = attention_maps.word_mask(seen, places, (16, 16), 0.6)
    both = (coarse + coarse[:, ::-1] ** 2)[0, :, :, 1:3].mean(axis=(0, 2)).reshape(4, 4)
    scaled = (both - both.min()) / (both.max() - both.min())
    np.testing.assert_array_equal(mask[0], scaled >= 0.6)
    larger = np.repeat(np.repeat(scaled >= 0.6, 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(attention_maps.mask_at(mask, 64, (16, 16))[0], larger.ravel())
    assert attention_maps.grid_of(15, (9, 5)) == (5, 3)
    assert attention_maps.word_mask(seen, places, (16, 16), 0.0).all()


# ---- MACE ----


def test_mace_fuses_what_its_loras_do():
    """Equation 6 as one dense least squares problem, of two concepts."""
    rng = np.random.default_rng(5)
    refined, original = rng.normal(size=(2, 3, 6))
    changes, prompts = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 4, 6))
    kept = rng.normal(size=(5, 6))
    ours = mace.fused(
        refined,
        changes,
        original,
        np.einsum("cni,cnj->cij", prompts, prompts) / 4,
        kept.T @ kept / 5,
        weight=0.7,
        regularization=0.2,
    )
    parts = [
        (states / 2, states @ (refined + change).T / 2)
        for states, change in zip(prompts, changes, strict=True)
    ]
    parts.append((np.sqrt(0.7 / 5) * kept, np.sqrt(0.7 / 5) * kept @ original.T))
    parts.append((np.sqrt(0.2) * np.eye(6), np.sqrt(0.2) * refined.T))
    left, right = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(ours, expected, atol=1e-9)


def test_mace_draws_times_by_its_density():
    logits = mace.focus_logits(1000, (0.2, 0.4), 50.0)
    t = np.arange(1000)
    xi = 1 / (1 + np.exp(-0.05 * (t - 200))) - 1 / (1 + np.exp(-0.05 * (t - 400)))
    np.testing.assert_allclose(jax.nn.softmax(logits), xi / xi.sum(), atol=1e-6)


def test_mace_refines_other_words_alone(pipeline):
    """Equation 2 over the states behind the concept, and projections that fuse to it untrained."""
    config = MaceConfig(**IMAGES, frames=0, preserve_weight=0.7, fuse_weight=0.3)
    static, state, frozen = mace.prepare(pipeline, ["three", "seven"], config, retain=RETAIN)
    prompts = stacked_prompts(
        pipeline.tokenizer, ["three", "seven"], [], config, length=pipeline.max_length, seed=0
    )
    behind = [
        np.arange(24) > np.flatnonzero(places)[-1] for places in prompts.concept.reshape(-1, 24)
    ]
    states = [
        np.float64(pipeline.text_encoder(jnp.asarray(rows.reshape(-1, 24)))[0])
        for rows in (prompts.tokens, prompts.without)
    ]
    around = np.concatenate([row[some] for row, some in zip(states[0], behind, strict=True)])
    # The empty anchor is one token shorter: what is behind the concept comes one earlier.
    anchor = np.concatenate(
        [row[np.roll(some, -1)] for row, some in zip(states[1], behind, strict=True)]
    )
    shifted = [np.roll(some, -1)[-1] == some[-1] for some in behind]
    assert not any(shifted)  # the last position has no partner
    words = encode_phrases(pipeline.tokenizer, RETAIN.kept, 24)
    kept = np.float64(pipeline.text_encoder(jnp.asarray(words))[0]).reshape(-1, 16)
    moment, unit = kept.T @ kept / len(kept), np.mean(kept**2)
    attention = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    old = np.float64(attention.to_k.kernel[...]).T
    right = old @ (anchor.T @ around / len(around) + 0.7 * moment + 0.01 * unit * np.eye(16))
    left = around.T @ around / len(around) + 0.7 * moment + 0.01 * unit * np.eye(16)
    refined = right @ np.linalg.inv(left)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.kernel"
    pick = lambda unet: unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2  # noqa: E731
    received = pick(static.original(frozen)).to_k.kernel[...]
    np.testing.assert_allclose(received, refined.T, atol=1e-4)
    np.testing.assert_allclose(frozen["unrefined"][path], old.T, atol=1e-6)
    # Fusion: nothing trained, so both concepts ask for the refined projections.
    params = moved(state.params, 0.1)
    for own, scale in ((state.params, 0.0), (params, 1.0)):
        changes = [
            scale * np.float64(params[path]["down"][c] @ params[path]["up"][c]).T for c in (0, 1)
        ]
        moments = [
            np.einsum("tli,tlj->ij", each, each) / each[..., 0].size
            for each in states[0].reshape(2, -1, 24, 16)
        ]
        left = sum(moments) + 0.3 * moment + 0.01 * unit * np.eye(16)
        right = sum((refined + d) @ m for d, m in zip(changes, moments, strict=True))
        right = right + 0.3 * old @ moment + 0.01 * unit * refined
        expected = (right @ np.linalg.inv(left)).T
        received = pick(static.result(own, frozen)).to_k.kernel[...]
        np.testing.assert_allclose(received, expected, atol=2e-4)


def test_mace_suppresses_maps_inside_the_mask():
    rng = np.random.default_rng(6)
    maps = {"a": rng.random((2, 3, 64, 5)), "b": rng.random((2, 3, 16, 5))}
    seen = {
        name: attention_maps.Seen(jnp.asarray(each, jnp.float32), jnp.zeros((2, each.shape[2], 1)))
        for name, each in maps.items()
    }
    places = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    small = rng.random((2, 4, 4)) > 0.5
    for mask in (small, None):
        expected = 0.0
        for image in (0, 1):
            for name, side in (("a", 8), ("b", 4)):
                inside = np.ones((side, side))
                if mask is not None:
                    inside = np.kron(mask[image], np.ones((side // 4, side // 4)))
                for word in np.flatnonzero(places[image]):
                    for head in range(3):
                        one_map = maps[name][image, head, :, word].reshape(side, side)
                        expected += np.linalg.norm(one_map * inside) ** 2 / 2
        given = None if mask is None else jnp.asarray(mask, jnp.float32)
        ours = mace.suppression_loss(seen, jnp.asarray(places), given, (8, 8))
        assert float(ours) == pytest.approx(expected, rel=1e-5)


# ---- Receler ----


def test_receler_follows_its_equations(pipeline):
    """Attack, mask and both losses of a cycle, from maps and outputs that are computed anew."""
    config = RecelerConfig(
        **{**RUN, "templates": ("a {} on it", "{}")},
        latents="noise",
        rank=2,
        attack_words=2,
        attack_steps=1,
        mask_threshold=0.4,
        mask_weight=0.7,
    )
    static, state, frozen = receler.prepare(pipeline, ["three"], config, retain=RETAIN)
    params, key = moved(state.params, 0.1), jax.random.key(5)
    metrics, gradient = loss_and_gradient(receler.receler_step, static, state, frozen, key, params)
    _, prompt_key, latent_key, _ = jax.random.split(key, 4)
    rows = jax.random.choice(prompt_key, 2, (2,))
    c, c0, places, free = (
        frozen[name][0, rows] for name in ("states", "anchor_states", "places", "free")
    )
    ends = np.array([5, 2])[rows]  # of "start a three on it end" and "start three end"
    np.testing.assert_array_equal(np.argmax(free, axis=1), ends)
    assert (free.sum(axis=1) == 2).all() and (places.sum(axis=1) == 1).all()
    time_key, noise_key = jax.random.split(latent_key)
    t = jax.random.randint(time_key, (2,), 500, 1000)
    x = jax.random.normal(noise_key, (2, 4, 4, 4))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"

    def watching(unet, x, t, context):
        seen = attention_maps.watched(unet)
        return unet(x, t, context), seen

    with jax.default_matmul_precision("highest"):
        both = jax.jit(lambda *inputs: watching(static.original(frozen), *inputs))
        wanted, seen = both(x, t, c)
        without, _ = both(x, t, c0)
        erased = lambda own: nnx.merge(  # noqa: E731
            static.unet, adapters.added(frozen["original"], own)
        )
        unit = jnp.sqrt(jnp.mean(c**2))

        def distance(words):
            context = jnp.where(free[..., None], words, c)
            return jnp.mean((predictions(erased(params), x, t, context) - wanted) ** 2)

        loss_before, slope = jax.jit(jax.value_and_grad(distance))(c)
    words = c - config.attack_rate * unit * jnp.sign(slope)  # Adam's first step
    c_adv = jnp.where(free[..., None], words, c)
    assert float(metrics["attack"]) == pytest.approx(float(loss_before), rel=1e-4)
    assert set(seen) == {path.removesuffix(".to_out.0.kernel") for path in params}
    word = jnp.argmax(places, axis=1)
    maps = jnp.mean(  # all layers lie at the side that is nearest to a quarter
        jnp.stack([each.weights[jnp.arange(2), :, :, word].mean(axis=1) for each in seen.values()]),
        axis=0,
    )
    low, high = maps.min(axis=1, keepdims=True), maps.max(axis=1, keepdims=True)
    outside = 1 - ((maps - low) / (high - low) >= 0.4).astype(jnp.float32)  # [2, L]
    target = without - 3 * (wanted - without)
    assert 0 < float(outside.sum()) < outside.size and name in seen

    def loss(own):
        output, noted = watching(erased(own), x, t, c_adv)
        erase = jnp.mean((output - target) ** 2)
        terms = []
        for path, each in noted.items():
            eraser = own[f"{path}.to_out.0.kernel"]
            o = each.gathered @ (eraser["down"] @ eraser["up"])
            left = jnp.sum((o * outside[..., None]) ** 2) / o.shape[-1]
            terms.append(left / jnp.sum(outside))
        return erase + 0.7 * jnp.mean(jnp.stack(terms))

    value, expected = transcribed(loss, params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)
    agree(gradient, expected, 5e-4)  # Adam's first step is a sign but for its epsilon


# ---- STEREO ----


def test_stereo_follows_its_equation(pipeline):
    """The second stage, with states of found words made up."""
    config = StereoConfig(**RUN, latents="noise", search_rounds=2, eta=1.5, anchor_guidance=0.7)
    static, state, frozen = common.assembled(pipeline, config)
    rng = np.random.default_rng(7)
    frozen |= {
        "found_states": jnp.asarray(rng.normal(size=(1, 3, 3, 24, 16)), jnp.float32),
        "anchor_states": jnp.asarray(rng.normal(size=(1, 3, 24, 16)), jnp.float32),
        "no_text": jnp.asarray(rng.normal(size=(24, 16)), jnp.float32),
    }
    params, key = moved(state.params), jax.random.key(5)
    metrics, gradient = loss_and_gradient(stereo.stereo_step, static, state, frozen, key, params)
    _, prompt_key, word_key, latent_key = jax.random.split(key, 4)
    rows, word = jax.random.choice(prompt_key, 3, (2,)), jax.random.randint(word_key, (), 0, 3)
    found, a = (frozen[name][0, rows] for name in ("found_states", "anchor_states"))
    time_key, noise_key = jax.random.split(latent_key)
    t = jax.random.randint(time_key, (2,), 500, 1000)
    x = jax.random.normal(noise_key, (2, 4, 4, 4))
    nothing = jnp.stack([frozen["no_text"]] * 2)
    context = jnp.concatenate([nothing, a, found[:, 0], found[:, 1], found[:, 2]])
    many = jnp.concatenate([x] * 5), jnp.concatenate([t] * 5), context
    e0, ea, *ec = jnp.split(jax.jit(lambda *i: predictions(pipeline.unet, *i))(*many), 5)
    target = e0 + 0.7 * (ea - e0) - 1.5 * sum(e - e0 for e in ec) / 3

    def loss(params):
        now = nnx.merge(static.unet, params, frozen["unet"])
        return squares(now, (target, x, t, found[:, word]))[0]

    value, expected = transcribed(loss, params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    agree(gradient, expected)


def test_stereo_puts_found_words_in_the_concepts_place():
    rng = np.random.default_rng(8)
    plain, words = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3))
    places = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
    ours = np.asarray(stereo.with_words(*map(jnp.asarray, (plain, places, words))))
    expected = plain.copy()
    expected[0, 1:3] = expected[1, 3:5] = words
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.slow
def test_stereos_search_brings_its_loss_down(pipeline):
    """Learnt words denoise the concept's images better than where they started."""
    config = StereoConfig(**RUN, ddim_steps=2, inversion_steps=0)
    prompts = stacked_prompts(
        pipeline.tokenizer, ["three"], [], config, length=pipeline.max_length, seed=0
    )
    (own,) = stereo._of_each(prompts)
    images = drawn_images(pipeline, prompts.tokens, config, 0)[0]
    x, t, noise = noised(pipeline, images, jax.random.key(9), len(images))
    losses = []
    for steps in (0, 60):
        longer = dataclasses.replace(config, inversion_steps=steps)
        states = stereo.inverted(pipeline, pipeline.unet, own, images, longer, 0)
        losses.append(float(jnp.mean((pipeline.unet(x, t, states) - noise) ** 2)))
    assert losses[1] < losses[0]
