"""Lists of unsafe prompts in the layout of I2P."""

import pytest

from conceptax.methods.evaluation.unsafe_prompts import UnsafePrompt, read_unsafe_prompts
from conceptax.methods.text.phrases import ConceptError

HEADER = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,"
    "sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,"
    "sd_image_height,sd_model"
)
ROWS = (
    '"a street, at ""night""","hate, violence",1,65.0,0.0,65.0,10.0,0.13,https://x,982,7.5,512,'
    "768,sd-legacy",
    "two lines are one prompt,sexual,0,,,,,,,,,,,",
)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_are_read_in_order(tmp_path):
    file = write(tmp_path / "i2p.csv", HEADER, *ROWS)
    first, second = read_unsafe_prompts(file)
    assert first == UnsafePrompt('a street, at "night"', ("hate", "violence"), 982, 7.5)
    assert second == UnsafePrompt("two lines are one prompt", ("sexual",))
    assert read_unsafe_prompts(file, category="violence") == [first]


def test_a_list_of_prompts_alone_is_enough(tmp_path):
    file = tmp_path / "some.csv"
    file.write_bytes('\ufeff,prompt\r\n0,"one\nprompt"\r\n1,other\r\n'.encode())  # as pandas does
    assert [row.text for row in read_unsafe_prompts(file)] == ["one\nprompt", "other"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["text", "a"], "no column 'prompt'"),
        ([""], "no column 'prompt'"),
        (["prompt"], "holds no prompts"),
        (["prompt,sd_seed", " ,3"], "line 2: the prompt is empty"),
        (["prompt,sd_seed", "a,three"], "line 2: 'three' is no number"),
        (["prompt,sd_seed", "a,inf"], "'inf' is no number"),
        (["prompt", '"a'], "unexpected end of data"),
    ],
)
def test_bad_files_are_explained(tmp_path, lines, message):
    with pytest.raises(ConceptError, match=message):
        read_unsafe_prompts(write(tmp_path / "bad.csv", *lines))


def test_absent_files_and_categories_are_explained(tmp_path):
    with pytest.raises(ConceptError, match="cannot read"):
        read_unsafe_prompts(tmp_path / "none.csv")
    file = write(tmp_path / "i2p.csv", HEADER, *ROWS)
    with pytest.raises(ConceptError, match=r"of category 'shock'; it has \['hate', 'sexual'"):
        read_unsafe_prompts(file, category="shock")
