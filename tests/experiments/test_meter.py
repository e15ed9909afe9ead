"""What a stage costs: seconds over all starts, and a peak that is the stage's own."""

import json
from pathlib import Path

import pytest

from experiments.lab.meter import metered, peak_mib, reset_peak

ON_LINUX = Path("/proc/self/clear_refs").exists()


def test_seconds_add_up_over_the_starts_of_a_stage(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "meter.json"
    with metered(path) as meter:
        assert meter.facts()["seconds"] >= 0.0
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(held | {"seconds": 100.0}), encoding="utf-8")
    with metered(path) as meter:
        assert meter.facts()["seconds"] >= 100.0
    assert json.loads(path.read_text(encoding="utf-8"))["seconds"] >= 100.0


def test_a_peak_of_an_earlier_start_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "meter.json"
    path.write_text(json.dumps({"seconds": 1.0, "peak_mib": 1e9}), encoding="utf-8")
    with metered(path) as meter:
        assert meter.facts()["peak_mib"] == 1e9


@pytest.mark.skipif(not ON_LINUX, reason="only Linux can take a peak back")
def test_a_stage_does_not_inherit_the_peak_of_a_larger_one_before_it(tmp_path: Path) -> None:
    with metered(tmp_path / "large.json") as large:
        block = bytearray(256 << 20)
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
        del block
    with metered(tmp_path / "small.json") as small:
        pass
    assert large.facts()["peak_mib"] - small.facts()["peak_mib"] > 200
    assert reset_peak() and peak_mib() is not None
