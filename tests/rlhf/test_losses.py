import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.losses import LossOutput, PairLogps, PreferenceLoss
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.losses.dpo import DPOLoss
from rlhf.losses.ppo import explained_variance, policy_loss, value_loss

NAN = float("nan")
LN_2 = math.log(2.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(chosen: list[float] | Tensor, rejected: list[float] | Tensor) -> PairLogps:
    chosen, rejected = torch.as_tensor(chosen), torch.as_tensor(rejected)
    length = torch.full(chosen.shape, 3)
    return PairLogps(chosen=chosen, rejected=rejected, chosen_length=length, rejected_length=length)


def mean(output: LossOutput, name: str) -> float:
    total, count = output.metrics[name]
    return float(total) / float(count)


def assert_adds_up(parts: list[LossOutput], whole: LossOutput) -> None:
    close = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum, **close)
    assert sum(part.count for part in parts) == whole.count
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name][0] for part in parts), total, **close)
        assert sum(part.metrics[name][1] for part in parts) == count
        assert not total.requires_grad
    for name, largest in whole.maxima.items():
        assert max(part.maxima[name] for part in parts) == largest
        assert not largest.requires_grad


# --- what losses give and take


def test_a_loss_over_nothing_has_a_sum_but_no_mean() -> None:
    nothing = LossOutput(loss_sum=torch.zeros(()), count=torch.tensor(0))
    with pytest.raises(ValueError, match="the loss has no mean: the batch holds no pair"):
        _ = nothing.loss
    three = LossOutput(loss_sum=torch.tensor(6.0), count=torch.tensor(3))
    assert three.loss == 2.0


def test_pairs_whose_shapes_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rejected \(3,\)"):
        pairs(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"are \(B,\), got \(2, 1\)"):
        pairs(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"policy \(2,\), reference \(1,\)"):
        DPOLoss()(pairs(torch.zeros(2), torch.zeros(2)), pairs(torch.zeros(1), torch.zeros(1)))


# --- DPO


def test_dpo_by_hand_on_three_pairs() -> None:
    policy = pairs([-10.0, -12.0, -5.0], [-12.0, -10.0, -5.0])
    reference = pairs([-11.0, -12.0, -6.0], [-11.5, -12.0, -6.0])
    output = DPOLoss(beta=0.5)(policy, reference)
    # gaps of log ratios: 1 - -.5 = 1.5; 0 - 2 = -2; 1 - 1 = 0; rewards are half of them
    losses = [math.log1p(math.exp(-0.75)), math.log1p(math.exp(1.0)), LN_2]
    assert output.loss_sum.item() == pytest.approx(sum(losses), rel=1e-6)
    assert output.count == 3
    assert output.loss.item() == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert mean(output, "preference/margin") == pytest.approx((0.75 - 1.0) / 3)
    assert mean(output, "preference/accuracy") == 0.5  # a win, a loss, a tie
    assert mean(output, "reward/chosen") == pytest.approx(0.5 * (1.0 + 0.0 + 1.0) / 3)
    assert mean(output, "reward/rejected") == pytest.approx(0.5 * (-0.5 + 2.0 + 1.0) / 3)
    assert mean(output, "logp/chosen") == -9.0
    assert mean(output, "logp/rejected") == -9.0


def test_dpo_with_smoothing_mixes_both_directions_of_the_label() -> None:
    policy, reference = pairs([-1.0], [-3.0]), pairs([-2.0], [-2.0])  # gap 2, margin 1
    output = DPOLoss(beta=0.5, label_smoothing=0.1)(policy, reference)
    by_hand = 0.9 * math.log1p(math.exp(-1.0)) + 0.1 * math.log1p(math.exp(1.0))
    assert output.loss.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_is_ln_2_when_the_policy_is_the_reference(label_smoothing: float) -> None:
    logps = pairs(random(5), random(5, seed=1))
    loss: PreferenceLoss = DPOLoss(beta=3.0, label_smoothing=label_smoothing)
    assert loss.needs_reference and loss.value_at_reference == LN_2
    output = loss(logps, logps)
    assert output.loss.item() == pytest.approx(LN_2, abs=1e-15)
    assert mean(output, "preference/accuracy") == 0.5


def test_dpo_tends_to_ln_2_as_beta_tends_to_0() -> None:
    policy, reference = pairs(random(5), random(5, seed=1)), pairs([0.0] * 5, [0.0] * 5)
    assert float(DPOLoss(beta=1e-9)(policy, reference).loss) == pytest.approx(LN_2, abs=1e-8)


