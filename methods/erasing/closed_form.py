"""Closed-form edits of cross-attention: which states are paired, and projections rewritten.

UCE, RECE and the refinement of MACE move the key and value projections W so that states of a
concept are projected as those of its anchor, and others as before:

    min_W'  s_e S |W' c_i - W c_i*|^2 + s_p S |W' c_j - W c_j|^2 + l |W' - W|^2

for states c_i of the concepts, c_i* of the anchor, and c_j to preserve.  As both targets are linear
in W, the solution is W' = W M with one d x d matrix M for all layers (`edit_matrix`).  S are means
here and sums in the papers, so that the weights do not depend on how many phrases there are.

Which token's state stands for a phrase: all from its last token to the end of the context, the
concept's and the anchor's aligned at that token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...flax_models.clip import pooling_positions
from ...flax_models.pipelines.stable_diffusion import StableDiffusionPipeline
from ..settings import check_settings
from ..text.phrases import PhraseSettings, TemplatedConcepts, hidden_states
from ..training import dotted, path_filter

# A projection's path and its W [out, in] in float64 -> W'.
Rewrite = Callable[[str, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class EditSettings(PhraseSettings):
    """The settings of edits in closed form.

    Attributes:
      edited: patterns of the UNet's projections that are rewritten.
      regularization: weight of staying at the old projections (l), relative to the mean squared
        entry of the retained states.
      frames: in how many templates each retained phrase is put, besides being retained bare.
    """

    edited: tuple[str, ...] = ("*.attn2.to_k", "*.attn2.to_v")
    regularization: float = 0.01
    frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, least={"frames": 0})
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
    """M of W' = W M (see above), in float64.

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


def mean_square(moment: Float[np.ndarray, "D D"]) -> float:
    """The mean squared entry of states, from their second moment."""
    return float(np.trace(moment)) / len(moment)


def rewritten(
    unet: nnx.Module, patterns: Sequence[str], width: int, rewrite: Rewrite
) -> nnx.Module:
    """A UNet with its chosen projections rewritten.

    Args:
      unet: the model; it stays as it is.
      patterns: of the projections.
      width: of the text states that they read.
      rewrite: gives W' of a projection.

    Raises:
      ValueError: a pattern that matches nothing, or what reads no text states.
    """
    graphdef, state = nnx.split(unet)
    params = nnx.to_pure_dict(state)
    chosen = path_filter(tuple(patterns), among=params)

    def edit(path: tuple[Any, ...], leaf: Array) -> Array:
        if not chosen(path, leaf):
            return leaf
        if leaf.ndim != 2 or leaf.shape[0] != width:
            raise ValueError(
                f"{dotted(path)} of shape {leaf.shape} reads no text states of width {width}; "
                "`edited` takes key and value projections of attn2."
            )
        kernel = np.asarray(leaf, np.float64)  # [in, out]: W transposed
        return jnp.asarray(rewrite(dotted(path), kernel.T).T, leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(edit, params))


def paired_states(
    pipeline: StableDiffusionPipeline, prompts: TemplatedConcepts, *, itself: bool = True
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "N D"]]:
    """States c_i of the concepts' prompts and c_i* of the same prompts with the anchor.

    Paired from the concept's last token (and the anchor's; without one, the token before it) to the
    end of the context, which the longer of the two prompts reaches first; without the concept
    `itself` from the token after it.
    """
    encoder, length = pipeline.prompt_encoder, prompts.tokens.shape[-1]
    pair = [rows.reshape(-1, length) for rows in (prompts.tokens, prompts.without)]
    concept, anchor = (np.asarray(hidden_states(encoder, rows)) for rows in pair)
    end, without = (pooling_positions(encoder.config, jnp.asarray(rows)) for rows in pair)
    places = prompts.concept.reshape(-1, length)
    last = length - 1 - np.argmax(places[:, ::-1], axis=1)
    row, position = np.nonzero(np.arange(length) >= last[:, None] + (not itself))
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
