"""GSPO's ratio of a whole answer, and what a loss over tokens is a mean over."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.losses import LossOutput
from rlhf.losses.gspo import gspo_loss, sequence_log_ratio
from rlhf.losses.mean import LossMean
from rlhf.losses.ppo import policy_loss

CLIPS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}
MEANS = (LossMean(), LossMean(over="sequence"), LossMean(over="constant", max_length=4))


def f64(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# An answer of 3 tokens, one of 1: log-ratios 0.3, -0.6, 0.9 (mean 0.2) and -0.5.
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
OLD = f64([[-1.0, -2.0, -0.5], [-1.5, 0.0, 0.0]])
NEW = OLD + f64([[0.3, -0.6, 0.9], [-0.5, 0.0, 0.0]])


def loss_of(
    loss: Callable[..., LossOutput],
    advantage: tuple[float, float],
    *,
    logp_BR: Tensor = NEW,
    **changes: Any,
) -> LossOutput:
    advantage_BR = f64(advantage)[:, None] * MASK
    return loss(logp_BR, OLD, **{"advantage_BR": advantage_BR, "mask_BR": MASK, **CLIPS, **changes})


# --- by hand


def test_the_ratio_is_the_geometric_mean_over_the_answer_by_hand() -> None:
    found = sequence_log_ratio(NEW, OLD, MASK)
    assert found.tolist() == [pytest.approx([0.2] * 3), pytest.approx([-0.5, 0.0, 0.0])]


def test_gspo_by_hand_on_two_answers() -> None:
    """e^0.2 = 1.221 is within 1.3; e^-0.5 = 0.607 is below 0.8, which holds a bad answer only."""
    free, held = math.exp(0.2), math.exp(-0.5)
    better = loss_of(gspo_loss, (2.0, 1.0))
    assert float(better.loss) == pytest.approx((-2 * free - held) / 2)
    worse = loss_of(gspo_loss, (-2.0, -1.0))
    assert float(worse.loss) == pytest.approx((2 * free + 0.8) / 2)
    assert int(worse.count) == 2
    assert [float(x) for x in worse.metrics["policy/clip_fraction"]] == [1.0, 4.0]
    assert float(better.metrics["policy/clip_fraction"][0]) == 0.0
    assert float(worse.metrics["policy/ratio"][0]) == pytest.approx(3 * free + held)


def test_the_gradient_of_gspo_by_hand_and_none_where_an_answer_is_clipped() -> None:
    """d/dlogp_t of -A s_i / 2 answers is -A s_i / (2 |o_i|), the same for its tokens."""
    logp_BR = NEW.clone().requires_grad_()
    loss_of(gspo_loss, (2.0, -1.0), logp_BR=logp_BR).loss.backward()
    each = -2.0 * math.exp(0.2) / (2 * 3)
    assert logp_BR.grad is not None
    assert logp_BR.grad.tolist() == [pytest.approx([each] * 3), [0.0, 0.0, 0.0]]


def naive(logp_BR: Tensor, advantage_B: Tensor) -> Tensor:
    """Equations 5 and 7 answer by answer."""
    total = torch.zeros((), dtype=torch.float64)
    for logp_R, old_R, mask_R, advantage in zip(logp_BR, OLD, MASK, advantage_B, strict=True):
        ratio = (logp_R - old_R)[mask_R].mean().exp()
        clipped = ratio.clamp(0.8, 1.3)
        total = total - torch.minimum(ratio * advantage, clipped * advantage)
    return total / len(logp_BR)


@pytest.mark.parametrize("advantage", [(2.0, 1.0), (-1.5, 0.7), (0.4, -3.0), (0.0, 0.0)])
def test_values_and_gradients_are_those_of_the_equation_written_out(
    advantage: tuple[float, float],
) -> None:
    found_BR, naive_BR = NEW.clone().requires_grad_(), NEW.clone().requires_grad_()
    output = loss_of(gspo_loss, advantage, logp_BR=found_BR)
    output.loss.backward()
    expected = naive(naive_BR, f64(advantage))
    expected.backward()
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)
    torch.testing.assert_close(found_BR.grad, naive_BR.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mean", MEANS, ids=lambda mean: mean.over)
@pytest.mark.parametrize("loss", [policy_loss, gspo_loss])
def test_gradients_agree_with_finite_differences(loss: Any, mean: LossMean) -> None:
    def summed(logp_BR: Tensor) -> Tensor:
        return loss_of(loss, (2.0, -1.0), logp_BR=logp_BR, mean=mean, clip_high=0.5).loss_sum

    assert torch.autograd.gradcheck(summed, NEW.clone().requires_grad_())


def test_tokens_of_one_answer_may_have_advantages_of_their_own() -> None:
    """GSPO-token: each token's gradient is -s_i A_t / |o_i|, whatever its neighbours have."""
    logp_BR = NEW.clone().requires_grad_()
    advantage_BR = f64([[1.0, -2.0, 0.5], [1.0, 0.0, 0.0]])
    gspo_loss(
        logp_BR, OLD, advantage_BR=advantage_BR, mask_BR=MASK, **CLIPS
    ).loss_sum.backward()  # fmt: skip
    assert logp_BR.grad is not None
    expected = [-math.exp(0.2) * a / 3 for a in (1.0, -2.0, 0.5)]
    assert logp_BR.grad[0].tolist() == pytest.approx(expected)


