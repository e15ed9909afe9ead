"""Answers judged one by one: how they are read, cut, handed on to other prompts and batched."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moe.errors import UserError
from sft.data import read_examples, require, split_by_prompt
from sft.examples import Preference, Unpaired
from sft.rows import preference_rows, prompt_rows
from sft.text import CONTINUATION, Message, TextPath, train_bpe
from sft.trl_data import unpair
from sft.unpaired import UnpairedCollator, handed_on, unpaired_rows


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, so that lengths can be counted by hand."""
    return train_bpe(["x"], vocab_size=259)


def path_of(tokenizer: PreTrainedTokenizerFast, max_length: int = 64) -> TextPath:
    return TextPath(tokenizer, CONTINUATION, max_length=max_length)


def write(folder: Path, rows: list[Any]) -> Path:
    file = folder / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def judged(prompt: str, completion: str, is_good: bool) -> Unpaired:
    return Unpaired(prompt=(Message("user", prompt),), completion=completion, is_good=is_good)


def pairs(count: int = 3) -> list[Preference]:
    return [
        Preference(prompt=(Message("user", f"q{i}"),), chosen=f"good{i}", rejected=f"bad{i}")
        for i in range(count)
    ]


# --- files


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "U", "completion": "A", "label": True},
        {
            "prompt": [{"role": "user", "content": "U"}],
            "completion": [{"role": "assistant", "content": "A"}],
            "label": True,
        },
        {
            "messages": [
                {"role": "user", "content": "U"},
                {"role": "assistant", "content": "A"},
            ],
            "label": True,
        },
    ],
    ids=["texts", "turns", "messages"],
)
def test_judged_answers_are_read_in_three_forms(tmp_path: Path, row: Any) -> None:
    found = read_examples(write(tmp_path, [row, {**row, "label": False}]))
    assert found.kind == "unpaired"
    assert list(found) == [judged("U", "A", True), judged("U", "A", False)]


def test_real_judged_answers_are_read(shared_data: Path) -> None:
    file = shared_data / "preference" / "llamafactory_kto_en_demo.json.gz"
    if not file.is_file():
        pytest.skip("real data absent")
    found = read_examples(file)
    assert found.format == "labelled-messages" and len(found) == 300
    assert sum(row.is_good for row in found if isinstance(row, Unpaired)) == 150


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "U", "completion": "A", "label": 1}, "'label' is a number, not true or false"),
        ({"prompt": "U", "completion": "A", "label": None}, "'label' is missing or null, not true"),
        (
            {"prompt": "U", "completion": [{"role": "user", "content": "A"}], "label": True},
            "field 'completion' is not one assistant turn",
        ),
    ],
)
def test_a_judgement_that_cannot_be_read_is_named(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_examples(write(tmp_path, [row]))


def test_methods_of_pairs_send_judged_answers_to_kto(tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, [{"prompt": "U", "completion": "A", "label": True}]))
    with pytest.raises(
        UserError, match=r"single answers with a label .* Use rlhf.train --method k"
    ):
        require(found, "preference")


def test_judged_answers_are_split_by_prompt_and_give_prompts(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"prompt": f"q{i // 2}", "completion": f"a{i}", "label": i % 2 > 0} for i in range(20)]
    train, val = split_by_prompt(read_examples(write(tmp_path, rows)), val_fraction=0.3, seed=0)
    prompts = [
        {row["prompt"] for row in prompt_rows(x, path_of(bytes_tokenizer))} for x in (train, val)
    ]
    assert len(train) == 14 and len(val) == 6 and not prompts[0] & prompts[1]


# --- rows


def test_a_pair_gives_both_its_answers_with_the_ids_that_dpo_would_learn_from(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = path_of(bytes_tokenizer)
    rows = unpaired_rows(pairs(), path)
    for i, pair in enumerate(preference_rows(pairs(), path)):
        good, bad = rows[2 * i], rows[2 * i + 1]
        assert good["prompt_ids"] == bad["prompt_ids"] == pair["prompt_ids"]
        assert (good["completion_ids"], good["is_good"]) == (pair["chosen_ids"], True)
        assert (bad["completion_ids"], bad["is_good"]) == (pair["rejected_ids"], False)
    assert [row["sample_id"] for row in rows] == list(range(6))


def test_pairs_and_their_judgements_one_by_one_give_the_same_rows(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Against TRL's way of taking pairs apart."""

    def told(found: Any) -> set[Any]:
        keys = ("prompt_ids", "completion_ids", "is_good")
        return {str([row[key] for key in keys]) for row in found}

    path = path_of(bytes_tokenizer)
    assert told(unpaired_rows(pairs(), path)) == told(unpaired_rows(unpair(pairs()), path))


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_is_handed_on_once_and_never_to_its_own_prompt(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 4) for _ in range(8)]
    prompts = [[i] for i, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(prompts)
    source = handed_on(prompts)
    assert sorted(source) == list(range(len(prompts)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(source))


def test_pairs_hand_on_their_good_answers_to_good_ones_and_bad_to_bad() -> None:
    source = handed_on([[i // 2] for i in range(8)])
    assert source == [2, 3, 4, 5, 6, 7, 0, 1]


def test_a_prompt_with_over_half_of_the_rows_is_refused() -> None:
    assert handed_on([[1], [1], [2], [3]]) == [2, 3, 0, 1]
    with pytest.raises(UserError, match="x: 3 of 5 rows share one prompt, so there are not enough"):
        handed_on([[1], [1], [1], [2], [3]], name="x")


def test_what_is_too_long_is_cut_and_counted(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = path_of(bytes_tokenizer, 16)
    found = unpaired_rows([judged("p" * 30, "a", True), judged("q", "b" * 30, False)], path)
    assert found.notes == (
        "1 of 2 prompts lose their beginning under --max-length 16.",
        "1 of 2 completions lose their end, and so their EOS, under --max-length 16.",
        "1 of 2 answers lose their end beside another prompt, where the KL is estimated, under "
        "--max-length 16.",
    )
    for row in found:
        assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= 16
        assert 1 <= len(row["other_ids"]) <= 16 - len(row["prompt_ids"])
    assert found[1]["other_ids"] == found[0]["completion_ids"]


# --- batches


def test_a_batch_holds_the_answers_and_beside_them_the_mismatched_ones() -> None:
    rows: list[Any] = [
        {"prompt_ids": [5, 6], "completion_ids": [7], "other_ids": [8, 9], "is_good": True,
         "sample_id": 4},
        {"prompt_ids": [5], "completion_ids": [8, 9], "other_ids": [7], "is_good": False,
         "sample_id": 1},
    ]  # fmt: skip
    batch = UnpairedCollator(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 9]]
    assert batch["completion_mask"].tolist() == [[False, False, True], [False, True, True]]
    assert batch["other_input_ids"].tolist() == [[5, 6, 8, 9], [5, 7, 0, 0]]
    assert batch["other_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["other_completion_mask"].tolist() == [
        [False, False, True, True],
        [False, True, False, False],
    ]
    assert batch["is_good"].tolist() == [True, False]
    assert torch.equal(batch["sample_ids"], torch.tensor([4, 1]))
