"""Concepts from files, the images people have, and the augmentation as a pipeline that resumes."""

import itertools
import json
import sys

import grain
import numpy as np
import pytest
from personalizing_toy import CELLS, SIZE, pictures, subject
from PIL import Image

from conceptax.methods.glyphs.tokenizer import build_tokenizer
from conceptax.methods.subjects.batches import (
    PREFIXES,
    augment,
    augmented,
    batches,
    cached,
    collect,
    square,
    to_unit,
)
from conceptax.methods.subjects.images import (
    Concept,
    ConceptListError,
    ImageError,
    class_word,
    read_concepts,
    read_image,
    read_images,
)

# Left half red, right half blue; a corner tells where the top is.
FLAG = np.zeros((8, 12, 3), np.uint8)
FLAG[:, :6], FLAG[:, 6:], FLAG[:2, :2] = (255, 0, 0), (0, 0, 255), (0, 255, 0)


# ---- reading ----


def test_an_image_is_read_as_its_viewer_shows_it(tmp_path):
    image = Image.fromarray(FLAG)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: to be shown 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), FLAG)

    image.quantize(4).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), FLAG)
    image.save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("RGB", (12, 8))])
    np.testing.assert_array_equal(read_image(tmp_path / "frames.gif"), FLAG)
    image.convert("CMYK").save(tmp_path / "cmyk.tiff")
    assert np.abs(read_image(tmp_path / "cmyk.tiff").astype(int) - FLAG).max() <= 2

    gray = np.arange(96, dtype=np.uint8).reshape(8, 12) * 2
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for name in ("gray.png", "deep.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.dstack([gray] * 3))

    alpha = np.full((8, 12, 1), 255, np.uint8)
    alpha[:, 6:] = 0
    clear = np.where(alpha > 0, FLAG, 255)
    Image.fromarray(np.dstack([FLAG, alpha])).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), clear)
    Image.fromarray(np.dstack([gray, alpha])).save(tmp_path / "gray_clear.png")
    assert (read_image(tmp_path / "gray_clear.png")[:, 6:] == 255).all()


def test_heic_needs_its_library_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "phone.heic"
    path.write_bytes(b"not looked at")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"phone\.heic is a HEIC image.*conceptax\[heic\]"):
        read_image(path)


def test_heic_is_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    wide = np.kron(FLAG, np.ones((8, 8, 1), np.uint8))
    Image.fromarray(wide).save(tmp_path / "phone.HEIC", quality=100)
    received = read_image(tmp_path / "phone.HEIC")
    assert received.shape == wide.shape
    assert np.abs(received.astype(int) - wide).mean() < 8


def test_damaged_files_are_named(tmp_path):
    Image.fromarray(np.kron(FLAG, np.ones((9, 9, 1), np.uint8))).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content in (
        ("cut.jpg", whole[: len(whole) // 2]),
        ("text.png", b"this is no image"),
        ("empty.webp", b""),
    ):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / "a.jpg").write_bytes(whole)
        (folder / name).write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name} cannot be read as an image: .*take it out"):
            read_images(folder)
    with pytest.raises(ImageError, match="absent is not a folder"):
        read_images(tmp_path / "absent")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "notes.txt").write_text("no image")
    (bare / ".hidden.png").write_bytes(whole)
    with pytest.raises(ImageError, match=r"holds no images.*found \.hidden\.png, notes\.txt"):
        read_images(bare)
    (bare / "b.PNG").write_bytes(whole)
    assert len(read_images(bare)) == 1


def _write_list(folder, entries):
    path = folder / "concepts.json"
    path.write_text(json.dumps(entries))
    return path


