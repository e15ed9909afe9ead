"""What a folder was begun with: continued with the same, refused in words with anything else."""

from pathlib import Path

import pytest

from experiments.lab.begun import claim_trials, named_differences
from moe.errors import UserError


def test_trials_of_other_options_in_one_folder_are_refused(tmp_path: Path) -> None:
    claim_trials(tmp_path / "new", {"target": "positive", "lora_rank": 0})
    claim_trials(tmp_path / "new", {"target": "positive", "lora_rank": 0})
    with pytest.raises(UserError, match="target positive there, negative now"):
        claim_trials(tmp_path / "new", {"target": "negative", "lora_rank": 0})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="options.json is not valid JSON"):
        claim_trials(tmp_path, {})
    (tmp_path / "options.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="must hold names and values"):
        claim_trials(tmp_path, {})


def test_what_differs_is_named_by_its_place_on_either_side() -> None:
    held = {"rates": {"a": 0.1, "b": 0.2}, "sizes": (1, 2)}
    asked = {"rates": {"a": 0.1, "c": 0.3}, "sizes": [1, 2]}
    assert named_differences(held, held, here="there") == ""
    assert named_differences(held, asked, here="there") == (
        "rates.b 0.2 there, absent now; rates.c absent there, 0.3 now"
    )


def test_of_many_differences_the_first_are_named_and_the_others_counted() -> None:
    held, asked = ({str(i): i + by for i in range(5)} for by in (0, 1))
    told = named_differences(held, asked, here="there")
    assert told.count("there") == 3 and told.endswith("; 2 more")
