"""The benchmark of the MoE layer runs, compares equal work and reports what was measured."""

import json
from pathlib import Path

import pytest
import torch

from experiments.bench import moe as bench
from experiments.bench.interleave import MIN_ROUNDS, Ratio


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("bench") / "new" / "moe.json"
    assert bench.main(["--quick", "--rounds", str(MIN_ROUNDS), "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_form_is_measured_at_every_size(record: dict) -> None:
    blocks = {bench.GROUPED, bench.EAGER, *bench.OURS.values(), bench.DENSE}
    rows = record["rows"]
    for size in (s.name for s in bench.QUICK):
        for which in (bench.FORWARD, bench.BOTH):
            forms = [r["form"] for r in rows if (r["size"], r["pass"]) == (size, which)]
            assert sorted(forms) == sorted({*blocks, bench.LIMIT})
    decoded = {row["form"] for row in rows if row["pass"] == bench.DECODE}
    assert decoded == {*blocks, bench.BATCHED}
    assert all(row["cpu_ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)


def test_each_goal_carries_a_word_and_its_interval(record: dict) -> None:
    goals = record["goals"]
    # Two forms at each size and their means; the bytes at each size; the decode.
    assert len(goals) == 2 * (len(bench.QUICK) + 1) + len(bench.QUICK) + len(bench.QUICK_ONE)
    for goal in goals:
        met, missed = goal["high"] <= goal["at_most"], goal["low"] > goal["at_most"]
        assert goal["word"] == ("met" if met else "missed" if missed else "unresolved")


def test_the_tables_name_every_size_and_goal(record: dict) -> None:
    told = bench.text(record)
    assert all(size.name in told for size in (*bench.QUICK, *bench.QUICK_ONE))
    assert all(goal["goal"] in told for goal in record["goals"])


def test_only_passes_with_a_backward_tell_what_they_keep(record: dict) -> None:
    tables = bench.text({**record, "goals": []}).split("\n\n")
    told = ["kept MiB" in table for table in tables]
    assert told == ["forward+backward" in table for table in tables] and True in told


def test_the_bytes_kept_by_the_dense_ffn_are_the_four_that_autograd_saves() -> None:
    (size,) = bench.QUICK_ONE
    block = bench._blocks(size)[bench.DENSE]
    # silu(gate), gate, up and h; the input and the weights are not counted.
    assert bench.kept_bytes(block, size) == 4 * size.tokens * size.top_k * size.intermediate * 4


def test_lean_keeps_fewer_bytes_than_the_default_and_that_fewer_than_eager() -> None:
    size = bench.QUICK[0]
    blocks = bench._blocks(size)
    lean, default, eager = (
        bench.kept_bytes(blocks[name], size) for name in (bench.LEAN, bench.DEFAULT, bench.EAGER)
    )
    assert lean < default < eager


def test_blocks_that_compute_something_else_are_not_timed() -> None:
    size = bench.QUICK[0]
    blocks = bench._blocks(size)
    bench.check_agreement(blocks, size)
    with torch.no_grad():
        blocks[bench.LEAN].experts.down_proj[0, 0, 0] += 1.0  # type: ignore[union-attr,index]
    with pytest.raises(RuntimeError, match="ours, lean and HF eager differ .* cannot be compared"):
        bench.check_agreement(blocks, size)


def test_the_geometric_mean_is_taken_round_by_round() -> None:
    def took(*seconds: float) -> Ratio:
        zeros = dict.fromkeys(("median_seconds", "ratio", "low", "high", "wall_ratio"), 0.0)
        return Ratio(name="x", cpu_seconds=seconds, wall_seconds=seconds, **zeros)

    sizes = [
        {bench.LEAN: took(1.0, 8.0), bench.GROUPED: took(1.0, 2.0)},
        {bench.LEAN: took(4.0, 1.0), bench.GROUPED: took(1.0, 1.0)},
    ]
    assert bench._geometric_means(sizes, bench.LEAN) == pytest.approx([2.0, 2.0])


def test_an_output_that_is_no_json_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--out", str(Path("x.txt"))]) == 2
    assert "must end in .json" in capsys.readouterr().err


def test_too_few_rounds_for_an_interval_are_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.main(["--rounds", str(MIN_ROUNDS - 1)]) == 2
    told = capsys.readouterr().err
    assert "rounds 5 is too few" in told and "measuring" not in told
