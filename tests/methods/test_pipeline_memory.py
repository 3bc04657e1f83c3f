"""The published sizes of pipelines, and the table of what they take."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each model's own tests have its published size

# Counted on PyTorch's meta device from the original classes, text encoders as far as they are read.
PUBLISHED = {
    "flux": {"text": 4_762_310_656 + 123_060_480, "vae": 83_819_683},
    "hunyuan": {"denoiser": 12_821_012_544, "vae": 246_478_803},
    "cosmos-t2w": {
        "denoiser": 7_236_192_256,
        "text": 4_864_791_552,
        "vae": 105_653_696,
    },
    "cosmos-v2w": {"denoiser": 7_236_208_640},
    "cosmos-14b": {"denoiser": 14_267_149_312},
    "wan-1.3b": {"denoiser": 1_418_996_800, "text": 5_680_910_336, "vae": 126_892_531},
    "wan-14b": {"denoiser": 14_288_491_584},
    "wan-2.2-5b": {"denoiser": 4_999_787_712, "vae": 704_688_668},
    "wan-2.2-a14b": {"denoiser": 2 * 14_288_491_584},
}


@pytest.fixture(scope="module")
def benchmark(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        yield importlib.import_module("pipeline_memory")


@pytest.fixture(scope="module")
def rows(benchmark):
    return benchmark.counted_rows(name for name in PUBLISHED)


def test_parameters_are_those_of_the_original_classes(rows):
    for name, counts in PUBLISHED.items():
        for part, count in counts.items():
            assert rows[name]["parameters"][part] == count, (name, part)


def test_streamed_models_hold_two_blocks(rows):
    flux = rows["flux"]
    # Two double blocks, at 2 bytes, of FLUX; of T5 two layers and its vocabulary; the rest.
    assert flux["whole"] == 2 * sum(flux["parameters"].values())
    assert flux["streamed"] < 0.1 * flux["whole"] and flux["streamed"] > 2 * 2 * 339.8e6
    for row in rows.values():
        assert row["peak"]["streamed"] < row["peak"]["whole"]
        assert row["peak"]["whole"] > row["whole"]


def test_the_page_has_the_figures(benchmark, rows):
    page, record = Path("docs/models.md").read_text(), json.loads(benchmark.RESULTS.read_text())
    assert benchmark.table(record["rows"]) in page and benchmark.measured_table(record) in page
    for name, row in rows.items():
        assert record["rows"][name] == row


def test_a_page_without_marks_is_left_alone(benchmark, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="lacks the marks"):
        benchmark.write_page(page, "table")
    assert page.read_text() == "nothing"
    page.write_text("".join(("before\n", *benchmark.MARKS, "\nafter")))
    benchmark.write_page(page, "table")
    assert page.read_text() == f"before\n{'table'.join(benchmark.MARKS)}\nafter"
