"""A reward model's report: calibration, margins, lengths, and what cheap rules do on the pairs."""

import json
import math
import random
from dataclasses import asdict
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from rlhf.calibration import (
    PairTokens,
    calibration_of,
    compare,
    fit_bag_of_words,
    histogram_of,
    measure_reward,
    sign_test,
)
from rlhf.reward import reward_accuracy, wilson_interval
from sft.rows import PreferenceCollator

LN_3, LN_9 = math.log(3.0), math.log(9.0)


def gaps(*groups: tuple[float, int]) -> Tensor:
    """(gap, how often) in a fixed but mixed order: no measure may depend on it."""
    values = [gap for gap, count in groups for _ in range(count)]
    random.Random(0).shuffle(values)
    return torch.tensor(values, dtype=torch.float64)


# --- calibration


def test_scores_that_say_how_often_they_are_right_are_calibrated() -> None:
    # sigma(ln 3) = 3/4 is right 3 times of 4, sigma(ln 9) = 9/10 9 times of 10.
    found = calibration_of(gaps((LN_3, 6), (-LN_3, 2), (LN_9, 9), (-LN_9, 1)))
    assert [part.num_pairs for part in found.bins] == [8, 10]
    assert [part.predicted for part in found.bins] == pytest.approx([0.75, 0.9])
    assert [part.observed for part in found.bins] == pytest.approx([0.75, 0.9])
    assert found.expected_error == pytest.approx(0.0, abs=1e-12)
    # (1 - p)^2 of the chosen answer: 6/16 + 2 * 9/16 + 9/100 + 81/100
    assert found.brier == pytest.approx((6 / 16 + 18 / 16 + 0.09 + 0.81) / 18)
    log_loss = -(6 * math.log(0.75) + 2 * math.log(0.25) + 9 * math.log(0.9) + math.log(0.1))
    assert found.log_loss == pytest.approx(log_loss / 18)


def test_scores_that_are_sure_and_always_wrong_are_as_uncalibrated_as_can_be() -> None:
    found = calibration_of(gaps((-LN_9, 20)))
    assert found.expected_error == pytest.approx(0.9)
    assert found.brier == pytest.approx(0.81)
    assert found.log_loss == pytest.approx(math.log(10))
    assert [(part.observed, part.num_pairs) for part in found.bins] == [(0.0, 20)]


def test_ties_are_a_coin_and_calibrated() -> None:
    found = calibration_of(gaps((0.0, 7)))
    (only,) = found.bins
    assert (only.predicted, only.observed, only.num_pairs) == (0.5, 0.5, 7)
    assert found.expected_error == 0.0
    assert found.brier == 0.25
    assert found.log_loss == pytest.approx(math.log(2))


def test_bins_hold_equally_many_pairs_and_equal_probabilities_share_one() -> None:
    gap_B = torch.arange(1, 101) / 10
    assert [part.num_pairs for part in calibration_of(gap_B).bins] == [10] * 10
    assert [part.num_pairs for part in calibration_of(gap_B[:3]).bins] == [1, 1, 1]
    highest = [part.highest for part in calibration_of(gap_B).bins]
    assert highest == sorted(highest)
    assert highest[0] == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert [part.num_pairs for part in calibration_of(gaps((1.0, 90), (2.0, 10))).bins] == [90, 10]


def test_chance_error_is_what_calibrated_scores_show() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, told = [], 0.0
    for _ in range(300):
        gap_B = torch.randn(200, generator=generator).double()
        is_right = torch.rand(200, generator=generator) < gap_B.sigmoid()
        found = calibration_of(torch.where(is_right, gap_B, -gap_B))
        errors.append(found.expected_error)
        told += found.chance_error / 300
    # The mean of 300 such errors is itself known to about 1.5 %; the approximation adds a little.
    assert sum(errors) / 300 == pytest.approx(told, rel=0.06)


# --- margins


def test_histogram_is_symmetric_and_counts_every_pair_once() -> None:
    found = histogram_of(torch.tensor([-2.0, -0.5, 0.0, 0.9, 1.0, 2.0]), bars_a_side=2)
    assert found.edges == (-2.0, -1.0, 0.0, 1.0, 2.0)
    assert found.counts == (1, 1, 2, 2)  # the tie is above 0, the largest in the last bar
    nothing = histogram_of(torch.zeros(3))
    assert nothing.edges[0] == -1.0 and sum(nothing.counts) == 3


# --- baselines


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (8, 2), (3, 3), (40, 61), (1, 2000)])
def test_sign_test_is_the_exact_binomial_one(better: int, worse: int) -> None:
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def test_sign_test_by_hand_and_on_many_pairs() -> None:
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(2, 8) == 2 * (1 + 10 + 45) / 1024
    assert 0.0 < sign_test(10_400, 10_000) < 0.01  # 2.8 standard deviations


def test_comparison_counts_pairs_on_which_one_does_better() -> None:
    found = compare(torch.tensor([1.0, 1.0, -1.0, 0.0]), torch.tensor([2.0, -3.0, 5.0, -1.0]))
    assert (found.better, found.worse) == (2, 1)  # the tie is better than a mistake
    assert found.difference == pytest.approx(2.5 / 4 - 2 / 4)
    assert found.accuracy.accuracy == 0.5
    assert found.p_value == 1.0


