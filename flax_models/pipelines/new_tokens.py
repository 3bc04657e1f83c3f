"""New tokens: a pipeline whose tokenizers and text encoders know more words."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..clip import CLIPTextModel
from .stable_diffusion import StableDiffusionPipeline
from .tokenizers import TokenError, token_ids, vectors


def add_tokens(
    pipeline: StableDiffusionPipeline, rows: Mapping[str, Float[Array, " C"] | np.ndarray]
) -> StableDiffusionPipeline:
    """The pipeline with more tokens in its tokenizer and text encoder; it stays as it is.

    A new token's id follows the tokenizer's last one; a name with capitals is read as it is
    written, others in any case. The table of embeddings grows where it has no
    row to spare there; every other row keeps its bits.

    Args:
      pipeline: the model; its tokenizer and text encoder are needed.
      rows: token -> embedding [hidden_size], stored in the dtype of the table; of SDXL the two
        encoders' one after the other.

    Raises:
      TokenError: a token that exists, that is empty or holds white space, that the tokenizer would
        not read as one, or would take for a vector of another; an embedding of another width.
    """
    if pipeline.tokenizer is None or pipeline.prompt_encoder is None:
        raise TokenError("new tokens need a pipeline with its tokenizer and text encoder.")
    tokenizers = {name: copy.deepcopy(getattr(pipeline, name)) for name in pipeline.TOKENIZERS}
    tokenizer = tokenizers["tokenizer"]
    vocabulary = tokenizer.get_vocab()
    for token in rows:
        if not token or token.split() != [token]:
            raise TokenError(f"a token is one word such as '<new1>', received {token!r}.")
        if {token, token.lower(), f"{token.lower()}</w>"} & vocabulary.keys():
            raise TokenError(
                f"the tokenizer already has the token {token!r}: choose another name, such as "
                "'<new1>'."
            )
    from transformers import AddedToken

    # CLIP reads in lower case, in which a name with capitals would not be found again.
    added = [AddedToken(token, normalized=token == token.lower()) for token in rows]
    for each in tokenizers.values():
        each.add_tokens(added)
    for token, names in vectors(tokenizer).items():
        mixed = rows.keys() & set(names)
        if mixed and not mixed.issuperset(names):
            raise TokenError(
                f"the tokenizer would take {', '.join(names)} for the vectors of one token "
                f"{token!r}, and some of them are there already: choose another name."
            )
    ids = token_ids(tokenizer, list(rows))
    encoder = nnx.clone(pipeline.prompt_encoder)
    widths = [tower.config.hidden_size for tower in encoder.towers]
    for token, row in rows.items():
        if np.shape(row) != (sum(widths),):
            raise TokenError(
                f"the embedding of {token!r} has shape {np.shape(row)}; this text encoder's rows "
                f"have {(sum(widths),)}. It belongs to another model."
            )
    start = 0
    for tower, width in zip(encoder.towers, widths, strict=True):
        own = [row[start : start + width] for row in rows.values()]
        _set_rows(tower, ids, own)
        start += width
    return dataclasses.replace(pipeline.with_prompt_encoder(encoder), **tokenizers)


def _set_rows(tower: CLIPTextModel, ids: Sequence[int], rows: Sequence[Any]) -> None:
    """Put rows into a tower's table of embeddings, which grows where it has none to spare."""
    embed = tower.embeddings.token_embedding
    table = embed.embedding[...]
    missing = max([len(table), *(index + 1 for index in ids)]) - len(table)
    table = jnp.concatenate([table, jnp.zeros((missing, table.shape[1]), table.dtype)])
    for index, row in zip(ids, rows, strict=True):
        table = table.at[index].set(jnp.asarray(row).astype(table.dtype))
    embed.embedding.set_value(table)
    embed.num_embeddings = len(table)
    tower.config = dataclasses.replace(tower.config, vocab_size=len(table))


def embedding_rows(
    pipeline: StableDiffusionPipeline, ids: Sequence[int]
) -> list[Float[Array, " C"]]:
    """Embeddings of tokens, as `add_tokens` takes them: of several encoders one after the other."""
    tables = [
        tower.embeddings.token_embedding.embedding[...] for tower in pipeline.prompt_encoder.towers
    ]
    return [jnp.concatenate([table[index] for table in tables]) for index in ids]
