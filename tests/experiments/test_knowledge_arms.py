"""The trainings in the world `knowledge`: who is as large as whom, what begins equal, tuning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import granularity_shared, load_balancing, moe_vs_dense
from experiments.lab.knowledge_arms import (
    CONTEXT,
    MODEL,
    SCORED_FROM,
    WIDTH,
    Design,
    Lab,
    beginning,
    config_of,
    dense,
    mixture,
    rate_of,
    rows_of,
)
from experiments.lab.knowledge_summary import steps_to, weight_of
from experiments.lab.knowledge_tuning import TRIED, tune
from moe.budget import budget
from moe.errors import UserError

EXPERIMENTS = (moe_vs_dense, load_balancing, granularity_shared)
ROUTERS = 2 * MODEL["hidden_size"]  # parameters of the routers of both layers, per expert


def parameters(design: Design) -> int:
    return int(budget(config_of(design)).total)


def test_equal_total_parameters_are_equal_but_for_the_router() -> None:
    arms = moe_vs_dense.ARMS
    assert parameters(arms["moe_08"]) == parameters(arms["dense_wide"]) + 8 * ROUTERS
    for name, finer in granularity_shared.GRANULARITY.items():
        extra = 8 * finer * ROUTERS
        assert parameters(granularity_shared.ARMS[name]) - extra == parameters(arms["dense_wide"])
    shared = parameters(granularity_shared.ARMS["shared"]) - 15 * ROUTERS
    assert shared == parameters(arms["dense_wide"])


def test_equal_active_parameters_are_equal_but_for_the_router() -> None:
    whole = config_of(moe_vs_dense.ARMS["dense"])
    for design in granularity_shared.ARMS.values():
        config = config_of(design)
        extra = config.num_experts * ROUTERS
        assert budget(config).active - extra == budget(whole).active
    assert WIDTH % max(granularity_shared.GRANULARITY.values()) == 0


def test_what_arms_share_begins_equal_and_differs_between_seeds() -> None:
    models = [
        beginning(design, seed=7).state_dict()
        for design in (dense(family=""), mixture(family="", num_experts=4))
    ]
    names = [name for name in models[0] if ".mlp." not in name]
    assert any("self_attn" in name for name in names)
    assert all(torch.equal(models[0][name], models[1][name]) for name in names)
    other = beginning(dense(family=""), seed=8).state_dict()
    assert not torch.equal(models[0]["lm_head.weight"], other["lm_head.weight"])


def test_rows_are_scored_from_the_place_at_which_the_domain_is_known(tmp_path: Path) -> None:
    lab = Lab(experiment="x", seed=0, scale="debug", folder=tmp_path, rates={})
    train, held_out, best = rows_of(lab)
    assert len(train) == lab.sizes.steps * lab.sizes.batch
    assert all(len(row["input_ids"]) == CONTEXT for row in [*train, *held_out])
    labels = train[0]["labels"]
    assert labels[:SCORED_FROM] == [-100] * SCORED_FROM and min(labels[SCORED_FROM:]) >= 0
    assert 0.5 < best < 1.2


def test_a_family_without_a_rate_is_refused(tmp_path: Path) -> None:
    lab = Lab(experiment="x", seed=0, scale="debug", folder=tmp_path, rates={"a": 0.1})
    with pytest.raises(UserError, match="family 'b', only for a"):
        rate_of(lab, dense(family="b"))


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda module: module.EXPERIMENT)
def test_every_family_has_one_arm_that_it_is_tried_on_and_arms_stand_by_name(module: Any) -> None:
    if module.QUESTION.tune is None:
        families = [d.family for d in module.ARMS.values()]
    else:
        tried = getattr(module, "TRIED_ON", tuple(module.ARMS))
        families = [module.ARMS[arm].family for arm in tried]
        assert len(set(families)) == len(families)
    assert set(families) == {d.family for d in module.ARMS.values()} == set(module.RATES)
    assert set(module.RATES.values()) <= set(TRIED)
    assert list(module.ARMS) == sorted(module.ARMS)
    assert all(weight_of(design) > 0 for design in module.ARMS.values())


def test_a_family_takes_the_rate_of_the_lowest_loss(tmp_path: Path) -> None:
    design = dense(family="d")
    for rate in TRIED:
        folder = tmp_path / f"rate-{rate:g}" / "dense-s9001"
        folder.mkdir(parents=True)
        judged = {"metrics": {"held_out_loss": abs(rate - 3e-3)}}
        (folder / "judged.json").write_text(json.dumps(judged), encoding="utf-8")
    found = tune(tmp_path, {"dense": design}, experiment="x", scale="debug", processes=1)
    assert found["chosen"] == {"d": 3e-3} and found["tried_on"] == {"d": "dense"}
    assert found["seed"] not in range(1000)


def test_steps_to_a_level_are_read_between_looks() -> None:
    curve = [(0, 4.0), (10, 3.0), (20, 2.0)]
    assert steps_to(curve, 2.5) == 15.0
    assert steps_to(curve, 4.5) == 0.0
    assert steps_to(curve, 1.0) is None
