"""The benchmark's bookkeeping: what it counts, what it calls met, and that it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.bench import attention
from experiments.bench.attention import Case, benchmark, goals, main

TINY = (Case(length=8, batch=2, window=4, width=4), Case(length=16, batch=1, window=4, width=4))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return benchmark(TINY, rounds=6, naive_up_to=8, min_seconds=0.0)


def test_every_form_computes_the_same_attention() -> None:
    case = Case(length=300, batch=2, window=300)
    forms = attention._forms(case, naive=True)  # the window hides nothing: all are causal
    expected = forms.pop(attention.NAIVE).attend()
    padded = forms.pop(attention.PADDED).attend()
    assert len(forms) == 3
    for form in forms.values():
        torch.testing.assert_close(form.attend(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1, :75], expected[1, :75], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(padded[1, 75:], expected[1, 75:], atol=1e-3)  # 75 are lost


def test_multiplications_are_counted_over_the_pairs_in_the_window() -> None:
    # 1 + 2 + 2 pairs, two products, for 4 rows times heads, 3 wide.
    case = Case(length=3, batch=2, window=2, heads=2, kv_heads=1, width=3)
    assert case.multiplications == 5 * 2 * 4 * 3


def test_each_form_is_measured_in_each_pass_and_what_is_not_is_said(record: dict) -> None:
    measured = {(row["length"], row["pass"], row["form"]) for row in record["rows"]}
    forms = {attention.OURS, attention.PADDED, attention.DENSE, attention.CAUSAL, attention.LIMIT}
    wanted = {(n, which, form) for n in (8, 16) for which in attention.PASSES for form in forms}
    wanted |= {(8, which, attention.NAIVE) for which in attention.PASSES}
    assert measured == wanted
    assert record["skipped"] == ["naive at 16 tokens: --naive-up-to is 8"]
    assert all(row["ratio"] == 1 for row in record["rows"] if row["form"] == attention.DENSE)


def test_kept_bytes_hold_at_least_the_inputs_and_the_output(record: dict) -> None:
    kept = {row["form"]: row["kept_over_least"] for row in record["rows"] if row["length"] == 8}
    assert kept.pop(attention.LIMIT) is None
    assert 1 < kept[attention.OURS] <= 1.1
    assert kept[attention.NAIVE] > kept[attention.DENSE] > kept[attention.OURS]


def test_a_goal_is_met_or_missed_only_with_the_whole_interval(record: dict) -> None:
    assert goals(record) == []  # other sizes than the goals are for
    words = [
        attention._goal("x", 0.5, {"ratio": 0.5, "low": low, "high": high})["word"]
        for low, high in ((0.4, 0.5), (0.51, 0.6), (0.4, 0.6))
    ]
    assert words == ["met", "missed", "unresolved"]


def test_the_goals_are_held_against_the_rows_they_name() -> None:
    interval = {"ratio": 0.1, "low": 0.05, "high": 0.15}
    rows = [
        {"length": n, "pass": which, "form": form, "kept_over_least": 1.01, **interval}
        for n in attention.GOALS
        for which in attention.PASSES
        for form in (attention.OURS, attention.DENSE)
    ]
    per_token = [{"length": n, "ratio": 1.2, "low": 1.1, "high": 1.6} for n in (512, 8192)]
    found = goals(
        {"sizes": [{"length": n} for n in attention.GOALS], "rows": rows, "per_token": per_token}
    )
    words = [goal["word"] for goal in found]
    assert words == ["met", "met", "met", "met", "unresolved", "met", "unresolved"]
    assert "8192" in found[-1]["goal"] and "512" in found[-1]["goal"]


def test_what_is_printed_is_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention, "QUICK", TINY)
    out = tmp_path / "new" / "attention.json"
    assert main(["--quick", "--rounds", "6", "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert attention.text(written) + "\n" == capsys.readouterr().out
    assert written["goals"] == [] and len(written["rows"]) == 24


def test_only_passes_with_a_backward_tell_what_they_keep(record: dict) -> None:
    tables = attention.text({**record, "goals": []}).split("\n\n")[: 2 * len(TINY)]
    told = ["kept MiB" in table for table in tables]
    assert told == ["forward+backward" in table for table in tables] == [False, True] * len(TINY)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--out", "x.csv"], "must end in .json"), (["--rounds", "5"], "rounds 5 is too few")],
)
def test_mistakes_are_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err
