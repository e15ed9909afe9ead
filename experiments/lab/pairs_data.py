"""A preference file as the pairs of a seed: read once, one split by prompt per seed.

The decision to know: pairs whose answers are the same under the length limit leave before the
split, so that every method and every baseline is asked about the same pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.lab.pairs_config import PairsScale
from sft.data import read_examples, require, rows_of_type, split_by_prompt
from sft.examples import Examples, Preference, note_dropped
from sft.rows import IGNORED_LABEL, PreferenceRow, Rows, SupervisedRow, preference_rows
from sft.text import TextPath

SUBSET_SEED = 0  # of the prompts that are kept of a file with too many: the same for every seed


@dataclass(frozen=True, kw_only=True)
class PairSides:
    """The pairs of one seed: no prompt on both sides. `examples[i]` is `rows[i]` before tokens."""

    train: Examples
    held_out: Examples
    train_rows: Rows[PreferenceRow]
    held_out_rows: Rows[PreferenceRow]


def read_pairs(path: Path, text_path: TextPath, *, max_pairs: int) -> Examples:
    """The file's pairs that can be told apart, about `max_pairs` of them, with notes on the rest.

    Raises:
        UserError: if the file is absent, broken, or holds no preferences.
    """
    examples = require(read_examples(path), "preference")
    notes = list(examples.notes)
    if len(examples) > max_pairs:
        _, kept = split_by_prompt(
            examples, val_fraction=max_pairs / len(examples), seed=SUBSET_SEED
        )
        notes.append(
            f"{len(kept)} of {len(examples)} pairs are used, whole prompts, the same ones for "
            "every seed."
        )
        examples = kept
    pairs = rows_of_type(Preference, examples)
    kept_at = [i for i, pair in enumerate(pairs) if _differ(pair, text_path)]
    known = set(kept_at)
    same = [place for i, place in enumerate(examples.places) if i not in known]
    limit = f"have the same tokens for both answers under --max-length {text_path.max_length}"
    notes += note_dropped(
        {limit: same} if same else {},
        total=len(examples),
        name=examples.name,
        remedy="Raise --max-length.",
    )
    return replace(examples.select(kept_at), notes=tuple(notes))


def _differ(pair: Preference, text_path: TextPath) -> bool:
    """Whether `sft.rows.preference_rows` would keep the pair; the room is its rule."""
    prompt = len(text_path.encode_prompt(pair.prompt))
    room = max(text_path.max_length // 2, text_path.max_length - prompt)
    chosen, rejected = (text_path.encode_completion(x) for x in (pair.chosen, pair.rejected))
    return chosen[:room] != rejected[:room]


def split_pairs(
    examples: Examples, text_path: TextPath, *, scale: PairsScale, seed: int
) -> PairSides:
    """Both sides of a seed; which prompts are held out depends on the seed alone."""
    train, held_out = split_by_prompt(examples, val_fraction=scale.held_out, seed=seed)
    sides = PairSides(
        train=train,
        held_out=held_out,
        train_rows=preference_rows(train, text_path),
        held_out_rows=preference_rows(held_out, text_path),
    )
    assert len(sides.train_rows) == len(train) and len(sides.held_out_rows) == len(held_out)
    return sides


def chosen_rows(rows: Sequence[PreferenceRow]) -> list[SupervisedRow]:
    """The chosen answers as rows to learn, cut where the pairs are cut; the prompts unlearned."""
    return [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [IGNORED_LABEL] * len(row["prompt_ids"]) + row["chosen_ids"],
            "sample_id": row["sample_id"],
        }
        for row in rows
    ]
