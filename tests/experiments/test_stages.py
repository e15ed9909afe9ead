"""The stages of one seed, run in this process at debug scale."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from experiments.lab import judging, stages
from experiments.lab.gold import GoldForbidden, GoldReward
from experiments.lab.presets import DEBUG
from experiments.lab.seed import Seed
from experiments.lab.tuning import NUM_PROMPTS, choose, trials
from experiments.lab.world_tales import TalesWorld
from sft.checkpoint import live_tensors, read_checkpoint


def make_seed(folder: Path, *, lora_rank: int = 0, number: int = 3) -> Seed:
    return Seed(
        seed=number,
        world=TalesWorld(scale=DEBUG),
        folder=folder / "stages",
        arms=folder,
        lora_rank=lora_rank,
        mirror=False,
    )


def run_trunk(seed: Seed) -> None:
    """Everything but the labelling under a ban on gold."""
    with GoldReward.forbid():
        stages.make_base(seed)
        stages.supervised_finetune(seed)
    stages.collect_pairs(seed)
    with GoldReward.forbid():
        stages.train_reward_model(seed)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    seed = make_seed(tmp_path_factory.mktemp("full"))
    run_trunk(seed)
    return seed


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    seed = make_seed(tmp_path_factory.mktemp("lora"), lora_rank=2)
    run_trunk(seed)
    return seed


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_and_selection_never_touch_gold(kind: str, request: pytest.FixtureRequest) -> None:
    seed = request.getfixturevalue(kind)
    with GoldReward.forbid():
        stages.train_dpo(seed, DEBUG.dpo)
        stages.train_ppo(seed, DEBUG.ppo)
        for arm in ("base", "few_shot", "sft", "dpo", "ppo", "best_of_n"):
            measured, _ = judging.measure_arm(seed, arm, seed.eval_prompts(4), best=DEBUG.best_of_n)
            assert "gold_reward" not in measured.metrics
        with pytest.raises(GoldForbidden):
            judging.judge_arm(seed, "sft")
        with pytest.raises(GoldForbidden):
            judging.judge_frontier(seed, "dpo")


@pytest.mark.parametrize("arm", ["dpo", "ppo"])
def test_the_frontier_has_at_least_five_points_of_each_arm(full: Seed, arm: str) -> None:
    if not full.is_done(arm):
        getattr(stages, f"train_{arm}")(full, getattr(DEBUG, arm))
    points = judging.judge_frontier(full, arm)
    assert len(points) >= 5
    assert [p["step"] for p in points] == sorted({p["step"] for p in points})


def test_sft_is_at_distance_zero_from_itself_and_wins_half(full: Seed) -> None:
    judged = judging.judge_arm(full, "sft")
    assert judged["metrics"]["kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    from experiments.lab.evaluation import win_rate

    assert win_rate(judged["gold"], judged["gold"]) == 0.5


def test_best_of_n_reports_the_bound_and_never_scores_below_its_first_draw(
    full: Seed,
) -> None:
    prompts = full.eval_prompts(6)
    best, tokens = judging.measure_arm(full, "best_of_n", prompts, best=DEBUG.best_of_n)
    assert best.metrics["kl_sequence"] == pytest.approx(0.1931, abs=1e-4)  # ln 2 - 1/2
    one, _ = judging.measure_arm(
        full, "best_of_n", prompts, best=dataclasses.replace(DEBUG.best_of_n, n=1)
    )
    assert best.metrics["proxy_reward"] >= one.metrics["proxy_reward"]
    assert tokens > 0


def test_lora_stages_leave_the_pretrained_weights_bit_identical(lora: Seed) -> None:
    base = read_checkpoint(lora.folder / "base" / "final").tensors["model"]
    trained = read_checkpoint(lora.folder / "sft" / "final").tensors["model"]
    plain = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in trained.items()
        if "lora_" not in name
    }
    assert plain.keys() == base.keys()
    assert all(torch.equal(plain[name], base[name]) for name in base)
    adapters = [name for name in trained if "lora_B" in name]
    assert adapters and any(trained[name].abs().sum() > 0 for name in adapters)


def test_under_lora_the_reference_is_the_frozen_sft_adapter(lora: Seed) -> None:
    policy, reference = lora.policy_and_reference()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = lora.sft().eval()(input_ids=ids, use_cache=False).logits
        for name, parameter in policy.named_parameters():
            if ".policy." in name:
                parameter.add_(0.1)
        moved = policy.eval()(input_ids=ids, use_cache=False).logits
        with reference.lend() as model:
            lent = model(input_ids=ids, use_cache=False).logits
        again = policy(input_ids=ids, use_cache=False).logits
    assert torch.equal(lent, before)
    assert not torch.equal(moved, before)
    assert torch.equal(again, moved)


def test_routing_of_sft_does_not_drift_from_itself(full: Seed) -> None:
    found = judging.routing_of(full, "sft")
    assert found is not None
    assert found["jaccard_from_sft"] == [1.0, 1.0]
    assert found["jsd_from_sft"] == [0.0, 0.0]
    assert all(abs(sum(layer) - 4) < 1e-9 for layer in found["load_share"])
    assert (full.arm_folder("sft") / "routing.npz").is_file()


def test_a_stage_that_is_asked_again_gives_the_same_weights(full: Seed, tmp_path: Path) -> None:
    again = make_seed(tmp_path)
    stages.make_base(again)
    first = live_tensors(full.base())
    second = live_tensors(again.base())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pairs_hold_two_different_completions_and_no_reward(full: Seed) -> None:
    held = json.loads((full.folder / "pairs.json").read_text(encoding="utf-8"))
    assert held["pairs"]
    for pair in held["pairs"]:
        assert set(pair) == {"prompt", "chosen", "rejected"}
        assert pair["chosen"] != pair["rejected"]
    train, val = stages.pair_rows(full)
    prompts = [{tuple(row["prompt_ids"]) for row in side} for side in (train, val)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_every_method_gets_the_same_number_of_tuning_trials() -> None:
    assert {len(settings) for settings in trials(TalesWorld(scale=DEBUG)).values()} == {4}


def test_tuning_prompts_are_not_those_of_the_evaluator() -> None:
    seed = make_seed(Path("unused"))
    evaluated = set(seed.eval_prompts(DEBUG.num_eval_prompts))
    assert not evaluated & set(seed.world.validation_prompts(NUM_PROMPTS))


def test_tuning_takes_the_highest_learned_reward_whose_text_is_still_text() -> None:
    rows = [
        {"proxy_reward": 1.0, "reference_perplexity": 3.0},
        {"proxy_reward": 9.0, "reference_perplexity": 8.0},
        {"proxy_reward": 2.0, "reference_perplexity": 4.0},
    ]
    assert choose(rows, sft_perplexity=3.0) == 2
    assert choose(rows, sft_perplexity=1.0) == 0  # none is near enough: the nearest
