"""Margins of preferences: from a user's file to the batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.errors import UserError
from sft.data import read_examples
from sft.examples import Preference
from sft.rows import PreferenceCollator, preference_rows
from sft.text import PLAIN, Message, TextPath, train_bpe

PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
RANKING = {
    "conversations": [{"from": "human", "value": "q"}],
    "chosen": {"from": "gpt", "value": "a"},
    "rejected": {"from": "gpt", "value": "b"},
}
TURNS = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("row", [PAIR, HH, RANKING, TURNS])
def test_every_format_of_pairs_may_have_a_margin(row: dict[str, Any], tmp_path: Path) -> None:
    found = read_examples(written(tmp_path, {**row, "margin": 2}, {**row, "margin": 0.5}))
    assert [pair.margin for pair in found if isinstance(pair, Preference)] == [2.0, 0.5]
    assert not any("margin" in note for note in found.notes)


def test_the_column_may_have_another_name(tmp_path: Path) -> None:
    path = written(tmp_path, {**PAIR, "gap": 1.5})
    (pair,) = read_examples(path, columns={"margin": "gap"})
    assert isinstance(pair, Preference) and pair.margin == 1.5


@pytest.mark.parametrize(
    ("margin", "sentence"),
    [
        ("1", "line 2: field 'margin' is text, not a number"),
        (True, "field 'margin' is true/false, not a number"),
        (-1, "field 'margin' is -1: it has to be finite and at least 0"),
        (float("nan"), "finite"),
        (float("inf"), "finite"),
    ],
)
def test_a_margin_that_is_none_is_refused(margin: Any, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, {**PAIR, "margin": 1}, {**PAIR, "margin": margin})
    with pytest.raises(UserError, match=sentence):
        read_examples(path)


def test_margins_are_in_all_rows_or_in_none() -> None:
    path = TextPath(train_bpe(["x"], vocab_size=259), PLAIN, max_length=64)
    pairs = [
        Preference(prompt=(Message("user", "q"),), chosen="a", rejected="b", margin=margin)
        for margin in (0.0, None, 1.0)
    ]
    with pytest.raises(UserError, match="row 2: this row has no 'margin', and 2 of 3 rows have"):
        preference_rows(pairs, path)
    collate = PreferenceCollator(path.pad_id)
    with_margins = collate(preference_rows(pairs[::2], path))
    assert torch.equal(with_margins["margin"], torch.tensor([0.0, 1.0]))
    assert "margin" not in collate(preference_rows(pairs[1:2], path))
