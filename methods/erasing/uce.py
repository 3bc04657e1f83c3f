"""UCE: erase concepts by rewriting the cross-attention projections in closed form.

Source: Gandikota et al. 2024, "Unified Concept Editing in Diffusion Models" (arXiv 2308.14761),
equation 7.  For every key and value projection W of the cross-attention, text states c_i of the
concepts with targets v_i* = W c_i* (c_i* the states of the anchor), and states c_j to preserve,

    W' = (s_e S v_i* c_i^T + s_p S W c_j c_j^T + l W) (s_e S c_i c_i^T + s_p S c_j c_j^T + l I)^-1

minimizes  s_e S |W' c_i - v_i*|^2 + s_p S |W' c_j - W c_j|^2 + l |W' - W|^2.  S are means here and
sums in the paper, so that the weights do not depend on how many phrases there are; l is the
regularization of the authors' code.  As both targets are linear in W, the solution is W' = W M with
one d x d matrix M for all layers (`edit_matrix`); nothing is trained.

Which token's state stands for a phrase: all from its last token to the end of the context, the
concept's and the anchor's aligned at that token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import check_settings
from ..text.phrases import PhraseSettings, Retained, TemplatedConcepts, hidden_states
from ..training import dotted, path_filter
from .common import erasing_prompts


@dataclasses.dataclass(frozen=True)
class UceConfig(PhraseSettings):
    """All settings of a UCE edit.

    Attributes:
      edited: patterns of the UNet's projections that are rewritten.
      erase_weight: weight of the concepts' states (s_e).
      preserve_weight: weight of the retained states (s_p).
      regularization: weight of staying at the old projections (lambda), relative to the mean
        squared entry of the retained states.
      frames: in how many templates each retained phrase is put, besides being retained bare.
    """

    edited: tuple[str, ...] = ("*.attn2.to_k", "*.attn2.to_v")
    erase_weight: float = 1.0
    preserve_weight: float = 1.0
    regularization: float = 0.01
    frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"preserve_weight": 0, "frames": 0}, positive=("erase_weight",))
        if not self.regularization > 0:
            raise ValueError(
                f"regularization must be positive, received {self.regularization}: without it the "
                "projections are not determined."
            )


def edit_matrix(
    concept: Float[np.ndarray, "N D"],
    anchor: Float[np.ndarray, "N D"],
    preserved: Float[np.ndarray, "D D"],
    *,
    erase_weight: float,
    preserve_weight: float,
    regularization: float,
) -> Float[np.ndarray, "D D"]:
    """M of W' = W M (equation 7, see above), in float64.

    Args:
      concept, anchor: states c_i and c_i*, one a row.
      preserved: mean of c_j c_j^T over the retained states.
      erase_weight, preserve_weight, regularization: s_e, s_p and l.
    """
    concept, anchor = concept.astype(np.float64), anchor.astype(np.float64)
    kept = preserve_weight * preserved + regularization * np.eye(concept.shape[1])
    weight = erase_weight / len(concept)
    before = weight * (anchor.T @ concept) + kept
    after = weight * (concept.T @ concept) + kept
    return np.linalg.solve(after, before.T).T  # `after` is symmetric


def erase(
    pipeline: StableDiffusionPipeline,
    concepts: Sequence[str],
    config: UceConfig | None = None,
    *,
    retain: Sequence[str] | Retained | None = None,
    seed: int = 0,
    **options: Any,
) -> StableDiffusionPipeline:
    """Erase concepts and return the pipeline with the edited UNet in its place.

    Arguments as of `erasing.erase`; options of the training loop are not used.

    Raises:
      ConceptError: no or unusable concepts, or nothing left to retain.
      ValueError: a pattern of projections that matches nothing.
    """
    del options
    config = config or UceConfig()
    prompts, retained = erasing_prompts(
        pipeline, concepts, config, retain, seed, frames=config.frames
    )
    concept, anchor = paired_states(pipeline, prompts)
    preserved = second_moment(pipeline, retained)
    matrix = edit_matrix(
        concept,
        anchor,
        preserved,
        erase_weight=config.erase_weight,
        preserve_weight=config.preserve_weight,
        regularization=config.regularization * float(np.trace(preserved)) / len(preserved),
    )
    return dataclasses.replace(pipeline, unet=_edited_unet(pipeline.unet, matrix, config.edited))


def _edited_unet(unet: nnx.Module, matrix: np.ndarray, patterns: Sequence[str]) -> nnx.Module:
    graphdef, state = nnx.split(unet)
    params = nnx.to_pure_dict(state)
    chosen = path_filter(tuple(patterns), among=params)

    def edit(path: tuple[Any, ...], leaf: Array) -> Array:
        if not chosen(path, leaf):
            return leaf
        if leaf.ndim != 2 or leaf.shape[0] != len(matrix):
            raise ValueError(
                f"{dotted(path)} of shape {leaf.shape} reads no text states of width "
                f"{len(matrix)}; `edited` takes key and value projections of attn2."
            )
        kernel = np.asarray(leaf, np.float64)  # [in, out]: W transposed
        return jnp.asarray(matrix.T @ kernel, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(edit, params))


def paired_states(
    pipeline: StableDiffusionPipeline, prompts: TemplatedConcepts
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N D"]]:
    """States c_i of the concepts' prompts and c_i* of the same prompts with the anchor.

    Paired from the concept's last token (and the anchor's; without one, the token before it) to the
    end of the context, which the longer of the two prompts reaches first.
    """
    encoder, length = pipeline.prompt_encoder, prompts.tokens.shape[-1]
    pair = [rows.reshape(-1, length) for rows in (prompts.tokens, prompts.without)]
    concept, anchor = (np.asarray(hidden_states(encoder, rows)) for rows in pair)
    end, without = (pooling_positions(encoder.config, jnp.asarray(rows)) for rows in pair)
    places = prompts.concept.reshape(-1, length)
    last = length - 1 - np.argmax(places[:, ::-1], axis=1)
    row, position = np.nonzero(np.arange(length) >= last[:, None])
    other = position - np.asarray(end - without)[row]
    inside = other < length  # an anchor longer than the concept
    return concept[row[inside], position[inside]], anchor[row[inside], other[inside]]


def second_moment(
    pipeline: StableDiffusionPipeline, rows: Int[np.ndarray, "N L"]
) -> Float[np.ndarray, "D D"]:
    """Mean of c c^T over all tokens of all rows, in float64; a chunk of rows at a time."""
    total = 0.0
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        states = np.asarray(hidden_states(pipeline.prompt_encoder, part), np.float64)
        flat = states.reshape(-1, states.shape[-1])
        total = total + flat.T @ flat
    return np.asarray(total) / rows.size
