import pytest
import torch

from rlhf.losses import PairLogps
from rlhf.losses.hinge import HingeLoss


def pairs(chosen: list[float], rejected: list[float]) -> PairLogps:
    length = torch.full((len(chosen),), 2)
    return PairLogps(
        chosen=torch.tensor(chosen, dtype=torch.float64, requires_grad=True),
        rejected=torch.tensor(rejected, dtype=torch.float64, requires_grad=True),
        chosen_length=length,
        rejected_length=length,
    )


def test_hinge_by_hand_on_three_pairs_and_its_gradient_ends_at_1() -> None:
    policy = pairs([-10.0, -12.0, -5.0], [-12.0, -10.0, -9.0])
    output = HingeLoss(beta=0.5)(policy, pairs([-11.0, -12.0, -6.0], [-11.5, -12.0, -6.0]))
    # margins: .5 * 1.5, .5 * -2, .5 * 4
    assert output.loss_sum.item() == pytest.approx(0.25 + 2.0 + 0.0)
    chosen, rejected = torch.autograd.grad(output.loss_sum, (policy.chosen, policy.rejected))
    assert chosen.tolist() == [-0.5, -0.5, 0.0]
    assert rejected.tolist() == [0.5, 0.5, 0.0]


def test_hinge_over_means_divides_each_log_ratio() -> None:
    output = HingeLoss(beta=0.5, normalisation="mean")(pairs([-10.0], [-12.0]), pairs([-11], [-11]))
    assert float(output.loss_sum) == pytest.approx(1.0 - 0.5 * (0.5 + 0.5))


def test_hinge_tends_to_1_as_beta_tends_to_0() -> None:
    output = HingeLoss(beta=1e-9)(pairs([-10.0], [-12.0]), pairs([-11.0], [-11.0]))
    assert float(output.loss_sum) == pytest.approx(HingeLoss().value_at_reference)
