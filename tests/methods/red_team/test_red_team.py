"""Attacks on erased models: their equations transcribed, what they may touch, and resuming."""

import dataclasses
import functools
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from erasing_toy import tiny_pipeline
from flax import nnx

from conceptax.converters import load_pytorch, save_pytorch
from conceptax.flax_models.pipelines.new_tokens import add_tokens
from conceptax.methods.red_team import (
    ATTACKS,
    ConceptInversionConfig,
    RelapseConfig,
    TokenSearchConfig,
    attack,
    attack_of,
    concept_inversion,
    relapse,
    token_search,
)
from conceptax.methods.red_team.common import Target, ordinary_tokens, restart_keys
from conceptax.methods.sampling import NoiseSchedule, alphas_cumprod, encode_images
from conceptax.methods.text.phrases import ConceptError, encode_phrases, with_prefix
from conceptax.methods.training import compile_step, leaf_paths, step_key

BATCH = {"batch_size": 2, "min_timestep": 0.2, "max_timestep": 0.9}
TINY = {
    "concept-inversion": ConceptInversionConfig(
        **BATCH,
        steps=4,
        snapshots=(0, 2),
        restarts=3,
        learning_rate=0.5,
        norm_cap=1.2,
        templates=("a {}", "a photo of {}"),
    ),
    "token-search": TokenSearchConfig(
        **BATCH,
        steps=4,
        snapshots=(2,),
        restarts=2,
        tokens=2,
        candidates=5,
        top=8,
        target="noise",
        forbidden=("trio",),
    ),
    "relapse": RelapseConfig(**BATCH, steps=4, snapshots=(0, 2), learning_rate=1e-2),
}
PROMPTS = ("a red three on brick", "this three is blue", "three")
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def original():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def edited(original):
    """The original with another text encoder."""
    graphdef, state = nnx.split(original.text_encoder)
    moved = jax.tree.map(
        lambda p: p + 0.05 * jnp.sin(jnp.arange(p.size).reshape(p.shape)), nnx.to_pure_dict(state)
    )
    return dataclasses.replace(original, text_encoder=nnx.merge(graphdef, moved))


def leaves(model):
    plain = nnx.to_pure_dict(nnx.state(model))
    return dict(zip(leaf_paths(plain), map(np.asarray, jax.tree.leaves(plain)), strict=True))


def changed_paths(before, after):
    old, new = leaves(before), leaves(after)
    assert old.keys() == new.keys()
    return {path for path in old if not np.array_equal(old[path], new[path])}


def begin(original, edited, config, module):
    return module.prepare(Target(original, edited, "three", IMAGES, PROMPTS), config)


@pytest.fixture(scope="module")
def runs(original, edited, tmp_path_factory):
    """Every attack, run once with checkpoints after every step: its folder and its attempts."""
    found = {}
    for name, config in TINY.items():
        folder = tmp_path_factory.mktemp(name)
        attempts = attack(
            original,
            edited,
            "three",
            config,
            images=IMAGES,
            prompts=PROMPTS,
            seed=3,
            progress=False,
            checkpoint_dir=folder / "run",
            checkpoint_every=1,
            metrics_path=folder / "metrics.jsonl",
        )
        found[name] = folder, attempts
    return found


def outcome(attempt):
    """What an attempt draws with, as arrays and texts to compare."""
    parts = leaves(attempt.pipeline.text_encoder) | leaves(attempt.pipeline.unet)
    return parts, np.asarray(attempt.prompts)


# ---- the interface ----


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_gives_an_attempt_per_snapshot(edited, runs, name):
    config, (_, attempts) = TINY[name], runs[name]
    assert attack_of(config) is ATTACKS[name]
    assert [each.budget["steps"] for each in attempts] == [*config.snapshots, config.steps]
    for each in attempts:
        assert len(each.prompts) == len(PROMPTS)
        assert all(np.isfinite(value) for value in each.budget.values())
        assert each.pipeline.vae is edited.vae
        assert all(np.isfinite(leaf).all() for leaf in outcome(each)[0].values())
    with pytest.raises(ValueError, match="received int"):
        attack_of(3)


