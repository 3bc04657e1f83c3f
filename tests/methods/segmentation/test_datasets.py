"""Scenes on disk, what is told about wrong ones, augmentation, and batches that resume."""

import json

import numpy as np
import pytest
from PIL import Image

from conceptax.flax_models.open_clip import IMAGE_MEAN
from conceptax.methods.segmentation.augmentation import (
    LargeScaleJitter,
    ResizeFlip,
    nearest,
    shortest_edge,
)
from conceptax.methods.segmentation.batches import scene_batches, targets_of
from conceptax.methods.segmentation.coco_stuff import CATEGORIES, convert
from conceptax.methods.segmentation.datasets import (
    LAYOUTS,
    DataError,
    label_maps,
    open_scenes,
    panoptic_maps,
)
from conceptax.methods.segmentation.metrics import Segment

RNG = np.random.default_rng(0)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(path, height=6, width=8):
    save(path, RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def labels_of(*rows, dtype=np.uint8):
    return np.repeat(np.array([rows], dtype), 6, axis=0)


@pytest.mark.parametrize(("dtype", "void"), [(np.uint8, 255), (np.uint16, 65535)])
def test_label_maps_of_both_depths(tmp_path, dtype, void):
    picture(tmp_path / "images/a.png")
    save(tmp_path / "annotations/a.png", labels_of(0, 0, 2, 2, void, void, 1, 1, dtype=dtype))
    scenes = open_scenes(tmp_path, 3)
    image, ids, segments = scenes[0]
    np.testing.assert_array_equal(ids[0], [1, 1, 3, 3, 0, 0, 2, 2])
    assert dict(segments) == {1: Segment(0), 2: Segment(1), 3: Segment(2)}
    assert image.shape == (6, 8, 3) and not scenes.panoptic
    assert scenes.sizes == ((6, 8),) and scenes.targets == (3,)
    # another label may stand for void, and a palette's numbers are labels
    with pytest.raises(DataError, match="unknown labels"):
        open_scenes(tmp_path, 3, ignore=2)
    map8 = Image.fromarray(labels_of(0, 0, 1, 1, 1, 1, 11, 11))
    map8.putpalette(list(range(0, 48)))
    map8.save(tmp_path / "annotations/a.png")
    assert set(open_scenes(tmp_path, 2, ignore=11)[0].segments) == {1, 2}


def panoptic(tmp_path, ids, segments, **image):
    image = {"id": 7, "file_name": "a.jpg", "width": 8, "height": 6, **image}
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    save(tmp_path / "panoptic/a.png", pixels)
    content = {
        "images": [image],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": segments}],
        "categories": [
            {"id": 3, "name": "cat", "isthing": 1},
            {"id": 90, "name": "wall", "isthing": 0},
        ],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))


