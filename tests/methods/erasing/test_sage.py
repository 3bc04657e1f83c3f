"""SAGE: its losses against transcriptions of the equations, its step, and its meshes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from erasing_toy import tiny_pipeline
from flax import nnx

from conceptax import bundled_model
from conceptax.converters import load_pytorch
from conceptax.flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from conceptax.methods.diffusion import objectives
from conceptax.methods.erasing import sage
from conceptax.methods.erasing.sage import SageConfig
from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.text.phrases import ConceptError, concept_prompts, vocabulary_words
from conceptax.methods.training import leaf_paths, make_mesh, step_key, train

TINY = SageConfig(
    cycles=80,
    prompts=2,
    check_steps=3,
    check_rate=0.1,
    vocabulary=40,
    similarity_cap=1.0,
    global_rows=5,
    local_rows=2,
    learning_rate=1e-3,
    templates=("a {}", "a photo of a {}"),
    contexts=0,
    frames=1,
)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def prepared(pipeline):
    return sage.prepare(pipeline, ["three"], TINY)


@pytest.fixture(scope="module")
def cycle(prepared):
    static, _, _ = prepared
    return jax.jit(lambda state, frozen, key: sage.erase_step(static, state, frozen, None, key))


# ---- losses ----


def _cos(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("form", ["anchor", "recall"])
def test_self_check_objective(form):
    rng = np.random.default_rng(0)
    original, current = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    concept, anchor = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    received = sage.self_check_objective(original, current, concept, anchor, form=form, weight=0.7)
    for i in range(3):
        second = _cos(current[i], anchor) if form == "anchor" else 1 - _cos(current[i], concept)
        assert received[i] == pytest.approx(-_cos(original[i], concept) + 0.7 * second, abs=1e-5)


def test_guided_check_objective():
    rng = np.random.default_rng(0)
    original, concept = jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    now, wanted, unwanted = jnp.asarray(rng.normal(size=(3, 3, 2, 2, 4)), jnp.float32)
    received = sage.guided_check_objective(original, concept, now, wanted, unwanted, weight=0.7)
    for i in range(3):
        relative = np.sum((now[i] - wanted[i]) ** 2) / np.sum((unwanted[i] - wanted[i]) ** 2)
        right = -_cos(original[i], concept[i]) + 0.7 * relative
        assert float(received[i]) == pytest.approx(float(right), rel=1e-4)


@pytest.mark.parametrize("form", ["cross", "self"])
def test_global_retention_loss(form):
    rng = np.random.default_rng(1)
    now, before = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
    every = before if form == "self" else jnp.asarray(rng.normal(size=(7, 6)), jnp.float32)
    related = now if form == "self" else every
    wanted = np.mean(
        [
            [(_cos(now[i], related[j]) - _cos(before[i], every[j])) ** 2 for j in range(len(every))]
            for i in range(4)
        ]
    )
    received = sage.global_retention_loss(now, before, every, now if form == "self" else None)
    assert float(received) == pytest.approx(wanted, rel=1e-4)
    assert float(sage.global_retention_loss(before, before, every)) == pytest.approx(0, abs=1e-12)


def test_erase_target_pushes_away_and_carries_no_gradient():
    anchor, concept = jnp.ones((2, 3)), jnp.full((2, 3), 3.0)
    np.testing.assert_allclose(objectives.erase_target(anchor, concept, 0.0), anchor)
    np.testing.assert_allclose(objectives.erase_target(anchor, concept, 1.5), -2.0)
    gradient = jax.grad(lambda target: objectives.prediction_loss(anchor, target))(concept)
    assert not gradient.any()


def test_total_loss_and_gradient_follow_the_equations(pipeline, prepared):
    """The batched loss against a transcription that calls the models one prompt at a time."""
    static, state, frozen = prepared
    key = jax.random.key(5)
    tokens, without = (jnp.asarray(frozen[name][0]) for name in ("tokens", "without"))
    ends_of_text = np.argmax(tokens, axis=1)
    attacked = 0.1 + jnp.asarray(
        pipeline.text_encoder.embeddings.token_embedding(tokens), jnp.float32
    )

    # Each model is compiled once, for one prompt; the sums around them are not.
    unet = jax.jit(lambda *inputs: pipeline.unet(*inputs)[0])
    t0 = jax.jit(lambda row: pipeline.text_encoder(row))
    trained = jax.jit(
        lambda params, *row, **embedded: nnx.merge(static.text, params, frozen["text"])(
            *row, **embedded
        )
    )

    def transcription(params):
        config, t = static.config, functools.partial(trained, params)
        latent_key, local_key, global_key = jax.random.split(key, 3)
        words = frozen["retained_tokens"]
        local = words[jax.random.choice(local_key, len(words), (config.local_rows,))]
        some = jax.random.choice(global_key, len(words), (config.global_rows,))
        time_key, noise_key = jax.random.split(latent_key)
        times = jax.random.randint(time_key, (4,), 500, 1000)
        z = jax.random.normal(noise_key, (4, 4, 4, 4))

        def e(i, hidden):
            return unet(z[i : i + 1], times[i], hidden)

        erase, kept = [], []
        for i in range(2):
            anchor = e(i, t0(without[i : i + 1])[0])
            y = anchor - config.eta * (e(i, t0(tokens[i : i + 1])[0]) - anchor)
            ends = jnp.array([ends_of_text[i]])
            for hidden in (
                t(tokens[i : i + 1])[0],
                t(inputs_embeds=attacked[i : i + 1], eos_positions=ends)[0],
            ):
                erase.append(jnp.mean((e(i, hidden) - jax.lax.stop_gradient(y)) ** 2))
        for i in range(2):
            row = local[i : i + 1]
            kept.append(jnp.mean((e(2 + i, t(row)[0]) - e(2 + i, t0(row)[0])) ** 2))
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        u0 = unit(t0(words)[1])
        u = unit(t(words[some])[1])
        global_ = jnp.mean((u @ u0.T - u0[some] @ u0.T) ** 2)
        return sum(erase) / 4 + config.global_weight * global_ + config.local_weight * sum(kept) / 2

    loss = lambda params: sage._erase_loss(  # noqa: E731
        static, frozen, jnp.array(0), tokens, without, attacked, key, params
    )[0]
    # Away from T = T0, where the retention terms have no gradient.
    params = jax.tree.map(
        lambda p: p + 0.02 * jnp.sin(jnp.arange(p.size).reshape(p.shape)), state.params
    )
    with jax.default_matmul_precision("highest"):
        received, gradient = jax.jit(jax.value_and_grad(loss))(params)
        wanted, expected = jax.value_and_grad(transcription)(params)
    assert float(received) == pytest.approx(float(wanted), rel=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)


# ---- self-check ----


def _prompts(frozen):
    """Tokens, the same without the concept, and what may move, of the first concept."""
    return tuple(jnp.asarray(frozen[name][0]) for name in ("tokens", "without", "free"))


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_self_check_moves_free_words_only_and_finds_worse_prompts(prepared, optimizer):
    static, state, frozen = prepared
    config = dataclasses.replace(
        TINY, check_steps=15, check_rate=0.03, check_radius=0.25, check_optimizer=optimizer
    )
    static = dataclasses.replace(static, config=config)
    tokens, without, free = _prompts(frozen)
    # A T that differs from T0, or nothing is left to find.
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), state.params
    )
    concept = frozen["concept_pooled"][0]
    run = jax.jit(
        lambda params: sage.self_check(
            static, params, frozen, 0, tokens, without, free, jax.random.key(0)
        )
    )
    attacked, metrics = run(params)
    before = nnx.merge(static.text, frozen["original"])
    now = nnx.merge(static.text, params, frozen["text"])
    start = before.embeddings.token_embedding(tokens)
    moved = np.abs(attacked - start).max(axis=-1)
    assert (moved[~np.asarray(free)] == 0).all()
    unit = float(frozen["embedding_rms"])
    assert (moved[np.asarray(free)] > 0.01 * unit).all()
    assert moved.max() <= 0.25 * unit + 1e-6

    def objective(embeddings):
        ends = jnp.argmax(tokens, axis=-1)
        pooled = [m(inputs_embeds=embeddings, eos_positions=ends).pooled for m in (before, now)]
        return sage.self_check_objective(
            *pooled, concept, frozen["anchor_pooled"], form="recall", weight=1.0
        )

    assert (objective(attacked) < objective(start)).all()
    assert set(metrics) == {"check_original", "check_current"}
    leak = jax.grad(lambda p: run(p)[0].sum())(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(leak))


def test_no_self_check_is_word_erasure(prepared):
    static, state, frozen = prepared
    static = dataclasses.replace(static, config=dataclasses.replace(TINY, check_steps=0))
    tokens, without, free = _prompts(frozen)
    attacked, _ = sage.self_check(
        static, state.params, frozen, 0, tokens, without, free, jax.random.key(0)
    )
    encoder = nnx.merge(static.text, frozen["original"])
    np.testing.assert_array_equal(attacked, encoder.embeddings.token_embedding(tokens))


def test_outside_in_starts_at_noise_where_the_attack_may_move(prepared):
    static, state, frozen = prepared
    config = dataclasses.replace(TINY, check_steps=0, check_start="random")
    static = dataclasses.replace(static, config=config)
    tokens, without, free = _prompts(frozen)
    attacked, again = (
        sage.self_check(
            static, state.params, frozen, 0, tokens, without, free, jax.random.key(seed)
        )[0]
        for seed in (0, 1)
    )
    embedded = nnx.merge(static.text, frozen["original"]).embeddings.token_embedding(tokens)
    np.testing.assert_array_equal(attacked[~free], embedded[~free])
    unit = float(frozen["embedding_rms"])
    assert np.sqrt(np.mean(np.square(attacked[free]))) == pytest.approx(unit, rel=0.1)
    assert (np.abs(attacked - again)[free].max(axis=-1) > unit).all()


def test_a_check_over_all_states_compares_each_prompt_with_itself(pipeline):
    """Where T is T0, every prompt's states are those wanted: the cosines are 1 before a step."""
    config = dataclasses.replace(TINY, check_steps=0, check_states="tokens", global_states="tokens")
    static, state, frozen = sage.prepare(pipeline, ["three"], config)
    tokens, without, free = _prompts(frozen)
    _, metrics = sage.self_check(
        static, state.params, frozen, 0, tokens, without, free, jax.random.key(0)
    )
    for name in ("check_original", "check_current"):
        assert float(metrics[name]) == pytest.approx(1.0, abs=1e-5)
    encoder = pipeline.text_encoder
    rows = np.asarray(encoder(frozen["retained_tokens"]).last_hidden_state)
    np.testing.assert_allclose(
        frozen["retained_states"], rows.reshape(len(rows), -1), rtol=1e-4, atol=1e-5
    )
    after, metrics = jax.jit(
        lambda state: sage.erase_step(static, state, frozen, None, jax.random.key(0))
    )(state)
    assert int(after.step) == 1 and np.isfinite(float(metrics["global_"]))


