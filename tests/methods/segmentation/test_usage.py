"""What a model's folder states about its use."""

import json

import pytest

from conceptax.methods.segmentation.usage import USAGE, Usage, UsageError, read_usage, write_usage
from conceptax.methods.segmentation.vocabulary import TEMPLATES, Vocabulary


def test_what_is_written_is_read(tmp_path):
    usage = Usage(Vocabulary.parse("cat, kitten; wall"), ("wall",), ("a {}", "{}"), 64, 96)
    write_usage(usage, tmp_path)
    assert read_usage(tmp_path) == usage
    write_usage(Usage(), tmp_path)
    assert read_usage(tmp_path) == Usage()


def test_what_is_not_stated_is_usual(tmp_path):
    assert read_usage(tmp_path) == Usage() == Usage(None, (), TEMPLATES, 800, 1333)
    assert read_usage(tmp_path / "model.pth") == Usage()
    (tmp_path / USAGE).write_text('{"short_side": 64}')
    assert read_usage(tmp_path) == Usage(short_side=64)
    (tmp_path / "model.pth").touch()  # a checkpoint beside it
    assert read_usage(tmp_path / "model.pth") == Usage(short_side=64)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ([], "must be an object"),
        ({"sort_side": 3}, "unknown sort_side"),
        ({"vocabulary": ["cat"]}, "vocabulary lists texts, received 'cat'"),
        ({"vocabulary": [["cat", ""]]}, "class 0 has an empty name"),
        ({"vocabulary": 3}, "not iterable"),
        ({"stuff": "wall"}, "stuff lists texts"),
        ({"templates": ["a"]}, "'a' lacks {}"),
        ({"long_side": 0}, "long_side is a number of pixels, received 0"),
    ],
)
def test_wrong_statements(stated, message, tmp_path):
    (tmp_path / USAGE).write_text(json.dumps(stated))
    with pytest.raises(UsageError, match=message) as caught:
        read_usage(tmp_path)
    assert str(tmp_path / USAGE) in str(caught.value)


def test_no_json(tmp_path):
    (tmp_path / USAGE).write_text("{")
    with pytest.raises(UsageError, match=USAGE):
        read_usage(tmp_path)
