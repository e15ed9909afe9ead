"""When a gain is one of broken text, by hand."""

from typing import Any

from experiments.lab.degenerate import degenerate
from experiments.lab.tables import console_table, main_table, sentences

SFT = {
    "gold_reward": [0.1, 0.1, 0.1],
    "original_perplexity": [10.0, 10.0, 20.0],
    "distinct_2": [0.5, 0.5, 0.5],
}


def arm(**changes: list[float]) -> dict[str, list[float]]:
    good = {**SFT, "gold_reward": [0.5, 0.5, 0.5]}
    return {**good, **changes}


def found(values: dict[str, list[float]]) -> str | None:
    return degenerate({"sft": SFT, "ppo": values}, ("ppo",), seeds=(7, 8, 9)).get("ppo")


def test_a_gain_with_the_same_text_quality_is_not_called_out() -> None:
    assert found(arm()) is None


def test_perplexity_may_rise_to_one_and_a_half_times_but_not_above() -> None:
    assert found(arm(original_perplexity=[15.0, 15.0, 30.0])) is None
    reason = found(arm(original_perplexity=[10.0, 16.0, 30.0]))
    assert reason == "perplexity under the original model is 1.60 (seed 8) times SFT's"


def test_distinct_bigrams_may_fall_to_four_fifths_but_not_below() -> None:
    assert found(arm(distinct_2=[0.4, 0.5, 0.5])) is None
    assert found(arm(distinct_2=[0.39, 0.5, 0.3])) == (
        "distinct-2 is 0.78 (seed 7), 0.60 (seed 9) times SFT's"
    )


def test_broken_text_without_a_gain_is_no_gain_to_call_out() -> None:
    assert found(arm(gold_reward=[0.0, 0.0, 0.0], distinct_2=[0.1, 0.1, 0.1])) is None


def test_table_and_sentences_call_it_out() -> None:
    row: dict[str, Any] = {
        "arm": "ppo",
        "against": "sft",
        "metric": "gold_reward",
        "word": "BETTER",
        "n": 3,
        "mean_difference": 0.4,
        "interval95": [0.3, 0.5],
        "margin": 0.05,
    }
    summary = {
        "arms": {"sft": SFT, "ppo": arm()},
        "seeds": [7, 8, 9],
        "comparisons": [row],
        "degenerate": {"ppo": "distinct-2 is 0.60 (seed 9) times SFT's"},
    }
    assert main_table(summary).rows[1][-1] == "BETTER, DEGENERATE"
    assert sentences(summary)[-1] == "PPO is DEGENERATE: distinct-2 is 0.60 (seed 9) times SFT's."
    assert console_table(summary).row_count == 2
    del summary["degenerate"]
    assert main_table(summary).rows[1][-1] == "BETTER"
