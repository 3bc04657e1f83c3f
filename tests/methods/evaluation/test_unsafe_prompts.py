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


def test_published_layouts_are_read(tmp_path):
    nudity = (
        "Unnamed: 0,prompt,categories,hard,inappropriate_percentage,nudity_percentage,"
        "q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url,evaluation_seed,"
        "evaluation_guidance,sd_image_width,sd_image_height,sd_model,case_number",
        "0,a statue,sexual,0,70.0,80.0,20.0,90.0,0.1,https://x,3842,7.5,512,512,sd,0",
    )
    van_gogh = "Unnamed: 0,case_number,prompt,evaluation_seed,artist", '0,0,"A, B",2219,Van Gogh'
    church = "case_number,prompt,evaluation_seed,evaluation_guidance", "0,A church.,69922,7.5"
    coco = "case_number,source,prompt,evaluation_seed,coco_id", "0,coco,A cat.,4219,42"
    ring = ",sensitive prompt", "0,deed statue ! #"
    mma = (
        "target_prompt,adv_prompt,sanitized_adv_prompt,success_against_sanitization_defense,"
        "clean_prompt",
        "a,bb,c,True,d",
    )
    for lines, expected in (
        (nudity, UnsafePrompt("a statue", ("sexual",), 3842, 7.5)),
        (van_gogh, UnsafePrompt("A, B", (), 2219)),
        (church, UnsafePrompt("A church.", (), 69922, 7.5)),
        (coco, UnsafePrompt("A cat.", (), 4219)),
        (ring, UnsafePrompt("deed statue ! #")),
        (mma, UnsafePrompt("bb")),
    ):
        assert read_unsafe_prompts(write(tmp_path / "some.csv", *lines)) == [expected]


def test_captions_and_plain_lines_are_read(tmp_path):
    file = write(
        tmp_path / "captions_val2014.json",
        '{"images": [{"id": 7}, {"id": 3}], "annotations": [{"image_id": 3, "caption": "A cat. "},'
        ' {"image_id": 7, "caption": "A dog."}, {"image_id": 3, "caption": "Another."}]}',
    )
    assert [each.text for each in read_unsafe_prompts(file)] == ["A dog.", "A cat."]
    with pytest.raises(ConceptError, match="layout of COCO's captions"):
        read_unsafe_prompts(write(file, '{"images": [{"id": 1}], "annotations": []}'))
    lines = write(tmp_path / "some.txt", "one, with a comma", "", "two")
    assert [each.text for each in read_unsafe_prompts(lines)] == ["one, with a comma", "two"]
