"""New words for a subject: which token stands for it, and where its embedding starts."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...flax_models.pipelines.new_tokens import embedding_rows
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ...flax_models.pipelines.tokenizers import TokenError
from .phrases import phrase_ids

# Single tokens of CLIP's vocabulary with next to no meaning of their own, one per concept.
RARE_WORDS = ("ktn", "pll", "ucd")


def default_initializers(tokenizer: Any, words: Sequence[str], kind: str) -> list[str]:
    """The word whose embedding each new token starts from.

    `kind` "rare" takes `RARE_WORDS` as far as they go, and the concept's class word where the
    tokenizer does not know them as one token; "class" takes the class words.
    """
    rare = [
        word for word in RARE_WORDS if len(phrase_ids(tokenizer, [word], special=False)[0]) == 1
    ]
    if kind == "class":
        rare = []
    return [rare[n] if n < len(rare) else word for n, word in enumerate(words)]


def initial_rows(
    pipeline: StableDiffusionPipeline, tokens: Sequence[str], initializers: Sequence[str]
) -> dict[str, Float[Array, " C"]]:
    """Token -> the embedding of its initializer, as the text encoder has it.

    Raises:
      TokenError: unequal counts, a token that is named twice, or an initializer that is not one
        token.
    """
    if len(tokens) != len(initializers):
        raise TokenError(
            f"every new token needs one initializer: received {len(tokens)} tokens "
            f"({', '.join(tokens)}) and {len(initializers)} initializers "
            f"({', '.join(initializers)})."
        )
    if len(set(tokens)) != len(tokens):
        raise TokenError(f"every concept needs a token of its own, received {list(tokens)}.")
    tokenizer = pipeline.tokenizer
    rows = {}
    for token, word in zip(tokens, initializers, strict=True):
        (ids,) = phrase_ids(tokenizer, [word], special=False)
        if len(ids) != 1:
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise TokenError(
                f"the initializer {word!r} of {token!r} is {len(ids)} tokens {pieces}; name "
                "another initializer, a word that is one token."
            )
        rows[token] = embedding_rows(pipeline, ids)[0]
    return rows


def encode_with_rows(
    encoder: Any,
    tokens: Int[Array, "B L"],
    rows: Float[Array, "N C"] | None,
    ids: Int[Array, " N"],
    positions: Int[Array, " B"],
) -> Any:
    """Encode texts with some rows of the embedding table replaced.

    The table is no input of a gradient: what trains are the N rows alone, so that neither a
    gradient nor weight decay can reach another one.

    Args:
      encoder: a pipeline's `prompt_encoder`, whose output is returned.
      tokens: [B, L] token ids.
      rows: [N, C] embeddings of `ids`; None takes those of the table.
      ids: [N] the tokens that they belong to.
      positions: [B] where each text is pooled.
    """
    embedded = encoder.embed_tokens(tokens)
    if rows is not None:
        hit = tokens[..., None] == ids  # [B, L, N]
        replaced = rows[jnp.argmax(hit, axis=-1)].astype(embedded.dtype)
        embedded = jnp.where(hit.any(axis=-1, keepdims=True), replaced, embedded)
    return encoder(inputs_embeds=embedded, eos_positions=positions)
