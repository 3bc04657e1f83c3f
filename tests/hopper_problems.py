"""What tests of the kernels for sm_90a share: shapes of tiles, and how instructions are spoiled."""

from hopper_machine import EmulatorError

from conceptax.kernels.gna.cuda import LEAST_SEEN
from conceptax.kernels.gna.tiles import shapes_of

ROWS = 128

# How each instruction is spoiled; what the numbers say is in `hopper_emulator.h`. Columns of a
# product's operand in registers come of more than one panel, those of another's never.
CHANGES = {
    "wait": [1],
    "arrive": [1],
    "arrive_expecting": [-128, 128],
    "start_barrier": [1, -1],
    "publish_barriers": [1],
    "block_barrier": [1],
    "copy_box": [1, 2, 3, 4, 5, 6],
    "begin_products": [1],
    "end_group": [1],
    "wait_for_products": [1],
    "multiply_shared": [1, 2, 4, 5],
    "multiply_registers": [1, 2, 3, 4, 5],
    "meet": [1],
    "signal": [1],
    "give_registers": [1],
    "bit_range": [1, 2, 3],
}


def drawn_shapes(rng, case, *tokens):
    """A shape of so many tokens each, such as boxes may have."""
    shapes = (shapes_of(n, len(case["layout"])) for n in tokens)
    shapes = ([shape for shape in one if shape[-1] >= LEAST_SEEN] for one in shapes)
    return [one[rng.integers(len(one))] for one in shapes]


def missed(check, seeds, spoiled):
    """Whether a spoiled instruction shows in nothing."""
    for seed in seeds:
        try:
            check(seed, spoiled)
        except (EmulatorError, AssertionError):
            return False
    return True