def test_dpo_pushes_apart_with_beta_times_the_wrong_probability() -> None:
    chosen = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    output = DPOLoss(beta=0.5)(pairs(chosen, rejected), pairs([-1.0], [-1.0]))
    gradients = torch.autograd.grad(output.loss, (chosen, rejected))
    wrong = 1.0 / (1.0 + math.exp(0.5))
    assert [float(g) for g in gradients] == pytest.approx([-0.5 * wrong, 0.5 * wrong])


def test_dpo_stays_finite_for_sequences_that_are_far_apart() -> None:
    chosen = torch.tensor([-1e5], requires_grad=True)
    output = DPOLoss(beta=1.0)(pairs(chosen, [0.0]), pairs([0.0], [0.0]))
    assert output.loss == 1e5
    assert float(torch.autograd.grad(output.loss, chosen)[0]) == -1.0


def test_dpo_leaves_the_reference_alone() -> None:
    reference = random(2, seed=2).requires_grad_()
    policy = random(2).requires_grad_()
    output = DPOLoss()(pairs(policy, random(2)), pairs(reference, random(2, seed=3)))
    output.loss.backward()
    assert policy.grad is not None and reference.grad is None


def test_dpo_over_no_pair_sums_to_zero() -> None:
    nothing = pairs(torch.zeros(0), torch.zeros(0))
    output = DPOLoss()(nothing, nothing)
    assert output.loss_sum == 0.0 and output.count == 0


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": NAN}, {"label_smoothing": 0.5}])
def test_dpo_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"DPO: {next(iter(options))} must be"):
        DPOLoss(**options)


# --- Bradley-Terry


def test_bradley_terry_by_hand_on_three_pairs() -> None:
    chosen_B, rejected_B = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 1.0])
    output = BradleyTerryLoss()(chosen_B, rejected_B)
    losses = [math.log1p(math.exp(-1.0)), math.log1p(math.exp(3.0)), LN_2]
    assert output.loss_sum.item() == pytest.approx(sum(losses), rel=1e-6)
    assert output.count == 3
    assert mean(output, "preference/accuracy") == 0.5
    assert mean(output, "preference/margin") == pytest.approx(-2.0 / 3)
    assert mean(output, "reward/chosen") == pytest.approx(1.0)
    assert mean(output, "reward/rejected") == pytest.approx(5.0 / 3)


def test_bradley_terry_adds_a_price_on_the_mean_score_and_asks_for_the_margin() -> None:
    chosen_B, rejected_B = torch.tensor([2.0]), torch.tensor([1.0])
    output = BradleyTerryLoss(center_coef=0.01)(chosen_B, rejected_B, margin_B=torch.tensor([3.0]))
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(2.0)) + 0.01 * 9.0, rel=1e-6)
    assert mean(output, "preference/accuracy") == 1.0


def test_bradley_terry_of_equal_scores_is_ln_2() -> None:
    loss = BradleyTerryLoss(center_coef=0.01)
    assert float(loss(torch.zeros(4), torch.zeros(4)).loss) == pytest.approx(loss.value_at_tie)


def test_bradley_terry_refuses_a_negative_price_and_shapes_that_would_broadcast() -> None:
    with pytest.raises(UserError, match="center_coef must be a finite number of 0 or more"):
        BradleyTerryLoss(center_coef=-0.1)
    with pytest.raises(ValueError, match=r"rejected \(2, 1\)"):
        BradleyTerryLoss()(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"margin \(1,\)"):
        BradleyTerryLoss()(torch.zeros(2), torch.zeros(2), margin_B=torch.zeros(1))
    with pytest.raises(ValueError, match=r"scores are \(B,\)"):
        BradleyTerryLoss()(torch.zeros(2, 1), torch.zeros(2, 1))


# --- PPO, policy


