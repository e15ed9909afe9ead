"""What every experiment's command does alike: contradictions refused, runs resumed, tuning."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.lab.question import STATE_KEYS, Options, Question, answer, command, summarised
from moe.errors import UserError
from sft.flags import main_guard
from sft.run import Run


def gather(options: Options, folder: Path) -> dict[str, Any]:
    return {
        "arms": {"a": {"loss": [1.0 for _ in options.seeds]}},
        "comparisons": [],
        "verdict": {"word": "INCONCLUSIVE", "rule": "a rule", "metric": "loss"},
    }


def tune(folder: Path, options: Options) -> dict[str, Any]:
    return {"folder": folder.name, "scale": options.scale}


QUESTION = Question(
    name="toy", asks="Is it so?", rule="a rule", plan=lambda o, f: [], gather=gather, tune=tune
)


@main_guard
def main(argv: list[str]) -> int:
    return command(QUESTION, argv)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tune", "--seeds", "3"], "no effect with --tune"),
        (["--tune", "--overwrite"], "--tune takes neither"),
        (["--seeds", "1", "1"], "give each seed once"),
        (["--processes", "0"], "at least 1"),
        (["--resume", "x", "--out", "y"], "leave out --out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_jobs_ends_with_summary_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = answer(QUESTION, Options(seeds=(0, 1), scale="debug", processes=1, out=folder))
    assert summary == json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["experiment"], summary["question"]) == ("toy", "Is it so?")
    assert (folder / "report.html").is_file()
    again = Options(seeds=(0, 1), scale="debug", resume=folder)
    assert summarised(QUESTION, again, folder=folder) == summary
    with pytest.raises(UserError, match="seeds"):
        answer(QUESTION, Options(seeds=(0,), scale="debug", resume=folder))


def test_a_finished_run_takes_its_own_options_and_says_that_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    answer(QUESTION, Options(seeds=(5,), scale="debug", processes=1, out=folder))
    assert main(["--resume", str(folder)]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert Run.open(folder).config == {"seeds": [5], "scale": "debug"}


def test_tuning_has_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tune", "--scale", "debug", "--out", str(tmp_path / "tried")]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "tried", "scale": "debug"}


def test_where_and_how_a_run_works_does_not_decide_its_result() -> None:
    assert not set(STATE_KEYS) & set(Options().identity)
