"""A Stable-Diffusion-style text-to-image pipeline: the parts of one diffusers folder."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import ConceptaxError
from ..autoencoder_kl import AutoencoderKL
from ..clip import CLIPTextModel
from ..pretrained import Pretrained
from ..unet_2d_condition import UNet2DConditionModel


@dataclasses.dataclass
class StableDiffusionPipeline(Pretrained):
    """Parts of a text-to-image model; how they sample and train is in `conceptax.methods`.

    Attributes:
      unet, vae, text_encoder: NNX modules, or None where a subset was loaded.
      tokenizer: a `transformers.CLIPTokenizer`.
      scheduler_config: the parsed `scheduler_config.json`.
      model_index: the parsed `model_index.json`, kept so that a saved folder names the same parts.
      carried: parts that nothing here computes with, such as the safety checker -> the folder (or
        file) that a saved pipeline gets an unchanged copy of.

    Class attributes:
      MODELS, TOKENIZERS: the parts that are one or the other.
      NOT_CARRIED: parts of diffusers' pipeline that this one does without, where none is carried.
    """

    unet: UNet2DConditionModel | Any
    vae: AutoencoderKL | Any
    text_encoder: CLIPTextModel | Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carried: Mapping[str, Path] = dataclasses.field(default_factory=dict, kw_only=True)

    MODELS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    TOKENIZERS: ClassVar[tuple[str, ...]] = ("tokenizer",)
    NOT_CARRIED: ClassVar[tuple[str, ...]] = (
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    )

    force_zeros_for_empty_prompt: ClassVar[bool] = False  # of SDXL, where its folder says so

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents that the UNet was made for.

        Raises:
          ValueError: it denoises something other than latents (an inpainting model).
        """
        config = self.unet.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"A text-to-image UNet maps latents to latents: in_channels={config.in_channels} "
                f"and out_channels={config.out_channels} must be equal. Models that read more than "
                "latents, such as those for inpainting, are converted, but not drawn with or "
                "trained."
            )
        height, width = config.latent_size
        return height, width, config.in_channels

    @property
    def prompt_encoder(self) -> Any:
        """What turns token ids into what the UNet reads: the text encoder, or None without one."""
        return self.text_encoder

    def with_prompt_encoder(self, encoder: Any) -> "StableDiffusionPipeline":
        """The pipeline with another one."""
        return dataclasses.replace(self, text_encoder=encoder)


class TokenError(ConceptaxError, ValueError):
    """A token that cannot be added to a tokenizer."""


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
    for token, names in _vectors(tokenizer).items():
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


def expanded(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with every word of several vectors spelt out, as diffusers reads them.

    Of a textual inversion of n vectors the tokenizer has `<t>`, `<t>_1`, ..., and a prompt names
    the first one alone. Every occurrence of its text is replaced, so this is done once and last.
    """
    vectors = {token: " ".join(names) for token, names in _vectors(tokenizer).items()}
    prompts = list(prompts)
    for number, prompt in enumerate(prompts if vectors else ()):
        for token in dict.fromkeys(tokenizer.tokenize(prompt)):
            prompts[number] = prompts[number].replace(token, vectors.get(token) or token)
    return prompts


def _vectors(tokenizer: Any) -> dict[str, list[str]]:
    """Added tokens of several vectors -> the names of all of them."""
    added = getattr(tokenizer, "added_tokens_encoder", {})
    vectors = {}
    for token in added:
        names = [token]
        while f"{token}_{len(names)}" in added:
            names.append(f"{token}_{len(names)}")
        if len(names) > 1:
            vectors[token] = names
    return vectors


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The ids of added tokens.

    Raises:
      TokenError: the tokenizer does not read one of them as a single token.
    """
    ids = []
    for token in tokens:
        index = tokenizer.convert_tokens_to_ids(token)
        read = tokenizer(f"a {token} a", add_special_tokens=False)["input_ids"]
        if len(read) != 3 or read[1] != index:
            raise TokenError(
                f"the tokenizer does not read {token!r} as one token: choose a name in angle "
                "brackets and lower case, such as '<new1>'."
            )
        ids.append(index)
    return ids
