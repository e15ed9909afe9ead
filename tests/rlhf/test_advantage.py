import math

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.advantage import (
    apply_missing_eos,
    gae,
    masked_moments,
    token_rewards,
    whiten,
)

NAN = float("nan")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numpy_gae(reward: np.ndarray, value: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """The infinite sum of its definition, over one row of real tokens."""
    value_after = np.append(value[1:], 0.0)
    delta = reward + gamma * value_after - value
    weight = gamma * lam
    return np.array(
        [sum(weight ** (u - t) * delta[u] for u in range(t, len(delta))) for t in range(len(delta))]
    )


# --- rewards


def test_every_token_pays_its_kl_and_the_last_real_one_gets_the_score() -> None:
    logp_BR = torch.tensor([[-1.0, -2.0, NAN], [-1.0, -1.0, -1.0]])
    ref_logp_BR = torch.tensor([[-2.0, -1.0, NAN], [-1.0, -1.0, -3.0]])
    mask_BR = torch.tensor([[True, True, False], [True, True, True]])
    reward_BR = token_rewards(
        torch.tensor([5.0, -1.0]), logp_BR, ref_logp_BR, mask_BR=mask_BR, kl_coef=0.1
    )
    torch.testing.assert_close(reward_BR, torch.tensor([[-0.1, 5.1, 0.0], [0.0, 0.0, -1.2]]))


def test_the_score_stands_on_the_last_real_token_behind_a_gap_and_nowhere_in_an_empty_row() -> None:
    mask_BR = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    zero_BR = torch.zeros(3, 4)
    reward_BR = token_rewards(
        torch.tensor([1.0, 2.0, 3.0]), zero_BR, zero_BR, mask_BR=mask_BR, kl_coef=0.1
    )
    assert reward_BR.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 3, 0, 0]]


def test_scores_that_do_not_belong_to_the_rows_are_refused() -> None:
    zero_BR = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"score \(2,\), rows \(3,\)"):
        token_rewards(torch.zeros(2), zero_BR, zero_BR, mask_BR=zero_BR, kl_coef=0.1)


def test_a_response_that_never_ended_pays_or_has_its_score_replaced() -> None:
    score_B, ended_B = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert apply_missing_eos(score_B, ended_B).tolist() == [2.0, 3.0]
    assert apply_missing_eos(score_B, ended_B, penalty=1.0).tolist() == [2.0, 2.0]
    assert apply_missing_eos(score_B, ended_B, replace_with=-1.0).tolist() == [2.0, -1.0]


def test_two_ways_of_missing_eos_or_a_negative_price_are_refused() -> None:
    score_B, ended_B = torch.zeros(1), torch.zeros(1).bool()
    with pytest.raises(ValueError, match="give one of the two"):
        apply_missing_eos(score_B, ended_B, penalty=1.0, replace_with=-1.0)
    with pytest.raises(UserError, match="must be 0 or more"):
        apply_missing_eos(score_B, ended_B, penalty=-1.0)


# --- advantages


def test_gae_by_hand_on_three_tokens() -> None:
    # delta = [0 + .5*2 - 1, 0 + .5*4 - 2, 8 - 4] = [0, 0, 4], each later delta weighs .5*.5
    advantage_BR, return_BR = gae(
        torch.tensor([[0.0, 0.0, 8.0]]),
        torch.tensor([[1.0, 2.0, 4.0]]),
        mask_BR=torch.ones(1, 3).bool(),
        gamma=0.5,
        lam=0.5,
    )
    assert advantage_BR.tolist() == [[0.25, 1.0, 4.0]]
    assert return_BR.tolist() == [[1.25, 3.0, 8.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
def test_gae_equals_the_definition_over_the_real_tokens_whatever_lies_between_and_behind(
    gamma: float, lam: float
) -> None:
    mask_BR = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0] * 6]
    ).bool()
    reward_BR = torch.where(mask_BR, random(5, 6), NAN)
    value_BR = torch.where(mask_BR, random(5, 6, seed=1), NAN)
    advantage_BR, return_BR = gae(reward_BR, value_BR, mask_BR=mask_BR, gamma=gamma, lam=lam)
    for b in range(5):
        real = mask_BR[b]
        reward, value = reward_BR[b, real].numpy(), value_BR[b, real].numpy()
        expected = numpy_gae(reward, value, gamma, lam)
        np.testing.assert_allclose(advantage_BR[b, real].numpy(), expected, atol=1e-13)
        np.testing.assert_allclose(return_BR[b, real].numpy(), expected + value, atol=1e-13)
    assert not advantage_BR[~mask_BR].any() and not return_BR[~mask_BR].any()