def test_concept_lists_have_the_published_layout(tmp_path):
    for name, count in (("dog", 2), ("dogs", 3), ("barn", 1)):
        (tmp_path / name).mkdir()
        for n, image in enumerate(pictures(count)):
            Image.fromarray(image).save(tmp_path / name / f"{n}.png")
    entries = [
        {
            "instance_prompt": "photo of a <new1> dog",
            "class_prompt": "a photo of a dog",
            "instance_data_dir": "dog",
            "class_data_dir": "dogs",
        },
        {
            "instance_prompt": "<new2> barn",
            "class_prompt": "old barn",
            "instance_data_dir": str(tmp_path / "barn"),
        },
    ]
    path = _write_list(tmp_path, entries)
    dog, barn = read_concepts(path)
    assert (dog.token, dog.word, dog.prompt) == ("<new1>", "dog", "photo of a <new1> dog")
    assert (len(dog.images), len(dog.class_images)) == (2, 3)
    assert dog.class_prompt == "a photo of a dog"
    assert (barn.token, barn.word, len(barn.images)) == ("<new2>", "old barn", 1)
    assert len(barn.class_images) == 0 and barn.initializer == ""
    named = read_concepts(path, words=["puppy", "hut"], initializers=["ktn", "pll"])
    assert [(each.word, each.initializer) for each in named] == [("puppy", "ktn"), ("hut", "pll")]

    with pytest.raises(ConceptListError, match="holds 2 concepts, but 1 tokens were given"):
        read_concepts(path, tokens=["<new1>"])
    with pytest.raises(ConceptListError, match="holds 2 concepts, but 3 initializers"):
        read_concepts(path, initializers=["a", "b", "c"])
    for change, message in (
        ({"instance_prompt": "photo of a dog"}, "must hold one new token.*found none"),
        ({"instance_prompt": "<a> and <b>"}, "must hold one new token"),
        ({"instance_prompt": None}, "lacks instance_prompt"),
        ({"class_prompt": 3}, "no text in class_prompt"),
        ({"color": "red"}, "unknown color"),
    ):
        with pytest.raises(ConceptListError, match=message):
            read_concepts(_write_list(tmp_path, [entries[0] | change]))
    for content in ({}, [], ["dog"]):
        with pytest.raises(ConceptListError, match=r"list of concepts|must be an object"):
            read_concepts(_write_list(tmp_path, content))
    with pytest.raises(ImageError, match="json: cat is not a folder, neither beside"):
        read_concepts(_write_list(tmp_path, [entries[0] | {"instance_data_dir": "cat"}]))
    path.write_text("{")
    with pytest.raises(ConceptListError, match="cannot read the concepts"):
        read_concepts(path)


def test_class_words_come_from_class_prompts():
    assert [class_word(text) for text in ("dog", "a photo of the teddy bear", "an owl")] == [
        "dog",
        "teddy bear",
        "owl",
    ]


# ---- augmentation ----


def test_augmentation_follows_its_description():
    image = np.full((20, 30, 3), 255, np.uint8)  # white, so that the canvas shows
    rng = np.random.default_rng(0)
    size, cells, factor = 48, 12, 4
    small = 0
    scales = set()
    for _ in range(600):
        pixels, mask, prefix = augment(image, size, cells, rng, flip=True, crop=False)
        assert pixels.shape == (48, 48, 3) and pixels.dtype == np.float32
        assert mask.shape == (12, 12, 1) and set(np.unique(mask)) <= {0.0, 1.0}
        inside = pixels[..., 0] == 1.0
        assert (pixels[~inside] == 0.0).all()
        if inside.all():
            scale = size
            assert PREFIXES[prefix] in ("", "zoomed in ", "close up ")
        else:
            rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
            scale = len(rows)
            assert len(columns) == scale and inside.sum() == scale**2
            far = PREFIXES[prefix] in ("a far away ", "very small ")
            assert far == (scale < 0.6 * size) and (far or prefix == 0)
            assert scale >= size // 3
        small += scale < size or not mask.all()
        scales.add(scale)
        covered = np.repeat(np.repeat(mask[..., 0], factor, 0), factor, 1) > 0
        assert inside[covered].all()
        if not mask.all():  # a cell away from the border, and not much more
            height = int(mask.any(axis=1).sum())
            assert scale // factor - 2 <= height <= scale // factor - 1
    assert 0.6 < small / 600 < 0.72
    assert {16, 48} <= scales and len(scales) > 30


