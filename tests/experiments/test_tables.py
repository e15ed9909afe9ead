"""A summary in words and tables: sentences, numbers, Markdown, the console."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from experiments.lab.runfiles import Summary
from experiments.lab.tables import (
    claims_table,
    console_table,
    main_table,
    reward_model_table,
    routing_table,
    sentences,
    show,
    show_interval,
    table_markdown,
)
from experiments.lab.verdict import compare


def summary_of(**gold: Sequence[float]) -> Summary:
    """Arms by their gold rewards, one per seed, each compared with sft."""
    comparisons = [
        {
            "arm": arm,
            "against": "sft",
            "metric": "gold_reward",
            **asdict(compare(values, gold["sft"], margin=0.05, higher_is_better=True)),
        }
        for arm, values in gold.items()
        if arm != "sft"
    ]
    arms = {arm: {"gold_reward": list(values)} for arm, values in gold.items()}
    return {"seeds": [0, 1, 2], "arms": arms, "comparisons": comparisons}


SMALL = summary_of(sft=[1.0, 1.1, 0.9], dpo=[1.5, 1.7, 1.4])
SIX_ARMS = summary_of(
    base=[-10.13, -10.11, -10.12],
    few_shot=[0.4, 0.41, 0.42],
    sft=[1.0, 1.1, 0.9],
    dpo=[1.5, 1.7, 1.4],
    ppo=[1.7, 1.8, 1.6],
    best_of_n=[1.3, 1.4, 1.2],
)


def test_a_sentence_names_word_interval_and_seeds() -> None:
    (sentence,) = sentences(SMALL)
    # differences .5 .6 .5: mean .5333, s .0577, t(.975, 2) 4.3027 -> half-width .1434
    assert sentence == "DPO is BETTER than SFT in gold reward: +0.53 [0.39, 0.68], 3 seeds."


def test_sentences_below_three_seeds_say_no_interval() -> None:
    (sentence,) = sentences(summary_of(sft=[1.0, 1.1], dpo=[1.5, 1.7]))
    told = "DPO against SFT in gold reward is UNRESOLVED: +0.55, no interval, 2 seeds."
    assert sentence == told


def test_sentences_cover_equivalent_missing_and_nothing() -> None:
    row = {"arm": "ppo", "against": "sft", "metric": "gold_reward", "margin": 0.05}
    same = {"mean_difference": 0.004, "interval95": [-0.03, 0.04], "n": 5, "word": "EQUIVALENT"}
    assert sentences({"comparisons": [{**row, **same}]}) == [
        "PPO is EQUIVALENT to SFT in gold reward (within +-0.05): +0.0040 [-0.030, 0.040], 5 seeds."
    ]
    gone = {"mean_difference": None, "interval95": None, "n": 0, "word": "UNRESOLVED"}
    assert sentences({"comparisons": [{**row, **gone}]}) == [
        "PPO cannot be compared with SFT in gold reward: no seed has both."
    ]
    assert sentences({"verdict": {"word": "NOT REPRODUCED"}}) == ["The verdict is NOT REPRODUCED."]
    assert sentences({}) == ["Nothing was compared."]


def test_sentences_put_the_trained_arms_first() -> None:
    found = [sentence.split(" ")[0] for sentence in sentences(SIX_ARMS)]
    assert found == ["DPO", "PPO", "best-of-n"]


def test_the_table_gives_mean_interval_word_and_seeds() -> None:
    table = main_table(SMALL)
    # sft 1.0 1.1 0.9: mean 1, s 0.1 -> half-width 4.3027 * 0.1 / sqrt(3) = 0.2484
    assert table.rows == (
        ("SFT", "3", "1", "[0.75, 1.25]", "-", "-", "baseline"),
        ("DPO", "3", "1.53", "[1.15, 1.91]", "+0.53", "[0.39, 0.68]", "BETTER"),
    )


def test_a_missing_seed_lowers_n() -> None:
    arms = {"sft": {"gold_reward": [1.0, 1.1, 0.9]}, "dpo": {"gold_reward": [1.5, None, 1.4]}}
    summary = {**SMALL, "arms": arms}
    assert main_table(summary).rows[1][1:4] == ("2", "1.45", "no interval")


def test_markdown_escapes_bars_and_has_equal_columns() -> None:
    arms = {"a|b": {"gold_reward": [1.0], "length": [3.0]}}
    text = table_markdown({**SMALL, "arms": arms})
    assert "a\\|b" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1


def test_the_console_table_fits_eighty_columns_and_reads_no_markup() -> None:
    def printed(summary: Any) -> str:
        console = Console(width=80, file=io.StringIO(), record=True)
        console.print(console_table(summary))
        return console.export_text()

    text = printed(SIX_ARMS)
    assert all(name in text for name in ("few-shot", "best-of-n", "BETTER", "minus SFT [95 %]"))
    assert "\u2026" not in text  # nothing is cut
    arms = {"[bold]x": {"gold_reward": [1.0]}}
    assert "[bold]x" in printed({**SMALL, "arms": arms})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.534, "0.53"),
        (1.0, "1"),
        (0, "0"),
        (-0.0312, "-0.031"),
        (12.34, "12.3"),
        (1_240_000.0, "1,240,000"),
        (1024, "1,024"),
        (0.00001234, "1.2e-05"),
        (0.0996, "0.10"),
        (None, "-"),
        (math.nan, "-"),
        ("word", "-"),
    ],
)
def test_numbers_keep_two_digits_that_count(value: object, text: str) -> None:
    assert show(value) == text


def test_signs_are_shown_for_differences() -> None:
    assert (show(0.5, signed=True), show(-0.5, signed=True), show(0.0, signed=True)) == (
        "+0.50",
        "-0.50",
        "0",
    )


def test_an_interval_has_the_decimals_of_its_finer_end() -> None:
    assert show_interval([0.097, 0.7]) == "[0.097, 0.700]"
    assert show_interval([-12.5, 0.25]) == "[-12.50, 0.25]"
    assert show_interval(None) == "no interval"


def test_routing_is_the_mean_over_layers_and_seeds_of_what_was_measured() -> None:
    routing = {"ppo": {"max_vio": [[1.0, None], [3.0]]}, "sft": {"max_vio": [], "other": [[1.0]]}}
    table = routing_table({"routing": routing})
    assert table is not None
    assert table.header == ("stage", "MaxVio (0: even)")
    assert table.rows == (("SFT", "-"), ("PPO", "2"))
    assert routing_table({}) is None


def test_what_the_reward_model_is_worth_is_told_seed_by_seed() -> None:
    measured = {"num_val_pairs": [6, 6], "accuracy_interval95": [[0.25, 0.75], None]}
    table = reward_model_table({"seeds": [0, 1], "reward_model": measured})
    assert table is not None
    assert table.header == ("measure", "seed 0", "seed 1")
    assert table.rows == (
        ("val pairs", "6", "6"),
        ("accuracy, 95 % interval", "[0.25, 0.75]", "-"),
    )
    assert reward_model_table({"seeds": [0, 1]}) is None


def test_a_claim_may_be_a_number_a_list_or_named_numbers() -> None:
    claims = [{"claim": "total", "published": {"size": 7.25}, "ours": [0.5, None]}]
    assert claims_table({"claims": claims}).rows == (("total", "size 7.25", "0.50, -", "-"),)
