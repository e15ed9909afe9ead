"""From scores to advantages under every option of PPO, by hand; and settings that cannot be."""

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.advantage import one_longer
from rlhf.losses.ppo import policy_loss, ratio_variance
from rlhf.ppo_objective import Weights, episode_loss
from rlhf.ppo_settings import PPOSettings
from rlhf.shaping import RunningScale, Shaped, shape, value_mask

# Three episodes of 4 places: 2 tokens, 4 tokens (no place behind them), 1 token without EOS.
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
ENDED = torch.tensor([True, True, False])
SCORE = torch.tensor([2.0, -1.0, 0.5])


def settings(**changes: Any) -> PPOSettings:
    return PPOSettings(**{"updates": 2, "episodes": 4, "minibatches": 2, **changes})


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old, ref, value = (torch.randn(3, 4, generator=generator) for _ in range(3))
    return {"old_logp_BR": old * MASK, "ref_logp_BR": ref * MASK, "value_BR": value}


def shaped(ppo: PPOSettings, *, scale: RunningScale | None = None, **changes: Any) -> Shaped:
    given = {**tensors(), "mask_BR": MASK, "kl_coef": 0.5, "scale": scale, "ppo": ppo, **changes}
    given["value_BR"] = given["value_BR"] * value_mask(MASK, ppo)
    return shape(SCORE, ENDED, **given)


# --- 15: where the score stands


