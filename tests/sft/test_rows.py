"""Rows of ids: what is learned, what is cut, and what a batch holds."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moe.errors import UserError
from sft.data import read_examples
from sft.examples import Document, Examples, Instruction, Preference, as_examples
from sft.rows import (
    IGNORED_LABEL,
    PreferenceCollator,
    SupervisedCollator,
    document_rows,
    preference_rows,
    prompt_rows,
    supervised_rows,
)
from sft.text import CONTINUATION, PLAIN, Message, TextPath, load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, so that lengths can be counted by hand."""
    return train_bpe(["x"], vocab_size=259)


@pytest.fixture
def path(bytes_tokenizer: PreTrainedTokenizerFast) -> TextPath:
    return TextPath(bytes_tokenizer, PLAIN, max_length=64)


def short_path(tokenizer: PreTrainedTokenizerFast, max_length: int) -> TextPath:
    return TextPath(tokenizer, CONTINUATION, max_length=max_length)


def pairs(number: int = 1) -> list[Preference]:
    return [
        Preference(prompt=(Message("user", f"q{index}"),), chosen="good", rejected="bad")
        for index in range(number)
    ]


def answers(*texts: str) -> list[Instruction]:
    return [
        Instruction(conversation=(Message("user", "q"), Message("assistant", text)))
        for text in texts
    ]


# --- rows of ids


def test_labels_are_the_ids_of_the_answer(path: TextPath) -> None:
    (row,) = supervised_rows(answers("ab"), path)
    prompt = path.encode_prompt((Message("user", "q"),))
    completion = path.encode_completion("ab")
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == [IGNORED_LABEL] * len(prompt) + completion
    assert row["sample_id"] == 0


