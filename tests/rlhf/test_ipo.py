import pytest
import torch

from rlhf.losses import PairLogps
from rlhf.losses.ipo import IPOLoss


def pairs(chosen: list[float], rejected: list[float], lengths: list[int]) -> PairLogps:
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float64),
        rejected=torch.tensor(rejected, dtype=torch.float64),
        chosen_length=torch.tensor(lengths),
        rejected_length=torch.tensor([2 * n for n in lengths]),
    )


POLICY = pairs([-10.0, -12.0, -5.0], [-12.0, -10.0, -5.0], [1, 2, 4])
REFERENCE = pairs([-11.0, -12.0, -6.0], [-11.5, -12.0, -6.0], [1, 2, 4])


def test_ipo_over_sums_by_hand_on_three_pairs() -> None:
    output = IPOLoss(beta=0.25)(POLICY, REFERENCE)
    # gaps: 1 - -.5 = 1.5; 0 - 2 = -2; 1 - 1 = 0; each drawn to 1 / (2 * .25) = 2
    assert float(output.loss_sum) == pytest.approx(0.5**2 + 4.0**2 + 2.0**2)
    total, count = output.metrics["preference/margin"]
    assert float(total / count) == pytest.approx(0.25 * (1.5 - 2.0) / 3)
    assert float(output.metrics["preference/accuracy"][0]) == 1.5  # a win, a loss, a tie
    assert float(output.metrics["reward/chosen"][0]) == pytest.approx(0.25 * 2.0)
    assert float(output.metrics["logp/rejected"][0]) == -27.0


def test_ipo_over_means_by_hand_on_three_pairs() -> None:
    output = IPOLoss(beta=0.25, normalisation="mean")(POLICY, REFERENCE)
    # 1/1 - -.5/2 = 1.25; 0/2 - 2/4 = -.5; 1/4 - 1/8 = .125
    assert float(output.loss_sum) == pytest.approx(0.75**2 + 2.5**2 + 1.875**2)


def test_the_default_is_the_sum_and_says_so() -> None:
    assert repr(IPOLoss()) == "IPOLoss(beta=0.1, normalisation='sum')"


def test_the_loss_at_the_reference_falls_with_the_square_of_beta() -> None:
    assert IPOLoss(beta=0.1).value_at_reference == pytest.approx(25.0)
    assert IPOLoss(beta=1e9).value_at_reference == pytest.approx(0.0)


def test_a_pair_beyond_its_aim_is_drawn_back() -> None:
    """What DPO never does."""
    policy = pairs([-1.0], [-9.0], [1])
    policy.chosen.requires_grad_()
    loss = IPOLoss(beta=0.25)(policy, pairs([-5.0], [-5.0], [1])).loss_sum  # a gap of 8, aim 2
    (gradient,) = torch.autograd.grad(loss, policy.chosen)
    assert float(gradient) == pytest.approx(2 * (8.0 - 2.0))


def test_with_a_large_beta_any_gap_is_an_error() -> None:
    output = IPOLoss(beta=1e12)(POLICY, REFERENCE)
    assert float(output.loss_sum) == pytest.approx(1.5**2 + 2.0**2 + 0.0)
