"""Reading a run's folder: all that it left, and what is broken in it."""

from pathlib import Path

import pytest

from experiments.lab.runfiles import read_run, read_summary
from moe.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with a summary, and an arm that left nothing."""
    (tmp_path / "summary.json").write_text('{"schema": 1, "seeds": [0]}', encoding="utf-8")
    (tmp_path / "dpo-s0").mkdir()
    return tmp_path


def test_a_run_is_read_by_arm_and_seed_in_the_order_of_making(folder: Path) -> None:
    for name in ("other-s0", "ppo-s10", "ppo-s2", "sft-s0", "report"):
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text('{"step": 1}\n\n', encoding="utf-8")
    (folder / "dpo-s0" / "samples.jsonl").write_text('{"prompt": "p"}\n', encoding="utf-8")
    (folder / "config.yaml").write_text("beta: 0.1\n", encoding="utf-8")
    (folder / "environment.json").write_text('{"python": "3.11"}', encoding="utf-8")
    run = read_run(folder)
    assert list(run.metrics) == ["sft", "ppo", "other"]
    assert run.metrics["ppo"] == {2: [{"step": 1}], 10: [{"step": 1}]}
    assert list(run.metrics["ppo"]) == [2, 10]
    assert run.samples == {"dpo": {0: [{"prompt": "p"}]}}
    assert (run.config, run.environment) == ("beta: 0.1\n", {"python": "3.11"})
    assert run.summary == read_summary(folder) == {"schema": 1, "seeds": [0]}
    assert run.notes == ()


def test_what_a_run_did_not_leave_is_empty(folder: Path) -> None:
    run = read_run(folder)
    assert (run.metrics, run.samples, run.config, run.environment) == ({}, {}, "", {})


def test_a_torn_last_line_is_left_out_and_mentioned(folder: Path) -> None:
    text = '{"step": 1}\n{"step": 2}\n{"step": 3, "na'
    (folder / "dpo-s0" / "metrics.jsonl").write_text(text, encoding="utf-8")
    run = read_run(folder)
    assert [row["step"] for row in run.metrics["dpo"][0]] == [1, 2]
    (note,) = run.notes
    assert note.startswith("dpo-s0/metrics.jsonl: line 3 breaks off")


def test_half_an_emoji_is_read_as_text_that_can_be_written_again(folder: Path) -> None:
    (folder / "dpo-s0" / "samples.jsonl").write_text('{"after": "so \\ud83d"}\n', encoding="utf-8")
    (row,) = read_run(folder).samples["dpo"][0]
    assert row["after"] == "so ?"


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "dpo-s0" / "metrics.jsonl").write_text("{}\n{oops\n{}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not valid JSON"):
        read_run(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "holds a list"), ('{"schema": 2}', "reads schema 1")],
)
def test_a_summary_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)
