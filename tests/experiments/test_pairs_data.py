"""The pairs of a seed: which leave, which side they are on, and what the rules say of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from experiments.lab.pairs_baselines import baselines, length_gaps, word_gaps, words_of
from experiments.lab.pairs_config import DEBUG
from experiments.lab.pairs_data import chosen_rows, read_pairs, split_pairs
from moe.errors import UserError
from sft.data import prompt_text
from sft.examples import Preference, as_examples
from sft.rows import IGNORED_LABEL
from sft.text import PLAIN, Message, TextPath, train_bpe


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, so that lengths can be counted by hand."""
    return train_bpe(["x"], vocab_size=259)


def text_path(tokenizer: PreTrainedTokenizerFast, max_length: int = 64) -> TextPath:
    return TextPath(tokenizer, PLAIN, max_length=max_length)


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt=(Message("user", prompt),), chosen=chosen, rejected=rejected)


def written(folder: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    path = folder / "pairs.jsonl"
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), r, strict=True))) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def twenty(folder: Path) -> Path:
    """20 pairs of 10 prompts, each prompt with two pairs."""
    rows = [(f"question {i // 2}", f"good {i}", f"bad {i}") for i in range(20)]
    return written(folder, rows)


def test_no_prompt_is_on_both_sides_and_seeds_split_differently(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = text_path(bytes_tokenizer)
    examples = read_pairs(twenty(tmp_path), path, max_pairs=100)
    held_out = []
    for seed in (1, 2):
        sides = split_pairs(examples, path, scale=DEBUG, seed=seed)
        train = {prompt_text(row) for row in sides.train}
        asked = {prompt_text(row) for row in sides.held_out}
        assert not train & asked
        assert len(sides.train) + len(sides.held_out) == 20
        assert len(sides.held_out) == 6  # a quarter is 5, and prompts have two pairs each
        held_out.append(asked)
    assert held_out[0] != held_out[1]


def test_rows_stand_beside_the_examples_they_are_made_of(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = text_path(bytes_tokenizer)
    sides = split_pairs(
        read_pairs(twenty(tmp_path), path, max_pairs=100), path, scale=DEBUG, seed=3
    )
    for side, rows in (
        (sides.train, sides.train_rows),
        (sides.held_out, sides.held_out_rows),
    ):
        told = [(path.decode(r["chosen_ids"]), path.decode(r["rejected_ids"])) for r in rows]
        assert told == [(row.chosen, row.rejected) for row in side if isinstance(row, Preference)]


def test_a_file_with_too_many_pairs_gives_whole_prompts_and_says_so(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = read_pairs(twenty(tmp_path), text_path(bytes_tokenizer), max_pairs=8)
    prompts = [prompt_text(row) for row in examples]
    assert len(examples) == 8 and all(prompts.count(prompt) == 2 for prompt in prompts)
    assert examples.notes == (
        "8 of 20 pairs are used, whole prompts, the same ones for every seed.",
    )


def test_pairs_that_the_limit_makes_equal_leave_before_the_split(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [(f"q{i}", f"{i} good", f"{i} bad") for i in range(11)]
    same = "the same first words of both answers, "  # 38 bytes, and half of 64 is 32
    file = written(tmp_path, [*rows, ("a question as long as half the limit", same + "a", same)])
    path = text_path(bytes_tokenizer)
    examples = read_pairs(file, path, max_pairs=100)
    assert len(examples) == 11 and "line 12" not in examples.places
    assert (
        "1 of 12 rows have the same tokens for both answers under --max-length 64"
        in (examples.notes[-1])
    )
    sides = split_pairs(examples, path, scale=DEBUG, seed=0)  # drops nothing more
    assert len(sides.train_rows) + len(sides.held_out_rows) == 11


def test_only_preferences_are_taken(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="this method needs preferences"):
        read_pairs(path, text_path(bytes_tokenizer), max_pairs=10)


def test_sft_learns_the_chosen_answer_and_nothing_of_the_prompt(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = text_path(bytes_tokenizer)
    sides = split_pairs(
        read_pairs(twenty(tmp_path), path, max_pairs=100), path, scale=DEBUG, seed=3
    )
    source, row = sides.train_rows[0], chosen_rows(sides.train_rows)[0]
    num_prompt = len(source["prompt_ids"])
    assert row["input_ids"] == source["prompt_ids"] + source["chosen_ids"]
    assert row["labels"][:num_prompt] == [IGNORED_LABEL] * num_prompt
    assert row["labels"][num_prompt:] == source["chosen_ids"]


# The rules without a model.


def test_length_is_in_characters_and_ties_count_half() -> None:
    held_out = [pair("a", "longer", "short"), pair("b", "no", "long"), pair("c", "same", "size")]
    assert length_gaps(held_out).tolist() == [1.0, -2.0, 0.0]
    found = baselines(
        as_examples([pair("d", "1", "22"), pair("e", "1", "22")]), as_examples(held_out)
    )
    assert found["longer_wins"].accuracy == 0.5  # one right, one wrong, one tie
    assert found["longer_wins"].num_pairs == 3


def test_the_direction_of_length_is_learned_from_the_training_pairs() -> None:
    shorter_wins = [pair(str(i), "no", "nonsense") for i in range(3)]
    held_out = as_examples([pair("a", "b", "long"), pair("c", "d", "long"), pair("e", "long", "f")])
    found = baselines(as_examples(shorter_wins), held_out)
    assert found["longer_wins"].accuracy == pytest.approx(1 / 3)
    assert found["length_rule"].accuracy == pytest.approx(2 / 3)


def test_a_bag_of_words_learns_which_words_win_and_ignores_those_it_does_not_know() -> None:
    train = [pair(str(i), f"kind {i}x", f"rude {i}y") for i in range(4)]
    gaps = word_gaps(
        train,
        [
            pair("a", "Kind!", "rude"),  # case does not matter
            pair("b", "rude", "kind"),
            pair("c", "unseen", "0x"),  # 0x is in one training answer: one is too few
        ],
    )
    assert gaps[0] > 0 and gaps[1] == -gaps[0] and gaps[2] == 0


def test_the_weight_of_a_word_is_the_minimum_of_the_penalised_loss() -> None:
    """Two words that only come as a pair: the gap 2w solves w = n sigma(-2w) for n pairs."""
    train = [pair(str(i), "kind", "rude") for i in range(4)]
    (gap,) = word_gaps(train, [pair("a", "kind", "rude")]).tolist()
    weight = gap / 2
    assert weight == pytest.approx(4 * float(torch.sigmoid(torch.tensor(-gap))), abs=1e-5)


def test_a_chinese_character_is_a_word_and_so_is_a_sign() -> None:
    assert words_of("Hello, \u4f60\u597d 42!") == ["hello", ",", "\u4f60", "\u597d", "42", "!"]


def test_without_a_word_that_comes_twice_the_bag_is_a_coin() -> None:
    assert word_gaps([pair("a", "b", "c")], [pair("d", "b", "c")]).tolist() == [0.0]
