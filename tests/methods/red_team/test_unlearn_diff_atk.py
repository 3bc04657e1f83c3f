"""UnlearnDiffAtk against a transcription of its published program's steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from erasing_toy import moved, tiny_pipeline
from flax import nnx

from conceptax.methods.red_team import unlearn_diff_atk
from conceptax.methods.red_team.unlearn_diff_atk import UnlearnDiffAtkConfig
from conceptax.methods.sampling import add_noise
from conceptax.methods.text.phrases import encode_phrases, with_prefix

CONFIG = UnlearnDiffAtkConfig(tokens=2, iterations=3, times=4)
PROMPTS = ("a red three on brick", "this three is blue", "three")


def bisection(row, xi=1e-7):
    """The published projection: the shift that leaves a sum of one, between 0 and 1."""
    low, high = row.min() - 1, row.max()
    while high - low > xi:
        middle = (low + high) / 2
        if np.clip(row - middle, 0, 1).sum() > 1:
            low = middle
        else:
            high = middle
    return np.clip(row - (low + high) / 2, 0, 1)


def test_the_published_settings_are_the_defaults():
    config = UnlearnDiffAtkConfig()
    assert (config.tokens, config.iterations) == (5, 40)
    assert config.timesteps(1000) == list(range(10, 1000, 20))
    assert CONFIG.timesteps(10) == [1, 3, 5, 7]
    for change in ({"tokens": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            dataclasses.replace(config, **change)


def test_steps_are_adams_and_end_on_the_simplex(torch):
    rng = np.random.default_rng(0)
    gradients = 3 * rng.normal(size=(4, 2, 3, 30)).astype(np.float32)
    config = dataclasses.replace(CONFIG, tokens=3, learning_rate=0.05)
    rows = jnp.full((2, 3, 30), 1 / 30)
    state = {
        "choices": rows,
        "optimizer": jax.vmap(unlearn_diff_atk._optimizer(config).init)(rows),
    }
    theirs = torch.full((2, 3, 30), 1 / 30, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.05, weight_decay=0.1)
    for gradient in gradients:
        state = unlearn_diff_atk.updated(config, state, jnp.asarray(gradient))
        theirs.grad = torch.nn.functional.hardtanh(torch.from_numpy(gradient))
        adam.step()
        flat = theirs.detach().numpy().reshape(-1, 30)
        projected = np.stack([bisection(each) for each in flat]).reshape(2, 3, 30)
        theirs.data = torch.from_numpy(projected)
        np.testing.assert_allclose(state["choices"], projected, atol=2e-6)
    np.testing.assert_allclose(state["choices"].sum(-1), 1, atol=1e-6)
    assert (np.asarray(state["choices"]) == 0).any()


@pytest.fixture(scope="module")
def given():
    """A model that is attacked, its parameters, and what three searches are given."""
    original = tiny_pipeline()
    graphdef, params = nnx.split(original.text_encoder)
    edited = dataclasses.replace(
        original, text_encoder=nnx.merge(graphdef, moved(nnx.to_pure_dict(params), 0.05))
    )
    static, frozen = unlearn_diff_atk.attacked(edited, CONFIG)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    latents = unlearn_diff_atk.targets(original, images)
    ids = encode_phrases(edited.tokenizer, PROMPTS, edited.max_length)
    times = np.asarray([100, 500, 900], np.int32)
    return edited, static, frozen, (latents, ids, times, jax.random.split(jax.random.key(1), 3))


def test_searches_do_not_depend_on_each_other(given):
    _, static, frozen, (latents, ids, times, keys) = given
    together, losses = unlearn_diff_atk.search(
        static, frozen, unlearn_diff_atk.begin(static, frozen, 3), latents, ids, times, keys
    )
    assert np.isfinite(losses).all()
    other = np.asarray([0, 2, 2])
    again, same = unlearn_diff_atk.search(
        static,
        frozen,
        unlearn_diff_atk.begin(static, frozen, 3),
        *(each[other] for each in (latents, ids, times, keys)),
    )
    np.testing.assert_allclose(same, np.asarray(losses)[other], rtol=1e-5)
    choices = [np.asarray(each["choices"]) for each in (together, again)]
    np.testing.assert_allclose(choices[1], choices[0][other], atol=1e-5)
    assert unlearn_diff_atk.likeliest(together).shape == (3, 2)


def test_a_step_follows_the_gradient_of_the_drawn_tokens(given):
    edited, static, frozen, (latents, ids, times, keys) = given
    config = dataclasses.replace(CONFIG, iterations=1)
    one = dataclasses.replace(static, config=config)
    state = unlearn_diff_atk.begin(one, frozen, 3)
    received, losses = unlearn_diff_atk.search(one, frozen, state, latents, ids, times, keys)

    latents, times = jnp.asarray(latents), jnp.asarray(times)
    tokens, noise = unlearn_diff_atk.drawn(one, state, latents, keys, 0)
    noisy = add_noise(static.schedule, latents, noise, times)
    encoder, unet = edited.text_encoder, edited.unet
    table = encoder.embeddings.token_embedding.embedding[...]

    @jax.jit
    def loss(onehot):
        rows = with_prefix(table[ids], onehot @ table)
        states = encoder(inputs_embeds=rows, eos_positions=jnp.zeros(3, int)).last_hidden_state
        return ((unet(noisy, times, states) - noise) ** 2).mean((1, 2, 3))

    onehot = jax.nn.one_hot(tokens, len(table))
    np.testing.assert_allclose(losses, loss(onehot), rtol=1e-4)
    gradient = jax.jit(jax.grad(lambda given: loss(given).sum()))(onehot)
    expected = unlearn_diff_atk.updated(config, state, gradient)["choices"]
    # Adam's first step has the size of the learning rate, whatever the gradient's: where that
    # is all but 0, rounding decides its sign.
    clear = np.abs(gradient + 0.1 * state["choices"]) > 1e-5
    assert clear.mean() > 0.9
    close = np.abs(np.asarray(received["choices"]) - expected) < 1e-5
    assert close[clear].mean() > 0.97