@pytest.mark.parametrize(
    "name",
    [n if n == "relapse" else pytest.param(n, marks=pytest.mark.slow) for n in ATTACKS],
)
def test_an_interrupted_attack_ends_as_if_it_had_not_been(original, edited, runs, name):
    folder, expected = runs[name]
    shutil.copytree(folder, again := folder.with_name(folder.name + "_again"))
    # As if the run had been killed during its last step: that checkpoint is not there.
    shutil.rmtree(again / "run" / "until_4" / "4")
    assert sorted(each.name for each in (again / "run" / "until_4").iterdir()) == ["3"]
    attempts = attack(
        original,
        edited,
        "three",
        TINY[name],
        images=IMAGES,
        prompts=PROMPTS,
        seed=3,
        progress=False,
        checkpoint_dir=again / "run",
        checkpoint_every=1,
        metrics_path=again / "metrics.jsonl",
    )
    for one, other in zip(attempts, expected, strict=True):
        assert one.budget == other.budget and one.details == other.details
        (parts, prompts), (wanted, texts) = outcome(one), outcome(other)
        np.testing.assert_array_equal(prompts, texts)
        for path, leaf in wanted.items():
            np.testing.assert_array_equal(parts[path], leaf)
    steps = [line.split(",")[0] for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) == 4


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_need_images_and_prompts(original, edited, name):
    for images, prompts in ((IMAGES[:0], PROMPTS), (IMAGES, ())):
        with pytest.raises(ValueError, match="needs images"):
            attack(original, edited, "three", TINY[name], images=images, prompts=prompts)


def test_settings_are_checked():
    for setting, make in (
        ("steps", lambda: ConceptInversionConfig(steps=0)),
        ("snapshots", lambda: RelapseConfig(steps=3, snapshots=(5,))),
        ("max_timestep", lambda: TokenSearchConfig(min_timestep=0.5, max_timestep=0.5)),
        ("max_timestep", lambda: TokenSearchConfig(max_timestep=1.5)),
        ("norm_cap", lambda: ConceptInversionConfig(norm_cap=0.0)),
        ("templates", lambda: ConceptInversionConfig(templates=("no place",))),
        ("candidates", lambda: TokenSearchConfig(candidates=0)),
        ("part", lambda: RelapseConfig(part="vae")),
    ):
        with pytest.raises((ValueError, TypeError), match=setting):  # or the type checker
            make()


# ---- the loss, transcribed ----


@pytest.fixture(scope="module")
def examples(original):
    z = original.vae.config.scaling_factor * encode_images(original.vae, IMAGES)[0]
    kept = alphas_cumprod(NoiseSchedule.from_config(original.scheduler_config))
    return functools.partial(draw, jnp.asarray(z), jnp.asarray(kept)[:, None, None, None])


def draw(z, kept, key):
    """The batch that a step draws: which images, noisy latents, times and noise."""
    row_key, noise_key = jax.random.split(key)
    time_key, noise_key = jax.random.split(noise_key)
    rows = jax.random.randint(row_key, (2,), 0, 4)
    times = jax.random.randint(time_key, (2,), 200, 900)
    noise = jax.random.normal(noise_key, (2, 4, 4, 4))
    z_t = jnp.sqrt(kept[times]) * z[rows] + jnp.sqrt(1 - kept[times]) * noise
    return rows, z_t, times, noise


def mean_error(unet, batch, states):
    _, z_t, t, eps = batch
    return ((unet(z_t, t, states) - eps) ** 2).sum() / eps.size


# ---- Concept Inversion ----


@pytest.fixture(scope="module")
def inversion(original, edited):
    return begin(original, edited, TINY["concept-inversion"], concept_inversion)


