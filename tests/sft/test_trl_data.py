"""The door to TRL: what it gives is TRL's, and what TRL gets wrong is caught."""

import subprocess
import sys
from pathlib import Path

import pytest
from trl.data_utils import extract_prompt as trl_extract_prompt

from moe.errors import UserError
from sft.examples import Preference
from sft.text import Message, load_tokenizer, pick_template
from sft.trl_data import chat_text, extract_prompt, is_conversational, pack, unpair


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_extract_prompt_is_trls_on_turns_and_on_text() -> None:
    sky = [turn("user", "Which colour?")]
    chosen, rejected = [*sky, turn("assistant", "Blue.")], [*sky, turn("assistant", "Green.")]
    expected = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
    assert extract_prompt(chosen, rejected) == tuple(expected.values())
    assert extract_prompt(chosen, rejected) == (sky, chosen[1:], rejected[1:])
    assert extract_prompt("The sky is blue", "The sky is red") == ("The sky is", " blue", " red")


def test_extract_prompt_of_texts_with_nothing_in_common_has_an_empty_prompt() -> None:
    # TRL looks at the last character here and makes "ab" of chosen a prompt.
    assert trl_extract_prompt({"chosen": "ab ", "rejected": "cd"})["prompt"] == "ab"
    assert extract_prompt("ab ", "cd") == ("", "ab ", "cd")


def test_extract_prompt_of_nothing_is_a_sentence() -> None:
    with pytest.raises(UserError, match="rejected is empty"):
        extract_prompt("x", "")


def test_equal_dialogues_keep_the_last_turn_as_the_answer() -> None:
    same = [turn("user", "U"), turn("assistant", "A")]
    assert extract_prompt(same, same) == (same[:1], same[1:], same[1:])


def test_unpair_gives_every_answer_with_its_judgement() -> None:
    prompt = (Message("system", "S"), Message("user", "U"))
    pairs = [
        Preference(prompt=prompt, chosen="good", rejected="bad"),
        Preference(prompt=prompt[1:], chosen="yes", rejected="no"),
    ]
    found = [(row.prompt, row.completion, row.is_good) for row in unpair(pairs)]
    assert sorted(found, key=str) == sorted(
        [
            (prompt, "good", True),
            (prompt, "bad", False),
            (prompt[1:], "yes", True),
            (prompt[1:], "no", False),
        ],
        key=str,
    )
    assert unpair([]) == []


def test_pack_keeps_every_row_whole_and_loses_no_token() -> None:
    rows = [{"input_ids": [10 * n + k for k in range(n)]} for n in (1, 5, 3, 4, 2, 6)]
    packed = pack(rows, seq_length=8)
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= 8 for row in packed)
    # 21 tokens fit three blocks of 8, and best fit decreasing finds that.
    assert len(packed) == 3
    pieces = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            pieces.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(pieces) == sorted(row["input_ids"] for row in rows)


def test_pack_packs_across_more_rows_than_one_batch_of_datasets() -> None:
    packed = pack([{"input_ids": [1]}] * 2500, seq_length=2500)
    assert [len(row["input_ids"]) for row in packed] == [2500]


def test_pack_refuses_a_row_that_trl_would_cut_silently() -> None:
    with pytest.raises(UserError, match="Row 1 has 5 tokens and does not fit a block of 4"):
        pack([{"input_ids": [1]}, {"input_ids": [1, 2, 3, 4, 5]}], seq_length=4)


def test_is_conversational_knows_turns_from_text() -> None:
    assert is_conversational([turn("user", "U")])
    assert not is_conversational("U")
    assert not is_conversational([])


def test_chat_text_is_what_our_chat_template_renders(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers/minimind6400")
    conversation = (Message("user", "U"), Message("assistant", "A"))
    ours = "".join(
        "<|im_end|>" if segment.ends_answer else segment.text
        for segment in pick_template(tokenizer).render(conversation)
    )
    assert chat_text(conversation, tokenizer) == ours + "\n"


def test_importing_the_door_opens_nothing_heavy() -> None:
    program = (
        "import sys, sft.rows, sft.trl_data; "
        "assert not {'trl', 'torch', 'datasets'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