def test_mirrored_images_and_central_squares():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 3] = 200
    np.testing.assert_array_equal(square(image, 4, crop=True)[:, 1], np.full((4, 3), 200))
    assert square(image, 4, crop=False)[:, 1].max() < 200  # squeezed
    left = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pixels, _, _ = augment(image, 16, 8, rng, flip=True, crop=False)
        bright = np.argwhere(pixels[..., 0] > 0)
        dark = np.argwhere(pixels[..., 0] < 0)
        if len(bright):
            left += bright[:, 1].mean() < dark[:, 1].mean()
    assert 5 < left < 35


# ---- batches ----


@pytest.fixture(scope="module")
def instances():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<new1>", "<new2>"])
    white = [np.full((8, 8, 3), 255, np.uint8)]
    concepts = [
        subject(),
        Concept("<new2>", "three", pictures(2, 5), class_images=white, class_prompt="a digit"),
    ]
    prompts = ["a <new1> seven", "a <new2> three"]
    return collect(tokenizer, concepts, prompts, 16, SIZE, prefixes=PREFIXES, prior=True), tokenizer


def test_batches_are_deterministic_and_resume_at_the_right_sample(instances):
    example = augmented(instances[0], SIZE, CELLS, flip=True, crop=False)
    data = batches(example, 5, 2, seed=3)
    first = list(itertools.islice(iter(data), 6))
    assert first[0]["pixels"].shape == (2, SIZE, SIZE, 3)
    assert first[0]["prior"]["tokens"].shape == (2, 16)
    iterator = iter(batches(example, 5, 2, seed=3))
    for expected in first[:2]:
        _equal(next(iterator), expected)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    resumed = iter(batches(example, 5, 2, seed=3))
    resumed.set_state(state)
    for expected in first[2:]:
        _equal(next(resumed), expected)
    other = next(iter(batches(example, 5, 2, seed=4)))
    assert not np.array_equal(other["pixels"], first[0]["pixels"])
    seen = [picture.tobytes() for batch in first for picture in batch["pixels"]]
    assert len(set(seen)) > 8  # each time another augmentation
    assert isinstance(data, grain.IterDataset)


def _equal(one, other):
    for name, value in other.items():
        if isinstance(value, dict):
            _equal(one[name], value)
        else:
            np.testing.assert_array_equal(one[name], value)


def test_latents_are_encoded_once_and_captions_belong_to_their_images(instances):
    instances, tokenizer = instances
    seen = []

    def encode(pixels):  # "latents" from which the picture can be told
        seen.append(len(pixels))
        small = pixels.reshape(len(pixels), CELLS, 2, CELLS, 2, 3).mean(axis=(2, 4))
        return small, np.ones_like(small)

    example = cached(instances, SIZE, CELLS, encode, flip=True, crop=True)
    assert sum(seen) == 2 * (5 + 2 + 1)
    sides = [square(image, SIZE, crop=True) for image in instances.images]
    plain = np.stack([encode(to_unit(image)[None])[0][0] for image in sides])
    mirrored = np.stack([encode(to_unit(image[:, ::-1])[None])[0][0] for image in sides])
    counts = {"plain": 0, "mirrored": 0}
    ids = dict(
        zip(
            ("<new1>", "<new2>"), tokenizer.convert_tokens_to_ids(["<new1>", "<new2>"]), strict=True
        )
    )
    for index in range(5):
        for seed in range(12):
            batch = example(index, np.random.default_rng(seed))
            side = "plain" if np.array_equal(batch["latent_mean"], plain[index]) else "mirrored"
            expected = {"plain": plain, "mirrored": mirrored}[side][index]
            np.testing.assert_array_equal(batch["latent_mean"], expected)
            counts[side] += 1
            assert batch["mask"].all() and batch["mask"].shape == (CELLS, CELLS, 1)
            second = index >= 3
            assert (ids["<new2>"] in batch["tokens"]) == second
            assert (ids["<new1>"] in batch["tokens"]) != second
            assert (batch["prior"]["latent_mean"] == 1.0).all() == second  # the white class image
            words = tokenizer.decode(batch["prior"]["tokens"], skip_special_tokens=True)
            assert words.strip() == ("a digit" if second else "seven")
    assert min(counts.values()) > 10