def surrogate(
    ratio: list[float],
    advantage: list[float],
    *,
    mask: list[bool] | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[LossOutput, list[float]]:
    """The loss of one row whose old log-probabilities are -1, and d loss_sum / d logp."""
    old_logp_BR = torch.full((1, len(ratio)), -1.0, dtype=torch.float64)
    logp_BR = (old_logp_BR + torch.tensor([ratio], dtype=torch.float64).log()).requires_grad_()
    output = policy_loss(
        logp_BR,
        old_logp_BR,
        advantage_BR=torch.tensor([advantage], dtype=torch.float64),
        mask_BR=torch.tensor([mask if mask else [True] * len(ratio)]),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    (gradient,) = torch.autograd.grad(output.loss_sum, logp_BR)
    return output, gradient[0].tolist()


def test_the_clip_stops_a_token_that_has_gained_enough_and_none_that_has_to_come_back() -> None:
    output, gradient = surrogate([1.5, 0.5, 1.5, 0.5], [2.0, 2.0, -2.0, -2.0])
    # -2*1.2 (clipped), -2*.5 (free), 2*1.5 (free), 2*.8 (clipped)
    assert output.loss_sum.item() == pytest.approx(-2.4 - 1.0 + 3.0 + 1.6)
    assert gradient == pytest.approx([0.0, -1.0, 3.0, 0.0])
    assert output.count == 4
    assert mean(output, "policy/clip_fraction") == 0.5
    assert mean(output, "policy/ratio") == pytest.approx(1.0)
    assert float(output.maxima["policy/ratio_max_deviation"]) == pytest.approx(0.5)


def test_the_two_bounds_are_apart() -> None:
    high, _ = surrogate([2.0], [1.0], clip_low=0.3, clip_high=0.5)
    low, _ = surrogate([0.1], [-1.0], clip_low=0.3, clip_high=0.5)
    assert high.loss_sum.item() == pytest.approx(-1.5)
    assert low.loss_sum.item() == pytest.approx(0.7)


def test_the_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    ratio, advantage = [5.0, 2.0, 5.0, 0.5], [-1.0, -1.0, 1.0, -4.0]
    free, free_gradient = surrogate(ratio, advantage)
    held, held_gradient = surrogate(ratio, advantage, dual_clip=3.0)
    assert free.loss_sum.item() == pytest.approx(5.0 + 2.0 - 1.2 + 3.2)
    assert held.loss_sum.item() == pytest.approx(3.0 + 2.0 - 1.2 + 3.2)
    assert free_gradient == pytest.approx([5.0, 2.0, 0.0, 0.0])
    assert held_gradient == pytest.approx([0.0, 2.0, 0.0, 0.0])
    assert mean(held, "policy/dual_clip_fraction") == 0.25
    assert "policy/dual_clip_fraction" not in free.metrics


def test_at_the_old_policy_the_loss_is_the_plain_policy_gradient_and_nothing_is_clipped() -> None:
    advantage = [1.0, -2.0, 0.5]
    output, gradient = surrogate([1.0, 1.0, 1.0], advantage)
    assert gradient == [-a for a in advantage]
    assert output.loss_sum.item() == 0.5
    for name in ("policy/clip_fraction", "policy/approx_kl_k2", "policy/approx_kl_k3"):
        assert mean(output, name) == 0.0
    assert output.maxima["policy/ratio_max_deviation"] == 0.0


def test_the_kl_metrics_are_from_the_old_policy_to_the_new_one() -> None:
    output, _ = surrogate([2.0], [1.0])
    assert mean(output, "policy/approx_kl_k2") == pytest.approx(0.5 * LN_2**2)
    assert mean(output, "policy/approx_kl_k3") == pytest.approx(2.0 - 1.0 - LN_2)


def test_masked_tokens_have_no_part_in_any_number() -> None:
    real, real_gradient = surrogate([1.5, 0.5], [2.0, -2.0], dual_clip=3.0)
    padded, gradient = surrogate(
        [1.5, 9.0, 0.5], [2.0, 7.0, -2.0], mask=[True, False, True], dual_clip=3.0
    )
    assert gradient == pytest.approx([real_gradient[0], 0.0, real_gradient[1]])
    assert_adds_up([real], padded)


@pytest.mark.parametrize("poisoned", ["logp", "old_logp", "advantage"])
def test_nan_under_padding_leaves_policy_loss_and_gradient_finite(poisoned: str) -> None:
    rows = {name: random(2, 3, seed=s) for s, name in enumerate(["logp", "old_logp", "advantage"])}
    rows[poisoned][:, 2] = NAN
    mask_BR = torch.tensor([[True, True, False]] * 2)
    logp_BR = rows["logp"].requires_grad_()
    output = policy_loss(
        logp_BR,
        rows["old_logp"],
        advantage_BR=rows["advantage"],
        mask_BR=mask_BR,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=2.0,
    )
    (gradient,) = torch.autograd.grad(output.loss, logp_BR)
    assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()
    assert not gradient[:, 2].any()
    numbers = [total for total, _ in output.metrics.values()] + list(output.maxima.values())
    assert all(torch.isfinite(number) for number in numbers)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_an_empty_mask_sums_to_zero_and_has_no_mean(shape: tuple[int, int]) -> None:
    logp_BR, masked_BR = random(*shape).requires_grad_(), torch.zeros(shape).bool()
    policy = policy_loss(
        logp_BR, logp_BR, advantage_BR=logp_BR, mask_BR=masked_BR, clip_low=0.2, clip_high=0.2
    )
    value = value_loss(logp_BR, logp_BR, return_BR=logp_BR, mask_BR=masked_BR, clip=0.2)
    for output in (policy, value):
        assert output.loss_sum == 0.0 and output.count == 0
        assert not torch.autograd.grad(output.loss_sum, logp_BR)[0].any()
        with pytest.raises(ValueError, match="no mean"):
            _ = output.loss
    assert policy.maxima["policy/ratio_max_deviation"] == 0.0
    assert explained_variance(value.metrics) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_low": 1.1}, "clip_low must lie between 0 and 1, got 1.1"),
        ({"clip_high": -0.1}, "clip_high must be 0 or more"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, or None"),
    ],
)
def test_policy_bounds_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        surrogate([1.0], [1.0], **options)


def test_policy_tensors_of_different_shapes_are_refused() -> None:
    two = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"advantage \(2, 1\)"):
        policy_loss(
            two, two, advantage_BR=two[:, :1], mask_BR=two.bool(), clip_low=0.2, clip_high=0.2
        )


