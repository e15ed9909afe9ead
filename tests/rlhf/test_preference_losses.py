"""All losses of pairs and of judged answers: against other implementations, and what they share."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.losses import LossOutput, PairLogps
from rlhf.losses.dpo import DPOLoss
from rlhf.losses.hinge import HingeLoss
from rlhf.losses.ipo import IPOLoss
from rlhf.losses.kto import KTOLoss, reference_point
from rlhf.losses.orpo import ORPOLoss
from rlhf.losses.simpo import SimPOLoss
from rlhf.losses.table import PAIR_LOSSES
from rlhf.options import LOSSES_OF, PairLoss

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "vectors" / "preference_losses.json").read_text(encoding="utf-8")
)
NAN = float("nan")
LN_2 = math.log(2.0)
# One of each, and of each normalisation, with numbers that are no default.
LOSSES = [
    DPOLoss(beta=0.7, label_smoothing=0.1),
    DPOLoss(beta=3.0, normalisation="mean"),
    IPOLoss(beta=0.7),
    IPOLoss(beta=0.7, normalisation="mean"),
    HingeLoss(beta=0.3),
    HingeLoss(beta=0.3, normalisation="mean"),
    SimPOLoss(beta=1.5, target_margin=0.4),
    ORPOLoss(odds_coef=0.5),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_pairs(count: int, *, seed: int = 0) -> PairLogps:
    """Pairs of unequal lengths, log-probabilities below 0."""
    lengths = torch.randint(1, 9, (2, count), generator=torch.Generator().manual_seed(seed))
    chosen, rejected = -lengths * (0.2 + random(2, count, seed=seed).abs())
    return PairLogps(
        chosen=chosen, rejected=rejected, chosen_length=lengths[0], rejected_length=lengths[1]
    )


def moved(pairs: PairLogps, *, chosen: Tensor, rejected: Tensor) -> PairLogps:
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_length=pairs.chosen_length,
        rejected_length=pairs.rejected_length,
    )


def rows_of(pairs: PairLogps, rows: slice) -> PairLogps:
    return PairLogps(**{f.name: getattr(pairs, f.name)[rows] for f in fields(PairLogps)})


def evaluate(loss: Any, policy: PairLogps, reference: PairLogps) -> LossOutput:
    found: LossOutput = loss(policy, reference) if loss.needs_reference else loss(policy)
    return found


# --- against other implementations


def vector_pairs(prefix: str = "") -> PairLogps:
    inputs = VECTORS["pairs"]["inputs"]
    return PairLogps(
        chosen=torch.tensor(inputs[f"{prefix}chosen"], dtype=torch.float64),
        rejected=torch.tensor(inputs[f"{prefix}rejected"], dtype=torch.float64),
        chosen_length=torch.tensor(inputs["chosen_length"]),
        rejected_length=torch.tensor(inputs["rejected_length"]),
    )


def named(case: Any) -> str:
    return f"{case['loss']}-{case['source']['repository'].split('/')[-1]}"


@pytest.mark.parametrize("case", VECTORS["pairs"]["cases"], ids=named)
def test_losses_of_pairs_and_their_gradients_are_those_of_other_implementations(case: Any) -> None:
    policy, reference = vector_pairs(), vector_pairs("reference_")
    loss = PAIR_LOSSES[case["loss"]](**case["options"])
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    found = [
        evaluate(loss, rows_of(policy, slice(i, i + 1)), rows_of(reference, slice(i, i + 1)))
        for i in range(len(policy.chosen))
    ]
    per_pair = torch.stack([output.loss_sum for output in found])
    if case["loss"] == "orpo":  # theirs is the odds term alone
        nll = torch.stack([output.metrics["preference/chosen_nll"][0] for output in found])
        graph = policy.chosen / policy.chosen_length
        torch.testing.assert_close(nll, -graph.detach(), rtol=0, atol=1e-15)
        per_pair = per_pair + graph
    gradients = torch.autograd.grad(per_pair.sum(), (policy.chosen, policy.rejected))
    close = {"rtol": 1e-10, "atol": 1e-10}
    expected = torch.tensor(case["per_pair"], dtype=torch.float64)
    torch.testing.assert_close(per_pair.detach(), expected, **close)
    for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
        expected = torch.tensor(case[f"gradient_{side}"], dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, **close)


@pytest.mark.parametrize("case", VECTORS["answers"]["cases"], ids=named)
def test_kto_and_its_point_of_reference_are_those_of_other_implementations(case: Any) -> None:
    inputs = VECTORS["answers"]["inputs"]
    logp_B = torch.tensor(inputs["logp"], dtype=torch.float64, requires_grad=True)
    mismatched, measured_from = (
        torch.tensor(case[name], dtype=torch.float64)
        for name in ("mismatched", "mismatched_reference")
    )
    point = reference_point((mismatched - measured_from).sum(), torch.tensor(len(mismatched)))
    assert float(point) == pytest.approx(case["reference_point"], abs=1e-10)
    output = KTOLoss(**case["options"])(
        logp_B,
        torch.tensor(inputs["reference"], dtype=torch.float64),
        is_good_B=torch.tensor(inputs["is_good"]).bool(),
        reference_point=point,
    )
    (gradient,) = torch.autograd.grad(output.loss, logp_B)
    assert float(output.loss.detach()) == pytest.approx(case["mean"], abs=1e-10)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_every_loss_of_the_table_has_a_vector_of_another_implementation() -> None:
    assert {case["loss"] for case in VECTORS["pairs"]["cases"]} == set(PAIR_LOSSES)


# --- the table


def test_the_command_knows_every_loss_and_every_option_of_it() -> None:
    assert set(get_args(PairLoss)) == set(PAIR_LOSSES)
    for name, kind in PAIR_LOSSES.items():
        options = {option for option, losses in LOSSES_OF.items() if name in losses}
        assert options == {f.name for f in fields(kind)}


def test_every_loss_of_the_table_is_tested_here() -> None:
    assert {type(loss) for loss in LOSSES} == set(PAIR_LOSSES.values())


# --- what all losses of pairs share


@every_loss
def test_gradients_are_those_of_finite_differences(loss: Any) -> None:
    pairs, reference = some_pairs(5), some_pairs(5, seed=1)

    def total(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = moved(pairs, chosen=chosen, rejected=rejected)
        return evaluate(loss, policy, reference).loss_sum

    inputs = (pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


@every_loss
def test_pairs_add_up_however_they_are_split(loss: Any) -> None:
    assert not loss.couples_batch
    policy, reference = some_pairs(7), some_pairs(7, seed=1)
    whole = evaluate(loss, policy, reference)
    parts = [
        evaluate(loss, rows_of(policy, rows), rows_of(reference, rows))
        for rows in (slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 7))
    ]
    close = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(sum(part.loss_sum for part in parts), whole.loss_sum, **close)
    assert sum(part.count for part in parts) == whole.count == 7
    for name, (total, count) in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name][0] for part in parts), total, **close)
        assert sum(part.metrics[name][1] for part in parts) == count == 7
        assert not total.requires_grad


@every_loss
def test_a_step_against_the_gradient_raises_chosen_over_rejected(loss: Any) -> None:
    pairs, reference = some_pairs(6), some_pairs(6)
    policy = moved(
        pairs, chosen=pairs.chosen.requires_grad_(), rejected=pairs.rejected.requires_grad_()
    )
    total = evaluate(loss, policy, reference).loss_sum
    chosen, rejected = torch.autograd.grad(total, (policy.chosen, policy.rejected))
    assert bool((chosen < 0).all()) and bool((rejected > 0).all())


@every_loss
def test_the_value_at_the_reference_is_the_loss_there_or_none_without_one(loss: Any) -> None:
    pairs = some_pairs(6)
    output = evaluate(loss, pairs, pairs)
    if loss.needs_reference:
        assert float(output.loss) == pytest.approx(loss.value_at_reference, rel=1e-14)
    else:
        assert loss.value_at_reference is None


@every_loss
def test_the_reference_is_a_constant(loss: Any) -> None:
    if not loss.needs_reference:
        return
    reference = some_pairs(3, seed=1)
    reference.chosen.requires_grad_(), reference.rejected.requires_grad_()
    pairs = some_pairs(3)
    pairs.chosen.requires_grad_()
    loss(pairs, reference).loss.backward()
    assert reference.chosen.grad is None and reference.rejected.grad is None


@every_loss
def test_bfloat16_log_probabilities_are_taken_to_float32(loss: Any) -> None:
    pairs = some_pairs(3)
    low = moved(
        pairs, chosen=pairs.chosen.to(torch.bfloat16), rejected=pairs.rejected.to(torch.bfloat16)
    )
    assert evaluate(loss, low, low).loss_sum.dtype == torch.float32


@every_loss
def test_pairs_without_a_token_give_nothing_infinite(loss: Any) -> None:
    none = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    empty = PairLogps(
        chosen=none,
        rejected=none,
        chosen_length=torch.zeros(2).long(),
        rejected_length=torch.zeros(2).long(),
    )
    output = evaluate(loss, empty, empty)
    assert bool(torch.isfinite(output.loss))
    (gradient,) = torch.autograd.grad(output.loss_sum, none)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("kind", [DPOLoss, IPOLoss, HingeLoss])
def test_mean_and_sum_are_one_for_answers_of_one_token_and_differ_for_longer_ones(
    kind: Any,
) -> None:
    pairs, reference = some_pairs(5), some_pairs(5, seed=1)
    one = torch.ones(5).long()
    short = PairLogps(
        chosen=pairs.chosen, rejected=pairs.rejected, chosen_length=one, rejected_length=one
    )
    by_sum, by_mean = kind(normalisation="sum"), kind(normalisation="mean")
    assert by_sum(short, reference).loss_sum == by_mean(short, reference).loss_sum
    assert by_sum(pairs, reference).loss_sum != by_mean(pairs, reference).loss_sum


@pytest.mark.parametrize("loss", [x for x in LOSSES if "mean" in repr(x)] + LOSSES[-2:], ids=repr)
def test_repeating_an_answers_tokens_changes_no_mean(loss: Any) -> None:
    """Twice the tokens at twice the log-probability."""
    pairs, reference = some_pairs(5), some_pairs(5, seed=1)

    def twice(one: PairLogps) -> PairLogps:
        return PairLogps(
            chosen=2 * one.chosen,
            rejected=2 * one.rejected,
            chosen_length=2 * one.chosen_length,
            rejected_length=2 * one.rejected_length,
        )

    once = evaluate(loss, pairs, reference)
    doubled = evaluate(loss, twice(pairs), twice(reference))
    torch.testing.assert_close(once.loss_sum, doubled.loss_sum, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (DPOLoss, {"normalisation": "token"}, "DPO: normalisation must be one of sum, mean, got"),
        (IPOLoss, {"beta": 0.0}, "IPO: beta must be a finite number above 0, got 0.0"),
        (IPOLoss, {"normalisation": ""}, "IPO: normalisation must be one of sum, mean, got ''"),
        (HingeLoss, {"beta": math.inf}, "hinge: beta must be"),
        (SimPOLoss, {"beta": -1.0}, "SimPO: beta must be"),
        (SimPOLoss, {"target_margin": NAN}, "SimPO: target_margin must be a finite number of 0"),
        (ORPOLoss, {"odds_coef": 0.0}, "ORPO: odds_coef must be a finite number above 0"),
        (KTOLoss, {"beta": NAN}, "KTO: beta must be"),
        (KTOLoss, {"undesirable_weight": -1.0}, "KTO: undesirable_weight must be a finite number"),
        (KTOLoss, {"desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing is left to learn"),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        kind(**options)


# --- DPO's mean


def test_dpo_over_means_by_hand() -> None:
    policy = PairLogps(
        chosen=torch.tensor([-10.0]),
        rejected=torch.tensor([-9.0]),
        chosen_length=torch.tensor([4]),
        rejected_length=torch.tensor([2]),
    )
    reference = moved(policy, chosen=torch.tensor([-12.0]), rejected=torch.tensor([-8.0]))
    output = DPOLoss(beta=2.0, normalisation="mean")(policy, reference)
    # log-ratios 2 over 4 tokens and -1 over 2: 0.5 and -0.5; margin 2 * 1
    assert float(output.loss) == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-6)
    assert float(output.metrics["preference/margin"][0]) == pytest.approx(2.0)
    assert float(output.metrics["logp/chosen"][0]) == -10.0  # the metric stays the sum