def test_a_guided_check_finds_prompts_that_the_unet_still_takes_for_the_concept(prepared):
    static, state, frozen = prepared
    tokens, without, free = _prompts(frozen)
    params = jax.tree.map(
        lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size).reshape(p.shape)), state.params
    )
    now = nnx.merge(static.text, params, frozen["text"])
    before = nnx.merge(static.text, frozen["original"])
    unet = nnx.merge(static.unet, frozen["unet"])
    ends = jnp.argmax(tokens, axis=-1)

    def distance(embeddings):
        """Between what the UNet predicts for the attack and for the plain prompts."""
        z = jax.random.normal(jax.random.key(9), (16, 4, 4, 4))
        times = jnp.linspace(500, 999, 16).astype(int)
        attacked = now(inputs_embeds=embeddings, eos_positions=ends).last_hidden_state
        wanted = before(tokens).last_hidden_state
        return sum(
            jnp.mean(
                (
                    unet(z, times, jnp.broadcast_to(a, (16, *a.shape)))
                    - unet(z, times, jnp.broadcast_to(b, (16, *b.shape)))
                )
                ** 2
            )
            for a, b in zip(attacked, wanted, strict=True)
        )

    found = {}
    for steps in (0, 12):
        config = dataclasses.replace(TINY, check="guided", check_steps=steps, check_weight=100.0)
        guided = dataclasses.replace(static, config=config)
        found[steps], _ = jax.jit(
            lambda params, guided=guided: sage.self_check(
                guided, params, frozen, 0, tokens, without, free, jax.random.key(0)
            )
        )(params)
    assert float(distance(found[12])) < 0.95 * float(distance(found[0]))


