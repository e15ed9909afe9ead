"""Baselines of other answers to the prompt: by hand, at their limits, and what settings refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.group_advantage import centered, group_deviation, leave_one_out, standardized
from rlhf.ppo_settings import PPOSettings
from rlhf.shaping import Shaped, shape

BASELINES = (centered, standardized, leave_one_out)


def f64(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# --- three numbers


def test_three_answers_by_hand() -> None:
    """Scores 1, 2, 6: mean 3, deviation sqrt((4 + 1 + 9) / 2) = sqrt(7); the others' means 4,
    3.5, 1.5."""
    score_B = f64(1.0, 2.0, 6.0)
    assert centered(score_B, group_size=3).tolist() == [-2.0, -1.0, 3.0]
    assert leave_one_out(score_B, group_size=3).tolist() == pytest.approx([-3.0, -1.5, 4.5])
    root = 7**0.5 + 1e-6
    expected = [-2 / root, -1 / root, 3 / root]
    assert standardized(score_B, group_size=3).tolist() == pytest.approx(expected, rel=1e-14)


def test_groups_are_rows_that_follow_one_another_and_know_nothing_of_each_other() -> None:
    both = f64(1.0, 2.0, 6.0, -5.0, 100.0, 7.0)
    for baseline in BASELINES:
        alone = [baseline(part, group_size=3) for part in both.split(3)]
        assert torch.equal(baseline(both, group_size=3), torch.cat(alone))
        assert float(baseline(both, group_size=3)[:3].sum()) == pytest.approx(0.0, abs=1e-12)


def test_leave_one_out_is_the_mean_of_the_others_written_out() -> None:
    score_B = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leave_one_out(score_B, group_size=5)
    for i in range(20):
        others = [float(score_B[j]) for j in range(i // 5 * 5, i // 5 * 5 + 5) if j != i]
        assert float(found[i]) == pytest.approx(float(score_B[i]) - sum(others) / 4, rel=1e-12)


# --- limits


@pytest.mark.parametrize("number", [0.1, -3.3e7, 0.0])
def test_a_group_of_equal_scores_has_advantage_0_also_where_their_mean_rounds(
    number: float,
) -> None:
    """In float32 the mean of seven times 0.1 is not 0.1, and 1e-6 does not hide the rest."""
    score_B = torch.full((7,), number)
    for baseline in BASELINES:
        assert not baseline(score_B, group_size=7).any()
    deviation_B, are_equal_B = group_deviation(score_B, group_size=7)
    assert not deviation_B.any() and are_equal_B.all()


def test_standardized_scores_do_not_know_their_scale_and_no_baseline_a_shift() -> None:
    score_B = f64(1.0, 2.0, 6.0, -4.0)
    for baseline in BASELINES:
        shifted = baseline(score_B + 100.0, group_size=4)
        torch.testing.assert_close(shifted, baseline(score_B, group_size=4), rtol=1e-12, atol=0)
    large = standardized(1e3 * score_B, group_size=4)
    torch.testing.assert_close(large, standardized(score_B, group_size=4), rtol=1e-6, atol=0)


def test_scores_that_differ_by_less_than_a_millionth_are_not_blown_up_to_deviation_1() -> None:
    """Two equal scores but for 1e-9: a deviation of 7e-10 would give -0.7 and 0.7."""
    found = standardized(f64(0.5, 0.5 + 1e-9), group_size=2)
    assert float(found.abs().max()) < 1e-3


def test_group_deviation_by_hand_says_it_of_every_answer() -> None:
    deviation_B, are_equal_B = group_deviation(f64(1.0, 2.0, 6.0, 4.0, 4.0, 4.0), group_size=3)
    assert deviation_B.tolist() == pytest.approx([7**0.5] * 3 + [0.0] * 3)
    assert are_equal_B.tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("baseline", BASELINES)
def test_groups_that_cannot_be_are_one_sentence(baseline: Any) -> None:
    with pytest.raises(UserError, match="group_size is 1: a baseline of other answers to the same"):
        baseline(f64(1.0, 2.0), group_size=1)
    with pytest.raises(UserError, match="5 scores are no whole number of groups of 2."):
        baseline(f64(1, 2, 3, 4, 5), group_size=2)


# --- from scores to the advantages of tokens

# Two prompts with two answers each, of 2, 1, 3 and 1 tokens.
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
SCORE = f64(2.0, -1.0, 0.5, 1.5)
K1 = f64(0.5, -1.0, 0.0, 2.0, 0.0, 0.0, 0.25, 0.25, 0.5, -1.5, 0.0, 0.0).view(4, 3)
BETA = 0.1
PAID = [2.0 + 0.05, -1.0 - 0.2, 0.5 - 0.1, 1.5 + 0.15]  # s - beta * sum_t k1


def shaped(*, beta: float = BETA, **ppo: Any) -> Shaped:
    return shape(
        SCORE,
        torch.ones(4),
        old_logp_BR=K1,
        ref_logp_BR=torch.zeros_like(K1),
        value_BR=torch.zeros_like(K1),
        mask_BR=MASK,
        ppo=PPOSettings(updates=2, episodes=4, minibatches=2, **ppo),
        kl_coef=beta,
        scale=None,
    )


def rows(per_answer: list[float]) -> list[list[float]]:
    return [[a * bool(m) for m in row] for a, row in zip(per_answer, MASK.tolist(), strict=True)]


def test_every_token_of_an_answer_has_its_advantage_and_the_score_includes_the_kl() -> None:
    half = (PAID[0] - PAID[1]) / 2, (PAID[2] - PAID[3]) / 2
    expected = {
        "rloo": [2 * half[0], -2 * half[0], 2 * half[1], -2 * half[1]],
        "grpo": [0.5**0.5, -(0.5**0.5), -(0.5**0.5), 0.5**0.5],
    }
    for name, per_answer in expected.items():
        found = shaped(advantage=name, group_size=2).advantage_BR
        torch.testing.assert_close(found, f64(*sum(rows(per_answer), [])).view(4, 3), atol=1e-5,
                                   rtol=0)  # fmt: skip
    plain = shaped(advantage="grpo", group_size=2, scale_by_std=False).advantage_BR
    assert plain[:, 0].tolist() == pytest.approx([half[0], -half[0], half[1], -half[1]])
    # Where the loss pays the KL, the score is the reward source's alone.
    bare = shaped(beta=0.0, advantage="rloo", group_size=2).advantage_BR
    assert bare[:, 0].tolist() == pytest.approx([3.0, -3.0, -1.0, 1.0])


def test_reinforce_pp_sums_the_rewards_from_each_token_on_and_whitens_over_all_tokens() -> None:
    """Rewards are -0.1 k1, and the score at the last token."""
    to_come = [[2.05, 2.1], [-1.2], [0.4, 0.425, 0.45], [1.65]]
    raw = shaped(advantage="reinforce_pp", whiten_advantages=False).advantage_BR
    assert [raw[i, : len(r)].tolist() for i, r in enumerate(to_come)] == [
        pytest.approx(r) for r in to_come
    ]
    assert not raw[~MASK].any()
    numbers = f64(*sum(to_come, []))
    white = (numbers - numbers.mean()) / numbers.std()
    found = shaped(advantage="reinforce_pp").advantage_BR
    torch.testing.assert_close(found[MASK], white, rtol=1e-7, atol=0)
    discounted = shaped(advantage="reinforce_pp", whiten_advantages=False, gamma=0.5).advantage_BR
    assert discounted[2].tolist() == pytest.approx([-0.025 - 0.0125 + 0.25 * 0.45, 0.2, 0.45])


def test_reinforce_pp_baseline_whitens_what_is_left_of_a_group_over_all_tokens() -> None:
    half = (PAID[0] - PAID[1]) / 2, (PAID[2] - PAID[3]) / 2
    numbers = f64(half[0], half[0], -half[0], half[1], half[1], half[1], -half[1])
    found = shaped(advantage="reinforce_pp_baseline", group_size=2).advantage_BR
    white = (numbers - numbers.mean()) / numbers.std()
    torch.testing.assert_close(found[MASK], white, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_without_a_critic_what_stands_under_padding_has_no_part_and_nothing_is_returned(
    name: str,
) -> None:
    ppo: dict[str, Any] = {"advantage": name, "group_size": 2}
    clean = shaped(**ppo)
    K1[~MASK] = float("nan")
    try:
        assert torch.equal(shaped(**ppo).advantage_BR, clean.advantage_BR)
    finally:
        K1[~MASK] = 0.0
    assert not clean.return_BR.any() and not clean.advantage_BR[~MASK].any()


# --- what settings refuse


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp_baseline"])
def test_a_group_of_one_has_no_others(name: str) -> None:
    with pytest.raises(UserError) as caught:
        PPOSettings(updates=1, episodes=8, advantage=name)  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"advantage {name} with group_size 1: an answer is measured by others to the same prompt, "
        "so give a group_size of 2 or more."
    )
    PPOSettings(updates=1, episodes=8, advantage="reinforce_pp")  # compares with all others


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lam": 1.0}, "lam 1.0 has no effect with advantage rloo (it belongs to gae): leave it"),
        ({"value_clip": 0.0}, "value_clip 0.0 has no effect with advantage rloo"),
        ({"value_coef": 1.0}, "value_coef 1.0 has no effect with advantage rloo"),
        ({"critic_lr_scale": 2.0}, "critic_lr_scale 2.0 has no effect with advantage rloo"),
        ({"critic_lam": 1.0}, "critic_lam 1.0 has no effect with advantage rloo"),
        ({"critic_warmup": 1, "updates": 2}, "critic_warmup 1 has no effect with advantage rloo"),
        ({"compat": "n_plus"}, "compat n_plus has no effect with advantage rloo"),
        ({"gamma": 0.9}, "gamma 0.9 has no effect with advantage rloo (it belongs to gae and rein"),
        ({"whiten_rewards": True}, "whiten_rewards True has no effect with advantage rloo"),
        ({"whiten_advantages": False}, "whiten_advantages False has no effect with advantage rloo"),
        (
            {"whitening_variance": "biased"},
            "whitening_variance biased has no effect with advantage",
        ),
        ({"scale_by_std": False}, "scale_by_std False has no effect with advantage rloo"),
        ({"episodes": 6}, "episodes 6 must be a multiple of group_size 4: they are prompts x"),
        ({"group_size": 0}, "group_size is 0: it must be at least 1."),
    ],
)
def test_an_option_that_a_method_has_no_use_for_is_one_sentence(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        PPOSettings(
            **{"updates": 1, "episodes": 8, "advantage": "rloo", "group_size": 4, **changes}
        )
    assert sentence in str(caught.value)
