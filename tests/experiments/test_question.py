"""What every experiment's command does alike: contradictions refused, runs resumed, tuning."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.lab.question import (
    STATE_KEYS,
    MirroredOptions,
    Options,
    Question,
    TunedOptions,
    answer,
    command,
    mirror_of,
    summarised,
)
from moe.errors import UserError
from sft.flags import main_guard
from sft.run import Run, config_hash


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
SETTINGS: dict[str, Any] = {"rates": {"moe": 3e-3}, "designs": {"moe": {"experts": 8}}}
SET = replace(QUESTION, settings=SETTINGS, tried=(1e-3, 3e-3))


def at_rate(rate: float) -> Question:
    return replace(SET, settings={**SETTINGS, "rates": {"moe": rate}})


def of_experts(count: int) -> Question:
    return replace(SET, settings={**SETTINGS, "designs": {"moe": {"experts": count}}})


def debug(folder: Path) -> Options:
    return Options(seeds=(0, 1), scale="debug", processes=1, out=folder)


@main_guard
def main(argv: list[str]) -> int:
    return command(QUESTION, argv)


@main_guard
def main_of(question: Question, argv: list[str]) -> int:
    return command(question, argv)


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


@pytest.mark.parametrize(
    ("question", "flags"),
    [
        (QUESTION, ["--mirror", "none"]),
        (replace(QUESTION, tune=None), ["--mirror", "none"]),
        (replace(QUESTION, tune=None), ["--tune"]),
        (replace(QUESTION, tune=None, mirrored=True), ["--tune"]),
    ],
)
def test_an_option_that_an_experiment_has_no_use_for_is_unknown(
    question: Question, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(question, flags) == 2
    told = capsys.readouterr().err
    assert "nknown" in told and flags[0] in told


def test_a_mirrored_experiment_says_where_and_its_identity_does_not(tmp_path: Path) -> None:
    mirrored = replace(QUESTION, tune=None, mirrored=True)
    assert mirrored.options is MirroredOptions and QUESTION.options is TunedOptions
    assert replace(QUESTION, tune=None).options is Options
    assert mirror_of(MirroredOptions()) == "wandb" and mirror_of(TunedOptions()) == "none"
    assert MirroredOptions(mirror="none").identity == Options().identity
    folder = str(tmp_path / "run")
    assert main_of(mirrored, ["--mirror", "none", "--scale", "debug", "--out", folder]) == 0
    assert main_of(mirrored, ["--resume", folder]) == 0


def test_a_question_that_contradicts_itself_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no mirror yet"):
        replace(QUESTION, mirrored=True)
    with pytest.raises(ValueError, match="no effect without tune"):
        replace(QUESTION, tune=None, tried=(1.0,))


def test_without_settings_nothing_is_said_of_them(tmp_path: Path) -> None:
    options = debug(tmp_path / "run")
    summary = answer(QUESTION, options)
    assert "settings_hash" not in summary
    assert summary["config_hash"] == config_hash(options.identity)
    assert not (tmp_path / "run" / "settings.json").exists()


def test_settings_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    first, second = (answer(q, debug(tmp_path / str(i))) for i, q in enumerate((SET, at_rate(1.0))))
    assert first["settings_hash"] == config_hash(SETTINGS) != second["settings_hash"]
    assert first["config_hash"] != second["config_hash"]
    assert json.loads((tmp_path / "0" / "settings.json").read_text(encoding="utf-8")) == SETTINGS
    # The options alone are what --config reads back.
    assert set(Run.open(tmp_path / "0").config) == {"seeds", "scale"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (at_rate(6e-3), r"rates\.moe 0\.003 in the run, 0\.006 now"),
        (of_experts(4), r"designs\.moe\.experts 8 in the run, 4 now"),
        (QUESTION, r"rates\.moe 0\.003 in the run, absent now"),
    ],
)
def test_a_run_of_other_settings_is_not_resumed(now: Question, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    answer(SET, debug(folder))
    again = Options(seeds=(0, 1), scale="debug", resume=folder)
    assert answer(SET, again)["settings_hash"] == config_hash(SETTINGS)
    with pytest.raises(UserError, match=f"Cannot resume .* settings differ .*{said}"):
        answer(now, again)


def test_a_run_from_before_there_were_settings_is_not_resumed_with_some(tmp_path: Path) -> None:
    answer(QUESTION, debug(tmp_path / "run"))
    with pytest.raises(UserError, match="absent in the run"):
        answer(SET, Options(seeds=(0, 1), scale="debug", resume=tmp_path / "run"))


def tuning(folder: Path, scale: str = "debug") -> list[str]:
    return ["--tune", "--scale", scale, "--out", str(folder)]


@pytest.mark.parametrize(
    ("now", "scale", "said"),
    [
        (SET, "laptop", "scale debug there, laptop now"),
        (of_experts(4), "debug", "settings_hash"),
        (replace(SET, tried=(1e-3,)), "debug", "tried [0.001, 0.003] there, [0.001] now"),
        (replace(SET, name="other"), "debug", "experiment toy there, other now"),
    ],
)
def test_trials_that_were_begun_with_something_else_are_not_continued(
    now: Question, scale: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_of(SET, tuning(tmp_path / "t")) == 0
    assert main_of(now, tuning(tmp_path / "t", scale)) == 2
    told = capsys.readouterr().err
    assert said in told and "give another --out" in told


def test_trials_are_continued_whatever_rates_were_chosen_since(tmp_path: Path) -> None:
    assert main_of(SET, tuning(tmp_path / "t")) == 0
    assert main_of(at_rate(6e-3), tuning(tmp_path / "t")) == 0


def test_trials_of_nobody_knows_what_are_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tuning.json").write_text("{}", encoding="utf-8")  # an outcome alone is no trial
    assert main_of(SET, tuning(tmp_path)) == 0
    (tmp_path / "options.json").unlink()
    (tmp_path / "rate-0.003").mkdir()
    assert main_of(SET, tuning(tmp_path)) == 2
    assert "rate-0.003 but no options.json" in capsys.readouterr().err
