"""Learning rates are those that the committed trials chose, and an edge of the grid is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import granularity_shared, load_balancing, moe_vs_dense, routing_analysis
from experiments.lab.knowledge_tuning import TRIED, TUNING_SEED, best_rate, is_at_an_edge

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize(
    ("experiment", "rates"),
    [
        ("moe_vs_dense", dict(moe_vs_dense.RATES)),
        ("granularity_shared", dict(granularity_shared.RATES)),
        ("routing_analysis", routing_analysis.RATE),
    ],
)
def test_the_rates_are_those_of_the_committed_trials_and_none_lies_at_an_edge(
    experiment: str, rates: Any
) -> None:
    path = RESULTS / experiment / "tuning" / "tuning.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["chosen"] == rates and not found["at_an_edge"]
    assert (found["seed"], found["scale"]) == (TUNING_SEED, "laptop")
    losses = found["held_out_loss"]
    by_family = losses if isinstance(found["chosen"], dict) else {"": losses}
    assert all([float(rate) for rate in tried] == list(TRIED) for tried in by_family.values())


def test_the_balanced_model_has_the_rate_of_the_same_model_elsewhere() -> None:
    assert load_balancing.RATES == {"moe": moe_vs_dense.RATES["moe"]}


def test_the_best_rate_is_that_of_the_lowest_loss_and_an_edge_is_told() -> None:
    inner = {f"{rate:g}": loss for rate, loss in zip(TRIED, (2.0, 1.5, 1.6, 1.9), strict=True)}
    assert best_rate(inner) == TRIED[1] and not is_at_an_edge(inner)
    outer = {f"{rate:g}": loss for rate, loss in zip(TRIED, (2.0, 1.9, 1.8, 1.7), strict=True)}
    assert best_rate(outer) == TRIED[-1] and is_at_an_edge(outer)