# --- PPO, value


def test_value_loss_by_hand_with_and_without_the_clip() -> None:
    value_BR = torch.tensor([[1.0, 0.0, 0.3]], dtype=torch.float64, requires_grad=True)
    old_value_BR = torch.tensor([[0.0, 1.0, 0.2]], dtype=torch.float64)
    return_BR = torch.tensor([[2.0, 1.0, 1.3]], dtype=torch.float64)
    mask_BR = torch.ones(1, 3).bool()
    free = value_loss(value_BR, old_value_BR, return_BR=return_BR, mask_BR=mask_BR, clip=None)
    assert free.loss_sum.item() == pytest.approx(0.5 * (1.0 + 1.0 + 1.0))
    assert "value/clip_fraction" not in free.metrics

    clipped = value_loss(value_BR, old_value_BR, return_BR=return_BR, mask_BR=mask_BR, clip=0.5)
    # V_clip: 0.5 (worse than V, counts, no gradient), 0.5 (better than V, does not), 0.3 (inside)
    assert clipped.loss_sum.item() == pytest.approx(0.5 * (2.25 + 1.0 + 1.0))
    (gradient,) = torch.autograd.grad(clipped.loss_sum, value_BR)
    assert gradient[0].tolist() == pytest.approx([0.0, -1.0, -1.0])
    assert mean(clipped, "value/clip_fraction") == pytest.approx(1 / 3)


def test_inside_its_bounds_the_value_clip_changes_nothing_by_rounding_either() -> None:
    old_value_BR = random(4, 50).float()
    value_BR = old_value_BR + 0.1 * random(4, 50, seed=1).float().clamp(-1.9, 1.9)
    masks = {"return_BR": random(4, 50, seed=2).float(), "mask_BR": torch.ones(4, 50).bool()}
    clipped = value_loss(value_BR, old_value_BR, clip=0.2, **masks)
    assert clipped.loss_sum == value_loss(value_BR, old_value_BR, clip=None, **masks).loss_sum
    assert mean(clipped, "value/clip_fraction") == 0.0


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_under_padding_leaves_value_loss_and_gradient_finite(poisoned: int) -> None:
    rows = [random(2, 3, seed=seed) for seed in range(3)]
    rows[poisoned][:, 0] = NAN
    mask_BR = torch.tensor([[False, True, True]] * 2)
    rows[0].requires_grad_()
    output = value_loss(rows[0], rows[1], return_BR=rows[2], mask_BR=mask_BR, clip=0.2)
    (gradient,) = torch.autograd.grad(output.loss, rows[0])
    assert torch.isfinite(output.loss) and torch.isfinite(gradient).all()
    assert not gradient[:, 0].any()
    assert all(torch.isfinite(total) for total, _ in output.metrics.values())


