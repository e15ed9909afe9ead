"""Examples: the right kind for a stage, and the split by prompt."""

import re
from pathlib import Path

import pytest

from moe.errors import UserError
from sft.data import (
    drop_shared_prompts,
    prompt_text,
    read_examples,
    require,
    split_by_prompt,
    use_chosen,
)
from sft.examples import Examples, Instruction, Preference, as_examples
from sft.text import Message


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


# --- the right kind


def test_the_wrong_kind_of_file_is_refused_with_the_way_out() -> None:
    preferences = as_examples(pairs(), name="p.json")
    with pytest.raises(UserError) as caught:
        require(preferences, "instruction")
    assert str(caught.value) == (
        "p.json holds preferences (chosen/rejected); this stage needs answers to learn "
        "(instructions). Use rlhf.train --method dpo, or --use chosen."
    )
    with pytest.raises(UserError, match="instructions with one answer each; this method needs"):
        require(as_examples(answers("a")), "preference")
    assert require(preferences, "preference") is preferences


def test_the_chosen_answers_can_be_learned() -> None:
    examples = use_chosen(as_examples(pairs()))
    assert examples.rows == (
        Instruction(conversation=(Message("user", "q0"), Message("assistant", "good"))),
    )
    assert "rejected ones are not" in examples.notes[-1]


def test_rows_of_two_kinds_do_not_mix() -> None:
    with pytest.raises(UserError, match="rows of one kind, got instruction, preference"):
        as_examples([*pairs(), *answers("a")])


# --- splitting


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    rows = [pair for index in range(40) for pair in pairs(40)[index : index + 1] * (index % 3 + 1)]
    train, val = split_by_prompt(rows, val_fraction=0.2, seed=1)
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in val}
    assert len(train) + len(val) == len(rows)
    assert 0.2 * len(rows) - 1 <= len(val) <= 0.2 * len(rows) + 3


def test_the_split_follows_the_seed_and_not_the_order() -> None:
    rows = pairs(30)
    _, val = split_by_prompt(rows, val_fraction=0.3, seed=1)
    _, same = split_by_prompt(rows[::-1], val_fraction=0.3, seed=1)
    _, other = split_by_prompt(rows, val_fraction=0.3, seed=2)
    assert {prompt_text(row) for row in val} == {prompt_text(row) for row in same}
    assert {prompt_text(row) for row in val} != {prompt_text(row) for row in other}
    assert len(val) == 9


def test_too_few_rows_to_split_is_an_error() -> None:
    with pytest.raises(UserError, match=r"8 rows with 8 different prompts .* Need 20 rows"):
        split_by_prompt(pairs(8), val_fraction=0.05, seed=0)
    with pytest.raises(UserError, match="6 rows with 1 different prompts"):
        split_by_prompt(pairs(1) * 6, val_fraction=0.5, seed=0)
    with pytest.raises(UserError, match="share 1.0"):
        split_by_prompt(pairs(8), val_fraction=1.0, seed=0)


def test_no_validation_share_gives_no_validation_rows() -> None:
    train, val = split_by_prompt(pairs(3), val_fraction=0, seed=0)
    assert (len(train), len(val)) == (3, 0)


def test_prompts_of_the_training_file_leave_the_held_out_file() -> None:
    train, held_out = as_examples(pairs(2), name="a"), as_examples(pairs(5), name="b")
    kept = drop_shared_prompts(held_out, train=train)
    assert [prompt_text(row) for row in kept] == ["q2", "q3", "q4"]
    assert kept.notes == ("2 prompts occur in both files; kept in a only.",)
    with pytest.raises(UserError, match="nothing is left"):
        drop_shared_prompts(train, train=held_out)


# --- real files


def read_real(shared_data: Path, name: str) -> Examples:
    file = shared_data / name
    if not file.is_file():
        pytest.skip(f"real data absent: {name}")
    return read_examples(file)


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("preference/hh_harmless_base_test.jsonl.gz", "preference", 2303),
        ("preference/llamafactory_dpo_en_demo.json.gz", "preference", 300),
        ("instruction/llamafactory_alpaca_en_demo.json.gz", "instruction", 999),
        ("instruction/llamafactory_alpaca_zh_demo.json.gz", "instruction", 1000),
        ("instruction/xtuner_openai_sft.jsonl", "instruction", 128),
        ("instruction/llamafactory_identity.json", "instruction", 91),
        ("lm/multidomain.jsonl.gz", "document", 5850),
        ("lm/tinystories_5.txt", "document", 5),
    ],
)
def test_real_files_are_read_whole(shared_data: Path, name: str, kind: str, number: int) -> None:
    examples = read_real(shared_data, name)
    assert (examples.kind, len(examples)) == (kind, number)


def test_the_hh_file_accounts_for_every_row(shared_data: Path) -> None:
    examples = read_real(shared_data, "preference/hh_harmless_base_test.jsonl.gz")
    dropped = [int(re.match(r"\d+", note)[0]) for note in examples.notes]  # type: ignore[index]
    assert dropped == [4, 5] and len(examples) + sum(dropped) == 2312
    train, val = split_by_prompt(examples, val_fraction=0.1, seed=0)
    assert len(val) == 230
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in val}