def test_the_return_at_lambda_1_is_the_discounted_reward_to_come_without_the_critic() -> None:
    mask_BR = torch.ones(1, 3).bool()
    reward_BR = torch.tensor([[1.0, 2.0, 4.0]])
    _, return_BR = gae(reward_BR, random(1, 3), mask_BR=mask_BR, gamma=0.5, lam=1.0)
    torch.testing.assert_close(return_BR, torch.tensor([[3.0, 4.0, 4.0]]).double())


def test_advantages_carry_no_gradient_and_are_float32_at_least() -> None:
    value_BR = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    mask_BR = torch.ones(1, 2)
    outputs = gae(torch.ones(1, 2).bfloat16(), value_BR, mask_BR=mask_BR, gamma=1.0, lam=1.0)
    assert not any(x.requires_grad for x in outputs)
    assert all(x.dtype == torch.float32 for x in outputs)


def test_no_response_token_at_all_gives_empty_advantages() -> None:
    nothing = torch.zeros(2, 0)
    advantage_BR, return_BR = gae(nothing, nothing, mask_BR=nothing.bool(), gamma=1.0, lam=1.0)
    assert advantage_BR.shape == return_BR.shape == (2, 0)


def test_a_discount_out_of_range_or_a_shape_that_would_broadcast_is_refused() -> None:
    two = torch.zeros(2, 2)
    with pytest.raises(UserError, match="gamma must lie between 0 and 1, got 1.1"):
        gae(two, two, mask_BR=two, gamma=1.1, lam=1.0)
    with pytest.raises(UserError, match="lam must lie between 0 and 1"):
        gae(two, two, mask_BR=two, gamma=1.0, lam=NAN)
    with pytest.raises(ValueError, match=r"value \(2,\)"):
        gae(two, torch.zeros(2), mask_BR=two, gamma=1.0, lam=1.0)


# --- moments and whitening


def test_whitening_by_hand_biased_and_unbiased_with_and_without_the_mean() -> None:
    x = torch.tensor([[1.0, 3.0, 5.0, NAN]])  # mean 3, squared deviations 8
    mask = torch.tensor([[True, True, True, False]])
    unbiased, biased = 2.0 / math.sqrt(4.0), 2.0 / math.sqrt(8.0 / 3.0)
    torch.testing.assert_close(
        whiten(x, mask=mask), torch.tensor([[-unbiased, 0.0, unbiased, 0.0]])
    )
    torch.testing.assert_close(
        whiten(x, mask=mask, unbiased=False), torch.tensor([[-biased, 0.0, biased, 0.0]])
    )
    torch.testing.assert_close(
        whiten(x, mask=mask, shift_mean=False),
        torch.tensor([[3.0 - unbiased, 3.0, 3.0 + unbiased, 0.0]]),
    )


def test_whitened_tokens_have_mean_0_and_variance_1_and_padding_has_no_part() -> None:
    x, mask = random(4, 9) * 7.0 + 3.0, random(4, 9, seed=1) > 0.0
    whitened = whiten(x, mask=mask)
    assert whitened[mask].mean().abs() < 1e-12
    assert whitened[mask].var() == pytest.approx(1.0, abs=1e-8)
    assert not whitened[~mask].any()
    torch.testing.assert_close(whiten(torch.where(mask, x, NAN), mask=mask), whitened)


def test_parts_whitened_with_merged_moments_equal_the_whole() -> None:
    x, mask = random(6, 5), random(6, 5, seed=1) > -0.5
    moments = masked_moments(x[:2], mask[:2]) + masked_moments(x[2:], mask[2:])
    parts = [whiten(x[rows], mask=mask[rows], moments=moments) for rows in (slice(2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whiten(x, mask=mask), rtol=0, atol=1e-14)


def test_equal_tokens_whiten_to_zero_and_fewer_than_two_come_back() -> None:
    mask = torch.ones(1, 3).bool()
    assert whiten(torch.full((1, 3), 0.1), mask=mask).tolist() == [[0.0, 0.0, 0.0]]
    one = torch.tensor([[True, False, False]])
    assert whiten(torch.full((1, 3), 7.0), mask=one).tolist() == [[7.0, 0.0, 0.0]]
    assert whiten(torch.full((1, 3), NAN), mask=~mask).tolist() == [[0.0, 0.0, 0.0]]


def test_moments_keep_a_spread_that_is_small_beside_the_mean() -> None:
    x = torch.tensor([1000.0, 1000.25, 1000.5])  # float32 sums of squares would give 0 or worse
    moments = masked_moments(x, torch.ones(3).bool())
    assert moments.mean == 1000.25 and moments.count == 3
    assert moments.variance(unbiased=True) == pytest.approx(0.0625, rel=1e-6)
    assert moments.variance(unbiased=False) == pytest.approx(0.0625 * 2 / 3, rel=1e-6)
