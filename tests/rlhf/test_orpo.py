import math

import pytest
import torch

from rlhf.losses import PairLogps
from rlhf.losses.orpo import ORPOLoss, log_odds


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float64),
        rejected=torch.tensor(rejected, dtype=torch.float64),
        chosen_length=torch.full((len(chosen),), 2),
        rejected_length=torch.full((len(chosen),), 1),
    )


def test_orpo_by_hand_on_three_pairs() -> None:
    # A token's probability of the chosen one: 1/2, 1/4, 1/2; of the rejected one: 1/2, 1/2, 1/5.
    ln = math.log
    policy = pairs([2 * ln(1 / 2), 2 * ln(1 / 4), 2 * ln(1 / 2)], [ln(1 / 2), ln(1 / 2), ln(1 / 5)])
    output = ORPOLoss(odds_coef=0.25)(policy)
    # Odds 1, 1/3, 1 against 1, 1, 1/4; sigma(log ratio) is ratio / (1 + ratio): 1/2, 1/4, 4/5.
    nll = ln(2) + ln(4) + ln(2)
    assert float(output.loss_sum) == pytest.approx(nll + 0.25 * (ln(2) + ln(4) + ln(5 / 4)))
    assert float(output.metrics["preference/chosen_nll"][0]) == pytest.approx(nll)
    assert float(output.metrics["preference/margin"][0]) == pytest.approx(ln(1 / 3) + ln(4))
    assert float(output.metrics["reward/chosen"][0]) == pytest.approx(ln(1 / 3))
    assert output.count == 3


def test_the_likelihood_term_is_a_mean_over_each_answers_own_tokens() -> None:
    """Not over all tokens of the batch: a long answer counts as much as a short one."""
    policy = PairLogps(
        chosen=torch.tensor([-1.0, -10.0]),
        rejected=torch.tensor([-1.0, -1.0]),
        chosen_length=torch.tensor([1, 5]),
        rejected_length=torch.tensor([1, 1]),
    )
    total, count = ORPOLoss()(policy).metrics["preference/chosen_nll"]
    assert float(total / count) == pytest.approx((1.0 + 2.0) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_keep_their_digits_from_certain_to_impossible(dtype: torch.dtype) -> None:
    """Against 60 digits; log(1 - exp(logp)) written plainly has none left near logp = 0."""
    from decimal import Decimal, localcontext

    values = [-1e-6, -1e-3, -0.5, -math.log(2.0), -0.7, -1.0, -20.0, -300.0]
    found = log_odds(torch.tensor(values, dtype=dtype))
    for value, one in zip(torch.tensor(values, dtype=dtype).tolist(), found.tolist(), strict=True):
        with localcontext() as context:
            context.prec = 60
            logp = Decimal(value)
            exact = logp - (1 - logp.exp()).ln()
        # Near odds of 1 the answer itself is near 0: an absolute error of an eps remains.
        eps = torch.finfo(dtype).eps
        assert one == pytest.approx(float(exact), rel=8 * eps, abs=2 * eps)


def test_certainty_has_finite_odds_and_a_finite_gradient() -> None:
    logp_B = torch.tensor([0.0, -1e-30, -1e-3, -200.0], requires_grad=True)
    odds_B = log_odds(logp_B)
    (gradient,) = torch.autograd.grad(odds_B.sum(), logp_B)
    assert bool(torch.isfinite(odds_B).all()) and bool(torch.isfinite(gradient).all())
    assert gradient[:2].tolist() == [0.0, 0.0]
    # d log odds / d log P = 1 / (1 - P)
    assert float(gradient[2]) == pytest.approx(1.0 / -math.expm1(-1e-3), rel=1e-5)
    assert float(gradient[3]) == pytest.approx(1.0)


def test_with_a_small_coefficient_only_the_likelihood_is_left() -> None:
    policy = pairs([-3.0, -5.0], [-1.0, -2.0])
    assert float(ORPOLoss(odds_coef=1e-12)(policy).loss) == pytest.approx(2.0)


def test_orpo_asks_for_no_reference() -> None:
    assert not ORPOLoss().needs_reference and ORPOLoss().value_at_reference is None
