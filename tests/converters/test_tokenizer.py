"""Tokenizers: CLIP's own, from what comes with the package."""

import pytest

from conceptax.converters.tokenizer import (
    CLIP_TOKENS,
    clip_tokenizer,
    read_tokenizer,
    write_tokenizer,
)

# Ids of OpenAI's tokenizer, as published implementations give them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A Café, it's   12 dogs!": [320, 15304, 267, 585, 568, 272, 273, 3255, 256],
    "<new1>": [283, 686, 272, 285],
}


def test_clips_own_tokenizer():
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == CLIP_TOKENS == 49408 and tokenizer.model_max_length == 77
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == [49406, *ids, 49407]


@pytest.mark.parametrize(("pad", "index"), [("<|endoftext|>", 49407), ("!", 0)])
def test_it_pads_as_its_model_learnt(pad, index, tmp_path):
    write_tokenizer(clip_tokenizer(pad), tmp_path)
    for tokenizer in (clip_tokenizer(pad), read_tokenizer(tmp_path)):
        ids = tokenizer("a cat", padding="max_length").input_ids
        assert ids == [49406, 320, 2368, 49407, *[index] * 73]
