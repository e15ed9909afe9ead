"""From numbers per seed to differences, intervals and words, by hand."""

import math
from typing import Any

import pytest

from experiments.lab.pairs_config import PairsConfig
from experiments.lab.pairs_summary import (
    COMPARED,
    arms_of,
    claims_of,
    compare_arms,
    overlap_interval,
    overlap_sentences,
    verdict_word,
)
from moe.errors import UserError

SPLIT = {"num_train_pairs": 80, "num_held_out_pairs": 20}


def arms(**accuracies: list[float]) -> dict[str, dict[str, list[float]]]:
    """Three seeds; what is not given is at chance."""
    names = ("rm", "dpo", "longer_wins", "length_rule", "bag_of_words", "chance")
    return {name: {"accuracy": accuracies.get(name, [0.5, 0.5, 0.5])} for name in names}


def compared(**accuracies: list[float]) -> list[dict[str, Any]]:
    return compare_arms(arms(**accuracies), splits=[SPLIT] * 3)


def test_every_asked_difference_is_made_once_and_paired_by_seed() -> None:
    rows = compared(rm=[0.6, 0.62, 0.61], bag_of_words=[0.58, 0.61, 0.6])
    assert [(row["arm"], row["against"]) for row in rows] == list(COMPARED)
    words = next(row for row in rows if row["against"] == "bag_of_words")
    assert words["per_seed"] == pytest.approx((0.02, 0.01, 0.01))
    assert words["mean_difference"] == pytest.approx(0.04 / 3)
    assert words["interval_method"].startswith("student-t")


@pytest.mark.parametrize(
    ("accuracies", "word"),
    [
        ({"rm": [0.6, 0.61, 0.62]}, "REPRODUCED"),
        ({"rm": [0.6, 0.61, 0.62], "bag_of_words": [0.6, 0.62, 0.6]}, "INCONCLUSIVE"),
        ({"rm": [0.6, 0.61, 0.62], "length_rule": [0.7, 0.71, 0.72]}, "NOT REPRODUCED"),
        ({"rm": [0.4, 0.41, 0.42]}, "NOT REPRODUCED"),
        ({"dpo": [0.9, 0.91, 0.92]}, "INCONCLUSIVE"),  # the verdict is about the reward model
    ],
)
def test_the_verdict_follows_the_words_of_the_reward_model(
    accuracies: dict[str, list[float]], word: str
) -> None:
    assert verdict_word(compared(**accuracies)) == word


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    one = {arm: {"accuracy": values["accuracy"][:1]} for arm, values in arms().items()}
    rows = compare_arms(one, splits=[SPLIT])
    assert all(row["interval95"] is None and row["interval95_overlap"] is None for row in rows)
    assert verdict_word(rows) == "INCONCLUSIVE"


def test_the_interval_with_overlap_is_wider_by_its_formula() -> None:
    """Differences 0.01, 0.02, 0.03: s = 0.01; t of 2 degrees at 97.5 % is 4.302653."""
    low, high = overlap_interval([0.01, 0.02, 0.03], held_out_per_train=0.25) or (0.0, 0.0)
    half = 4.302653 * 0.01 * math.sqrt(1 / 3 + 0.25)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-7)


def test_a_word_that_overlap_takes_away_is_told() -> None:
    rows = compared(rm=[0.51, 0.52, 0.53])  # 0.02 +- 0.025 over seeds
    assert not overlap_sentences(rows)
    rows = compared(rm=[0.515, 0.52, 0.525])  # 0.02 +- 0.012, with overlap +- 0.016
    assert not overlap_sentences(rows)
    rows = compared(rm=[0.512, 0.52, 0.528])  # 0.02 +- 0.0199, with overlap +- 0.026
    told = overlap_sentences(rows)
    assert len(told) == 4 and "holds 0" in told[0]  # against each rule, all of them at chance


def test_a_claim_needs_the_sign_in_every_seed_and_the_gain() -> None:
    def verdicts(rm: list[float]) -> list[str]:
        return [claim["verdict"] for claim in claims_of(arms(rm=rm))]

    assert verdicts([0.53, 0.54, 0.55])[0] == "REPRODUCED"
    assert verdicts([0.51, 0.51, 0.52])[0] == "INCONCLUSIVE"  # above chance by less than 0.02
    assert verdicts([0.45, 0.46, 0.47])[0] == "NOT REPRODUCED"
    assert [claim["ours"] for claim in claims_of(arms(rm=[0.6, 0.6, 0.6]))][0] == [0.6, 0.6, 0.6]


def test_arms_hold_one_value_per_seed() -> None:
    metrics = {"accuracy": 0.6, "wilson_low": 0.5, "wilson_high": 0.7}
    rule = {"accuracy": 0.4, "low": 0.3, "high": 0.5}
    rules = {name: rule for name in ("longer_wins", "length_rule", "bag_of_words")}
    facts = {stage: [{"metrics": metrics}] * 2 for stage in ("rm", "dpo")}
    found = arms_of(facts, [rules] * 2)
    assert list(found) == ["rm", "dpo", "longer_wins", "length_rule", "bag_of_words", "chance"]
    assert found["rm"]["wilson_low"] == [0.5, 0.5]
    assert found["longer_wins"]["wilson_high"] == [0.5, 0.5]
    assert found["chance"] == {"accuracy": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seeds": ()}, "give each seed once"),
        ({"max_length": -1}, "--max-length -1"),
        ({"upcycle": "8"}, "--upcycle 8: give experts"),
        ({"processes": 0}, "--processes 0"),
        ({"resume": "r", "overwrite": True}, "leave out --out and --overwrite"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        PairsConfig(data="d", model="m", **options)  # type: ignore[arg-type]