# ---- the cycle ----


def test_a_cycle_changes_exactly_the_trainable_parameters(pipeline, prepared, cycle):
    static, state, frozen = prepared
    before = jax.tree.map(np.array, (frozen, state.params))
    after, metrics = cycle(state, frozen, jax.random.key(0))
    assert int(after.step) == 1
    assert all(np.isfinite(float(value)) for value in metrics.values())
    for old, new in zip(jax.tree.leaves(before[1]), jax.tree.leaves(after.params), strict=True):
        assert (old != new).any()
    for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    edited = sage.edited_text_encoder(static, after, frozen)
    original = nnx.to_pure_dict(nnx.state(pipeline.text_encoder))
    changed = {
        path
        for path, old, new in zip(
            leaf_paths(original),
            jax.tree.leaves(original),
            jax.tree.leaves(nnx.to_pure_dict(nnx.state(edited))),
            strict=True,
        )
        if (old != new).any()
    }
    assert changed == {p for p in leaf_paths(original) if not p.startswith("embeddings")}


def test_same_key_same_cycle(prepared, cycle):
    _, state, frozen = prepared
    first, second, other = (cycle(state, frozen, jax.random.key(k))[0] for k in (3, 3, 4))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    leaves = zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True)
    assert any((a != b).any() for a, b in leaves)


def test_erasing_brings_the_erase_loss_down(prepared, cycle):
    _, start, frozen = prepared

    def erase_loss(state):  # on the same prompts, latents and times
        return np.mean([cycle(state, frozen, jax.random.key(n))[1]["erase"] for n in range(16)])

    state = start
    for n in range(TINY.cycles):
        state, _ = cycle(state, frozen, step_key(jax.random.key(1), n))
    assert erase_loss(state) < 0.8 * erase_loss(start)


