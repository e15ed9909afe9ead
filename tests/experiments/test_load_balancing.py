"""The experiment `load_balancing` at debug scale: one model four ways, resumed, and its rule."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lab import grid
from experiments.lab.begun import keep_settings
from experiments.lab.knowledge_arms import arm_job, beginning, mixture
from experiments.lab.question import Options
from experiments.lab.rules import combined
from experiments.load_balancing import (
    ARMS,
    BIAS_RATE,
    EXPERIMENT,
    QUESTION,
    conditions,
    gather,
    labs,
    plan,
    reported,
    run,
)
from sft.checkpoint import read_checkpoint
from sft.run import Run

OPTIONS = Options(seeds=(0,), scale="debug", processes=1)


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


def test_the_arms_of_load_balancing_begin_as_one_model() -> None:
    states = [beginning(d, seed=0).state_dict() for d in ARMS.values()]
    weights = [{k: v for k, v in state.items() if "bias" not in k} for state in states]
    assert all(torch.equal(weights[0][k], held[k]) for held in weights[1:] for k in weights[0])


def test_only_the_bias_arm_has_a_bias_and_it_moved(
    finished: Path,
) -> None:
    (lab,) = labs(OPTIONS, finished)
    for arm in ARMS:
        tensors = read_checkpoint(lab.stage(arm) / "final").tensors["model"]
        biases = [t for name, t in tensors.items() if "correction_bias" in name]
        assert len(biases) == (2 if arm == "bias" else 0)
        for bias in biases:
            steps = bias / BIAS_RATE
            assert torch.allclose(steps, steps.round(), atol=1e-3) and bool(steps.abs().max() >= 1)


class Interruption(Exception):
    pass


class Interrupting:
    """A place for progress reports at which the job dies when it tells of this step."""

    def put(self, told: tuple[str, str, int, int]) -> None:
        if told[2] == 3:
            raise Interruption


@pytest.mark.parametrize("arm", ["bias", "aux"])
def test_an_interrupted_arm_goes_on_to_the_same_end(
    arm: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (whole,) = labs(OPTIONS, finished)
    (lab,) = labs(OPTIONS, tmp_path)
    design = ARMS[arm]
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_reports", Interrupting())
        with pytest.raises(Interruption):
            arm_job(lab, "job", arm, design)
    assert (lab.stage(arm) / "checkpoint-2").is_dir() and not lab.is_judged(arm)
    arm_job(lab, "job", arm, design)
    same, other = lab.judged(arm), whole.judged(arm)
    del same["timings"], other["timings"]
    assert same == other
    assert lab.curve(arm) == whole.curve(arm)


def test_what_is_judged_is_not_trained_again(finished: Path) -> None:
    (lab,) = labs(OPTIONS, finished)
    before = (lab.arm_folder("z") / "judged.json").read_bytes()
    arm_job(lab, "job", "z", mixture(family="not even known", num_experts=2))
    assert (lab.arm_folder("z") / "judged.json").read_bytes() == before


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
    ("aux", "bias", "loss", "expected"),
    [
        (0.4, 0.2, 1.9, "REPRODUCED"),
        (0.4, 0.2, 1.93, "NOT REPRODUCED"),
        (0.7, 0.2, 1.9, "INCONCLUSIVE"),  # less than half is taken away
        (1.3, 0.2, 1.9, "NOT REPRODUCED"),
        (0.4, 0.5, 1.9, "NOT REPRODUCED"),
        (0.4, 0.4, 1.9, "INCONCLUSIVE"),
    ],
)
def test_the_verdict_of_load_balancing_follows_its_rule(
    aux: float, bias: float, loss: float, expected: str
) -> None:
    even = {"none": 1.2, "aux": aux, "bias": bias, "z": 1.2}
    losses = {"bias": loss}
    arms = flat(
        {
            arm: {"max_vio": v, "held_out_loss": losses.get(arm, 1.9), "squared_logsumexp": 5.0}
            for arm, v in even.items()
        }
    )
    if aux == bias:
        arms["bias"]["max_vio"][0] = 0.41  # one seed the other way
        arms["bias"]["max_vio"][1:] = [0.39, 0.39]
    assert word(conditions(arms)) == expected
    claims = [condition.word for condition in reported(arms)]
    assert claims[1] == "INCONCLUSIVE"  # the logits are as large with the z-loss