# --- limits


def test_at_ratio_1_it_is_the_plain_policy_gradient_and_that_of_ppo() -> None:
    """d/dlogp_t = -A_i / |o_i|, as for the mean of A log pi over tokens, then answers."""
    gradients = []
    for loss in (gspo_loss, policy_loss):
        logp_BR = OLD.clone().requires_grad_()
        output = loss_of(loss, (2.0, -3.0), logp_BR=logp_BR, mean=LossMean(over="sequence"))
        assert float(output.maxima["policy/ratio_max_deviation"]) == 0.0
        output.loss.backward()
        gradients.append(logp_BR.grad)
    logp_BR = OLD.clone().requires_grad_()
    plain = -(f64([2.0, -3.0]) * (logp_BR * MASK).sum(dim=1) / MASK.sum(dim=1)).mean()
    plain.backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, logp_BR.grad, rtol=1e-15, atol=0)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_for_answers_of_one_token_both_ratios_are_the_same(advantage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old_BR = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    new_BR = old_BR + 0.5 * torch.randn(6, 1, generator=generator, dtype=torch.float64)
    found = []
    for loss in (policy_loss, gspo_loss):
        logp_BR = new_BR.clone().requires_grad_()
        output = loss(
            logp_BR, old_BR, advantage_BR=torch.full_like(old_BR, advantage),
            mask_BR=torch.ones(6, 1), mean=LossMean(), **CLIPS,
        )  # fmt: skip
        output.loss_sum.backward()
        found.append((output.loss_sum.detach(), logp_BR.grad, output.metrics))
    torch.testing.assert_close(found[0], found[1], rtol=1e-14, atol=0)


def test_padding_and_an_answer_without_tokens_change_nothing_not_even_when_they_are_nan() -> None:
    clean_BR, dirty_BR = NEW.clone().requires_grad_(), NEW.clone()
    dirty_BR[~MASK] = float("nan")
    dirty_BR = torch.cat([dirty_BR, torch.full((1, 3), float("nan")).double()])
    dirty_BR.requires_grad_()
    mask_BR = torch.cat([MASK, torch.zeros(1, 3).bool()])
    advantage_BR = f64([[2.0] * 3, [-1.0] * 3, [7.0] * 3])
    for mean in MEANS:
        clean = loss_of(gspo_loss, (2.0, -1.0), logp_BR=clean_BR, mean=mean)
        dirty = gspo_loss(
            dirty_BR, torch.cat([OLD, OLD[:1]]), advantage_BR=advantage_BR, mask_BR=mask_BR,
            mean=mean, **CLIPS,
        )  # fmt: skip
        assert float(dirty.loss) == float(clean.loss) and int(dirty.count) == int(clean.count)
        (gradient,) = torch.autograd.grad(dirty.loss, dirty_BR)
        (expected,) = torch.autograd.grad(clean.loss, clean_BR)
        assert torch.equal(gradient[:2], expected) and not gradient[2].any()


def test_a_bad_answer_with_a_large_ratio_is_held_by_the_dual_clip() -> None:
    far_BR = OLD + 2.0 * MASK
    output = loss_of(gspo_loss, (-1.0, -1.0), logp_BR=far_BR, dual_clip=3.0)
    assert float(output.loss) == pytest.approx(3.0)  # e^2 without it
    assert [float(x) for x in output.metrics["policy/dual_clip_fraction"]] == [4.0, 4.0]


# --- what a loss is a mean over


def test_the_three_means_by_hand() -> None:
    """Tokens 1, 2, 6 and 5: over 4 tokens 14 / 4; over answers (3 + 5) / 2; of 4 places 14 / 8."""
    x_BR = f64([[1.0, 2.0, 6.0], [5.0, 0.0, 0.0]])
    found = [float(mean.total(x_BR, MASK) / mean.count(MASK)) for mean in MEANS]
    assert found == pytest.approx([3.5, 4.0, 1.75])
    assert [int(mean.count(MASK)) for mean in MEANS] == [4, 2, 2]


@pytest.mark.parametrize("mean", MEANS, ids=lambda mean: mean.over)
def test_totals_and_counts_of_parts_add_up_to_those_of_the_whole(mean: LossMean) -> None:
    """Whatever the split, also with a micro-batch that is all masked."""
    generator = torch.Generator().manual_seed(0)
    x_BR = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    mask_BR = torch.rand(8, 5, generator=generator) < 0.6
    mask_BR[6:] = False
    parts = [(x_BR[i : i + 2], mask_BR[i : i + 2]) for i in range(0, 8, 2)]
    total = sum(float(mean.total(*part)) for part in parts)
    assert total == pytest.approx(float(mean.total(x_BR, mask_BR)), rel=1e-12)
    assert sum(int(mean.count(m)) for _, m in parts) == int(mean.count(mask_BR))
    assert float(mean.total(*parts[3])) == 0.0 and int(mean.count(parts[3][1])) == 0


def test_a_mean_that_cannot_be_is_one_sentence() -> None:
    for over, length in (("constant", None), ("token", 4)):
        with pytest.raises(UserError, match="constant needs a length, and the others have no use"):
            LossMean(over=over, max_length=length)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_length is 0: it must be at least 1."):
        LossMean(over="constant", max_length=0)
