"""The experiment `rloo` at debug scale, how gradients scatter, and its rule."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lab.begun import keep_settings
from experiments.lab.enumerable import answer_logps, build_world, new_policy
from experiments.lab.enumerable_arms import TRIED
from experiments.lab.gradient_spread import (
    answers_logp,
    covariance_trace,
    drawn,
    gradient_spread,
)
from experiments.lab.question import Options
from experiments.lab.rules import combined
from experiments.rloo import LISTED, METHODS, QUESTION, RATES, conditions, gather, plan, run
from sft.run import Run

OPTIONS = Options(seeds=(0,), scale="debug", processes=1)
RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs run here, one by one; the command then finds them done and goes on to the report."""
    folder = tmp_path_factory.mktemp("rloo") / "run"
    Run.create(folder, "rloo", OPTIONS.identity, out=folder)
    keep_settings(folder, QUESTION.settings)
    for job in plan(OPTIONS, folder):
        job.function(*job.arguments)
    run(replace(OPTIONS, resume=folder))
    return folder


def test_a_run_leaves_summary_table_and_report(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    for file in ("table.md", "report.html"):
        assert (finished / file).is_file(), file
    gathered = json.loads(json.dumps(gather(OPTIONS, finished)))
    assert gathered == {key: summary[key] for key in gathered}
    assert summary["verdict"]["word"] == "INCONCLUSIVE"  # one seed decides nothing
    assert set(summary["arms"]) == {*LISTED, *METHODS}
    assert "gradient_spread" not in summary["arms"]["ppo"]  # its critic is untrained at the start


def test_the_rates_are_those_of_the_committed_trials() -> None:
    path = RESULTS / "rloo" / "tuning" / "tuning.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["chosen"] == dict(RATES) and found["scale"] == "laptop"
    for tried in found["kl_to_optimum"].values():
        assert [float(rate) for rate in tried] == list(TRIED)


# --- how gradients scatter -----------------------------------------------------------------------


def test_the_trace_of_a_covariance_by_hand() -> None:
    rows_NG = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 6.0]], dtype=torch.float64)
    assert covariance_trace(rows_NG) == pytest.approx(1.0 + 12.0)


def test_answers_come_in_fours_and_their_log_probability_is_the_listed_one() -> None:
    world, policy = build_world(0, longest=2), new_policy(0, width=16).eval()
    logp_PA = answer_logps(policy, world)
    place_B, prompt_B = drawn(logp_PA, count=16, seed=0, batch=3)
    assert prompt_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    found = answers_logp(policy, world, place_B=place_B, prompt_B=prompt_B)
    expected = logp_PA[prompt_B, place_B].tolist()
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_estimators_that_differ_by_a_baseline_have_one_mean() -> None:
    """E[grad log p] = 0: over all answers a constant baseline changes nothing, to the digit."""
    world, policy = build_world(1, longest=1), new_policy(1, width=16).eval()
    probability_A = answer_logps(policy, world)[0].exp()
    count = len(world.answers)
    logp_B = answers_logp(
        policy, world, place_B=torch.arange(count), prompt_B=torch.zeros(count, dtype=torch.int64)
    )
    total = (probability_A.detach() * logp_B).sum()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-5


def test_a_batch_scatters_by_the_reward_and_not_at_all_where_all_rewards_are_one() -> None:
    world, policy = build_world(2, longest=1), new_policy(2, width=16).eval()
    logp_PA = answer_logps(policy, world)
    found = gradient_spread(policy, logp_PA, world, answers=8, batches=3, seed=0)
    assert set(found) == {"pg", "rloo_2", "rloo_4"} and min(found.values()) > 0
    alike = replace(world, weight_PA=((2,) * len(world.answers),) * len(world.weight_PA))
    same = gradient_spread(policy, logp_PA, alike, answers=8, batches=3, seed=0)
    assert same["rloo_2"] == same["rloo_4"] == 0.0 < same["pg"]


# --- the rule ------------------------------------------------------------------------------------


def three_seeds(**changes: float) -> dict[str, dict[str, list[float]]]:
    spread = {"pg": 3.0, "rloo_2": 2.0, "rloo_4": 1.0}
    objective = {"pg": 1.0, "ppo": 1.1, "rloo_2": 1.2, "rloo_4": 1.3} | changes
    arms: dict[str, dict[str, list[float]]] = {
        arm: {"objective": [value] * 3} for arm, value in objective.items() if arm in METHODS
    }
    for arm, value in spread.items():
        arms[arm]["gradient_spread"] = [changes.get(f"{arm}_spread", value)] * 3
    return arms


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "REPRODUCED"),
        ({"rloo_4": 1.0}, "NOT REPRODUCED"),
        ({"rloo_4_spread": 2.5}, "NOT REPRODUCED"),
        ({"rloo_4_spread": 2.0}, "INCONCLUSIVE"),
    ],
)
def test_the_verdict_follows_its_rule(changes: dict[str, Any], expected: str) -> None:
    found = conditions(three_seeds(**changes))
    assert combined([condition.word for condition in found]) == expected
