"""The experiment `granularity_shared` at debug scale: what it leaves, surgery, and its rule."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.granularity_shared import (
    ARMS,
    EXPERIMENT,
    GRANULARITY,
    QUESTION,
    SURGERIES,
    conditions,
    gather,
    labs,
    law_of,
    plan,
    run,
)
from experiments.lab.begun import keep_settings
from experiments.lab.question import Options
from experiments.lab.rules import combined
from sft.run import Run

OPTIONS = Options(seeds=(0,), scale="debug", processes=1)
ROUTER = 2 * 64  # parameters of the routers of both layers, per expert


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs run here, one by one; the command then finds them done and goes on to the report."""
    folder = tmp_path_factory.mktemp(EXPERIMENT) / "run"
    Run.create(folder, EXPERIMENT, OPTIONS.identity, out=folder)
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
    for file in ("config.yaml", "environment.json", "summary.json", "table.md", "report.html"):
        assert (finished / file).is_file(), file
    assert (finished / "figures" / "curve-held_out-eval-loss.svg").is_file()
    gathered = json.loads(json.dumps(gather(OPTIONS, finished)))
    assert gathered == {key: summary[key] for key in gathered}
    assert summary["verdict"]["word"] == "INCONCLUSIVE"  # one seed decides nothing
    assert {claim["verdict"] for claim in summary["claims"]} == {"INCONCLUSIVE"}


def test_surgery_changes_what_it_names_and_trains_nothing(
    finished: Path,
    summary: dict[str, Any],
) -> None:
    assert set(summary["arms"]) == {*ARMS, *SURGERIES}
    losses = {arm: metrics["held_out_loss"][0] for arm, metrics in summary["arms"].items()}
    assert len({losses[a] for a in ("shared", "shared_dropped", "shared_replaced")}) == 3
    active = {arm: metrics["active_parameters"][0] for arm, metrics in summary["arms"].items()}
    assert active["shared_replaced"] == active["shared"] > active["shared_dropped"]
    (lab,) = labs(OPTIONS, finished)
    assert not lab.stage("shared_replaced").exists()
    assert losses["g2_dropped"] != losses["g2"] and active["g2_dropped"] < active["g2"]


def test_the_router_takes_a_growing_share_of_the_flops(
    summary: dict[str, Any],
) -> None:
    arms = summary["arms"]
    shares = [arms[arm]["router_flop_share"][0] for arm in GRANULARITY]
    assert shares == sorted(shares)
    flops = arms["g8"]["forward_flops_per_token"][0]
    assert shares[-1] == pytest.approx(2 * 64 * ROUTER / flops)


# --- the rule ------------------------------------------------------------------------------------

Arms = dict[str, dict[str, list[float | None]]]


def word(conditions: list[Any]) -> str:
    return combined([condition.word for condition in conditions])


def flat(levels: Mapping[str, Mapping[str, float]]) -> Arms:
    """Three seeds that hardly differ."""
    return {
        arm: {metric: [value, value + 0.001, value - 0.001] for metric, value in metrics.items()}
        for arm, metrics in levels.items()
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "REPRODUCED"),
        ({"g2": 1.975, "g4": 1.96, "g8": 1.955}, "INCONCLUSIVE"),
        ({"shared_replaced": 1.85}, "INCONCLUSIVE"),
        ({"shared_replaced": 1.7}, "NOT REPRODUCED"),
        ({"g2": 2.1, "g4": 2.2, "g8": 2.3}, "NOT REPRODUCED"),
        # The loss falls once and rises again: no level that it goes to.
        ({"g2": 1.7, "g4": 1.8, "g8": 1.9}, "NOT REPRODUCED"),
        # Each split gains more than the one before it: no exponent above 0 has g above 0.
        ({"g2": 1.95, "g4": 1.85, "g8": 1.65}, "NOT REPRODUCED"),
    ],
)
def test_the_verdict_of_granularity_shared_follows_its_rule(
    changes: dict[str, float], expected: str
) -> None:
    levels = {"g1": 2.0, "g2": 1.8, "g4": 1.7, "g8": 1.65, "shared": 1.8, "shared_replaced": 2.2}
    arms = flat({arm: {"held_out_loss": v} for arm, v in (levels | changes).items()})
    law = law_of(arms)
    assert word(conditions(arms, law)) == expected
