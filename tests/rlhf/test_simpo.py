import math

import pytest
import torch

from rlhf.losses import PairLogps
from rlhf.losses.simpo import SimPOLoss


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float64, requires_grad=True),
        rejected=torch.tensor(rejected, dtype=torch.float64, requires_grad=True),
        chosen_length=torch.full((len(chosen),), 4),
        rejected_length=torch.full((len(chosen),), 2),
    )


def test_simpo_by_hand_on_three_pairs() -> None:
    output = SimPOLoss(beta=2.0, target_margin=0.5)(pairs([-4.0, -8.0, -2.0], [-2.0, -2.0, -1.0]))
    # rewards: -2, -4, -1 against -2, -2, -1: margins 0, -2, 0, asked to be .5
    losses = [math.log1p(math.exp(0.5)), math.log1p(math.exp(2.5)), math.log1p(math.exp(0.5))]
    assert float(output.loss_sum) == pytest.approx(sum(losses))
    assert float(output.metrics["preference/margin"][0]) == pytest.approx(-2.0)
    assert float(output.metrics["preference/accuracy"][0]) == 1.0  # two ties and a loss
    assert float(output.metrics["reward/chosen"][0]) == pytest.approx(-7.0)
    assert float(output.metrics["logp/chosen"][0]) == -14.0


def test_without_a_margin_a_tie_costs_ln_2_and_with_a_large_one_its_size() -> None:
    tie = pairs([-4.0], [-2.0])
    assert float(SimPOLoss(target_margin=0.0)(tie).loss) == pytest.approx(math.log(2.0))
    assert float(SimPOLoss(target_margin=100.0)(tie).loss) == pytest.approx(100.0)


def test_the_gradient_of_a_token_is_less_in_a_longer_answer() -> None:
    tie = pairs([-4.0], [-2.0])
    loss = SimPOLoss(beta=2.0, target_margin=0.0)(tie).loss_sum
    chosen, rejected = torch.autograd.grad(loss, (tie.chosen, tie.rejected))
    assert float(chosen) == pytest.approx(-0.5 * 2.0 / 4)
    assert float(rejected) == pytest.approx(0.5 * 2.0 / 2)


def test_simpo_asks_for_no_reference() -> None:
    assert not SimPOLoss().needs_reference and SimPOLoss().value_at_reference is None