def test_panoptic_maps(tmp_path):
    picture(tmp_path / "images/a.jpg")
    ids = labels_of(5, 5, 70000, 70000, 300, 300, 0, 0, dtype=np.int64)
    segments = [
        {"id": 5, "category_id": 3, "iscrowd": 0},
        {"id": 70000, "category_id": 3, "iscrowd": 1},
        {"id": 300, "category_id": 90, "iscrowd": 0},
    ]
    panoptic(tmp_path, ids, segments)
    scenes = open_scenes(tmp_path, 2, layout="panoptic")
    np.testing.assert_array_equal(scenes[0].ids, ids)
    assert dict(scenes[0].segments) == {5: Segment(0), 70000: Segment(0, True), 300: Segment(1)}
    assert scenes.things == {0} and scenes.category_ids == (3, 90) and scenes.targets == (2,)
    assert scenes.panoptic

    labels, masks, valid = targets_of(scenes[0].ids, scenes[0].segments, (32, 32), 3)
    np.testing.assert_array_equal(valid, [True, True, False])  # by id, without the crowd
    np.testing.assert_array_equal(labels, [0, 1, 0])
    assert masks.shape == (3, 32, 32)
    np.testing.assert_array_equal(masks[0, :6, :8], ids == 5)
    assert masks.sum() == 24  # none in the padding
    with pytest.raises(ValueError, match="has 2 targets, but there is room for 1"):
        targets_of(scenes[0].ids, scenes[0].segments, (32, 32), 1)
    gone = np.where(scenes[0].ids == 5, 0, scenes[0].ids)
    kept, dropped = (
        targets_of(gone, scenes[0].segments, (32, 32), 2, keep_empty=keep)[2].sum()
        for keep in (True, False)
    )
    assert (kept, dropped) == (2, 1)

    panoptic(tmp_path, ids, [*segments[:2], {"id": 9, "category_id": 4}])
    with pytest.raises(DataError, match=r"unknown categories \[4\]"):
        panoptic_maps(tmp_path / "images", tmp_path / "panoptic.json", 2)
    panoptic(tmp_path, ids, [*segments[:2], {"id": 9, "category_id": 90}])
    with pytest.raises(DataError, match=r"has unknown ids \[300\].*lacks the segments \[9\]"):
        panoptic_maps(tmp_path / "images", tmp_path / "panoptic.json", 2)
    with pytest.raises(DataError, match="2 categories, but the vocabulary has 5"):
        panoptic_maps(tmp_path / "images", tmp_path / "panoptic.json", 5)
    (tmp_path / "panoptic.json").write_text("{}")
    with pytest.raises(DataError, match="no panoptic JSON"):
        panoptic_maps(tmp_path / "images", tmp_path / "panoptic.json", 2)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    good = labels_of(0, 0, 1, 1, 1, 1, 1, 1)
    for name in ("good", "lonely", "unknown", "deep", "rgb", "small"):
        picture(tmp_path / f"images/{name}.jpg")
    (tmp_path / "images/damaged.jpg").write_bytes(b"nothing")
    (tmp_path / "images/notes.txt").write_text("not an image")
    maps = tmp_path / "annotations"
    save(maps / "good.png", good)
    save(maps / "orphan.png", good)
    save(maps / "damaged.png", good)
    save(maps / "unknown.png", good + 6)
    save(maps / "deep.png", good.astype(np.uint16))
    save(maps / "rgb.png", np.repeat(good[..., None], 3, axis=-1))
    save(maps / "small.png", good[:3])
    with pytest.raises(DataError) as error:
        label_maps(tmp_path / "images", maps, 2, bits=8)
    message = str(error.value)
    assert "7 problems" in message
    for part in (
        "orphan.png has no image",
        "lonely.jpg has no labels",
        "damaged.jpg cannot be read",
        "unknown.png has unknown labels [6, 7]",
        "deep.png has 16 bits, not 8 bits",
        "rgb.png has RGB, not 8 bits",
        "small.png is 3 x 8, but its image is 6 x 8",
    ):
        assert part in message, part
    for n in range(9):
        picture(tmp_path / f"images/more{n}.jpg")
    with pytest.raises(DataError, match=r"16 problems.*and 6 more"):
        label_maps(tmp_path / "images", maps, 2, bits=8)


def test_layouts(tmp_path):
    with pytest.raises(DataError, match="no layout 'coco'; choose one of folder, panoptic"):
        open_scenes(tmp_path, 2, layout="coco")
    for name in LAYOUTS:
        with pytest.raises(DataError, match="has no"):
            open_scenes(tmp_path, 2, layout=name)
    for place in ("ade20k", "ade"):  # as in the code, as in the README
        root = tmp_path / f"in-{place}/{place}/ADE20K_2021_17_01"
        for name in ("a", "unlabeled"):
            picture(root / f"images_detectron2/validation/{name}.jpg")
        deep = labels_of(0, 0, 800, 800, 800, 65535, 1, 1, dtype=np.uint16)
        save(root / "annotations_detectron2/validation/a.tif", deep)
        scenes = open_scenes(tmp_path / f"in-{place}", 847, layout="ade20k-847")
        assert len(scenes) == 1 and set(scenes[0].segments) == {1, 2, 801}


def test_coco_stuff(tmp_path, repository):
    assert len(CATEGORIES) == 171
    published = repository.parent / "shared/data/vocabularies/coco_stuff_with_prompt_eng.txt"
    if published.exists():
        lines = [line.split(":") for line in published.read_text().splitlines()]
        there = tuple(int(n) for n, name in lines if name != "invalid_class_id")
        assert there == CATEGORIES
    save(tmp_path / "raw/a.png", labels_of(0, 10, 12, 181, 255, 255, 255, 255))
    save(tmp_path / "raw/nothing.png", labels_of(*[255] * 8))
    assert convert(tmp_path / "raw", tmp_path / "new") == 1
    (written,) = (tmp_path / "new").iterdir()
    found = np.asarray(Image.open(written))
    np.testing.assert_array_equal(found[0], [0, 10, 11, 170, 255, 255, 255, 255])
    save(tmp_path / "raw/b.png", labels_of(*[11] * 8))
    with pytest.raises(DataError, match=r"b.png has unknown labels \[11\]"):
        convert(tmp_path / "raw", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 427), (1199, 800)),
        ((300, 900), (444, 1333)),
        ((512, 512), (800, 800)),
        ((1000, 100), (1333, 133)),
        ((1, 4000), (1, 1333)),
    ],
)
def test_shortest_edge(size, expected):
    assert shortest_edge(size, 800, 1333) == expected


@pytest.mark.parametrize("size", [(5, 7), (31, 16), (64, 90), (13, 29)])
def test_nearest_neighbors(size, torch):
    ids = RNG.integers(0, 1000, (13, 29), dtype=np.int32)
    by_torch = torch.nn.functional.interpolate(torch.tensor(ids)[None, None].float(), size)
    np.testing.assert_array_equal(nearest(ids, size, centers=False), by_torch[0, 0].int().numpy())
    by_pillow = Image.fromarray(ids).resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(nearest(ids, size, centers=True), np.asarray(by_pillow))


