"""Published speed-ups end to end, to hold the simulator against.

arXiv 2504.16922, on a B200: FLUX.1-dev at 4K (table 6), Cosmos-Predict1 7B and HunyuanVideo. By the
name of a preset: stride; FLOP-wise, NATTENSim and actual, with all steps sparse and after the dense
ones.
"""

import statistics

from conceptax.kernels.gna.presets import PRESETS, Preset
from conceptax.kernels.gna.simulator import simulate_model
from conceptax.kernels.gna.simulator.whole_model import speedups

PUBLISHED = {
    "flux-4k": [
        ((1, 1), (1.88, 1.76, 1.65), (1.46, 1.42, 1.37)),
        ((16, 1), (1.88, 1.84, 1.72), (1.46, 1.45, 1.40)),
        ((16, 16), (1.88, 1.88, 1.82), (1.46, 1.46, 1.45)),
    ],
    "cosmos-56": [
        ((1, 1, 1), (1.50, 1.35, 1.18), (1.28, 1.21, 1.11)),
        ((1, 8, 1), (1.50, 1.42, 1.20), (1.28, 1.24, 1.12)),
        ((1, 1, 16), (1.50, 1.42, 1.21), (1.28, 1.24, 1.13)),
        ((1, 8, 16), (1.50, 1.50, 1.46), (1.28, 1.28, 1.26)),
    ],
    "cosmos-89": [
        ((1, 1, 1), (2.10, 1.90, 1.76), (1.52, 1.45, 1.40)),
        ((1, 8, 1), (2.10, 1.96, 1.79), (1.52, 1.48, 1.40)),
        ((1, 1, 16), (2.10, 2.05, 1.88), (1.52, 1.51, 1.44)),
        ((1, 8, 16), (2.10, 2.10, 2.05), (1.52, 1.52, 1.50)),
    ],
    "hunyuan-58": [
        ((1, 1, 1), (1.55, 1.21, 1.15), (1.33, 1.14, 1.08)),
        ((1, 1, 8), (1.55, 1.44, 1.26), (1.33, 1.27, 1.15)),
        ((1, 32, 8), (1.55, 1.55, 1.53), (1.33, 1.33, 1.30)),
    ],
    "hunyuan": [
        ((1, 1, 1), (2.23, 1.73, 1.73), (1.63, 1.42, 1.42)),
        ((2, 1, 1), (2.23, 1.78, 1.77), (1.63, 1.44, 1.44)),
        ((1, 1, 8), (2.23, 1.99, 1.95), (1.63, 1.53, 1.51)),
        ((2, 1, 8), (2.23, 2.02, 1.98), (1.63, 1.55, 1.54)),
        ((1, 8, 8), (2.23, 2.17, 2.09), (1.63, 1.61, 1.58)),
        ((2, 8, 8), (2.23, 2.20, 2.11), (1.63, 1.62, 1.59)),
        ((16, 8, 8), (2.23, 2.23, 2.23), (1.63, 1.63, 1.63)),
    ],
}
ROWS = [(name, *row) for name, rows in PUBLISHED.items() for row in rows]


def predicted(name, stride):
    """End to end as the paper counts, by what is counted: all steps sparse, and after the dense."""
    attention = Preset(PRESETS[name].window, stride)
    result = simulate_model(name, attention=attention, mask_every_tile=True, gpu="b200")
    share = result.preset.attention_share
    return {
        counted: [
            result.end_to_end(speedup, share, all_steps=all_steps) for all_steps in (True, False)
        ]
        for counted, speedup in speedups(result.image_alone).items()
    }


def typical_error() -> float:
    """Median of how far the predictions of the actual figures are off, as a share of these."""
    return statistics.median(
        abs(found / row[2] - 1)
        for name, stride, *published in ROWS
        for found, row in zip(
            predicted(name, stride)["kernel and permutation"], published, strict=True
        )
    )
