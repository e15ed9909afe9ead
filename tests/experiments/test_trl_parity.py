"""The experiment `trl_parity` at debug scale: TRL's trainers beside ours, and the rule."""

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.lab import trl_beside
from experiments.lab.question import Options
from experiments.lab.trl_beside import FAMILIES, STAGES
from experiments.trl_parity import CLOSE, EXPERIMENT, cells, conditions, gather, plan, run
from moe.errors import UserError
from sft.run import Run

OPTIONS = Options(seeds=(0,), scale="debug", processes=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job runs here; the command then finds it done and goes on to the report."""
    folder = tmp_path_factory.mktemp(EXPERIMENT) / "run"
    Run.create(folder, EXPERIMENT, OPTIONS.identity, out=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_beside, "report", lambda *said: None)  # there is no grid to hear it
        for job in plan(OPTIONS, folder):
            job.function(*job.arguments)
    run(replace(OPTIONS, resume=folder))
    return folder


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    return found


def seed_found(**changed: float) -> dict[str, Any]:
    cell = {"ours": 1.0, "trl": 1.0, "gradient_gap": 0.0, "first": 1.0, "last": 0.5}
    return {key: {**cell, "weight_gap": 0.0, "bias_gap": 0.0, **changed} for key, _, _ in cells()}


def words(*seeds: dict[str, Any]) -> set[str]:
    return {condition.word for condition in conditions(seeds)}


def test_a_run_leaves_summary_table_and_report(finished: Path, summary: dict[str, Any]) -> None:
    for file in ("config.yaml", "environment.json", "summary.json", "table.md", "report.html"):
        assert (finished / file).is_file(), file
    gathered = json.loads(json.dumps(gather(OPTIONS, finished)))
    assert gathered == {key: summary[key] for key in gathered}
    assert summary["verdict"]["word"] == "INCONCLUSIVE"  # one seed decides nothing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_our_loss_and_gradients_are_trls(finished: Path, family: str, stage: str) -> None:
    found = trl_beside.read_seed(finished, 0)[f"{family}_{stage}"]
    assert abs(found["ours"] - found["trl"]) <= CLOSE
    assert found["gradient_gap"] <= CLOSE
    assert found["last"] < found["first"]


def test_where_the_sides_differ_is_what_the_notes_say(finished: Path) -> None:
    found = trl_beside.read_seed(finished, 0)["differences"]
    cells_of = trl_beside.read_seed(finished, 0)
    assert all(cells_of[key]["same_rows"] for key, _, _ in cells())
    assert not found["same_rows_without_bos"]
    assert abs(found["smoothing_trl"]) <= CLOSE < abs(found["smoothing_ours"])
    assert abs(found["eos_pad_trl"]) > 1e-3
    assert found["balance_trl"] > 1.5 > found["balance_ours"] > 0.9  # even: 2 and 1


def test_the_rule_asks_every_stage_of_every_model_in_every_seed() -> None:
    good = seed_found()
    assert words(good, good, good) == {"REPRODUCED"}
    assert words(good, good) == {"INCONCLUSIVE"}
    apart = seed_found(trl=1.0 + 1.5 * CLOSE)
    assert words(good, good, apart) == {"REPRODUCED", "INCONCLUSIVE"}
    assert "NOT REPRODUCED" in words(apart, apart, apart)
    rising = seed_found(last=2.0)
    assert "NOT REPRODUCED" in words(rising, rising, rising)
    steep = seed_found(gradient_gap=1e-3)
    assert "NOT REPRODUCED" in words(good, good, steep)


def test_without_trl_the_experiment_refuses_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "trl":
            raise ModuleNotFoundError("No module named 'trl'")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="install trl 1.16 or later"):
        plan(OPTIONS, tmp_path)