@pytest.mark.parametrize("augmentation", [ResizeFlip(48, 64), LargeScaleJitter(48)])
def test_masks_follow_their_image(augmentation):
    """Blocks of one color each: a pixel's color says its id, but at borders and in padding."""
    rng = np.random.default_rng(1)
    ids = np.kron(np.arange(1, 13, dtype=np.int32).reshape(3, 4), np.ones((20, 20), np.int32))
    image = np.repeat((20 * ids)[..., None], 3, axis=-1).astype(np.uint8)
    shapes, agreed, kinds = set(), [], set()
    for _ in range(20):
        pixels, found = augmentation(image, ids, rng)
        shapes.add((pixels.shape[:2], found.shape))
        kinds.add(found.tobytes())
        inside = found > 0
        agreed.append(np.mean(pixels[inside][:, 0] == 20 * found[inside]))
        assert (pixels[~inside] == 128).all()  # in the padding
    expected = augmentation.size(ids.shape)
    assert shapes == {(expected, expected)}
    assert np.mean(agreed) > 0.75 and min(agreed) > 0.2  # mirrored alone, it would be near 0
    assert len(kinds) > 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Five wide scenes and two tall ones, told apart by their brightness."""
    root = tmp_path_factory.mktemp("scenes")
    for n in range(7):
        size = (40, 60) if n < 5 else (60, 40)
        save(root / f"images/{n}.png", np.full((*size, 3), 30 * n, np.uint8))
        labels = np.zeros(size, np.uint8)
        labels[:10], labels[-5:] = n % 3, 255
        save(root / f"annotations/{n}.png", labels)
    return open_scenes(root, 3)


def numbers(batch):
    """Which scenes a batch holds."""
    bright = batch["images"][:, 0, 0, 0] * 68.5005327 + IMAGE_MEAN[0]
    return np.rint(bright / 30).astype(int).tolist()


def test_batches(scenes):
    augmentation = ResizeFlip(32, 64)
    stream = iter(scene_batches(scenes, augmentation, 2, seed=0))
    rounds = [[next(stream) for _ in range(4)] for _ in range(2)]
    for each in rounds:
        shapes = sorted(batch["images"].shape for batch in each)
        assert shapes == [(2, 32, 64, 3)] * 3 + [(2, 64, 32, 3)]
        found = sorted(n for batch in each for n in numbers(batch))
        assert set(found) == set(range(7)) and len(found) == 8  # one wide scene twice
        for batch in each:
            assert batch["masks"].shape == (2, 2, *batch["images"].shape[1:3])
            assert batch["images"].dtype == np.float32 and batch["labels"].dtype == np.int32
            for n, labels, valid in zip(
                numbers(batch), batch["labels"], batch["valid"], strict=True
            ):
                assert labels[valid].tolist() == sorted({0, n % 3})
            assert not batch["masks"][~batch["valid"]].any()
    assert [numbers(b) for b in rounds[0]] != [numbers(b) for b in rounds[1]]
    assert scenes.targets == (1, 2, 2, 1, 2, 2, 1)
    with pytest.raises(ValueError, match="2 targets, but there is room for 1"):
        scene_batches(scenes, augmentation, 2, seed=0, room=1)
    with pytest.raises(ValueError, match="multiple of 32; received 7, 2, 2 and 48"):
        scene_batches(scenes, augmentation, 2, seed=0, multiple=48)


def test_batches_resume(scenes):
    make = lambda: iter(scene_batches(scenes, LargeScaleJitter(64), 3, seed=5))  # noqa: E731
    first = make()
    expected = [next(first) for _ in range(6)]
    second = make()
    for _ in range(2):
        next(second)
    state, third = second.get_state(), make()
    third.set_state(state)
    for wanted in expected[2:]:
        found = next(third)
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
    other = next(iter(scene_batches(scenes, LargeScaleJitter(64), 3, seed=6)))
    assert not np.array_equal(other["images"], expected[0]["images"])


def test_street_scenes(repository):
    root = repository.parent / "shared/data/camvid_subset"
    if not root.exists():
        pytest.skip("the street scenes are not beside the repository")
    scenes = open_scenes(root, 11, ignore=11)
    assert len(scenes) == 16 and set(scenes.sizes) == {(360, 480)}
    batch = next(iter(scene_batches(scenes, ResizeFlip(96, 160), 4, seed=0)))
    assert batch["images"].shape == (4, 96, 128, 3)
    assert batch["valid"].sum() >= 4 * 5
    covered = (batch["masks"] & batch["valid"][..., None, None]).sum(axis=1)
    assert covered.max() == 1 and 0.8 < covered.mean() < 1
    assert abs(batch["images"].mean()) < 1
