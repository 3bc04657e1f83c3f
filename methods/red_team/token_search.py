"""Token search: words in front of a prompt that bring the erased concept back.

Source: UnlearnDiffAtk, Zhang et al. 2023, "To Generate or Not? Safety-Driven Unlearned Diffusion
Models Are Still Easy to Generate Unsafe Images ... For Now" (arXiv 2310.11868), section 4: with
images of the concept as the target, find the discrete prefix d of a prompt p that lets the edited
model denoise them,

    min_d  E || eps - e(z_t, t, T([d, p])) ||^2

That needs no other model.  With the original at hand (P4D, Chin et al. 2023, "Prompting4Debugging",
arXiv 2309.06135, equation 4) its prediction under the prompt takes the place of eps, which rids the
loss of the noise that no model can know: `target` says which.

The papers descend on relaxed tokens and project.  Here tokens are exchanged one at a time by
greedy coordinate gradients (Zou et al. 2023, arXiv 2307.15043, algorithm 1): the gradient with
respect to the one-hot choice of each token names its most promising substitutes; of a random
`candidates` single exchanges the best one on the step's batch is kept, if it is better than none.

Each restart searches on its own.  What is found are token ids; a tokenizer may cut their text in
another way.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..seeds import seed_key
from ..settings import check_settings
from ..text.phrases import ConceptError, encode_phrases, hidden_states, with_prefix
from ..training import TrainState
from .common import (
    AttackSettings,
    AttackStatic,
    Attempt,
    Frozen,
    Target,
    assembled,
    draw_examples,
    embedding_loss,
    mean_losses,
    ordinary_tokens,
    restart_keys,
    snapshots,
    word_tokens,
)


@dataclasses.dataclass(frozen=True)
class TokenSearchConfig(AttackSettings):
    """All settings of a token search, whose steps are exchanges, tried one after the other.

    Attributes:
      restarts: prefixes that are searched, each on its own; prompts take turns with them.
      tokens: length of a prefix.
      candidates: exchanges among which a step chooses.
      top: substitutes per place from which candidates are drawn.
      target: what the edited model is to predict, the "noise" or what the "original" model does.
      forbidden: words whose tokens are never used.
    """

    steps: int = 40
    restarts: int = 4
    tokens: int = 3
    candidates: int = 16
    top: int = 32
    target: Literal["noise", "original"] = "original"
    forbidden: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"restarts": 1, "tokens": 1, "candidates": 1, "top": 1})


def search_examples(
    static: AttackStatic, frozen: Frozen, key: PRNGKeyArray
) -> tuple[Int[Array, "B L"], tuple[Array, Array, Array]]:
    """A batch: prompts, and noisy latents, times and the targets that `config.target` names."""
    rows, (latents, times, target) = draw_examples(static, frozen, key)
    if static.config.target == "original":
        unet = nnx.merge(static.unet, frozen["original_unet"])
        target = unet(latents, times, frozen["original_states"][rows])
    return frozen["prompts"][rows], (latents, times, target)


def prefix_loss(
    static: AttackStatic,
    frozen: Frozen,
    prefix: Float[Array, "K C"],
    prompts: Int[Array, "B L"],
    noised: tuple[Array, Array, Array],
) -> Float[Array, ""]:
    """The denoising loss of B prompts behind a prefix given as token embeddings."""
    rows = jnp.broadcast_to(prefix, (prompts.shape[0], *prefix.shape))
    return embedding_loss(static, frozen, with_prefix(_table(frozen)[prompts], rows), noised)


def choice_gradient(
    table: Float[Array, "V C"], gradient: Float[Array, "K C"]
) -> Float[Array, "K V"]:
    """From the gradient with respect to K embeddings to that with respect to one-hot choices."""
    return gradient @ table.T


def draw_exchanges(
    key: PRNGKeyArray,
    prefix: Int[Array, " K"],
    scores: Float[Array, "K V"],
    allowed: Bool[Array, " V"],
    *,
    top: int,
    count: int,
) -> Int[Array, "N K"]:
    """Copies of the prefix with one token each exchanged for one of its `top` best substitutes.

    Args:
      key, prefix: of the places and the substitutes, and where to start.
      scores: the gradient with respect to choices; the lowest promise most.
      allowed: which tokens may be used.
      top, count: substitutes per place, and copies.
    """
    place_key, rank_key = jax.random.split(key)
    promising = jax.lax.top_k(jnp.where(allowed, -scores, -jnp.inf), top)[1]  # [K, top]
    places = jax.random.randint(place_key, (count,), 0, prefix.shape[0])
    ranks = jax.random.randint(rank_key, (count,), 0, top)
    copies = jnp.broadcast_to(prefix, (count, prefix.shape[0]))
    return copies.at[jnp.arange(count), places].set(promising[places, ranks].astype(prefix.dtype))


def _search(
    static: AttackStatic, frozen: Frozen, prefix: Int[Array, " K"], key: PRNGKeyArray
) -> tuple[Int[Array, " K"], dict[str, Array]]:
    """One exchange of one restart: the prefix afterwards; its loss and the gain on the batch."""
    config, table = static.config, _table(frozen)
    example_key, exchange_key = jax.random.split(key)
    prompts, noised = search_examples(static, frozen, example_key)
    loss_of = functools.partial(prefix_loss, static, frozen, prompts=prompts, noised=noised)
    before, gradient = jax.value_and_grad(loss_of)(table[prefix])
    scores = choice_gradient(table, gradient)
    limits = {"top": config.top, "count": config.candidates}
    exchanges = draw_exchanges(exchange_key, prefix, scores, frozen["allowed"], **limits)
    losses = jax.lax.map(lambda each: loss_of(table[each]), exchanges)
    best = jnp.argmin(losses)
    better = losses[best] < before
    after = jnp.where(better, losses[best], before)
    return jnp.where(better, exchanges[best], prefix), {"loss": after, "gain": before - after}


def search_step(
    static: AttackStatic, state: TrainState, frozen: Frozen, batch: None, key: PRNGKeyArray
) -> tuple[TrainState, dict[str, Array]]:
    """One exchange in every restart's prefix.

    The parameters are prefixes int32 [R, K]; the metrics are the loss after the exchange, and by
    how much it fell (on the step's batch, means over restarts).
    """
    del batch
    search = jax.vmap(functools.partial(_search, static, frozen))
    prefixes, metrics = search(state.params["prefixes"], restart_keys(key, static.config.restarts))
    after = dataclasses.replace(state, step=state.step + 1, params={"prefixes": prefixes})
    return after, jax.tree.map(jnp.mean, metrics)


def prepare(
    target: Target, config: TokenSearchConfig, *, seed: int = 0
) -> tuple[AttackStatic, TrainState, dict[str, Any]]:
    """Everything `search_step` needs, computed once.

    The seed is of the words to start with.

    Raises:
      ConceptError: a prompt with no room for the prefix, or no token left to use.
    """
    original, edited = target.original, target.edited
    tokenizer = edited.tokenizer
    static, _, frozen = assembled(target, config)
    tokens = target.of_images(prompts_with_room(edited, target.prompts, config.tokens))
    banned = [token for word in config.forbidden for token in word_tokens(tokenizer, word)]
    candidates = np.setdiff1d(ordinary_tokens(tokenizer), banned)
    if len(candidates) < config.top:
        raise ConceptError(
            f"top={config.top} substitutes are asked for, but only {len(candidates)} tokens of the "
            "vocabulary may be used."
        )
    allowed = np.zeros(edited.text_encoder.config.vocab_size, bool)
    allowed[candidates] = True
    keys = restart_keys(seed_key(seed), config.restarts)
    start = jax.vmap(lambda key: jax.random.choice(key, candidates, (config.tokens,)))(keys)

    frozen |= {"prompts": tokens, "allowed": allowed}  # [M, L] and [V]
    if config.target == "original":
        frozen |= {
            "original_unet": nnx.to_pure_dict(nnx.state(original.unet)),
            "original_states": hidden_states(original.text_encoder, tokens),  # [M, L, D]
        }
    state = TrainState(jnp.zeros((), jnp.int32), {"prefixes": start.astype(jnp.int32)}, ())
    return static, state, jax.tree.map(jnp.asarray, frozen)


def prompts_with_room(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], tokens: int
) -> Int[np.ndarray, "N L"]:
    """Token ids of prompts that leave room for `tokens` more.

    Raises:
      ConceptError: one does not.
    """
    length = pipeline.max_length
    for prompt in prompts:
        taken = len(word_tokens(pipeline.tokenizer, prompt)) + 2
        if taken + tokens > length:
            raise ConceptError(
                f"the prompt {prompt!r} takes {taken} tokens with start and end, which leaves no "
                f"room for {tokens} more: this text encoder reads {length}."
            )
    return encode_phrases(pipeline.tokenizer, prompts, length)


def _table(frozen: Frozen) -> Float[Array, "V C"]:
    return frozen["text_encoder"]["embeddings"]["token_embedding"]["embedding"].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _examine(static: AttackStatic, frozen: Any, prefixes: Array, key: PRNGKeyArray) -> Array:
    def loss(prefix: Array, key: PRNGKeyArray) -> Array:
        return prefix_loss(
            static, frozen, _table(frozen)[prefix], *search_examples(static, frozen, key)
        )

    return mean_losses(loss, prefixes, key)


def run(
    target: Target, config: TokenSearchConfig, *, seed: int = 0, **options: Any
) -> Iterator[Attempt]:
    """Find prefixes that bring the concept back, and put them in front of the prompts.

    The images and prompts say what the concept is, and `config.forbidden` what may not.

    Yields:
      one attempt per snapshot. Its prompts are token ids; its budget is "steps" and "tokens"; its
      details are "prefixes" as text and "losses" per restart, on batches that are the same for all.

    Raises:
      ConceptError: a prompt with no room for the prefix, or too few tokens left to use.
    """
    static, state, frozen = prepare(target, config, seed=seed)
    edited = target.edited
    rows = prompts_with_room(edited, target.prompts, config.tokens)
    for steps, after in snapshots(search_step, static, state, frozen, seed=seed, **options):
        prefixes = after.params["prefixes"]
        turns = prefixes[np.arange(len(rows)) % config.restarts]
        losses = _examine(static, frozen, prefixes, seed_key(seed))
        texts = tuple(edited.tokenizer.decode(each) for each in prefixes.tolist())
        details = {"prefixes": texts, "losses": tuple(losses.tolist())}
        budget = {"steps": float(steps), "tokens": float(config.tokens)}
        found = np.asarray(with_prefix(jnp.asarray(rows), turns))
        yield Attempt(edited, found, budget, details)