@pytest.fixture(scope="module")
def slope(inversion):
    static, _, frozen = inversion
    loss = functools.partial(concept_inversion.inversion_loss, static, frozen)
    return jax.jit(jax.value_and_grad(loss))


def test_inversion_follows_its_equation(edited, examples, inversion, slope):
    _, state, frozen = inversion
    key, text = jax.random.key(8), edited.text_encoder
    table = text.embeddings.token_embedding.embedding[...]
    unit = float(jnp.sqrt(jnp.mean(table**2)))
    assert float(frozen["unit"]) == pytest.approx(unit)
    text_key, example_key = jax.random.split(key)
    which = np.asarray(jax.random.randint(text_key, (2,), 0, 2))
    batch = examples(example_key)

    def transcription(v):  # the new word is the last of both templates
        prompts = []
        for words in (("a", "a photo of")[each] for each in which):
            ids = np.asarray(edited.tokenizer(words)["input_ids"])
            rest = np.full(24 - len(ids), edited.tokenizer.pad_token_id)
            prompts.append(jnp.concatenate([table[ids[:-1]], unit * v[None], table[rest]]))
        states = text(inputs_embeds=jnp.stack(prompts), eos_positions=jnp.zeros(2, int))[0]
        return mean_error(edited.unet, batch, states)

    v = state.params["embeddings"][0]
    received, gradient = slope(v, key)
    wanted, expected = jax.jit(jax.value_and_grad(transcription))(v)
    assert float(received) == pytest.approx(float(wanted), rel=1e-5)
    scale = float(jnp.abs(expected).max())
    assert scale > 0
    np.testing.assert_allclose(gradient, expected, atol=2e-5 * scale)


def test_restarts_know_nothing_of_each_other(original, edited, inversion, slope):
    """The last of three restarts is learnt alone, with Adam and the projection written out."""
    static, state, frozen = inversion
    config = dataclasses.replace(TINY["concept-inversion"], restarts=1)
    _, alone, _ = begin(original, edited, config, concept_inversion)
    start = np.asarray(state.params["embeddings"])
    np.testing.assert_array_equal(alone.params["embeddings"], start[:1])
    step, key = compile_step(concept_inversion.inversion_step, static), jax.random.key(0)
    v, first, second = start[2], 0.0, 0.0
    for n in range(3):
        _, gradient = slope(v, restart_keys(step_key(key, n), 3)[2])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        root = jnp.sqrt(second / (1 - 0.999 ** (n + 1)))
        v = v - 0.5 * first / (1 - 0.9 ** (n + 1)) / (root + 1e-8)
        v = v * min(1.0, 1.2 * float(frozen["norm"]) / float(jnp.linalg.norm(v)))
        state, _ = step(jax.tree.map(jnp.copy, state), frozen, None, key)
    ends = np.asarray(state.params["embeddings"])
    np.testing.assert_allclose(ends[2], v, atol=1e-3)
    assert np.abs(ends - start).max(axis=1).min() > 0.1
    assert np.abs(ends[0] - ends[2]).max() > 0.1


def test_the_norm_stays_under_its_cap(edited, runs):
    _, attempts = runs["concept-inversion"]
    table = np.asarray(edited.text_encoder.embeddings.token_embedding.embedding[...])
    vocabulary = np.linalg.norm(table[ordinary_tokens(edited.tokenizer)], axis=1).mean()
    for each in attempts:
        learnt = each.pipeline.text_encoder.embeddings.token_embedding.embedding[...][-3:]
        norms = np.linalg.norm(learnt, axis=1) / vocabulary
        np.testing.assert_allclose(each.details["norms"], norms, rtol=1e-5)
        assert each.budget["norm"] == pytest.approx(norms.mean(), rel=1e-5)
        assert norms.max() <= 1.2 * (1 + 1e-6)
    assert attempts[-1].budget["norm"] > 1.19  # such steps reach it
    inside, outside = np.array([[0.3, 0.4], [3.0, 4.0]], np.float32)
    projected = concept_inversion.project(jnp.stack([inside, outside]), 1.0)
    np.testing.assert_allclose(projected, [inside, outside / 5], rtol=1e-6)


