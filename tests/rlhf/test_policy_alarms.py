"""Alarms of alignment: each provoked by a made-up stream, the gravest by training a tiny policy.

The trainings are far from their thresholds: over seeds 0, 1 and 2 the policy that is paid for one
token ends with entropy 1/13 to 1/26 of its start (alarm from 1/4), KL of 1.8 to 2.4 nats per token
(1), and distinct-2 12 to 33 times lower (1.25).
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import MoEConfig, MoEForCausalLM
from rlhf.alarms import POLICY, PREFERENCE
from rlhf.dpo import DPOTrainer
from rlhf.kl import FixedKL
from rlhf.kto import KTOTrainer
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenCopy
from sft.alarms import Alarm, AlarmWatch
from sft.settings import TrainSettings

ROWS = 24
Shape = Callable[[float], float]  # of a metric over the training, from 0 to 1
# A training in which all is well: (value over time, deviation of the noise, count).
HEALTHY: dict[str, tuple[Shape, float, float]] = {
    "policy/kl_sequence": (lambda x: 8 * x, 0.1, 64),
    "policy/entropy": (lambda x: 2.0 - 0.8 * x, 0.1, 2000),
    "policy/approx_kl_k3": (lambda x: 0.02, 0.01, 2000),
    "policy/clip_fraction": (lambda x: 0.08, 0.03, 2000),
    "rollout/length": (lambda x: 40.0, 3.0, 64),
    "rollout/ended": (lambda x: 0.9, 0.04, 64),
    "rollout/distinct_2": (lambda x: 0.6, 0.02, 64),
    "rollout/logp_mismatch": (lambda x: 1e-5, 0.0, 1),
    "router/flip_rate_rollout": (lambda x: 0.001, 0.0, 2000),
    "reward/score": (lambda x: 2 * x, 0.15, 64),
    "reward/equal_groups": (lambda x: 0.3, 0.05, 64),
    "value/explained_variance": (lambda x: 0.6 - 3 * math.exp(-8 * x), 0.1, 1),
    "value/loss": (lambda x: 0.1 + 2 * math.exp(-8 * x), 0.01, 2000),
}
PAIRS: dict[str, tuple[Shape, float, float]] = {
    "logp/chosen": (lambda x: -30.0 - 5 * x, 1.5, 128),
    "reward/chosen": (lambda x: -0.5 * x, 0.05, 128),
    "reward/rejected": (lambda x: -1.5 * x, 0.05, 128),
}
# What goes wrong -> the metrics that show it.
TROUBLE: dict[str, dict[str, Shape]] = {
    "kl_blow_up": {"policy/kl_sequence": lambda x: 80 * x, "reward/score": lambda x: 0.0},
    "kl_negative": {"policy/kl_sequence": lambda x: -4 * x},
    "entropy_collapse": {"policy/entropy": lambda x: 2.0 * 0.05**x},
    "length_explosion": {"rollout/length": lambda x: 40 * 3**x},
    "length_collapse": {
        "rollout/length": lambda x: 40 * 0.2**x,
        "policy/kl_sequence": lambda x: 2 * x,
    },
    "endings_lost": {"rollout/ended": lambda x: 0.9 - 0.7 * x, "reward/score": lambda x: 0.0},
    "value_divergence": {"value/loss": lambda x: 0.2 * 50**x},
    "useless_critic": {"value/explained_variance": lambda x: -3.0},
    # 36 nats over 40 tokens and no less entropy: a perplexity exp(0.9) = 2.5 times as high.
    "reward_hacking": {
        "policy/kl_sequence": lambda x: 36 * x,
        "policy/entropy": lambda x: 2.0,
    },
    "reward_hacking_repetition": {"rollout/distinct_2": lambda x: 0.6 - 0.3 * x},
    "reward_hacking_endings": {"rollout/ended": lambda x: 0.9 - 0.7 * x},
    "step_too_large": {"policy/approx_kl_k3": lambda x: 0.5 * x},
    "clipped": {"policy/clip_fraction": lambda x: 0.6 * x},
    "rollout_mismatch": {"rollout/logp_mismatch": lambda x: 2 * x},
    "rollout_flips": {"router/flip_rate_rollout": lambda x: 0.12},
    "no_group_signal": {"reward/equal_groups": lambda x: 1.0},
    "likelihood_displacement": {
        "logp/chosen": lambda x: -30 - 60 * x,
        "reward/chosen": lambda x: -6 * x,
        "reward/rejected": lambda x: -9 * x,
    },
}
# Rings beside it, because its metrics are the same.
BESIDE = {"reward_hacking_endings": {"endings_lost"}}


def stream(
    healthy: dict[str, tuple[Shape, float, float]],
    trouble: dict[str, Shape] | None = None,
    *,
    seed: int = 0,
    rows: int = ROWS,
    still: bool = False,
) -> list[dict[str, tuple[float, float]]]:
    """Rows of metrics with noise; `still` leaves every metric where it begins."""
    rng = random.Random(seed)
    found = []
    for i in range(rows):
        row = {}
        for name, (shape, deviation, count) in healthy.items():
            value = (trouble or {}).get(name, shape)(0.0 if still else i / (rows - 1))
            row[name] = (value + rng.gauss(0, deviation), count)
        found.append(row)
    return found


def ringing(alarms: tuple[Alarm, ...], rows: list[dict[str, tuple[float, float]]]) -> set[str]:
    watch = AlarmWatch(alarms)
    for step, row in enumerate(rows, start=1):
        watch.read(row, step=step)
    return {ring.name for ring in watch.rings}


def test_every_alarm_of_alignment_is_provoked_here() -> None:
    own = {alarm.name for alarm in (*POLICY, *PREFERENCE)}
    assert own - set(TROUBLE) == {"not_finite", "router_collapse", "dead_experts"}  # sft's tests


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_rings_its_alarm_and_no_other(name: str) -> None:
    alarms, healthy = (PREFERENCE, PAIRS) if "likelihood" in name else (POLICY, HEALTHY)
    assert ringing(alarms, stream(healthy, TROUBLE[name])) == {name} | BESIDE.get(name, set())


def test_a_healthy_training_and_noise_about_a_constant_ring_nothing() -> None:
    for seed in range(10):
        for alarms, healthy in ((POLICY, HEALTHY), (PREFERENCE, PAIRS)):
            assert ringing(alarms, stream(healthy, seed=seed)) == set()
            at_rest = {**healthy}
            if "value/explained_variance" in at_rest:
                at_rest["value/explained_variance"] = (lambda x: 0.3, 0.3, 1)
            assert ringing(alarms, stream(at_rest, seed=seed, rows=150, still=True)) == set()


def test_few_answers_a_row_are_waited_for() -> None:
    """Lengths of single answers, 1 to 80 tokens: rows of one answer, windows of 32."""
    for seed in range(5):
        rng = random.Random(seed)
        rows = [{"rollout/length": (rng.uniform(1.0, 80.0), 1.0)} for _ in range(600)]
        assert ringing(POLICY, rows) == set()


def test_a_fall_of_the_chosen_answers_without_a_growing_margin_is_no_displacement() -> None:
    falls = {**TROUBLE["likelihood_displacement"], "reward/rejected": lambda x: -3 * x}
    assert ringing(PREFERENCE, stream(PAIRS, falls)) == set()


def test_perplexity_under_the_reference_without_a_gain_is_no_reward_hacking() -> None:
    trouble = {**TROUBLE["reward_hacking"], "reward/score": lambda x: 0.0}
    assert ringing(POLICY, stream(HEALTHY, trouble)) == set()


def test_the_reference_gives_an_answer_its_entropy_and_its_kl_in_nats() -> None:
    """E[-log ref] = H(policy) + KL(policy, ref): the identity that reward_hacking reads by."""
    torch.manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    entropy = -(policy.exp() * policy).sum()
    divergence = (policy.exp() * (policy - reference)).sum()
    assert float(-(policy.exp() * reference).sum()) == pytest.approx(float(entropy + divergence))


# --- tiny policies that are really trained


def tiny_policy(seed: int) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(
        MoEConfig(
            vocab_size=32,
            hidden_size=16,
            moe_intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            initializer_range=0.2,
        )
    )


def trained(
    folder: Path,
    reward: Callable[[Tensor, Tensor], Tensor],
    *,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    updates: int,
    lr: float,
    kl_coef: float = 0.0,
    **options: Any,
) -> PPOTrainer:
    """RLOO: two epochs over 32 answers to 8 prompts."""
    rng = random.Random(0)
    prompts = [
        {"prompt_ids": [rng.randrange(3, 32) for _ in range(rng.randrange(2, 8))]}
        for _ in range(16)
    ]
    policy = tiny_policy(0)
    ppo = PPOSettings(
        updates=updates,
        episodes=32,
        epochs=2,
        max_new_tokens=max_new_tokens,
        advantage="rloo",
        group_size=4,
    )
    made = PPOTrainer(
        policy,
        TrainSettings(
            max_steps=ppo.steps, batch_size=32, lr=lr, lr_schedule="constant", log_steps=2
        ),
        critic=None,
        reference=FrozenCopy(policy),
        reward=reward,
        rows=prompts,
        ppo=ppo,
        kl_controller=FixedKL(kl_coef),
        pad_id=0,
        stop_ids=stop_ids,
        folder=folder,
        **options,
    )
    made.fit()
    return made


def rung_of(trainer: PPOTrainer) -> set[str]:
    return {ring.name for ring in trainer.alarm_watch.rings}


def one_token(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    return ((input_ids_BS == 20) & attention_mask_BS.bool()).sum(dim=1).float()


def num_tokens(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    return attention_mask_BS.sum(dim=1).float()


def test_a_policy_paid_for_one_token_without_a_price_on_kl_rings_four_alarms(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    made = trained(
        tmp_path, one_token, stop_ids=(2, 5), max_new_tokens=8, updates=9, lr=6e-2, say=said.append
    )
    expected = {
        "kl_blow_up",
        "entropy_collapse",
        "reward_hacking_repetition",
        "reward_hacking_endings",
    }
    assert expected <= rung_of(made)
    assert len(said) == len(rung_of(made))  # each was told once
    last = made.state.log_history[-1]
    assert all(last[f"alarm/{name}"] == 1.0 for name in expected)
    json.dumps(made.alarm_watch.state_dict(), allow_nan=False)


def test_a_policy_paid_for_length_rings_length_explosion(tmp_path: Path) -> None:
    made = trained(
        tmp_path,
        num_tokens,
        stop_ids=(2, 5, 7, 9, 11, 13, 15, 17),
        max_new_tokens=20,
        updates=6,
        lr=4e-2,
    )
    assert "length_explosion" in rung_of(made)


def test_a_policy_that_learns_calmly_rings_nothing(tmp_path: Path) -> None:
    made = trained(
        tmp_path, one_token, stop_ids=(2, 5, 7), max_new_tokens=8, updates=5, lr=1e-3, kl_coef=0.2
    )
    assert rung_of(made) == set()
    assert len(made.alarm_watch.state_dict()["series"]) >= 10  # it was watched


def test_each_trainer_watches_its_own() -> None:
    assert PPOTrainer.alarms == POLICY
    assert DPOTrainer.alarms == KTOTrainer.alarms == PREFERENCE
