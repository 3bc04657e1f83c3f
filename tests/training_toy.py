"""A toy model and step for the training tests; also a program that gets itself killed.

    python training_toy.py CHECKPOINTS SIGNAL_NAME STEP

trains ten steps, saving every third, and sends itself the signal when it asks for batch STEP. It
says "begun" on stderr, and waits TOY_SECONDS_PER_BATCH of the environment before each batch.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from conceptax.methods import training

OPTIMIZER = optax.adamw(3e-2)
NUM_STEPS = 10


class Toy(nnx.Module):
    """Two linear layers with a frozen scale; `layers` gives integer path components."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(8, 256, rngs=rngs), nnx.Linear(256, 8, rngs=rngs)])
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](jnp.tanh(self.layers[0](x))) * self.scale[...]


def step(static, state, frozen, batch, key):
    """Regress a batch (or noise made here, if there is none) onto itself, plus noise."""
    noise = training.constrain_batch(jax.random.normal(key, (16, 8)))
    batch = noise if batch is None else batch["x"] + 0.1 * noise

    def loss(params):
        return jnp.mean((nnx.merge(static, params, frozen)(batch) - batch) ** 2)

    value, gradients = jax.value_and_grad(loss)(state.params)
    return training.apply_gradients(state, gradients, OPTIMIZER), {"loss": value}


def start():
    """``(graphdef, state, frozen)`` of a fresh toy."""
    graphdef, params, frozen = training.split_trainable(Toy(nnx.Rngs(0)), exclude="scale")
    return graphdef, training.init_state(params, OPTIMIZER), frozen


def batches(first: int = 0, poison: int | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, each a function of its number; batch `poison` holds a NaN."""
    while True:
        x = np.random.default_rng(first).normal(size=(16, 8)).astype(np.float32)
        if first == poison:
            x[3, 4] = np.nan
        yield {"x": x}
        first += 1


def run(**options):
    """Train the toy on `batches`; `options` go to `train`."""
    graphdef, state, frozen = start()
    defaults = {"batches": batches(), "num_steps": NUM_STEPS, "progress": False}
    return training.train(
        step, graphdef, state, frozen, key=jax.random.key(1), **(defaults | options)
    )


def _killed_at(signum: int, number: int) -> Iterator[dict[str, np.ndarray]]:
    wait = float(os.environ.get("TOY_SECONDS_PER_BATCH", "0"))
    for n, batch in enumerate(batches()):
        if n == 2:  # until the first step is done, a signal ends the process at once
            print("begun", file=sys.stderr, flush=True)
        if n == number:
            os.kill(os.getpid(), signum)
        time.sleep(wait)
        yield batch


if __name__ == "__main__":
    folder, name, number = sys.argv[1:]
    run(
        batches=_killed_at(getattr(signal, name), int(number)),
        checkpoint_dir=folder,
        checkpoint_every=3,
    )