def test_learnt_words_are_all_that_is_new(edited, runs, tmp_path):
    _, attempts = runs["concept-inversion"]
    pipeline, count = attempts[-1].pipeline, len(edited.tokenizer)
    assert pipeline.unet is edited.unet and len(edited.tokenizer) == count
    old, new = leaves(edited.text_encoder), leaves(pipeline.text_encoder)
    table = "embeddings.token_embedding.embedding"
    np.testing.assert_array_equal(new.pop(table)[:count], old.pop(table))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[path], new[path]) for path in old)
    rows = [
        each.pipeline.text_encoder.embeddings.token_embedding.embedding[...][-3:]
        for each in attempts
    ]
    assert all((one != other).any() for one, other in itertools.pairwise(rows))

    names = attempts[-1].details["tokens"]
    assert attempts[-1].prompts == (
        f"a red {names[0]} on brick",
        f"this {names[1]} is blue",
        names[2],
    )
    ids = encode_phrases(pipeline.tokenizer, attempts[-1].prompts, 24)
    before = encode_phrases(edited.tokenizer, PROMPTS, 24)
    three = edited.tokenizer.convert_tokens_to_ids("three</w>")
    np.testing.assert_array_equal(ids >= count, before == three)
    np.testing.assert_array_equal(ids[ids < count], before[before != three])

    save_pytorch(pipeline, tmp_path / "model")  # a pipeline like any other
    loaded = load_pytorch(tmp_path / "model")
    assert not changed_paths(loaded.text_encoder, pipeline.text_encoder)
    np.testing.assert_array_equal(encode_phrases(loaded.tokenizer, attempts[-1].prompts, 24), ids)


def test_inversion_starts_where_it_is_told(original, edited):
    table = np.asarray(edited.text_encoder.embeddings.token_embedding.embedding[...])
    ids = [edited.tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("red", "grass")]
    config = dataclasses.replace(TINY["concept-inversion"], norm_cap=None, start="red grass")
    _, state, frozen = begin(original, edited, config, concept_inversion)
    expected = np.tile(table[ids].mean(axis=0), (3, 1))
    np.testing.assert_allclose(frozen["unit"] * state.params["embeddings"], expected, atol=1e-6)
    with pytest.raises(ConceptError, match="no token"):
        begin(original, edited, dataclasses.replace(config, start="  "), concept_inversion)
    with pytest.raises(ConceptError, match="does not name the concept 'three'"):
        attack(original, edited, "three", config, images=IMAGES, prompts=["a threefold 3"])
    # A second attack on an attacked model takes names that are free.
    (first,) = concept_inversion.free_names(edited.tokenizer, 1)
    attacked = add_tokens(edited, {first: table[0]})
    assert concept_inversion.free_names(attacked.tokenizer, 2) == ["<inverted-1>", "<inverted-2>"]


# ---- token search ----


@pytest.fixture(scope="module")
def search(original, edited):
    return begin(original, edited, TINY["token-search"], token_search)