def row(chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    return {"prompt_ids": [30], "chosen_ids": chosen, "rejected_ids": rejected, "sample_id": 0}


def batch(*rows: Any) -> dict[str, Tensor]:
    return PreferenceCollator(pad_id=0)(rows)


def test_one_word_gives_the_weight_of_its_equation() -> None:
    # 8 pairs whose chosen answer has one more of token 5: 8 sigma(-w) = w has one solution.
    rows = [row([4, 5], [4])] * 8
    weight_V = fit_bag_of_words(PairTokens.of_batches([batch(*rows[:3]), batch(*rows[3:])]))
    weight = float(weight_V[5])
    assert 8 / (1 + math.exp(weight)) == pytest.approx(weight, abs=1e-5)  # the gradient left
    assert weight_V[:5].tolist() == [0.0] * 5  # token 4 is on both sides, the prompt in none


def test_bag_of_words_is_at_its_minimum_and_always_the_same() -> None:
    rng = random.Random(0)

    def text(length: int) -> list[int]:
        return [rng.randrange(1, 20) for _ in range(length)]

    rows = [row(text(6), text(5)) for _ in range(40)]
    pairs = PairTokens.of_batches([batch(*rows)])
    weight_V = fit_bag_of_words(pairs)
    assert torch.equal(weight_V, fit_bag_of_words(pairs))
    counts_BV = torch.zeros(40, 20).double()
    for index, pair in enumerate(rows):
        for token in pair["chosen_ids"]:
            counts_BV[index, token] += 1
        for token in pair["rejected_ids"]:
            counts_BV[index, token] -= 1
    logit_B = counts_BV @ weight_V
    torch.testing.assert_close(pairs.bag_of_words(weight_V), logit_B)
    gradient_V = weight_V - counts_BV.T @ (-logit_B).sigmoid()
    assert float(gradient_V.abs().max()) < 1.1e-5


def test_answers_of_the_same_words_leave_a_bag_of_words_without_an_opinion() -> None:
    same = PairTokens.of_batches([batch(row([3, 4], [4, 3]))])
    assert same.bag_of_words(fit_bag_of_words(same)).tolist() == [0.0]


def test_tokens_that_training_did_not_have_say_nothing() -> None:
    pairs = PairTokens.of_batches([batch(row([3], [9]), row([25], [4]))])
    weight_V = torch.tensor([0.0, 0, 0, 2, 1], dtype=torch.float64)
    assert pairs.bag_of_words(weight_V).tolist() == [2.0, -1.0]


# --- the report


class Table(nn.Module):
    """The score of a text is the number at its last token."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.arange(32.0))

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        class Outputs:
            logits = self.value[input_ids][..., None]

        return Outputs


def test_report_on_five_pairs_by_hand() -> None:
    model = Table().train()
    held_out = [
        batch(row([1, 9], [5]), row([1, 7], [6])),  # right, chosen longer
        batch(row([4], [4]), row([3], [1, 8]), row([10], [1, 3])),  # tie; wrong, right: shorter
    ]
    train = [batch(row([3, 9], [5]), row([10], [5]))]
    found = measure_reward(model, held_out, train_batches=train)
    assert model.training
    assert found.accuracy == reward_accuracy(model, held_out)
    assert found.accuracy.accuracy == 3.5 / 5
    assert {name: (p.accuracy, p.num_pairs) for name, p in found.by_length.items()} == {
        "chosen_longer": (1.0, 2),
        "rejected_longer": (0.5, 2),
        "same_length": (0.5, 1),
    }
    coin, longer = found.baselines["coin"], found.baselines["longer"]
    assert (coin.accuracy.low, coin.accuracy.high) == wilson_interval(2.5, 5)
    assert (coin.better, coin.worse, coin.p_value) == (3, 1, 10 / 16)
    assert longer.accuracy.accuracy == 2.5 / 5
    assert (longer.better, longer.worse) == (1, 0)
    # 9, 10 and 3 were chosen, 5 was rejected: 9 against 5 and 10 against 3 are right, 3 against 8.
    assert found.baselines["bag_of_words"].accuracy.accuracy == (1 + 0.5 + 0.5 + 1 + 1) / 5
    assert sum(found.margins.counts) == 5
    assert json.loads(json.dumps(asdict(found)))["accuracy"]["num_pairs"] == 5
    text = "\n".join(found.lines())
    assert len(found.lines()) == 5
    assert "accuracy by length: chosen longer 1.000 of 2, rejected longer 0.500 of 2" in text
    assert "against coin 0.500 [" in text and "against bag of words 0.800 [" in text


def test_report_without_training_pairs_has_no_bag_of_words() -> None:
    found = measure_reward(Table(), [batch(row([9], [5]))])
    assert list(found.baselines) == ["coin", "longer"]
    assert list(found.by_length) == ["same_length"]
    with pytest.raises(ValueError, match="no pairs to measure"):
        measure_reward(Table(), [])
    with pytest.raises(ValueError, match="no pairs to learn"):
        measure_reward(Table(), [batch(row([9], [5]))], train_batches=[])
