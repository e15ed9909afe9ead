"""The experiment `moe_vs_dense` at debug scale: what it leaves, what costs what, and its rule."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.lab.begun import keep_settings
from experiments.lab.knowledge_arms import BACKWARD
from experiments.lab.question import Options
from experiments.lab.rules import combined
from experiments.moe_vs_dense import (
    ARMS,
    CAPACITIES,
    EXPERIMENT,
    PAIRS,
    QUESTION,
    conditions,
    gather,
    plan,
    run,
)
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


def test_every_arm_says_its_loss_its_cost_and_when_it_reached_the_dense_one(
    summary: dict[str, Any],
) -> None:
    assert set(summary["arms"]) == set(ARMS)
    for arm, metrics in summary["arms"].items():
        (loss,), (above,) = metrics["held_out_loss"], metrics["above_best"]
        assert loss - above == pytest.approx(summary["best_possible_loss"][0]), arm
        tokens = metrics["tokens_trained"][0]
        flops = metrics["forward_flops_per_token"][0]
        assert metrics["train_gflops"][0] == pytest.approx((1 + BACKWARD) * flops * tokens / 1e9)
        assert (metrics["dropped_share"][0] is None) == arm.startswith("dense")
    assert summary["arms"]["dense"]["steps_to_dense"] == [1.0]
    assert [(r["arm"], r["against"]) for r in summary["comparisons"]] == list(PAIRS)


def test_only_capacities_drop_and_one_expert_costs_the_flops_of_the_dense_ffn(
    summary: dict[str, Any],
) -> None:
    arms = summary["arms"]
    assert arms["moe_08"]["dropped_share"] == [0.0]
    dropped = [arms[arm]["dropped_share"][0] for arm in CAPACITIES]
    assert dropped[0] > 0 and dropped == sorted(dropped, reverse=True)
    flops = {arm: metrics["forward_flops_per_token"][0] for arm, metrics in arms.items()}
    assert flops["moe_08"] - flops["dense"] == 2 * 8 * ROUTER
    assert flops["moe_08_capacity_1.0"] == flops["moe_08"] < flops["moe_08_top_2"]


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


def compared_arms(**changes: float) -> Arms:
    levels = {"dense": 2.4, "moe_02": 2.3, "moe_04": 2.2, "moe_08": 2.0, "moe_16": 1.9}
    levels |= {"dense_wide": 2.0, "moe_08_top_2": 1.9, "moe_08_top_2_raw": 1.9}
    arms = {arm: {"held_out_loss": changes.get(arm, level)} for arm, level in levels.items()}
    for arm, dropped in zip(CAPACITIES, (0.2, 0.1, 0.01), strict=True):
        arms[arm] = {"held_out_loss": 2.0, "dropped_share": changes.get(arm, dropped)}
    arms["moe_08"]["steps_to_dense"] = changes.get("steps", 0.4)
    return flat(arms)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "REPRODUCED"),
        ({"moe_08": 2.21}, "INCONCLUSIVE"),
        ({"moe_08": 2.5, "moe_16": 2.6}, "NOT REPRODUCED"),
        ({"steps": 0.7}, "INCONCLUSIVE"),  # a saving that is only too small
        ({"steps": 1.2}, "NOT REPRODUCED"),
        ({"moe_08_capacity_1.25": 0.3}, "NOT REPRODUCED"),
        ({"moe_16": 2.01}, "INCONCLUSIVE"),
        ({"moe_16": 2.03}, "NOT REPRODUCED"),
    ],
)
def test_the_verdict_of_moe_vs_dense_follows_its_rule(
    changes: dict[str, float], expected: str
) -> None:
    assert word(conditions(compared_arms(**changes))) == expected


def test_an_arm_that_never_reached_the_dense_loss_saved_nothing() -> None:
    arms = compared_arms()
    arms["moe_08"]["steps_to_dense"] = [None, None, None]
    saved = conditions(arms)[1]
    assert saved.gaps == (0.0, 0.0, 0.0) and saved.word == "INCONCLUSIVE"