def test_a_step_takes_the_best_exchange_and_no_worse_one(edited, examples, search):
    """Steps of each restart, transcribed with one-hot choices of tokens."""
    static, state, frozen = search
    text, size = edited.text_encoder, edited.text_encoder.config.vocab_size
    table = text.embeddings.token_embedding.embedding[...]
    tokens = encode_phrases(edited.tokenizer, [*PROMPTS, PROMPTS[0]], 24)  # of the four images

    @jax.jit
    @jax.value_and_grad
    def loss(choices, key):
        batch = examples(key)
        rows = table[jnp.asarray(tokens)[batch[0]]]
        prefix = jnp.stack([choices @ table] * 2)
        rows = jnp.concatenate([rows[:, :1], prefix, rows[:, 1:-2]], axis=1)
        states = text(inputs_embeds=rows, eos_positions=jnp.zeros(2, int))[0]
        return mean_error(edited.unet, batch, states)

    step, run_key, taken = compile_step(token_search.search_step, static), jax.random.key(5), 0
    for n in range(3):
        befores = np.asarray(state.params["prefixes"])
        state, metrics = step(jax.tree.map(jnp.copy, state), frozen, None, run_key)
        assert int(state.step) == n + 1
        losses, falls = [], []
        for r, own in enumerate(restart_keys(step_key(run_key, n), 2)):
            example_key, exchange_key = jax.random.split(own)
            _, scores = loss(jax.nn.one_hot(befores[r], size), example_key)
            exchanges = token_search.draw_exchanges(
                exchange_key, jnp.asarray(befores[r]), scores, frozen["allowed"], top=8, count=5
            )
            every = [befores[r], *np.asarray(exchanges)]
            found = [float(loss(jax.nn.one_hot(each, size), example_key)[0]) for each in every]
            best = int(np.argmin(found))
            np.testing.assert_array_equal(state.params["prefixes"][r], every[best])
            losses.append(found[best])
            falls.append(found[0] - found[best])
            taken += best > 0
        assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
        assert float(metrics["gain"]) == pytest.approx(np.mean(falls), abs=1e-5)
    assert taken  # the prefixes did move


def test_the_target_is_the_noise_or_the_originals_prediction(original, edited, examples, search):
    config = dataclasses.replace(TINY["token-search"], target="original")
    static, _, frozen = begin(original, edited, config, token_search)
    tokens = encode_phrases(edited.tokenizer, [*PROMPTS, PROMPTS[0]], 24)
    key = jax.random.key(2)
    rows, z_t, t, noise = examples(key)
    states = original.text_encoder(jnp.asarray(tokens[rows])).last_hidden_state
    made = jax.jit(lambda frozen: token_search.search_examples(static, frozen, key))(frozen)
    np.testing.assert_array_equal(made[0], tokens[rows])
    np.testing.assert_allclose(made[1][0], z_t, atol=1e-6)
    np.testing.assert_allclose(made[1][2], jax.jit(original.unet)(z_t, t, states), atol=1e-5)
    _, plain = token_search.search_examples(search[0], search[2], key)
    np.testing.assert_array_equal(plain[2], noise)


def test_the_gradient_of_choices_is_the_change_of_a_linear_loss():
    rng = np.random.default_rng(0)
    table, slope = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 4), (3, 4)))
    prefix = np.array([2, 7, 7])
    scores = token_search.choice_gradient(jnp.asarray(table), jnp.asarray(slope))
    for place in range(3):
        for token in range(9):
            other = prefix.copy()
            other[place] = token
            change = np.sum(slope * table[other]) - np.sum(slope * table[prefix])
            difference = scores[place, token] - scores[place, prefix[place]]
            assert float(difference) == pytest.approx(float(change), abs=1e-5)


def test_exchanges_are_single_promising_and_allowed():
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(3, 30)), jnp.float32)
    allowed = jnp.arange(30) % 3 > 0
    prefix = jnp.array([1, 2, 4])
    made = np.asarray(
        token_search.draw_exchanges(jax.random.key(0), prefix, scores, allowed, top=4, count=200)
    )
    assert ((made != np.asarray(prefix)).sum(axis=1) <= 1).all()
    for place in range(3):
        ranked = [v for v in np.argsort(scores[place]) if allowed[v]][:4]
        used = set(made[:, place]) - {int(prefix[place])}
        assert used == set(ranked) - {int(prefix[place])}


