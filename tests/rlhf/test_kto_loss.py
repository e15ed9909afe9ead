import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.losses import LossOutput
from rlhf.losses.kto import KTOLoss, reference_point

GOOD = torch.tensor([True, False, True])
REFERENCE = torch.tensor([-5.0, -5.0, -5.0], dtype=torch.float64)


def sigma(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def judged(loss: KTOLoss, logp: list[float] | Tensor, *, point: float = 0.0, **more: Any) -> Any:
    output: LossOutput = loss(
        torch.as_tensor(logp, dtype=torch.float64),
        more.get("reference", REFERENCE),
        is_good_B=more.get("is_good", GOOD),
        reference_point=torch.tensor(point, dtype=torch.float64),
    )
    return output


def test_kto_by_hand_on_three_answers() -> None:
    loss = KTOLoss(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    output = judged(loss, [-3.0, -4.0, -7.0], point=1.0)
    # r - z0: 2 - 1 = 1; 1 - 1 = 0; -2 - 1 = -3
    losses = [2.0 * sigma(-0.5), 3.0 * sigma(0.0), 2.0 * sigma(1.5)]
    assert float(output.loss_sum) == pytest.approx(sum(losses))
    assert output.count == 3
    total, count = output.metrics["reward/chosen"]
    assert (float(total), int(count)) == (pytest.approx(0.5 * (2.0 - 2.0)), 2)
    total, count = output.metrics["reward/rejected"]
    assert (float(total), int(count)) == (pytest.approx(0.5), 1)
    assert float(output.metrics["logp/rejected"][0]) == -4.0


def test_at_the_reference_an_answer_costs_half_its_weight() -> None:
    loss = KTOLoss(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert loss.value_at_reference(2, 1) == pytest.approx((1.0 + 1.5 + 1.0) / 3)
    assert float(judged(loss, REFERENCE).loss) == pytest.approx(loss.value_at_reference(2, 1))
    assert KTOLoss().value_at_reference(5, 7) == 0.5


def test_the_loss_lies_between_0_and_the_weights() -> None:
    loss = KTOLoss(beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    best = judged(loss, [900.0, -900.0, 900.0])
    worst = judged(loss, [-900.0, 900.0, -900.0])
    assert float(best.loss_sum) == pytest.approx(0.0)
    assert float(worst.loss_sum) == pytest.approx(2.0 + 3.0 + 2.0)


def test_good_answers_are_raised_and_bad_ones_lowered_most_where_undecided() -> None:
    logp_B = torch.tensor([-5.0, -5.0, 20.0], dtype=torch.float64, requires_grad=True)
    output = judged(KTOLoss(beta=0.5), logp_B)
    (gradient,) = torch.autograd.grad(output.loss_sum, logp_B)
    assert gradient[:2].tolist() == pytest.approx([-0.5 * 0.25, 0.5 * 0.25])
    assert -1e-5 < float(gradient[2]) < 0.0


def test_gradients_are_those_of_finite_differences() -> None:
    logp_B = torch.tensor([-3.0, -4.0, -7.0], dtype=torch.float64, requires_grad=True)
    loss = KTOLoss(beta=0.7, desirable_weight=1.3)
    assert torch.autograd.gradcheck(lambda x: judged(loss, x, point=0.4).loss_sum, (logp_B,))


def test_answers_add_up_where_the_point_of_reference_is_given() -> None:
    loss = KTOLoss(beta=0.7, undesirable_weight=1.3)
    assert loss.couples_batch
    logp_B = torch.tensor([-3.0, -4.0, -7.0], dtype=torch.float64)
    whole = judged(loss, logp_B, point=0.4)
    parts = [
        judged(loss, logp_B[rows], point=0.4, reference=REFERENCE[rows], is_good=GOOD[rows])
        for rows in (slice(0, 1), slice(1, 3), slice(3, 3))
    ]
    assert float(sum(part.loss_sum for part in parts)) == pytest.approx(float(whole.loss_sum))
    for name, (total, count) in whole.metrics.items():
        assert float(sum(part.metrics[name][0] for part in parts)) == pytest.approx(float(total))
        assert sum(part.metrics[name][1] for part in parts) == count


def test_the_point_of_reference_is_a_mean_never_below_0_and_a_constant() -> None:
    three = torch.tensor(3)
    assert float(reference_point(torch.tensor(6.0), three)) == 2.0
    assert float(reference_point(torch.tensor(-6.0), three)) == 0.0
    assert float(reference_point(torch.tensor(0.0), torch.tensor(0))) == 0.0
    ratios = torch.ones(3, requires_grad=True)
    assert not reference_point(ratios.sum(), three).requires_grad


def test_answers_whose_shapes_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logp \(2,\), reference \(3,\)"):
        judged(KTOLoss(), [-1.0, -2.0])
    square = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"are \(B,\), got \(2, 2\)"):
        judged(KTOLoss(), square, reference=square, is_good=square.bool())
