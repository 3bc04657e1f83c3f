"""Vocabularies against the published counts, label maps against plain loops over torch's resize."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float
from segmentation_oracles import random_model

from conceptax.flax_models.convnext import ConvNeXtConfig
from conceptax.flax_models.layers.bilinear import resize
from conceptax.flax_models.open_clip import OpenCLIP, OpenCLIPConfig, OpenCLIPTextConfig
from conceptax.methods.glyphs.tokenizer import MAX_LENGTH, build_tokenizer
from conceptax.methods.segmentation import inference
from conceptax.methods.segmentation.inference import (
    ImageSizes,
    class_scores,
    panoptic_map,
    semantic_labels,
)
from conceptax.methods.segmentation.vocabulary import (
    TEMPLATES,
    Vocabulary,
    text_rows,
    tokenize,
)

COUNTS = {
    "coco_stuff": (171, 328),
    "coco_panoptic": (133, 254),
    "ade20k_150": (150, 403),
    "ade20k_847": (847, 1342),
    "pascal_ctx_459": (459, 559),
    "pascal_ctx_59": (59, 160),
    "pascal_voc_21": (20, 79),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_vocabularies(name, repository):
    path = repository.parent / f"shared/data/vocabularies/{name}_with_prompt_eng.txt"
    if not path.exists():
        pytest.skip("the published class files are not beside the repository")
    vocabulary = Vocabulary.read(path)
    assert (len(vocabulary), len(vocabulary.rows)) == COUNTS[name]
    if name == "pascal_voc_21":
        assert Vocabulary.read(path, background=True).classes[0][0] == "background"
    else:
        assert Vocabulary.read(path, background=True) == vocabulary


def test_the_fourteen_sentences():
    assert len(set(TEMPLATES)) == 14
    assert sum(template.endswith(".") for template in TEMPLATES) == 10
    for sentence in (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is the {} in the scene",
        "a photo of a small {}.",
        "This is a photo of a medium {}.",
        "There is a large {} in the scene.",
    ):
        assert sentence in TEMPLATES


def test_vocabulary_of_a_command_line(tmp_path):
    vocabulary = Vocabulary.parse("cat; sofa, couch,settee ;wall;")
    assert vocabulary.classes == (("cat",), ("sofa", "couch", "settee"), ("wall",))
    assert vocabulary.rows == ("cat", "sofa", "couch", "settee", "wall")
    np.testing.assert_array_equal(vocabulary.synonyms(), [[0, 0, 0], [1, 2, 3], [4, 4, 4]])
    (tmp_path / "classes.txt").write_text(
        "0:invalid_class_id\n1:cat\n2:sofa, couch,settee\n3:wall\n"
    )
    assert Vocabulary.read(tmp_path / "classes.txt") == vocabulary
    for text, message in (
        (" ; ", "at least one class"),
        ("cat; sofa,,couch", r"class 1 has an empty name among \['sofa', '', 'couch'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Vocabulary.parse(text)
    (tmp_path / "wrong.txt").write_text("1:cat\nsofa\nx:wall\n")
    with pytest.raises(ValueError, match=r"received line 2 'sofa', line 3 'x:wall'\."):
        Vocabulary.read(tmp_path / "wrong.txt")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_padding_behind_the_text(tokenizer):
    ids = tokenize(tokenizer, ["three", "three " * 40], MAX_LENGTH)
    end = tokenizer.eos_token_id
    length = len(tokenizer("three")["input_ids"])
    assert ids[0, length - 1] == ids[1, -1] == end
    assert not ids[0, length:].any()
    assert ids.shape == (2, MAX_LENGTH)


def test_text_rows(tokenizer):
    """One row per synonym, whatever the number of prompts; the mean direction of its sentences."""
    text = OpenCLIPTextConfig(8, 2, 1, len(tokenizer), MAX_LENGTH)
    trunk = ConvNeXtConfig((1, 1, 1, 1), (4, 4, 4, 4))
    config = OpenCLIPConfig(text, trunk, embed_dim=6)
    clip = random_model(lambda rngs: OpenCLIP(config, rngs=rngs))
    vocabulary = Vocabulary.parse("three, trio; brick; " + "; ".join("abcdefgh"))
    rows = text_rows(clip, tokenizer, vocabulary)  # 11 * 14 prompts: more than a chunk
    assert rows.shape == (11, 6)
    for place in (0, 1, 10):
        prompts = [template.format(vocabulary.rows[place]) for template in TEMPLATES]
        graphdef, state = nnx.split(clip)
        ids = jnp.asarray(tokenize(tokenizer, prompts, MAX_LENGTH))
        embeddings = np.asarray(jax.jit(nnx.merge(graphdef, state).encode_text)(ids))
        mean = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(rows[place], mean / np.linalg.norm(mean), atol=1e-5)


def test_text_rows_are_kept(tokenizer, tmp_path):
    text = OpenCLIPTextConfig(8, 2, 1, len(tokenizer), MAX_LENGTH)
    trunk = ConvNeXtConfig((1, 1, 1, 1), (4, 4, 4, 4))
    config = OpenCLIPConfig(text, trunk, embed_dim=6)
    clip = random_model(lambda rngs: OpenCLIP(config, rngs=rngs))
    vocabulary, templates = Vocabulary.parse("three; brick"), TEMPLATES[:2]
    options = {"templates": templates, "cache": tmp_path / "rows"}
    first = text_rows(clip, tokenizer, vocabulary, **options)
    (file,) = (tmp_path / "rows").iterdir()
    np.save(file, np.asarray(first) + 1)  # what is there is taken
    np.testing.assert_array_equal(text_rows(clip, tokenizer, vocabulary, **options), first + 1)
    clip.visual.head.proj.kernel.set_value(clip.visual.head.proj.kernel[...] + 1)
    np.testing.assert_array_equal(text_rows(clip, tokenizer, vocabulary, **options), first + 1)
    clip.text_projection.set_value(2 * clip.text_projection[...])  # another tower
    np.testing.assert_allclose(text_rows(clip, tokenizer, vocabulary, **options), first, atol=1e-5)
    text_rows(clip, tokenizer, Vocabulary.parse("three; grass"), **options)
    assert len(list((tmp_path / "rows").iterdir())) == 3


# ---- label maps ----

SIZES = ImageSizes(padded=(32, 64), size=(30, 51), original=(45, 70))
QUERIES, CLASSES = 9, 4


def interpolate(torch, x, size):
    x = torch.tensor(x)[None]
    out = torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return out[0].numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def outputs(seed):
    rng = np.random.default_rng(seed)
    inside, outside = 3 * rng.normal(size=(2, QUERIES, CLASSES + 1))
    # Each of 2x4 blocks belongs to one query, some to two.
    owns = rng.integers(QUERIES, size=(2, 4)) == np.arange(QUERIES)[:, None, None]
    owns |= rng.random(owns.shape) < 0.05
    masks = np.repeat(np.repeat(np.where(owns, 4.0, -4.0), 4, 1), 4, 2)
    masks += rng.normal(size=masks.shape)
    return (x.astype(np.float32) for x in (inside, outside, masks))


def expected_scores(inside, outside):
    void = softmax(inside)[:, -1:]
    scores = np.concatenate([softmax(outside[:, :-1]) * (1 - void), void], axis=1)
    return softmax(np.log(scores + 1e-8))  # as the authors' code has it


@functools.partial(jax.jit, static_argnums=2)
def semantic_scores(
    scores: Float[Array, "Q C"], mask_logits: Float[Array, "Q h w"], sizes: ImageSizes
) -> Float[Array, "H W K"]:
    """How much each class is at each pixel of the original image: its argmax is the label map."""
    masks = jax.nn.sigmoid(resize(mask_logits, sizes.padded))
    rows, columns = sizes.size
    maps = jnp.einsum("qk,qhw->hwk", scores[:, :-1], masks[:, :rows, :columns])
    return resize(maps, sizes.original, axis=0)


@pytest.mark.parametrize("seed", range(2))
def test_semantic_map(seed, torch):
    inside, outside, masks = outputs(seed)
    scores = class_scores(jnp.asarray(inside), jnp.asarray(outside))
    expected = expected_scores(inside, outside)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    received = semantic_scores(scores, jnp.asarray(masks), SIZES)
    full = sigmoid(interpolate(torch, masks, SIZES.padded))
    maps = np.einsum("qk,qhw->khw", expected[:, :-1], full)
    maps = interpolate(torch, maps[:, :30, :51], SIZES.original)
    np.testing.assert_allclose(received, maps.transpose(1, 2, 0), atol=2e-5)


def test_labels_are_found_in_bands(monkeypatch, torch):
    """The same classes as from the scores of all pixels at once, and void where all are low."""
    inside, outside, masks = outputs(3)
    scores = class_scores(jnp.asarray(inside), jnp.asarray(outside))
    arguments = scores, jnp.asarray(masks), SIZES
    votes = np.asarray(semantic_scores(*arguments))
    sure = np.ptp(np.sort(votes, axis=-1)[..., -2:], axis=-1) > 1e-4
    monkeypatch.setattr(inference, "_BAND", 7 * 70 * QUERIES)  # 7 rows of 45
    least = float(np.median(votes.max(-1)))
    received = np.asarray(semantic_labels(*arguments, least))
    expected = np.where(votes.max(-1) >= least, votes.argmax(-1), CLASSES)
    clear = sure & (np.abs(votes.max(-1) - least) > 1e-4)
    np.testing.assert_array_equal(received[clear], expected[clear])
    assert 0.4 < (received == CLASSES).mean() < 0.6 and clear.mean() > 0.95

    full = interpolate(torch, masks, SIZES.padded)[:, :30, :51]
    full = sigmoid(interpolate(torch, full, SIZES.original))
    votes = np.einsum("qk,qhw->hwk", np.asarray(scores)[:, :-1], full)
    sure = np.ptp(np.sort(votes, axis=-1)[..., -2:], axis=-1) > 1e-4
    first = np.asarray(semantic_labels(*arguments, 0.0, True))
    np.testing.assert_array_equal(first[sure], votes.argmax(-1)[sure])


def panoptic_by_loops(torch, scores, masks, things):
    """Ids, their classes, and how many queries were refused or joined to stuff of their class."""
    full = interpolate(torch, masks, SIZES.padded)[:, :30, :51]
    full = sigmoid(interpolate(torch, full, SIZES.original))
    kept = [q for q in range(QUERIES) if scores[q].argmax() < CLASSES and scores[q].max() > 0.2]
    value = np.stack([scores[q].max() * full[q] for q in kept])
    ids, known, refused, joined = np.zeros(SIZES.original, int), {}, 0, 0
    for place, q in enumerate(kept):
        won, own = value.argmax(0) == place, full[q] >= 0.5
        if not (won.sum() and own.sum() and (won & own).sum()) or won.sum() / own.sum() < 0.7:
            refused += 1
            continue
        category = int(scores[q].argmax())
        stuff = [i for i, c in known.items() if c == category and c not in things]
        joined += bool(stuff)
        if not stuff:
            known[len(known) + 1] = category
        ids[won & own] = stuff[0] if stuff else len(known)
    return ids, known, refused, joined


def test_panoptic_map(torch):
    things, seen = {0, 1}, np.zeros(3, int)
    for seed in range(8):
        inside, outside, masks = outputs(seed)
        inside[:, -1] -= 2  # fewer queries are void
        scores = expected_scores(inside, outside).astype(np.float32)
        ids, segments = panoptic_map(jnp.asarray(scores), jnp.asarray(masks), SIZES, things)
        expected, known, refused, joined = panoptic_by_loops(torch, scores, masks, things)
        assert {i: segment.category for i, segment in segments.items()} == known
        np.testing.assert_array_equal(ids, expected)
        assert set(np.unique(ids)) - {0} == set(segments)
        seen += (len(known), refused, joined)
    assert (seen > (15, 3, 3)).all(), seen  # every case came up


def test_nothing_but_void():
    scores = jnp.zeros((3, CLASSES + 1)).at[:, -1].set(1.0)
    ids, segments = panoptic_map(scores, jnp.ones((3, 8, 16)), SIZES, {0})
    assert not ids.any()
    assert segments == {}