def test_explained_variance_is_1_for_a_perfect_critic_and_0_for_a_constant_one() -> None:
    return_BR, mask_BR = random(3, 4) + 5.0, torch.ones(3, 4).bool()

    def explained(value_BR: Tensor, return_BR: Tensor = return_BR) -> float | None:
        output = value_loss(value_BR, value_BR, return_BR=return_BR, mask_BR=mask_BR, clip=None)
        return explained_variance(output.metrics)

    assert explained(return_BR) == 1.0
    assert explained(torch.full((3, 4), 9.0)) == pytest.approx(0.0, abs=1e-12)
    noisy = return_BR + random(3, 4, seed=1)
    by_definition = 1.0 - (return_BR - noisy).var() / return_BR.var()
    assert explained(noisy) == pytest.approx(float(by_definition), abs=1e-12)
    constant = torch.full((3, 4), 0.3, dtype=torch.float64)  # its variance comes out as 2e-17
    assert explained(noisy, constant) is None


def test_a_value_clip_of_0_is_refused() -> None:
    two = torch.zeros(2, 2)
    with pytest.raises(UserError, match="value clip must be above 0, or None"):
        value_loss(two, two, return_BR=two, mask_BR=two.bool(), clip=0.0)


# --- all of them


def losses_of_rows(rows: slice) -> list[LossOutput]:
    """Each loss on the same rows of the same random numbers, uneven masks included."""
    logp, old, advantage = (random(5, 4, seed=seed)[rows] for seed in range(3))
    masks = {"mask_BR": (random(5, 4, seed=3) > -0.5)[rows]}
    policy, reference = pairs(logp[:, 0], logp[:, 1]), pairs(old[:, 0], old[:, 1])
    clips = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5}
    return [
        DPOLoss(beta=0.3, label_smoothing=0.1)(policy, reference),
        BradleyTerryLoss(center_coef=0.1)(logp[:, 0], old[:, 0], margin_B=advantage[:, 0].abs()),
        policy_loss(logp, old, advantage_BR=advantage, **masks, **clips),
        value_loss(logp, old, return_BR=advantage, **masks, clip=0.2),
    ]


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    cuts = [losses_of_rows(rows) for rows in (slice(0, 1), slice(1, 5))]
    for *parts, whole in zip(*cuts, losses_of_rows(slice(5)), strict=True):
        assert_adds_up(parts, whole)


MASK_23 = torch.tensor([[True, True, False], [True, False, True]])
LOSS_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "dpo": lambda x: (
        DPOLoss(beta=0.7, label_smoothing=0.1)(
            pairs(x[0], x[1]), pairs(random(3, seed=5), random(3, seed=6))
        ).loss_sum
    ),
    "bradley_terry": lambda x: (
        BradleyTerryLoss(center_coef=0.1)(x[0], x[1], margin_B=random(3, seed=5).abs()).loss_sum
    ),
    "policy": lambda x: (
        policy_loss(
            x,
            random(2, 3, seed=5),
            advantage_BR=random(2, 3, seed=6),
            mask_BR=MASK_23,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=1.5,
        ).loss_sum
    ),
    "value": lambda x: (
        value_loss(
            x, random(2, 3, seed=5), return_BR=random(2, 3, seed=6), mask_BR=MASK_23, clip=0.5
        ).loss_sum
    ),
}


@pytest.mark.parametrize("name", LOSS_SUMS)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(LOSS_SUMS[name], random(2, 3).requires_grad_())


def test_low_precision_inputs_are_summed_in_float32() -> None:
    low = random(3, 4).bfloat16()
    length = torch.ones(3)
    logps = PairLogps(
        chosen=low[:, 0], rejected=low[:, 1], chosen_length=length, rejected_length=length
    )
    ones = torch.ones(3, 4).bool()
    outputs = [
        DPOLoss()(logps, logps),
        BradleyTerryLoss()(low[:, 0], low[:, 1]),
        policy_loss(low, low, advantage_BR=low, mask_BR=ones, clip_low=0.2, clip_high=0.2),
        value_loss(low, low, return_BR=low, mask_BR=ones, clip=0.2),
    ]
    for output in outputs:
        assert output.loss_sum.dtype == torch.float32
        assert all(total.dtype != torch.bfloat16 for total, _ in output.metrics.values())