@pytest.mark.parametrize(
    "changes",
    [
        {"latents": "ddim", "ddim_steps": 2, "ddim_samples": 2},
        pytest.param(
            {"erase_updates": 2, "check": "anchor", "global_form": "self", "free_concept": False},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_options_run(pipeline, changes):
    config = dataclasses.replace(TINY, cycles=1, **changes)
    edited = sage.erase(pipeline, ["three", "a red seven"], config, progress=False)
    assert edited.unet is pipeline.unet
    old, new = (nnx.to_pure_dict(nnx.state(p.text_encoder)) for p in (pipeline, edited))
    assert (old["final_layer_norm"]["scale"] != new["final_layer_norm"]["scale"]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


# ---- preparation ----


def test_prompts_mark_the_concept_in_each_template():
    tokenizer = build_tokenizer()
    prompts = concept_prompts(tokenizer, " red  three ", 24, ("a {}", "the {} on grass"))
    text = [tokenizer.convert_ids_to_tokens(row) for row in prompts.tokens]
    for row, free, place in zip(text, prompts.free, prompts.concept, strict=True):
        assert [t for t, c in zip(row, place, strict=True) if c] == ["red</w>", "three</w>"]
        assert not (free & place).any()
    words = [t for t, f in zip(text[1], prompts.free[1], strict=True) if f]
    assert words == ["the</w>", "on</w>", "grass</w>"]


@pytest.mark.parametrize(
    ("concepts", "changes", "retain", "message"),
    [
        ([], {}, None, "no concept"),
        (["  "], {}, None, "concept is empty"),
        (["three " * 40], {}, None, "takes 42 tokens"),
        (["three"], {"templates": ("no place",)}, None, "exactly one"),
        (["three"], {"similarity_cap": -1.0}, None, "similarity_cap"),
        (["three"], {}, [], "nothing to retain"),
        (["three"], {"trainable": ("encodre",)}, None, "encodre"),
    ],
)
def test_unusable_requests_are_explained(pipeline, concepts, changes, retain, message):
    with pytest.raises(ValueError, match=message):
        sage.prepare(pipeline, concepts, dataclasses.replace(TINY, **changes), retain=retain)


def test_retained_words_exclude_the_concept(pipeline):
    words = vocabulary_words(pipeline.tokenizer, 1000)
    assert {"red", "seven", "grass", "7"} <= set(words)
    _, _, frozen = sage.prepare(pipeline, ["three"], TINY, retain=["three", "four"])
    assert len(frozen["retained_tokens"]) == 2  # "four", bare and in a template
    with pytest.raises(ConceptError, match="closer"):
        sage.prepare(pipeline, ["three"], TINY, retain=["three"])


@pytest.mark.parametrize(
    "setting", [{"cycles": 0}, {"min_timestep": 1.0}, {"check": "?"}, {"check_radius": 0.0}]
)
def test_settings_are_checked(setting):
    with pytest.raises((ValueError, TypeError), match=next(iter(setting))):  # or the type checker
        SageConfig(**setting)


# ---- meshes ----


def losses(pipeline, config, path, mesh):
    static, state, frozen = sage.prepare(pipeline, ["three"], config)
    path.unlink(missing_ok=True)
    train(
        sage.erase_step,
        static,
        state,
        frozen,
        key=jax.random.key(0),
        num_steps=3,
        mesh=mesh,
        metrics_path=path,
        progress=False,
    )
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


# Nearly all of it is compilation; the mesh that splits both ways stands for the others.
@pytest.mark.slow
def test_a_mesh_gives_the_single_device_losses(pipeline, tmp_path):
    config = dataclasses.replace(TINY, prompts=8, local_rows=8, global_rows=8)
    path = tmp_path / "metrics.jsonl"
    single = losses(pipeline, config, path, None)
    assert len(single) == 3
    spread = losses(pipeline, config, path, make_mesh(data=4, fsdp=2))
    np.testing.assert_allclose(spread, single, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 2)], ids=str)
def test_meshes_give_the_single_device_losses_on_glyphs(tmp_path, shape):
    pipeline = load_pytorch(bundled_model(), param_dtype=jnp.float32)
    config = SageConfig(cycles=3, prompts=8, local_rows=8, check_steps=4)
    path = tmp_path / "metrics.jsonl"
    single = losses(pipeline, config, path, None)
    mesh = make_mesh(data=shape[0], fsdp=shape[1])
    # of about 0.2 to 1.2
    np.testing.assert_allclose(losses(pipeline, config, path, mesh), single, rtol=1e-5, atol=1e-5)
