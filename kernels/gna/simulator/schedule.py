"""GPU time of thread blocks: list scheduling, and its constants fitted to runs.

A thread block (CTA) works off one query tile of one head: it costs `launch + step * (tiles + mask *
masked tiles)`, and a GPU starts the blocks in order, each on the first free slot.
"""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import nnls

from ..presets import TileClass, Tiles
from ..problem import per_dimension


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """What the prediction needs to know of a GPU and of the kernel that runs on it.

    Attributes:
      processors: streaming multiprocessors.
      bandwidth: bytes read plus written in a second by a copy.
      step: seconds that a block of 128 queries takes per 128 keys of 128 channels, without a mask.
      launch: seconds that a block takes before and after its tiles.
      mask: what masking adds to a tile's time, as a share.
      slots: blocks that a multiprocessor runs at a time; `step` is then that of one among them.
      tiles: (query tile, key tile) shapes by rank that kernels for head dimension 128 offer.
      tile_class: of a preset's tiles.
    """

    processors: int
    bandwidth: float
    step: float
    launch: float
    mask: float
    slots: int = 1
    tiles: Mapping[int, Sequence[Tiles]] = dataclasses.field(default_factory=dict, repr=False)
    tile_class: TileClass = "hopper"


HOPPER_TILES = {
    1: (((128,), (128,)),),
    2: (((16, 8), (16, 8)),),
    3: (((4, 4, 8), (4, 4, 8)), ((2, 8, 8), (2, 8, 8))),
}
BLACKWELL_TILES = {
    1: (((256,), (128,)),),
    2: (((16, 16), (16, 8)),),
    3: (((8, 4, 8), (4, 4, 8)), ((4, 8, 8), (2, 8, 8))),
}
# step, launch and mask are fitted to NATTEN's published times on H100 and B200, which they meet
# within 9 % (docs/gna_simulator.md); an H200 computes as an H100 does. An A100's step is assumed
# for 200 TFLOP/s, all else to be as on an H100. Bandwidths are nine tenths of the data sheets'.
GPUS = {
    "a100": Gpu(108, 1.8e12, 4.53e-6, 3.0e-6, 0.57, tiles=HOPPER_TILES),
    "h100": Gpu(132, 3.0e12, 1.69e-6, 3.0e-6, 0.57, tiles=HOPPER_TILES),
    "h200": Gpu(132, 4.3e12, 1.69e-6, 3.0e-6, 0.57, tiles=HOPPER_TILES),
    "b200": Gpu(
        *(148, 7.2e12, 0.96e-6, 6.9e-6, 0.51), tiles=BLACKWELL_TILES, tile_class="blackwell"
    ),
}


def find_gpu(gpu: str | Gpu) -> Gpu:
    """A GPU by name, or the given one."""
    if isinstance(gpu, Gpu):
        return gpu
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, received {gpu!r}.")
    return GPUS[gpu]