def n_plus_by_hand(
    beta: float, gamma: float, lam: float, *, whiten: bool
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Rewards, advantages and returns as the code of N+ and TRL describes them, in plain numbers.

    Log-probabilities under padding are both 1, so that their difference is 0 there;
    `padding_mask` is true behind the last token, `padding_mask_p1` behind the place after it.
    """
    given = {name: tensor.double().tolist() for name, tensor in tensors().items()}
    width = 4
    rewards, advantages, returns = [], [], []
    for row in range(3):
        length = int(MASK[row].sum())
        sequence_length, p1 = length - 1, length
        padding_mask = [t > sequence_length for t in range(width)]
        padding_mask_p1 = [t > p1 for t in range(width)]
        old, ref = (
            [1.0 if padding_mask[t] else given[name][row][t] for t in range(width)]
            for name in ("old_logp_BR", "ref_logp_BR")
        )
        value = [0.0 if padding_mask_p1[t] else given["value_BR"][row][t] for t in range(width)]
        reward = [-beta * (old[t] - ref[t]) for t in range(width)]
        reward[p1 if p1 < width else sequence_length] += float(SCORE[row])
        advantage, after = [0.0] * width, 0.0
        for t in reversed(range(width)):
            next_value = value[t + 1] if t + 1 < width else 0.0
            after = reward[t] + gamma * next_value - value[t] + gamma * lam * after
            advantage[t] = after
        rewards.append(reward)
        returns.append([a + v for a, v in zip(advantage, value, strict=True)])
        advantages.append([0.0 if padding_mask[t] else advantage[t] for t in range(width)])
    if whiten:
        kept = [a for row, m in zip(advantages, MASK.tolist(), strict=True)
                for a, real in zip(row, m, strict=True) if real]  # fmt: skip
        mean, deviation = statistics.fmean(kept), math.sqrt(statistics.variance(kept) + 1e-8)
        advantages = [
            [(a - mean) / deviation if real else 0.0 for a, real in zip(row, m, strict=True)]
            for row, m in zip(advantages, MASK.tolist(), strict=True)
        ]
    return rewards, advantages, returns


@pytest.mark.parametrize("whiten", [False, True])
def test_n_plus_puts_the_score_behind_the_last_token_where_there_is_a_place(whiten: bool) -> None:
    ppo = settings(compat="n_plus", gamma=0.9, lam=0.8, whiten_advantages=whiten)
    found = shaped(ppo)
    rewards, advantages, returns = n_plus_by_hand(0.5, 0.9, 0.8, whiten=whiten)
    for held, expected in (
        (found.reward_BR, rewards),
        (found.advantage_BR, advantages),
        (found.return_BR, returns),
    ):
        torch.testing.assert_close(held, torch.tensor(expected), rtol=0, atol=1e-5)
    assert found.value_mask_BR.tolist() == [
        [True, True, True, False],
        [True] * 4,
        [True, True, False, False],
    ]
    plain = shaped(settings(whiten_advantages=False)).reward_BR
    assert plain[0].tolist() != pytest.approx(found.reward_BR[0].tolist())
    assert plain[1].tolist() == found.reward_BR[1].tolist()  # no place behind: the last token's


def test_a_row_without_a_token_does_not_get_one_by_becoming_longer() -> None:
    assert one_longer(torch.zeros(1, 3)).tolist() == [[False] * 3]
    assert one_longer(torch.tensor([[1, 0, 0]])).tolist() == [[True, True, False]]


def test_n_plus_divides_the_value_loss_by_its_own_places() -> None:
    """5 response tokens and 7 value places: the weight is 5 / 7 of the sum over the 7."""
    mask_BR = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    value_BR = torch.arange(8.0).view(2, 4)
    batch = {
        **{name: torch.zeros(2, 4) for name in ("old_logp_BR", "advantage_BR", "return_BR")},
        "ref_logp_BR": torch.zeros(2, 4),
        "value_BR": value_BR,
        "mask_BR": mask_BR,
        "value_mask_BR": one_longer(mask_BR),
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
    }
    ppo = settings(value_clip=0.0, value_coef=2.0, compat="n_plus")
    output = episode_loss(
        torch.zeros(2, 5, 3), value_BR, batch=batch, ppo=ppo, weights=Weights(value=5 / 7)
    )
    squares = [v * v / 2 for v in (0, 1, 2, 4, 5, 6, 7)]
    assert float(output.loss) == pytest.approx(2.0 * sum(squares) / 7)


# --- 14: the KL of the loss


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_the_kl_of_the_loss_is_priced_per_token_and_pulls_on_the_policy_alone(name: Any) -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], requires_grad=True)  # one token, drawn 0
    ref_logp = math.log(0.4)
    batch = {
        "old_logp_BR": torch.log_softmax(logits.detach(), -1)[:, :1, 0],
        "ref_logp_BR": torch.tensor([[ref_logp]], requires_grad=True),
        **{k: torch.zeros(1, 1) for k in ("advantage_BR", "value_BR", "return_BR")},
        **{k: torch.ones(1, 1).bool() for k in ("mask_BR", "value_mask_BR")},
        "input_ids": torch.tensor([[1, 0]]),
    }
    ppo = settings(kl_in="loss", kl_estimator=name)
    output = episode_loss(
        logits, torch.zeros(1, 1), batch=batch, ppo=ppo, weights=Weights(kl_coef=0.3)
    )
    p = 1 / (1 + math.exp(-1.0))
    d = math.log(p) - ref_logp
    value = d * d / 2 if name == "k2" else math.exp(-d) - 1 + d
    assert float(output.loss_sum.detach()) == pytest.approx(0.3 * value, rel=1e-5)
    assert float(output.metrics["policy/kl_loss"][0]) == pytest.approx(value, rel=1e-5)
    output.loss_sum.backward()
    slope = d if name == "k2" else 1 - math.exp(-d)
    assert logits.grad is not None
    assert float(logits.grad[0, 0, 0]) == pytest.approx(0.3 * slope * (1 - p), rel=1e-5)
    assert batch["ref_logp_BR"].grad is None


# --- 16, 18, 19, 22, 32: options by hand


def test_a_score_without_eos_is_replaced() -> None:
    assert shaped(settings(missing_eos_replace=-3.0)).score_B.tolist() == [2.0, -1.0, -3.0]
    assert shaped(settings(missing_eos_replace=0.0)).score_B.tolist() == [2.0, -1.0, 0.0]
    assert shaped(settings(missing_eos_penalty=0.75)).score_B.tolist() == [2.0, -1.0, -0.25]


def test_running_scaling_divides_by_the_deviation_of_all_scores_so_far_and_keeps_signs() -> None:
    scale = RunningScale()
    first = shaped(settings(score_scaling="running"), scale=scale).score_B
    torch.testing.assert_close(first, SCORE / statistics.stdev(SCORE.tolist()))
    more = torch.tensor([5.0, 7.0])
    deviation = statistics.stdev([*SCORE.tolist(), 5.0, 7.0])
    torch.testing.assert_close(scale(more), more / deviation)
    again = RunningScale()
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again(SCORE), scale(SCORE))


def test_running_scaling_leaves_a_score_alone_that_nothing_differs_from() -> None:
    scale = RunningScale()
    assert scale(torch.tensor([4.0])).tolist() == [4.0]
    assert scale(torch.tensor([4.0, 4.0])).tolist() == [4.0, 4.0]


def test_scores_are_clipped_after_they_are_scaled() -> None:
    found = shaped(settings(score_scaling="running", score_clip=1.0), scale=RunningScale())
    deviation = statistics.stdev(SCORE.tolist())
    assert found.score_B.tolist() == pytest.approx([1.0, -1.0 / deviation, 0.5 / deviation])


def test_whitening_takes_the_variance_that_was_asked_for() -> None:
    plain = shaped(settings(whiten_advantages=False)).advantage_BR[MASK].tolist()
    for name, spread in (("unbiased", statistics.variance), ("biased", statistics.pvariance)):
        found = shaped(settings(whitening_variance=name)).advantage_BR[MASK].tolist()
        mean, deviation = statistics.fmean(plain), math.sqrt(spread(plain) + 1e-8)
        assert found == pytest.approx([(a - mean) / deviation for a in plain], abs=1e-5)


def test_biased_variance_is_that_of_whitened_rewards_too() -> None:
    plain = shaped(settings()).reward_BR[MASK].tolist()
    found = shaped(settings(whiten_rewards=True, whitening_variance="biased")).reward_BR[MASK]
    mean, deviation = statistics.fmean(plain), math.sqrt(statistics.pvariance(plain) + 1e-8)
    assert found.tolist() == pytest.approx([(r - mean) / deviation + mean for r in plain], abs=1e-5)


def test_advantages_of_a_minibatch_scope_are_left_to_the_minibatch() -> None:
    plain = shaped(settings(whiten_advantages=False))
    assert torch.equal(shaped(settings(whitening_scope="minibatch")).advantage_BR,
                       plain.advantage_BR)  # fmt: skip


def test_the_critics_own_lambda_changes_returns_and_no_advantage() -> None:
    base = shaped(settings(lam=0.3))
    found = shaped(settings(lam=0.3, critic_lam=1.0))
    assert torch.equal(found.advantage_BR, base.advantage_BR)
    for row in range(3):  # at lambda 1 and gamma 1 a return is the reward to come
        length = int(MASK[row].sum())
        reward = found.reward_BR[row, :length].tolist()
        expected = [sum(reward[t:]) for t in range(length)]
        assert found.return_BR[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
    assert not torch.allclose(found.return_BR, base.return_BR)


# --- 30


def test_ratio_variance_is_that_of_the_tokens_even_when_it_is_tiny() -> None:
    logp = torch.tensor([[1e-4, -1e-4, 3e-4]])
    mask = torch.ones(1, 3)
    output = policy_loss(
        logp, torch.zeros(1, 3), advantage_BR=mask, mask_BR=mask, clip_low=0.2, clip_high=0.2
    )
    expected = statistics.pvariance([math.exp(x) for x in logp[0].tolist()])
    assert ratio_variance(output.metrics) == pytest.approx(expected, rel=1e-3)
    empty = policy_loss(
        logp, logp, advantage_BR=mask, mask_BR=torch.zeros(1, 3), clip_low=0.2, clip_high=0.2
    )
    assert ratio_variance(empty.metrics) is None


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kl_in": "loss", "kl_estimator": "k1"}, "a gradient of zero in expectation, noise with"),
        ({"kl_estimator": "k3"}, "kl_estimator k3 has no effect with kl_in reward, which takes k1"),
        ({"missing_eos_penalty": 1.0, "missing_eos_replace": 0.0}, "two answers to one question"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0: give a number of 0 or more."),
        ({"clip_high": -0.1}, "clip_high is -0.1: give a number of 0 or more."),
        ({"dual_clip": 0.9}, "dual_clip is 0.9: it must be above 1, or 0 to leave it out."),
        ({"ratio_threshold": 1.0}, "ratio_threshold is 1.0: it must be above 1, or 0"),
        ({"target_kl": math.inf}, "target_kl is inf: give a number of 0 or more."),
        ({"target_kl": 0.1, "epochs": 1}, "target_kl has no effect with 1 epoch"),
        ({"ratio_threshold": 2.0, "epochs": 1, "minibatches": 1}, "its ratio is always 1."),
        ({"critic_lam": 1.5}, "critic_lam 1.5 must lie between 0 and 1."),
        ({"critic_warmup": 2}, "must be at least 0 and below updates 2: the policy would never"),
        ({"critic_warmup": 1, "value_coef": 0.0}, "critic_warmup has no effect with value_coef 0"),
    ],
)
def test_settings_that_cannot_be_or_change_nothing_are_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        settings(**changes)
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") == 0
