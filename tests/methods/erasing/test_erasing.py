"""SAGE's rivals: their equations transcribed, what they change, and the interface they share."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from erasing_toy import PHRASES, agree, moved, one, tiny_pipeline
from flax import nnx

from conceptax.converters import OutputError, save_changes, save_pytorch
from conceptax.methods.erasing import (
    METHODS,
    AdvUnlearnConfig,
    ConceptAblationConfig,
    EsdUConfig,
    EsdXConfig,
    MaceConfig,
    ReceConfig,
    RecelerConfig,
    SalUnConfig,
    SpeedConfig,
    SpmConfig,
    StereoConfig,
    UceConfig,
    WordConfig,
    advunlearn,
    closed_form,
    erase,
    esd,
    method_of,
    rece,
    sage,
    speed,
)
from conceptax.methods.erasing.common import draw_latents
from conceptax.methods.sampling import NoiseSchedule, denoise_until, make_sampler
from conceptax.methods.text.phrases import (
    ConceptError,
    Retained,
    encode_phrases,
    retained_phrases,
    stacked_prompts,
)
from conceptax.methods.training import leaf_paths, matches

RUN = {**PHRASES, "contexts": 0, "cycles": 2, "prompts": 2}
ESD = {**RUN, "ddim_steps": 4}
TINY = {
    "sage": sage.SageConfig(
        **PHRASES,
        contexts=0,
        frames=0,
        cycles=1,
        prompts=2,
        check_steps=1,
        global_rows=4,
        local_rows=2,
    ),
    "word": WordConfig(
        **PHRASES, contexts=0, frames=0, cycles=1, prompts=2, global_rows=4, local_rows=2
    ),
    "esd-x": EsdXConfig(**ESD),
    "esd-u": EsdUConfig(**ESD),
    "uce": UceConfig(**PHRASES, contexts=3),
    "rece": ReceConfig(**PHRASES, contexts=3, epochs=2),
    "speed": SpeedConfig(**PHRASES, contexts=3, threshold=0.5, augmentations=2),
    "concept-ablation": ConceptAblationConfig(**RUN, ddim_steps=2),
    "salun": SalUnConfig(
        **RUN, ddim_steps=2, frames=0, saliency_batches=1, retain_images=3, retain_rows=2
    ),
    "spm": SpmConfig(**RUN, ddim_steps=2, anchors=4, anchor_rows=2, frames=0),
    "mace": MaceConfig(**RUN, ddim_steps=2, frames=0, mask_threshold=0.3),
    "receler": RecelerConfig(**RUN, ddim_steps=2, rank=2, attack_steps=1),
    "stereo": StereoConfig(
        **RUN, ddim_steps=2, search_rounds=1, search_cycles=1, inversion_steps=2
    ),
    "advunlearn": AdvUnlearnConfig(
        **PHRASES,
        contexts=0,
        frames=1,
        cycles=2,
        warmup=1,
        prompts=2,
        attack_steps=2,
        attack_tokens=2,
        retain_rows=3,
        latents="edited",
        ddim_steps=3,
    ),
}

TWO = ["three", "a red seven"]  # equal shapes and settings share a compiled step


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def changed_paths(before, after):
    old, new = (nnx.to_pure_dict(nnx.state(model)) for model in (before, after))
    pairs = zip(leaf_paths(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return {path for path, a, b in pairs if (a != b).any()}


# ---- the interface ----


# What tests of their equations cover in smaller programs.
SLOW = (
    "advunlearn",
    "esd-x",
    "word",
    "concept-ablation",
    "salun",
    "spm",
    "mace",
    "receler",
    "stereo",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METHODS],
)
def test_every_method_edits_its_part_alone_for_several_concepts(pipeline, name):
    method, config = METHODS[name], TINY[name]
    assert method_of(config) is method
    options = {"progress": False} if method.trains else {}
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(getattr(pipeline, method.edits))))
    edited = erase(pipeline, TWO, config, seed=1, **options)
    other = "unet" if method.edits == "text_encoder" else "text_encoder"
    assert getattr(edited, other) is getattr(pipeline, other) and edited.vae is pipeline.vae
    changed = changed_paths(getattr(pipeline, method.edits), getattr(edited, method.edits))
    assert changed and not any("embedding" in path for path in changed)
    for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(getattr(edited, method.edits)))):
        assert np.isfinite(leaf).all()
    after = nnx.to_pure_dict(nnx.state(getattr(pipeline, method.edits)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)  # the pipeline itself stays as it is


@pytest.mark.parametrize("name", METHODS)
def test_every_method_explains_unusable_requests(pipeline, name):
    module = METHODS[name].erase
    for concepts, changes, message in (
        ([], {}, "no concept"),
        (["  "], {}, "concept is empty"),
        (["three"], {"templates": ("no place",)}, "exactly one"),
        (["three"], {"similarity_cap": -1.0}, "similarity_cap"),
    ):
        with pytest.raises(ConceptError, match=message):
            module(pipeline, concepts, dataclasses.replace(TINY[name], **changes))


def test_settings_are_checked_and_belong_to_a_method():
    for setting, make in (
        ("cycles", lambda: EsdXConfig(cycles=0)),
        ("latents", lambda: EsdUConfig(latents="ddim")),
        ("min_timestep", lambda: AdvUnlearnConfig(min_timestep=1.0)),
        ("attack_tokens", lambda: AdvUnlearnConfig(attack_tokens=0)),
        ("regularization", lambda: UceConfig(regularization=0.0)),
        ("similarity_cap", lambda: UceConfig(similarity_cap=2.0)),
        ("learning_rate", lambda: WordConfig(learning_rate=-1.0)),
    ):
        with pytest.raises((ValueError, TypeError), match=setting):  # or the type checker
            make()
    with pytest.raises(ValueError, match="received int"):
        method_of(3)


def test_word_erasure_is_sage_without_self_check(pipeline):
    assert not any(f.init for f in dataclasses.fields(WordConfig) if f.name.startswith("check"))
    word = WordConfig()
    assert word.check_steps == 0 and word.cycles == sage.SageConfig().cycles
    assert "check_steps" in dataclasses.asdict(word)
    with pytest.raises(TypeError, match="check_steps"):
        WordConfig(check_steps=3)


def test_word_erasure_trains_on_plain_prompts_alone(pipeline):
    """Its whole loss: L_erase over the prompts themselves, and what SAGE retains."""
    config = dataclasses.replace(TINY["word"], global_weight=0.0, local_weight=0.0)
    static, state, frozen = sage.prepare(pipeline, ["three"], config)
    key = jax.random.key(4)
    tokens, without, free = (frozen[name][0] for name in ("tokens", "without", "free"))

    def ours(params):
        which = jnp.array(0)
        attacked, _ = sage.self_check(
            static, params, frozen, which, tokens, without, free, jax.random.key(0)
        )
        return sage._erase_loss(static, frozen, which, tokens, without, attacked, key, params)[0]

    def transcription(params):
        t, t0 = nnx.merge(static.text, params, frozen["text"]), pipeline.text_encoder
        time_key, noise_key = jax.random.split(jax.random.split(key, 3)[0])
        times = jax.random.randint(time_key, (4,), 500, 1000)[:2]
        z = jax.random.normal(noise_key, (4, 4, 4, 4))[:2]

        def of_one_prompt(each):
            z, time, row, empty = each
            now, concept, anchor = (
                one(pipeline.unet, z, time, text(words[None])[0][0])
                for text, words in ((t, row), (t0, row), (t0, empty))
            )
            return jnp.mean((now - (anchor - config.eta * (concept - anchor))) ** 2)

        return jnp.mean(jax.lax.map(of_one_prompt, (z, times, tokens, without)))

    params = moved(state.params)
    with jax.default_matmul_precision("highest"):
        received, gradient = jax.jit(jax.value_and_grad(ours))(params)
        wanted, expected = jax.jit(jax.value_and_grad(transcription))(params)
    assert float(received) == pytest.approx(float(wanted), rel=1e-5)
    agree(gradient, expected)


# ---- retained phrases ----


def test_phrases_near_a_concept_are_named(pipeline):
    phrases = ["four", "three", "3", "red"]
    found = retained_phrases(pipeline, ["three", "red"], TINY["uce"], phrases)
    assert set(found.kept) == {"four", "3"}
    assert {(each.phrase, each.concept) for each in found.near} == {
        ("three", "three"),
        ("red", "red"),
    }
    assert all(each.similarity == pytest.approx(1, abs=1e-4) for each in found.near)
    strict = dataclasses.replace(TINY["uce"], similarity_cap=0.0)
    closer = retained_phrases(pipeline, ["three"], strict)
    cosines = [each.similarity for each in closer.near]
    assert cosines == sorted(cosines, reverse=True) and min(cosines) > 0
    assert retained_phrases(pipeline, ["three"], strict, closer) is closer
    assert closer.own and not found.own  # whose words they are
    assert not set(closer.kept) & {each.phrase for each in closer.near}


# ---- ESD ----


@pytest.fixture(scope="module", params=["esd-x", pytest.param("esd-u", marks=pytest.mark.slow)])
def esd_run(pipeline, request):
    config = TINY[request.param]
    run = esd.prepare(pipeline, ["three", "seven"], config)
    static = run[0]
    step = jax.jit(lambda state, frozen, key: esd.esd_step(static, state, frozen, None, key))
    return config, run, step


def test_esd_loss_and_gradient_follow_equation_7(pipeline, esd_run):
    _, (static, state, frozen), _ = esd_run
    rng = np.random.default_rng(0)
    z, c, c0 = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 4, 4, 4), (2, 24, 16), (2, 24, 16))
    )
    t, eta = jnp.array([700, 30]), 1.7

    def ours(params):
        now = nnx.merge(static.unet, params, frozen["unet"])
        return esd.esd_loss(now, pipeline.unet, z, t, c, c0, eta)

    def transcription(params):
        now = nnx.merge(static.unet, params, frozen["unet"])

        def of_one_prompt(each):
            z, t, c, c0 = each
            without = one(pipeline.unet, z, t, c0)
            goal = without - eta * (one(pipeline.unet, z, t, c) - without)
            return jnp.mean((one(now, z, t, c) - goal) ** 2)

        return jnp.mean(jax.lax.map(of_one_prompt, (z, t, c, c0)))

    params = moved(state.params)
    with jax.default_matmul_precision("highest"):
        received, gradient = jax.jit(jax.value_and_grad(ours))(params)
        wanted, expected = jax.jit(jax.value_and_grad(transcription))(params)
    assert float(received) == pytest.approx(float(wanted), rel=1e-5)
    agree(gradient, expected)


def test_esd_trains_its_layers_and_repeats_itself(pipeline, esd_run):
    config, (static, state, frozen), step = esd_run
    before = jax.tree.map(np.array, frozen)
    after, metrics = step(state, frozen, jax.random.key(0))
    again, _ = step(state, frozen, jax.random.key(0))
    other, _ = step(state, frozen, jax.random.key(1))
    assert int(after.step) == 1 and np.isfinite(float(metrics["loss"]))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    pairs = zip(jax.tree.leaves(after.params), jax.tree.leaves(other.params), strict=True)
    assert any((a != b).any() for a, b in pairs)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = changed_paths(pipeline.unet, nnx.merge(static.unet, after.params, frozen["unet"]))
    every = set(leaf_paths(pipeline.unet))
    cross = {path for path in every if ".attn2." in path}
    if isinstance(config, EsdUConfig):
        left = {path for path in every if matches("conv_out", path) or "time_embedding" in path}
        assert changed == every - cross - left - {p for p in every if "conv_norm_out" in p}
    else:
        assert changed == cross


def test_esd_brings_its_loss_down(pipeline):
    config = dataclasses.replace(
        TINY["esd-x"], latents="noise", learning_rate=1e-2, cycles=60, prompts=4
    )
    static, start, frozen = esd.prepare(pipeline, ["three"], config)
    step = jax.jit(lambda state, key: esd.esd_step(static, state, frozen, None, key))

    def loss(state):  # on the same prompts, latents and times
        return np.mean([step(state, jax.random.key(n))[1]["loss"] for n in range(12)])

    state = start
    for n in range(60):
        state, _ = step(state, jax.random.key(100 + n))
    assert loss(state) < 0.5 * loss(start)


# ---- latents ----


def test_latents_are_those_of_a_guided_run_of_the_edited_model(pipeline, esd_run):
    _, (static, state, frozen), _ = esd_run
    unet = nnx.merge(static.unet, moved(state.params), frozen["unet"])
    condition, empty = frozen["states"][0, :2], frozen["empty_states"]
    predict = jax.jit(unet.__call__)
    schedule = NoiseSchedule.from_config(pipeline.scheduler_config)
    sampler = make_sampler(schedule, "ddim", num_inference_steps=4)
    noise = jax.random.normal(jax.random.key(3), (2, 4, 4, 4))
    run = jax.jit(lambda x, n: denoise_until(unet, sampler, x, n, condition, empty, 3.0))
    x = noise
    for i in range(3):
        np.testing.assert_allclose(run(noise, i), x, atol=1e-4)
        time = int(sampler.timesteps[i])
        with_prompt = predict(x, time, condition)
        without = predict(x, time, jnp.stack([empty, empty]))
        x = sampler.advance(x, without + 3.0 * (with_prompt - without), i, None, sampler.memory(x))[
            0
        ]

    key = jax.random.key(0)
    draw = functools.partial(draw_latents, static, frozen, size=2, model=unet, condition=condition)
    latents, times = jax.jit(draw)(key)
    assert set(np.asarray(times)) <= set(sampler.timesteps) and len(set(np.asarray(times))) == 1
    first, _ = jax.random.split(key)
    count = list(sampler.timesteps).index(int(times[0]))
    start = jax.random.normal(first, (2, 4, 4, 4))
    expected = run(start, count)
    np.testing.assert_allclose(latents, expected, atol=1e-4)


# ---- UCE ----


def test_uce_solves_the_least_squares_problem():
    rng = np.random.default_rng(0)
    c, star, kept = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=(40, 8))
    weights = {"erase_weight": 2.0, "preserve_weight": 0.5, "regularization": 0.1}
    matrix = closed_form.edit_matrix(c, star, kept.T @ kept / 40, **weights)
    for out in (3, 8):  # projections of two sizes, one matrix
        old = rng.normal(size=(out, 8))
        # Every term of the objective as rows of one dense problem  min |A W'^T - B|^2.
        parts = [
            (np.sqrt(2.0 / 5) * c, np.sqrt(2.0 / 5) * star @ old.T),
            (np.sqrt(0.5 / 40) * kept, np.sqrt(0.5 / 40) * kept @ old.T),
            (np.sqrt(0.1) * np.eye(8), np.sqrt(0.1) * old.T),
        ]
        left, right = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        expected = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(old @ matrix, expected, atol=1e-10)


def test_uce_with_sums_is_the_papers_formula():
    rng = np.random.default_rng(1)
    c, star, kept = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.normal(size=(9, 6))
    old = rng.normal(size=(5, 6))
    numerator, denominator = 0.3 * old, 0.3 * np.eye(6)
    for ci, vi in zip(c, star @ old.T, strict=True):
        numerator, denominator = numerator + np.outer(vi, ci), denominator + np.outer(ci, ci)
    for cj in kept:
        numerator = numerator + old @ np.outer(cj, cj)
        denominator = denominator + np.outer(cj, cj)
    matrix = closed_form.edit_matrix(
        c, star, kept.T @ kept / 9, erase_weight=4.0, preserve_weight=9.0, regularization=0.3
    )
    np.testing.assert_allclose(old @ matrix, numerator @ np.linalg.inv(denominator), atol=1e-10)


def test_uce_pairs_states_from_the_concept_on(pipeline):
    length = pipeline.max_length
    settings = dataclasses.replace(TINY["uce"], contexts=0, templates=("a {} on grass", "{}"))

    def pairs(anchor):
        prompts = stacked_prompts(
            pipeline.tokenizer,
            ["red three"],
            [],
            dataclasses.replace(settings, anchor=anchor),
            length=length,
            seed=0,
        )
        text = pipeline.text_encoder
        states = [
            np.asarray(text(jnp.asarray(rows[0]))[0]) for rows in (prompts.tokens, prompts.without)
        ]
        return states, closed_form.paired_states(pipeline, prompts)

    # start a red three on grass end -> start a on grass end: from "three" and "a", both to the end
    (with_, without), (concept, anchor) = pairs("")
    assert len(concept) == (length - 3) + (length - 2)
    np.testing.assert_allclose(concept[: length - 3], with_[0, 3:], atol=1e-5)
    np.testing.assert_allclose(anchor[: length - 3], without[0, 1 : length - 2], atol=1e-5)
    np.testing.assert_allclose(anchor[length - 3], without[1, 0], atol=1e-5)
    # An anchor of three words: the last position of the concept's prompt has no partner.
    (with_, without), (concept, anchor) = pairs("one two four")
    np.testing.assert_allclose(concept[: length - 4], with_[0, 3:-1], atol=1e-5)
    np.testing.assert_allclose(anchor[: length - 4], without[0, 4:], atol=1e-5)


def test_uce_rewrites_the_projections_of_cross_attention(pipeline):
    strong = dataclasses.replace(TINY["uce"], preserve_weight=0.0, regularization=1e-6, contexts=0)
    edited = erase(pipeline, ["three"], strong)
    kinds = {path.split(".attn2.")[-1] for path in changed_paths(pipeline.unet, edited.unet)}
    assert kinds == {"to_k.kernel", "to_v.kernel"}
    # Without anything to preserve, the concept is projected as the anchor was.
    prompts = stacked_prompts(
        pipeline.tokenizer, ["three"], [], strong, length=pipeline.max_length, seed=0
    )
    concept, anchor = closed_form.paired_states(pipeline, prompts)
    attention = lambda p: p.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2  # noqa: E731
    old, new = (np.asarray(attention(p).to_v.kernel[...]) for p in (pipeline, edited))
    near = np.linalg.norm(concept @ new - anchor @ old)
    assert near < 0.5 * np.linalg.norm(concept @ old - anchor @ old)
    with pytest.raises(ValueError, match="reads no text states"):
        erase(pipeline, ["three"], dataclasses.replace(strong, edited=("conv_in",)))


# ---- RECE ----


def test_rece_finds_what_the_edited_projections_take_for_the_concept():
    """The derived state as a least squares problem over all projections, one state at a time."""
    rng = np.random.default_rng(2)
    old = [rng.normal(size=(out, 6)) for out in (4, 5, 9)]
    matrix, states = rng.normal(size=(6, 6)), rng.normal(size=(3, 6))
    gram = sum(weight.T @ weight for weight in old)
    found = rece.adversarial_states(states, matrix, gram, 0.3)
    left = np.concatenate([*(weight @ matrix for weight in old), np.sqrt(0.3) * np.eye(6)])
    for state, ours in zip(states, found, strict=True):
        right = np.concatenate([*(weight @ state for weight in old), np.zeros(6)])
        np.testing.assert_allclose(ours, np.linalg.lstsq(left, right, rcond=None)[0], atol=1e-9)


def test_rece_goes_on_from_uce_and_erases_what_it_finds(pipeline):
    """Two epochs of the paper, projection by projection, by sums over all of its layers."""
    uce = dataclasses.replace(
        TINY["rece"], contexts=0, frames=0, epochs=0, search_regularization=0.1
    )
    retain = Retained(("four", "red", "brick"))
    first = erase(pipeline, ["three"], uce, retain=retain)
    plain = UceConfig(**PHRASES, contexts=0, frames=0)
    kernels = [
        [
            np.float64(leaf)
            for path, leaf in zip(
                leaf_paths(each.unet),
                jax.tree.leaves(nnx.to_pure_dict(nnx.state(each.unet))),
                strict=True,
            )
            if ".attn2.to_k" in path or ".attn2.to_v" in path
        ]
        for each in (pipeline, first, erase(pipeline, ["three"], plain, retain=retain))
    ]
    for one_, other in zip(*kernels[1:], strict=True):
        np.testing.assert_array_equal(one_, other)
    old, new = ([kernel.T for kernel in each] for each in kernels[:2])
    prompts = stacked_prompts(
        pipeline.tokenizer, ["three"], [], uce, length=pipeline.max_length, seed=0
    )
    concept, anchor = (np.float64(each) for each in closed_form.paired_states(pipeline, prompts))
    rows = encode_phrases(pipeline.tokenizer, retain.kept, pipeline.max_length)
    kept = closed_form.second_moment(pipeline, rows)
    unit = np.trace(kept) / 16
    lamb = 0.1 * np.trace(sum(weight.T @ weight for weight in old)) / 16
    for _ in range(2):
        left = lamb * np.eye(16) + sum(now.T @ now for now in new)
        right = sum(now.T @ was for now, was in zip(new, old, strict=True))
        found = concept @ (np.linalg.inv(left) @ right).T
        after = found.T @ found / len(found) + kept + 0.01 * unit * np.eye(16)
        new = [
            (now @ anchor.T @ found / len(found) + now @ kept + 0.01 * unit * now)
            @ np.linalg.inv(after)
            for now in new
        ]
    edited = erase(pipeline, ["three"], dataclasses.replace(uce, epochs=2), retain=retain)
    attention = edited.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    np.testing.assert_allclose(attention.to_k.kernel[...], new[0].T, atol=1e-4)


# ---- SPEED ----


def test_speed_solves_its_constrained_problem():
    """Equation 10 by its Karush-Kuhn-Tucker system, over the entries of D in the null space."""
    rng = np.random.default_rng(3)
    size, out = 7, 4
    concept, anchor = rng.normal(size=(2, size)), rng.normal(size=(2, size))
    invariant, weight = rng.normal(size=(2, size)), rng.normal(size=(out, size))
    basis = np.linalg.qr(rng.normal(size=(size, 5)))[0]  # of the null space
    ours = weight @ speed.constrained_update(concept, anchor, invariant, basis @ basis.T, 0.7)
    # D P = Z basis^T with free Z: |Z a - W(c* - c)|^2 / N + l |Z|^2 with Z b = 0, row by row.
    inside, fixed = concept @ basis, invariant @ basis
    goal = (anchor - concept) @ weight.T
    normal = inside.T @ inside / 2 + 0.7 * np.eye(5)
    system = np.block([[normal, fixed.T], [fixed, np.zeros((2, 2))]])
    right = np.concatenate([inside.T @ goal / 2, np.zeros((2, out))])
    expected = (basis @ np.linalg.solve(system, right)[:5]).T
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    np.testing.assert_allclose(ours @ invariant.T, 0, atol=1e-9)
    outside = np.eye(size) - basis @ basis.T
    np.testing.assert_allclose(ours @ outside, 0, atol=1e-9)


def test_speed_refines_what_is_retained():
    rng = np.random.default_rng(4)
    weight, states = rng.normal(size=(5, 4)), rng.normal(size=(30, 4))
    concept, anchor = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    alone = np.linalg.lstsq(  # erasing alone, of means, with l = 0.5
        np.concatenate([concept / np.sqrt(3), np.sqrt(0.5) * np.eye(4)]),
        np.concatenate([(anchor - concept) @ weight.T / np.sqrt(3), np.zeros((4, 5))]),
        rcond=None,
    )[0].T
    shifts = np.linalg.norm(states @ alone.T, axis=1)
    given = weight, states, concept, anchor, 0.5
    np.testing.assert_allclose(speed.prior_shift(*given), shifts, atol=1e-9)
    sizes = {"directions": 1, "rng": rng}
    kept = speed.refined(*given, augmentations=0, **sizes)
    np.testing.assert_array_equal(kept, states[shifts > shifts.mean()])
    more = speed.refined(*given, augmentations=6, **sizes)
    np.testing.assert_array_equal(more[: len(kept)], kept)
    copies = more[len(kept) :]
    assert 0 < len(copies) < 6 * len(kept)
    direction = np.linalg.eigh(weight.T @ weight)[1][:, 0]  # that W changes least
    away = (copies[:, None] - kept) @ (np.eye(4) - np.outer(direction, direction))
    assert np.linalg.norm(away, axis=-1).min(axis=1).max() < 1e-9
    values, vectors = np.linalg.eigh(states.T @ states / 30)
    projection = speed.null_space(states.T @ states / 30, float(values[1:3].mean()))
    np.testing.assert_allclose(projection, vectors[:, :2] @ vectors[:, :2].T, atol=1e-9)


def test_speed_leaves_the_empty_prompt_as_it_is(pipeline):
    edited = erase(pipeline, ["three"], dataclasses.replace(TINY["speed"], threshold=10.0))
    changed = changed_paths(pipeline.unet, edited.unet)
    assert changed and all(path.endswith("attn2.to_v.kernel") for path in changed)
    empty = encode_phrases(pipeline.tokenizer, [""], pipeline.max_length)
    start, *others = np.asarray(pipeline.text_encoder(jnp.asarray(empty)).last_hidden_state[0])
    leading = np.linalg.eigh(np.transpose(others) @ np.stack(others))[1][:, -3:].T
    old, new = (
        np.asarray(p.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.kernel[...])
        for p in (pipeline, edited)
    )
    assert np.abs(new - old).max() > 1e-3
    np.testing.assert_allclose(np.stack([start, *leading]) @ (new - old), 0, atol=1e-4)


# ---- AdvUnlearn ----


@pytest.fixture(scope="module")
def adversarial(pipeline):
    config = dataclasses.replace(TINY["advunlearn"], latents="noise", retain_weight=0.7)
    return advunlearn.prepare(pipeline, ["three"], config)


def test_the_upper_level_follows_the_equations(pipeline, adversarial):
    static, state, frozen = adversarial
    config, key = static.config, jax.random.key(5)
    tokens, without = (frozen[name][0] for name in ("tokens", "without"))
    table = pipeline.text_encoder.embeddings.token_embedding
    attacked = table(tokens) + 0.01

    def transcription(params):
        t, t0 = nnx.merge(static.text, params, frozen["text"]), pipeline.text_encoder
        rows_key, latent_key = jax.random.split(key)
        words = frozen["retained_tokens"]
        rows = words[jax.random.choice(rows_key, len(words), (3,))]
        time_key, noise_key = jax.random.split(latent_key)
        times = jax.random.randint(time_key, (5,), 500, 1000)
        z = jax.random.normal(noise_key, (5, 4, 4, 4))

        def erased(each):
            z, time, prompt, empty, embeddings = each
            anchor = one(pipeline.unet, z, time, t0(empty[None])[0][0])
            concept = one(pipeline.unet, z, time, t0(prompt[None])[0][0])
            hidden = t(inputs_embeds=embeddings[None], eos_positions=jnp.array([3]))[0][0]
            goal = anchor - config.eta * (concept - anchor)
            return jnp.mean((one(pipeline.unet, z, time, hidden) - goal) ** 2)

        def kept(each):
            z, time, row = each
            now, before = (one(pipeline.unet, z, time, text(row[None])[0][0]) for text in (t, t0))
            return jnp.mean((now - before) ** 2)

        esd = jax.lax.map(erased, (z[:2], times[:2], tokens, without, attacked))
        return jnp.mean(esd) + 0.7 * jnp.mean(jax.lax.map(kept, (z[2:], times[2:], rows)))

    def ours(params):
        return advunlearn._loss(static, frozen, tokens, without, attacked, key, params)[0]

    params = moved(state.params)
    with jax.default_matmul_precision("highest"):
        received, gradient = jax.jit(jax.value_and_grad(ours))(params)
        wanted, expected = jax.jit(jax.value_and_grad(transcription))(params)
    assert float(received) == pytest.approx(float(wanted), rel=1e-5)
    agree(gradient, expected)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sign", marks=pytest.mark.slow)])
def test_the_lower_level_follows_its_equation(pipeline, adversarial, optimizer):
    """Two steps of the attack, transcribed with the models called one prompt at a time."""
    static, state, frozen = adversarial
    config = dataclasses.replace(static.config, attack_optimizer=optimizer, attack_rate=0.1)
    static = dataclasses.replace(static, config=config)
    params, key, tokens = moved(state.params, 0.1), jax.random.key(2), frozen["tokens"][0]
    t, t0 = nnx.merge(static.text, params, frozen["text"]), pipeline.text_encoder
    table = t0.embeddings.token_embedding
    unit = float(jnp.sqrt(jnp.mean(table.embedding[...] ** 2)))
    start_key, steps_key = jax.random.split(key)
    prefix = table(jax.random.randint(start_key, (2, 2), 0, table.num_embeddings))
    plain = table(tokens)

    def prompt(prefix):  # start, prefix, the rest without its last two
        return jnp.concatenate([plain[:, :1], prefix, plain[:, 1:-2]], axis=1)

    def distance(prefix, key):
        time_key, noise_key = jax.random.split(key)
        times = jax.random.randint(time_key, (2,), 500, 1000)
        z = jax.random.normal(noise_key, (2, 4, 4, 4))

        def of_one_prompt(each):
            z, time, embeddings, row = each
            hidden = t(inputs_embeds=embeddings[None], eos_positions=jnp.array([5]))[0][0]
            wanted = one(pipeline.unet, z, time, t0(row[None])[0][0])
            return jnp.mean((one(pipeline.unet, z, time, hidden) - wanted) ** 2)

        return jnp.mean(jax.lax.map(of_one_prompt, (z, times, prompt(prefix), tokens)))

    with jax.default_matmul_precision("highest"):
        attacked, last = jax.jit(
            lambda params: advunlearn.attack(static, params, frozen, tokens, key)
        )(params)
        first = second = 0.0
        slope = jax.jit(jax.value_and_grad(distance))
        for n, step in enumerate(jax.random.split(steps_key, 2), 1):
            loss, gradient = slope(prefix, step)
            if optimizer == "sign":
                update = jnp.sign(gradient)
            else:  # Adam (Kingma & Ba 2015), algorithm 1
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                root = jnp.sqrt(second / (1 - 0.999**n))
                update = first / (1 - 0.9**n) / (root + 1e-8)
            prefix = prefix - 0.1 * unit * update
    assert float(last) == pytest.approx(float(loss), rel=1e-4)
    np.testing.assert_allclose(attacked, prompt(prefix), atol=2e-3 * unit)


@pytest.mark.slow
def test_a_longer_attack_brings_the_concept_nearer(pipeline, adversarial):
    static, state, frozen = adversarial
    tokens = frozen["tokens"][0]
    params, t0 = moved(state.params, 0.1), pipeline.text_encoder
    t = nnx.merge(static.text, params, frozen["text"])
    z = jax.random.normal(jax.random.key(9), (2, 4, 4, 4))
    wanted = pipeline.unet(z, 800, t0(tokens)[0])

    def distance(embeddings):
        hidden = t(inputs_embeds=embeddings, eos_positions=jnp.array([5, 5]))[0]
        return float(jnp.mean((pipeline.unet(z, 800, hidden) - wanted) ** 2))

    config = dataclasses.replace(static.config, attack_steps=40, attack_rate=0.3)
    static, key = dataclasses.replace(static, config=config), jax.random.key(0)
    attacked, _ = jax.jit(lambda p: advunlearn.attack(static, p, frozen, tokens, key))(params)
    table = t0.embeddings.token_embedding
    words = jax.random.randint(jax.random.split(key)[0], (2, 2), 0, table.num_embeddings)
    start = advunlearn.with_prefix(table(tokens), table(words))
    assert distance(attacked) < 0.9 * distance(start)


def test_the_warm_up_erases_plain_prompts(pipeline, tmp_path):
    log = tmp_path / "log.jsonl"
    config = TINY["advunlearn"]
    erase(pipeline, TWO, config, progress=False, metrics_path=log, log_every=1)
    first, second = map(json.loads, log.read_text().splitlines())
    assert config.warmup == 1 and first["attack"] == 0 and second["attack"] > 0


def test_the_attack_needs_room(pipeline):
    config = dataclasses.replace(TINY["advunlearn"], attack_tokens=22)
    with pytest.raises(ConceptError, match="leave no room"):
        advunlearn.prepare(pipeline, ["three"], config)
    config = dataclasses.replace(TINY["advunlearn"], attack_tokens=20)
    with pytest.raises(ConceptError, match="takes 5 tokens"):
        advunlearn.prepare(pipeline, ["a red three"], config)


# ---- exports ----


@pytest.fixture(scope="module")
def uce_edited(pipeline):
    return erase(pipeline, ["three"], TINY["uce"], retain=Retained(("four", "red")))


def test_changed_tensors_fit_the_unet_of_diffusers(torch, pipeline, uce_edited, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import load_file

    file = tmp_path / "unet_changes.safetensors"
    keys = save_changes(uce_edited.unet, pipeline.unet, file)
    assert keys and all(key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for key in keys)
    save_pytorch(pipeline.unet, tmp_path / "original")
    save_pytorch(uce_edited.unet, tmp_path / "edited")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "original")
    whole = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "edited").state_dict()
    result = unet.load_state_dict(load_file(file), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == set(whole) - set(keys)
    assert all(torch.equal(value, whole[key]) for key, value in unet.state_dict().items())


def test_changes_name_the_text_encoder_as_transformers_does(pipeline, tmp_path):
    edited = erase(pipeline, TWO, TINY["word"], progress=False)
    keys = save_changes(edited.text_encoder, pipeline.text_encoder, tmp_path / "x.safetensors")
    assert all(key.startswith("text_model.") for key in keys)
    assert safetensors.numpy.load_file(tmp_path / "x.safetensors").keys() == set(keys)
    with pytest.raises(OutputError, match="no change"):
        save_changes(pipeline.unet, edited.unet, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="one architecture"):
        save_changes(pipeline.unet, pipeline.vae, tmp_path / "y.safetensors")
