"""The experiment `closed_form` at debug scale: what it leaves, and its rule."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.closed_form import (
    BEST_OF,
    LISTED,
    METHODS,
    QUESTION,
    RATES,
    conditions,
    gather,
    plan,
    reported,
    run,
)
from experiments.lab.begun import keep_settings
from experiments.lab.enumerable import BETA, best_of_bound
from experiments.lab.enumerable_arms import TRIED, best_name
from experiments.lab.question import Options
from experiments.lab.rules import combined
from sft.run import Run

OPTIONS = Options(seeds=(0,), scale="debug", processes=1)
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs run here, one by one; the command then finds them done and goes on to the report."""
    folder = tmp_path_factory.mktemp("closed_form") / "run"
    Run.create(folder, "closed_form", OPTIONS.identity, out=folder)
    keep_settings(folder, QUESTION.settings)
    for job in plan(OPTIONS, folder):
        job.function(*job.arguments)
    run(replace(OPTIONS, resume=folder))
    return folder


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    return found


def test_a_run_leaves_summary_table_report_and_curves(
    finished: Path, summary: dict[str, Any]
) -> None:
    for file in ("settings.json", "summary.json", "table.md", "report.html"):
        assert (finished / file).is_file(), file
    assert (finished / "figures" / "curve-exact-eval-kl_to_optimum.svg").is_file()
    gathered = json.loads(json.dumps(gather(OPTIONS, finished)))
    assert gathered == {key: summary[key] for key in gathered}
    assert summary["verdict"]["word"] == "INCONCLUSIVE"  # one seed decides nothing


def test_every_method_starts_from_the_reference_and_lacks_beta_times_its_distance(
    summary: dict[str, Any],
) -> None:
    arms = summary["arms"]
    assert set(arms) == {*LISTED, *METHODS}
    (best,) = arms["optimum"]["objective"]
    for arm, metrics in arms.items():
        (objective,), (distance,) = metrics["objective"], metrics["kl_to_optimum"]
        assert best - objective == pytest.approx(BETA * distance, abs=1e-5), arm
    assert arms["reference"]["exact_kl"] == [pytest.approx(0.0, abs=1e-12)]
    assert all(arms[arm]["exact_kl"][0] > 0 for arm in METHODS)


def test_the_rates_are_those_of_the_committed_trials() -> None:
    path = RESULTS / "closed_form" / "tuning" / "tuning.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["chosen"] == dict(RATES) and found["scale"] == "laptop"
    assert all([float(rate) for rate in tried] == list(TRIED) for tried in _tried(found))


def _tried(found: dict[str, Any]) -> list[dict[str, float]]:
    return list(found["kl_to_optimum"].values())


# --- the rule ------------------------------------------------------------------------------------


def three_seeds(**changes: float) -> dict[str, dict[str, list[float]]]:
    """Three seeds alike: every method a hundredth of a nat away, the reference one nat."""
    distances = dict.fromkeys(METHODS, 0.01) | {"reference": 1.0} | changes
    arms = {arm: {"kl_to_optimum": [distances[arm]] * 3} for arm in (*METHODS, "reference")}
    for n in BEST_OF:
        over = changes.get("excess", -0.1)
        arms[best_name(n)] = {
            "kl_to_optimum": [0.2] * 3,
            "exact_kl": [best_of_bound(n) + over] * 3,
        }
    return arms


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "REPRODUCED"),
        ({"grpo": 0.5}, "REPRODUCED"),  # told, and decides nothing
        ({"ppo": 0.06}, "NOT REPRODUCED"),
        ({"dpo": 0.2}, "NOT REPRODUCED"),
        ({"excess": 0.01}, "NOT REPRODUCED"),
    ],
)
def test_the_verdict_follows_its_rule(changes: dict[str, float], expected: str) -> None:
    found = conditions(three_seeds(**changes))
    assert combined([condition.word for condition in found]) == expected


def test_one_seed_that_is_left_behind_leaves_it_open() -> None:
    arms = three_seeds()
    arms["rloo"]["kl_to_optimum"] = [0.01, 0.06, 0.01]
    assert combined([condition.word for condition in conditions(arms)]) == "INCONCLUSIVE"


def test_dividing_by_the_deviation_is_told_by_its_sign() -> None:
    words = {c.claim.split(" (")[0]: c.word for c in reported(three_seeds(grpo=0.5))}
    assert words["Dividing by a group's deviation ends further away"] == "REPRODUCED"
    assert words["PPO ends nearer than the best of n at its best n"] == "REPRODUCED"
