"""Models with random values and no initialization to compile; or sizes alone."""

import numpy as np
from flax import nnx

from conceptax.converters.files.safetensors_file import StoredTensor
from conceptax.converters.parameters import OneKey, fill
from conceptax.converters.tensors import tensor_specs, variables


def sizes(model_class, config):
    """A model of shapes only."""
    rngs = OneKey()
    return nnx.eval_shape(lambda: model_class(config, rngs=rngs))


def filled(model_class, config, seed=0):
    """A model with normal values."""
    model, rng = sizes(model_class, config), np.random.default_rng(seed)
    stored = {
        spec.key: StoredTensor.of(np.asarray(rng.standard_normal(spec.shape), np.float32))
        for spec in tensor_specs(model)
    }
    fill(model, stored, source="random values")
    return model


def weights(model):
    """Key -> values in PyTorch's layout."""
    slots = variables(model)
    return {
        spec.key: spec.to_torch(np.asarray(slots[spec.path].get_value()))
        for spec in tensor_specs(model)
    }
