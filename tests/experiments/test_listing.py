"""`python -m experiments`: every experiment says what it asks and by which rule it is judged."""

import json
from pathlib import Path

import pytest

from experiments.__main__ import FIELDS, Entry, experiments, index, listing


@pytest.mark.parametrize("entry", experiments(), ids=lambda entry: entry.name)
def test_every_experiment_names_question_published_arms_cost_and_rule(entry: Entry) -> None:
    assert entry.title.endswith("?")
    for field in FIELDS:
        assert entry.parts.get(field), f"{entry.name}: no '{field}:' in its docstring"


def test_the_listing_names_each_experiment_and_its_cost() -> None:
    text = listing(experiments())
    assert "compare" in text and "Cost:" in text


def test_the_index_is_read_from_finished_summaries_alone(tmp_path: Path) -> None:
    for name, status in (("a", "done"), ("b", "running")):
        folder = tmp_path / "compare" / name
        folder.mkdir(parents=True)
        summary = {
            "status": status,
            "question": "Is it so?",
            "seeds": [1, 2],
            "verdict": {"word": "INCONCLUSIVE", "rule": "a | b"},
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = index(tmp_path)
    assert "[compare/a](compare/a/) | Is it so? | 2 | INCONCLUSIVE | a \\| b |" in text
    assert "compare/b" not in text
