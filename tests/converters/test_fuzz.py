"""A short fuzz of every reader of checkpoints; `benchmarks/fuzz_checkpoints.py` runs for longer."""

import pytest
from fuzz_targets import allowed, targets
from hypothesis import HealthCheck, given, settings

# Examples that take a moment each (a model is made) get fewer.
EXAMPLES = {"config": 30, "single": 60, "lora": 60, "open_clip": 60}
EXAMPLES |= {"transformer": 60, "flux lora": 60, "scales": 80}


@pytest.mark.parametrize("name", sorted(targets()))
def test_only_checkpoint_errors_come_out(name, tmp_path):
    target = targets()[name]
    (tmp_path / "inside").mkdir()

    @settings(
        max_examples=EXAMPLES.get(name, 150),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.contents)
    def run(contents):
        message = allowed(target, tmp_path / "inside", contents)
        assert message is None or len(message) < 4000

    run()
    assert [entry.name for entry in tmp_path.iterdir()] == ["inside"]
