"""What is built of a language model that is read before its end; parity is in `test_models.py`."""

import pytest
from flax import nnx

from conceptax.flax_models.layers.decoder import DecoderConfig
from conceptax.flax_models.llama import LlamaConfig, LlamaModel

CONFIG = LlamaConfig(
    vocab_size=9,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=5,
    num_attention_heads=2,
)


def built(read):
    return nnx.eval_shape(lambda: LlamaModel(CONFIG, read=read, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("read", "layers", "norm"),
    [(None, 3, False), ((-3, 0), 3, False), ((5,), 5, True), ((-1, 2), 5, True), ((-6,), 0, False)],
)
def test_layers_that_are_not_read_are_not_built(read, layers, norm):
    model = built(read)
    assert (len(model.layers), hasattr(model, "norm")) == (layers, norm)
    unread = {f"layers.{n}.*" for n in range(layers, 5)} | {"lm_head.weight"}
    assert set(model.pytorch_unread) == unread | (set() if norm else {"norm.weight"})


@pytest.mark.parametrize("read", [(), (6,), (-7,)])
def test_hidden_states_that_there_are_not(read):
    with pytest.raises(ValueError, match="numbers of hidden states from 0 to 5, the model's laye"):
        built(read)


def test_heads_follow_from_the_width_where_nothing_else_is_said():
    assert isinstance(CONFIG, DecoderConfig)
    assert (CONFIG.num_key_value_heads, CONFIG.head_dim) == (2, 4)
    raw = CONFIG.to_dict()
    assert raw["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    assert LlamaConfig.from_dict(raw) == CONFIG
    assert LlamaConfig.from_dict({**raw, "num_key_value_heads": None, "head_dim": None}) == CONFIG