def test_a_cut_row_is_kept_and_the_rate_is_noted(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    # BOS, q, newline, 2 bytes, EOS: 6 tokens; with 8 bytes 12, of which 4 go.
    path = TextPath(bytes_tokenizer, PLAIN, max_length=8)
    rows = supervised_rows(answers("ab", "abcdefgh"), path)
    assert [len(row["input_ids"]) for row in rows] == [6, 8]
    assert rows.notes == (
        "1 of 2 rows (50.0%) are over --max-length 8 and lose their end (22.2% of the tokens).",
    )
    kept = supervised_rows(answers("abcdefgh", "ab"), path, drop_long=True)
    assert [(len(row["input_ids"]), row["sample_id"]) for row in kept] == [(6, 0)]
    assert kept.notes == ("1 of 2 rows (50.0%) are over --max-length 8 and are dropped.",)


def test_a_row_with_nothing_to_learn_is_named(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = TextPath(bytes_tokenizer, PLAIN, max_length=3)
    with pytest.raises(UserError) as caught:
        supervised_rows(answers("ab"), path)
    assert str(caught.value) == (
        "examples row 1: nothing left to learn after --max-length 3 (the prompt is 3 tokens). "
        "Raise it, or drop long rows with --drop-long."
    )
    with pytest.raises(UserError, match="--drop-long leaves none"):
        supervised_rows(answers("ab"), path, drop_long=True)


def test_rows_of_the_wrong_kind_are_refused(path: TextPath) -> None:
    with pytest.raises(UserError, match="--use chosen"):
        supervised_rows(as_examples(pairs()), path)
    with pytest.raises(UserError, match="needs preferences"):
        preference_rows(as_examples(answers("a")), path)


def test_documents_follow_each_other_in_full_blocks(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = short_path(bytes_tokenizer, 64)
    a, b = path.encode_document("aaa"), path.encode_document("bb")
    assert (a[0], a[-1], len(a)) == (path.bos_id, path.eos_id, 5)
    rows = document_rows(["aaa", "bb"], path, block=4)
    assert [row["input_ids"] for row in rows] == [a[:4], [*a[4:], *b[:3]]]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert rows.notes == ("1 last tokens stood alone in a block: dropped.",)


def test_a_block_holds_one_domain(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = short_path(bytes_tokenizer, 64)
    texts = [Document(text=3 * name, domain=name) for name in "abab"]
    rows = document_rows(texts, path, block=10)
    assert [(row["domain"], len(row["input_ids"]), row["sample_id"]) for row in rows] == [
        ("a", 10, 0),
        ("b", 10, 1),
    ]
    assert path.decode(rows[1]["input_ids"]) == "bbbbbb"


def test_whole_packing_splits_no_document_that_fits(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = short_path(bytes_tokenizer, 64)
    texts = ["a" * 3, "b" * 4, "c" * 1, "d" * 9]
    rows = document_rows(texts, path, block=8, packing="whole")
    assert sorted(length for row in rows for length in row["seq_lengths"]) == [3, 3, 5, 6, 8]
    assert sum(len(row["input_ids"]) for row in rows) == 25
    whole = [text for text in texts if any(text in path.decode(row["input_ids"]) for row in rows)]
    assert whole == texts[:3]


def test_preferences_are_cut_where_the_least_is_lost(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = short_path(bytes_tokenizer, 12)
    pair = Preference(prompt=(Message("user", "0123456789"),), chosen="abcdefgh", rejected="xy")
    rows = preference_rows([pair], path)
    (row,) = rows
    # Half of 12 for the completions; the prompt keeps its BOS and its end in what is left.
    assert path.decode(row["chosen_ids"]) == "abcdef" and path.eos_id not in row["chosen_ids"]
    assert path.decode(row["rejected_ids"]) == "xy" and row["rejected_ids"][-1] == path.eos_id
    assert row["prompt_ids"][0] == path.bos_id and path.decode(row["prompt_ids"]) == "56789"
    assert rows.notes == (
        "1 of 1 prompts lose their beginning under --max-length 12.",
        "1 of 2 completions lose their end, and so their EOS, under --max-length 12.",
    )


def test_preferences_that_fit_are_whole(path: TextPath) -> None:
    rows = preference_rows(pairs(), path)
    assert rows[0]["prompt_ids"] == path.encode_prompt((Message("user", "q0"),))
    assert rows[0]["chosen_ids"] == path.encode_completion("good")
    assert rows.notes == ()


def test_pairs_made_equal_by_the_cut_stop_the_run(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Preference(prompt=(Message("user", "q"),), chosen="aaaaaaab", rejected="aaaaaaac")
    with pytest.raises(UserError, match="same ids for both answers .* Raise --max-length"):
        preference_rows([pair], short_path(bytes_tokenizer, 8))


def test_prompts_come_as_ids_and_as_text(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = short_path(bytes_tokenizer, 8)
    rows = prompt_rows(pairs(2), path)
    assert [row["prompt"] for row in rows] == ["q0", "q1"]
    assert rows[1]["prompt_ids"] == path.encode_prompt((Message("user", "q1"),))
    long = Instruction(conversation=(Message("user", "0123456789"), Message("assistant", "a")))
    cut = prompt_rows([long], path, max_prompt_length=4)
    assert cut[0]["prompt_ids"][0] == path.bos_id
    assert path.decode(cut[0]["prompt_ids"]) == "789"
    assert cut.notes == ("1 of 1 prompts lose their beginning: over 4 tokens.",)


def test_a_prompt_without_tokens_is_an_error(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = train_bpe(["x"], vocab_size=259)
    tokenizer.bos_token = None
    pair = Preference(prompt=(Message("user", ""),), chosen="a", rejected="b")
    with pytest.raises(UserError, match="row 1: the prompt has no tokens"):
        preference_rows([pair], short_path(tokenizer, 8))


# --- batches


def test_the_supervised_batch_is_right_padded_and_masked() -> None:
    rows = [
        {"input_ids": [5, 6, 0], "labels": [-100, 6, 0], "sample_id": 7},
        {"input_ids": [8], "labels": [8], "sample_id": 2},
    ]
    batch = SupervisedCollator(0)(rows)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[5, 6, 0], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 0], [8, -100, -100]]
    assert batch["sample_ids"].tolist() == [7, 2]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_preference_batch_has_the_chosen_rows_first() -> None:
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [9], "sample_id": 0},
        {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5, 6, 9], "sample_id": 3},
    ]
    batch = PreferenceCollator(pad_id=0)(rows)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 4, 0, 0], [1, 2, 9, 0], [1, 5, 6, 9]]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert batch["completion_mask"].tolist() == [
        [False, False, True, True],
        [False, True, False, False],
        [False, False, True, False],
        [False, True, True, True],
    ]
    assert batch["sample_ids"].tolist() == [0, 6, 1, 7]


# --- real files


def read_real(shared_data: Path, name: str) -> Examples:
    file = shared_data / name
    if not file.is_file():
        pytest.skip(f"real data absent: {name}")
    return read_examples(file)


@pytest.mark.parametrize("folder", ["models/stories260K/hf", "tokenizers/minimind6400"])
def test_real_files_become_rows_with_real_tokenizers(shared_data: Path, folder: str) -> None:
    path = TextPath(load_tokenizer(shared_data / folder), PLAIN, max_length=512)
    name = "instruction/llamafactory_alpaca_zh_demo.json.gz"
    rows = supervised_rows(read_real(shared_data, name).select(range(100)), path, drop_long=True)
    assert all(row["labels"][-1] == path.eos_id for row in rows)
    name = "preference/llamafactory_dpo_en_demo.json.gz"
    for pair in preference_rows(read_real(shared_data, name).select(range(50)), path):
        longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        assert 1 <= len(pair["prompt_ids"]) <= 512 - longest
        assert pair["chosen_ids"] != pair["rejected_ids"]
