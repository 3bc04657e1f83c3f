"""conceptax erases, learns and locates visual concepts in JAX.

The rooms of the house, each imported on its own so that this module stays light:

* `conceptax.flax_models`: what computes. NNX modules, one architecture per file.
* `conceptax.methods`: what trains. Losses, pure steps, samplers, data, the training loop.
* `conceptax.kernels`: what is fast.
* `conceptax.converters`: what travels. PyTorch weights in and out.
* `conceptax.cli`: the `conceptax` command.
"""

__version__ = "0.1.0"