def tile_options(
    gpu: Gpu,
    rank: int,
    query_tile: int | Sequence[int] | None,
    key_tile: int | Sequence[int] | None,
) -> Sequence[Tiles]:
    """The tile shapes asked for, or all that kernels on the GPU offer."""
    if query_tile is None and key_tile is None:
        return gpu.tiles[rank]
    if query_tile is None or key_tile is None:
        raise ValueError(
            f"query_tile and key_tile come together, received query_tile={query_tile} and "
            f"key_tile={key_tile}."
        )
    query = per_dimension("query_tile", query_tile, rank)
    return ((query, per_dimension("key_tile", key_tile, rank)),)


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """The work of a launch's blocks, in the order in which they start.

    `steps` and `masked` count key tiles per block, in units of 128 x 128 pairs of 128 channels;
    the launch repeats them `repeats` times (batch and heads).
    """

    steps: Float[np.ndarray, " blocks"]
    masked: Float[np.ndarray, " blocks"]
    repeats: int = 1

    def seconds(self, gpu: Gpu) -> float:
        """Time from the first block's start to the last one's end."""
        return float(_seconds(self.critical_work(gpu)[None], gpu)[0])

    def critical_work(self, gpu: Gpu) -> Float[np.ndarray, "3"]:
        """Blocks, steps and masked steps of the slot that finishes last."""
        work = np.stack([np.ones_like(self.steps), self.steps, self.masked], axis=1)
        slots = gpu.processors * gpu.slots
        if (work == work[0]).all():
            return -(-len(work) * self.repeats // slots) * work[0]
        owner = _first_free(np.tile(_seconds(work, gpu), self.repeats), slots)
        loads = np.stack(
            [np.bincount(owner, np.tile(column, self.repeats), slots) for column in work.T], axis=1
        )
        return loads[np.argmax(_seconds(loads, gpu))]


def fit(runs: Sequence[tuple[Blocks, float]], gpu: Gpu) -> Gpu:
    """The GPU with `step`, `launch` and `mask` that explain measured runs best.

    A slot's time is linear in (launch, step, step * mask), but which slot finishes last depends on
    them: so the non-negative least-squares problem (in relative errors) and the schedule alternate.

    Args:
      runs: the blocks of a launch and its seconds; at least three that differ in kind, such as a
        dense, a block-sparse and a stride-1 problem.
      gpu: supplies everything else, and where to begin.

    Raises:
      ValueError: fewer than three runs, a time that is not positive, or runs too alike.
    """
    seconds = np.array([time for _, time in runs], float)
    if len(runs) < 3 or not (seconds > 0).all():
        raise ValueError(
            f"a fit needs at least three runs with positive times, received {seconds.tolist()}."
        )
    best, best_error = gpu, np.inf
    for _ in range(20):
        work = np.stack([blocks.critical_work(gpu) for blocks, _ in runs]) / seconds[:, None]
        if np.linalg.matrix_rank(work / np.abs(work).max(axis=0).clip(1e-300), 1e-6) < 3:
            raise ValueError(
                "the runs do not tell launch, step and mask apart: measure a dense, a block-sparse "
                "and a masked (stride 1) problem."
            )
        launch, step, masking = nnls(work, np.ones(len(runs)))[0]
        if step == 0:
            raise ValueError(f"the times {seconds.tolist()} do not grow with the tiles visited.")
        gpu = dataclasses.replace(gpu, step=step, launch=launch, mask=masking / step)
        predicted = np.array([blocks.seconds(gpu) for blocks, _ in runs])
        error = float(np.square(predicted / seconds - 1).sum())
        if error >= best_error:
            break
        best, best_error = gpu, error
    return best


def end_to_end_speedup(
    attention_share: float, relative_time: float, *, replaced: float = 1.0, permutation: float = 0.0
) -> float:
    """Amdahl's law: how much faster a model runs whose attention became sparse.

    Args:
      attention_share: of the dense model's run time.
      relative_time: mean of sparse over dense time of the attention calls that are replaced.
      replaced: share of attention calls (layers x steps) that are replaced.
      permutation: time of token permutation over the dense attention's time.

    Raises:
      ValueError: a share is not between 0 and 1.
    """
    _check_shares(attention_share=attention_share, replaced=replaced)
    attention = 1 - replaced + replaced * relative_time + permutation
    return 1 / (1 - attention_share + attention_share * attention)


def attention_share_of(
    end_to_end: float, relative_time: float, *, replaced: float = 1.0, permutation: float = 0.0
) -> float:
    """The attention share that explains a measured end-to-end speed-up: Amdahl's law inverted.

    Raises:
      ValueError: no share between 0 and 1 does.
    """
    saved = 1 - (1 - replaced + replaced * relative_time + permutation)
    share = (1 - 1 / end_to_end) / saved if saved else np.inf
    if not 0 <= share <= 1:
        raise ValueError(
            f"no attention share explains {end_to_end}x end to end where attention itself takes "
            f"{1 - saved:.3g} of its dense time."
        )
    return share


def scaled_share(attention_share: float, tokens_ratio: float) -> float:
    """The attention share with `tokens_ratio` times the tokens: share / (1 - share) grows so."""
    _check_shares(attention_share=attention_share)
    odds = attention_share * tokens_ratio
    return odds / (odds + 1 - attention_share)


def _seconds(work: Float[np.ndarray, "rows 3"], gpu: Gpu) -> Float[np.ndarray, " rows"]:
    """Of blocks, steps and masked steps; a matrix product would round as the machine does."""
    blocks, steps, masked = work.T
    return blocks * gpu.launch + steps * gpu.step + masked * (gpu.step * gpu.mask)


def _first_free(costs: Float[np.ndarray, " blocks"], slots: int) -> Int[np.ndarray, " blocks"]:
    """The slot that each block runs on, if blocks start in order on the first slot that is free."""
    ready = [(0.0, slot) for slot in range(slots)]
    owner = np.empty(len(costs), int)
    for n, cost in enumerate(costs.tolist()):
        time, slot = ready[0]
        owner[n] = slot
        heapq.heapreplace(ready, (time + cost, slot))
    return owner


def _check_shares(**shares: float) -> None:
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, received {value}.")
