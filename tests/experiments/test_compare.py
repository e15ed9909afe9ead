"""The main job at debug scale: what it leaves, and that neither processes nor a kill change it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.compare import Config, main, run
from experiments.lab.compare_summary import verdict_word
from experiments.lab.compare_terms import ARMS, METRICS
from moe.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def small(folder: Path, **changes: Any) -> Config:
    options: dict[str, Any] = {"seeds": (0,), "scale": "debug", "mirror": "none", "out": folder}
    return Config(**{**options, **changes})


def identity(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    del summary["timings"]
    return summary


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "run"
    run(small(folder))
    return folder


def test_a_run_leaves_everything_the_design_names(finished: Path) -> None:
    for name in ("config.yaml", "environment.json", "summary.json", "table.md", "report.html"):
        assert (finished / name).is_file(), name
    assert json.loads((finished / "status.json").read_text("utf-8"))["status"] == "done"
    assert list((finished / "figures").glob("*.svg"))
    for arm in ARMS:
        rows = (finished / f"{arm}-s0" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert set(json.loads(rows[0])) >= {"prompt", "before", "after"}
    for arm in ("base", "sft", "rm", "dpo", "ppo"):
        assert (finished / f"{arm}-s0" / "metrics.jsonl").is_file()
        assert (finished / f"{arm}-s0" / "routing.npz").is_file()


def test_the_summary_has_every_metric_of_every_arm_and_a_computed_verdict(finished: Path) -> None:
    summary = identity(finished)
    assert summary["schema"] == 1 and summary["seeds"] == [0]
    for arm in ARMS:
        assert set(METRICS) <= set(summary["arms"][arm])
    assert summary["arms"]["sft"]["win_rate"] == [0.5]
    assert summary["verdict"]["word"] == verdict_word(summary["comparisons"])
    assert {c["word"] for c in summary["comparisons"]} == {"UNRESOLVED"}  # one seed: no interval
    assert all(c["interval95"] is None for c in summary["comparisons"])
    assert set(summary["routing"]) == {"base", "sft", "rm", "dpo", "ppo"}


def test_a_killed_run_resumes_to_the_same_summary(finished: Path, tmp_path: Path) -> None:
    """Killed with -9 in the middle of PPO, in one process; the first run had two."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.compare", "--scale", "debug", "--seeds", "0"]
    command += ["--mirror", "none", "--processes", "1", "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        checkpoint = folder / "stages" / "s0" / "ppo" / "checkpoint-2"
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (folder / "summary.json").exists()
    again = [*command[:3], "--resume", str(folder)]
    subprocess.run(
        [*again, "--mirror", "none"], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    assert identity(folder) == identity(finished)
    rows = [
        (folder / "ppo-s0" / "metrics.jsonl").read_bytes(),
        (finished / "ppo-s0" / "metrics.jsonl").read_bytes(),
    ]
    assert rows[0] == rows[1]


def test_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(finished)]) == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_resuming_with_another_option_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(finished), "--seeds", "0", "1"]) == 2
    assert "seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["BETTER", "BETTER", "BETTER"], "REPRODUCED"),
        (["BETTER", "BETTER", "UNRESOLVED"], "INCONCLUSIVE"),
        (["BETTER", "EQUIVALENT", "BETTER"], "INCONCLUSIVE"),
        (["BETTER", "WORSE", "UNRESOLVED"], "NOT REPRODUCED"),
    ],
)
def test_the_verdict_follows_its_rule(words: list[str], expected: str) -> None:
    rows = [
        {"arm": arm, "metric": "gold_reward", "word": word}
        for arm, word in zip(("dpo", "ppo", "best_of_n"), words, strict=True)
    ]
    noise = [
        {"arm": "base", "metric": "gold_reward", "word": "WORSE"},
        {"arm": "dpo", "metric": "length", "word": "WORSE"},
    ]
    assert verdict_word([*rows, *noise]) == expected


@pytest.mark.parametrize(
    "changes", [{"peft": "lora"}, {"lora_rank": 8}, {"seeds": (1, 1)}, {"processes": 0}]
)
def test_options_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        small(Path("unused"), **changes)


@pytest.mark.parametrize("option", ["--seeds=3", "--mirror=none"])
def test_tuning_refuses_what_it_would_ignore(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tune", option]) == 2
    assert "no effect with --tune" in capsys.readouterr().err


def test_every_stage_has_its_own_seconds_and_memory(finished: Path) -> None:
    timings = json.loads((finished / "summary.json").read_text("utf-8"))["timings"]
    stages = {*ARMS, "pairs", "rm", "judge"}
    assert set(timings["seconds"]) == set(timings["peak_mib"]) == stages
    assert all(value > 0.0 for values in timings["seconds"].values() for value in values)