def test_specials_and_forbidden_words_are_never_used(edited, search, runs):
    _, state, frozen = search
    tokenizer = edited.tokenizer
    allowed = np.asarray(frozen["allowed"])
    trio = tokenizer.convert_tokens_to_ids("trio</w>")
    banned = {trio, *tokenizer.all_special_ids}
    assert set(np.flatnonzero(~allowed)) == banned
    assert not banned & set(np.asarray(state.params["prefixes"]).ravel().tolist())
    _, attempts = runs["token-search"]
    for each in attempts:
        prompts = np.asarray(each.prompts)
        rows = encode_phrases(tokenizer, PROMPTS, 24)
        turns = prompts[:, 1:3]
        np.testing.assert_array_equal(prompts, with_prefix(jnp.asarray(rows), jnp.asarray(turns)))
        np.testing.assert_array_equal(turns[0], turns[2])  # two restarts take turns
        assert not banned & set(turns.ravel().tolist())
        assert each.details["prefixes"] == tuple(tokenizer.decode(row) for row in turns[:2])
        assert each.pipeline is edited


def test_a_search_needs_room_and_tokens(original, edited):
    config = dataclasses.replace(TINY["token-search"], tokens=18)
    with pytest.raises(ConceptError, match="takes 7 tokens with start and end, which leaves no"):
        begin(original, edited, config, token_search)
    begin(original, edited, dataclasses.replace(config, tokens=17), token_search)
    config = dataclasses.replace(TINY["token-search"], top=10_000)
    with pytest.raises(ConceptError, match="may be used"):
        begin(original, edited, config, token_search)


# ---- relapse ----


@pytest.mark.slow
def test_relapse_follows_the_denoising_loss(original, edited, examples):
    config = dataclasses.replace(TINY["relapse"], part="both")
    static, state, frozen = begin(original, edited, config, relapse)
    key, tokens = jax.random.key(4), encode_phrases(edited.tokenizer, [*PROMPTS, PROMPTS[0]], 24)
    batch = examples(step_key(key, 0))

    @jax.jit
    @jax.value_and_grad
    def transcription(params):
        text = nnx.merge(static.text_encoder, params["text_encoder"])
        unet = nnx.merge(static.unet, params["unet"])
        return mean_error(unet, batch, text(jnp.asarray(tokens[batch[0]]))[0])

    step = compile_step(relapse.relapse_step, static)
    after, metrics = step(jax.tree.map(jnp.copy, state), frozen, None, key)
    wanted, gradient = transcription(state.params)
    assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-5)
    # Adam's first update (Kingma & Ba 2015, algorithm 1) is the gradient over its size; the
    # entries that vanish but for rounding are left out. Then the decay of AdamW.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for p, g, new in zip(
        *map(jax.tree.leaves, (state.params, gradient, after.params)), strict=True
    ):
        expected = p - 1e-2 * (g / (jnp.abs(g) + 1e-8) + 0.01 * p)
        clear = np.abs(g) > 1e-4 * largest
        np.testing.assert_allclose(new[clear], expected[clear], atol=1e-5)


def test_relapse_trains_its_part_alone_from_the_edited_model(original, edited, runs):
    _, attempts = runs["relapse"]
    first, _, last = attempts
    assert all(each.pipeline.text_encoder is edited.text_encoder for each in attempts)
    assert not changed_paths(edited.unet, first.pipeline.unet)
    every = set(leaves(edited.unet))
    moved = changed_paths(edited.unet, last.pipeline.unet)
    assert {path for path in every if path.endswith("kernel")} <= moved
    for part, trained in (("text_encoder", {"text_encoder"}), ("both", {"text_encoder", "unet"})):
        config = dataclasses.replace(TINY["relapse"], part=part)
        static, state, frozen = begin(original, edited, config, relapse)
        assert set(state.params) == trained
        for name in ("text_encoder", "unet"):
            whole = nnx.merge(getattr(static, name), state.params.get(name, {}), frozen[name])
            assert not changed_paths(getattr(edited, name), whole)
            assert (jax.tree.leaves(frozen[name]) == []) == (name in trained)
