"""Advantages without a critic and policy losses beside the numbers of three public frameworks.

The numbers in vectors/policy_losses.json were computed once, in float64, by the code that each case
names; nothing of that code is here. Twelve answers in three groups, of 1 to 5 tokens; the scores of
the last group are equal.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.losses.gspo import gspo_loss
from rlhf.losses.mean import LossMean
from rlhf.losses.ppo import policy_loss
from rlhf.ppo_settings import PPOSettings
from rlhf.shaping import shape

STORED = json.loads(
    (Path(__file__).parent / "vectors" / "policy_losses.json").read_text(encoding="utf-8")
)
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in STORED["cases"]}


def given(name: str) -> Tensor:
    return torch.tensor(STORED["inputs"][name], dtype=torch.float64)


def expected(case: str, name: str) -> Tensor:
    return torch.tensor(CASES[case]["outputs"][name], dtype=torch.float64)


def advantage(kl_coef: float, **ppo: Any) -> Tensor:
    mask_BR = given("mask").bool()
    settings = PPOSettings(updates=1, episodes=12, minibatches=1, **ppo)
    return shape(
        given("score"),
        torch.ones(12),
        old_logp_BR=given("old_logp"),
        ref_logp_BR=given("ref_logp"),
        value_BR=torch.zeros(12, 5, dtype=torch.float64),
        mask_BR=mask_BR,
        ppo=settings,
        kl_coef=kl_coef,
        scale=None,
    ).advantage_BR


def test_every_case_says_where_it_is_from() -> None:
    for case in CASES.values():
        source = case["source"]
        assert source["repository"].startswith("github.com/") and source["function"]
        assert len(source.get("commit", "")) == 40 or source["version"]


@pytest.mark.parametrize(
    ("case", "ppo"),
    [
        ("grpo_std", {"advantage": "grpo", "group_size": 4}),
        ("grpo_no_std", {"advantage": "grpo", "group_size": 4, "scale_by_std": False}),
        ("rloo", {"advantage": "rloo", "group_size": 4}),
        ("reinforce_pp_gamma_1.0", {"advantage": "reinforce_pp"}),
        ("reinforce_pp_gamma_0.9", {"advantage": "reinforce_pp", "gamma": 0.9}),
        ("reinforce_pp_baseline", {"advantage": "reinforce_pp_baseline", "group_size": 4}),
    ],
)
def test_advantages_with_the_kl_in_the_reward_are_those_of_verl(
    case: str, ppo: dict[str, Any]
) -> None:
    """verl whitens with 1e-8 in the denominator of each mean, which moves the ninth digit."""
    found = advantage(STORED["inputs"]["kl_coef"], **ppo)
    torch.testing.assert_close(found, expected(case, "advantage"), rtol=0, atol=1e-7)


def test_a_group_of_equal_scores_has_advantage_0_in_verl_and_here() -> None:
    found = advantage(0.0, advantage="grpo", group_size=4)
    theirs = expected("grpo_std_without_kl", "advantage")
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-9)
    assert not found[8:].any()


@pytest.mark.parametrize(
    ("case", "ppo", "tolerance"),
    [
        ("openrlhf_rloo", {"advantage": "rloo", "group_size": 4}, 1e-12),
        # 1e-9 beside the deviation, ours is 1e-6: a relative 1e-6 at deviations near 1.
        ("openrlhf_group_norm", {"advantage": "grpo", "group_size": 4}, 3e-6),
        (
            "openrlhf_dr_grpo",
            {"advantage": "grpo", "group_size": 4, "scale_by_std": False},
            1e-12,
        ),
        (
            "openrlhf_reinforce_baseline",
            {
                "advantage": "reinforce_pp_baseline",
                "group_size": 4,
                "whitening_variance": "biased",
            },
            1e-7,
        ),
        ("openrlhf_reinforce", {"advantage": "reinforce_pp", "whitening_variance": "biased"}, 1e-7),
    ],
)
def test_advantages_without_kl_are_those_of_openrlhf_which_whitens_with_the_biased_variance(
    case: str, ppo: dict[str, Any], tolerance: float
) -> None:
    """It takes the KL off after a group's mean and deviation, so they are compared without one."""
    found = advantage(0.0, **ppo)
    torch.testing.assert_close(found, expected(case, "advantage"), rtol=0, atol=tolerance)


def test_reward_to_go_with_the_kl_of_each_token_is_that_of_openrlhf() -> None:
    found = advantage(
        STORED["inputs"]["kl_coef"], advantage="reinforce_pp", whitening_variance="biased"
    )
    theirs = expected("openrlhf_reinforce_kl", "advantage")
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-7)


SEQUENCE = LossMean(over="sequence")
CONSTANT = LossMean(over="constant", max_length=5)
TOKEN_CLIP, SEQUENCE_CLIP = (0.2, 0.28), (0.05, 0.08)


@pytest.mark.parametrize(
    ("case", "loss", "mean", "clips"),
    [
        ("clip_token-mean", policy_loss, LossMean(), TOKEN_CLIP),
        ("clip_seq-mean-token-mean", policy_loss, SEQUENCE, TOKEN_CLIP),
        ("gspo_0.2_0.28", gspo_loss, SEQUENCE, TOKEN_CLIP),
        ("gspo_0.05_0.08", gspo_loss, SEQUENCE, SEQUENCE_CLIP),
        ("openrlhf_gspo_sequence", gspo_loss, SEQUENCE, SEQUENCE_CLIP),
        ("openrlhf_ppo_sequence", policy_loss, SEQUENCE, TOKEN_CLIP),
        ("openrlhf_ppo_token", policy_loss, LossMean(), TOKEN_CLIP),
        ("trl_grpo_token", policy_loss, SEQUENCE, TOKEN_CLIP),
        ("trl_bnpo_token", policy_loss, LossMean(), TOKEN_CLIP),
        ("trl_dr_grpo_token", policy_loss, CONSTANT, TOKEN_CLIP),
        ("trl_grpo_sequence", gspo_loss, SEQUENCE, SEQUENCE_CLIP),
        ("trl_bnpo_sequence", gspo_loss, LossMean(), SEQUENCE_CLIP),
        ("trl_dr_grpo_sequence", gspo_loss, CONSTANT, SEQUENCE_CLIP),
    ],
)
def test_loss_and_gradient_are_those_of_verl_openrlhf_and_trl(
    case: str, loss: Any, mean: LossMean, clips: tuple[float, float]
) -> None:
    """verl and OpenRLHF have 1e-8 beside the length of an answer, which moves the ninth digit.

    verl clips by tokens of GSPO-token, OpenRLHF and TRL an answer's own ratio: the same gradient.
    """
    mask_BR = given("mask").bool()
    logp_BR = given("logp").requires_grad_()
    output = loss(
        logp_BR,
        given("old_logp"),
        advantage_BR=given("advantage")[:, None] * mask_BR,
        mask_BR=mask_BR,
        clip_low=clips[0],
        clip_high=clips[1],
        mean=mean,
    )
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), expected(case, "loss"), rtol=0, atol=1e-8)
    torch.testing.assert_close(logp_BR.grad, expected(case, "gradient"), rtol=0, atol=1e-8)
    clipped, count = output.metrics["policy/clip_fraction"]
    assert 0 < float(clipped) < float(count)  # or the case would not test the clip
