"""Data files as examples, and which of them go where: the right kind, the split by prompt.

The decision to know: rows count as the same by their prompt, and the split is by prompt, so that
what is held out was never seen with another answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from moe.errors import UserError
from sft.examples import (
    KIND_OF,
    Document,
    Example,
    Examples,
    Instruction,
    Kind,
    Preference,
    Unpaired,
    as_examples,
)
from sft.files import parse_records, read_text, suffix_of
from sft.formats import read_rows, rename_columns, split_documents
from sft.text import Message, conversation_text


def read_examples(path: str | Path, *, columns: Mapping[str, str] | None = None) -> Examples:
    """The examples in a JSON, JSONL or text file, plain or .gz.

    `columns` maps our field names to the file's ({"instruction": "question"}). A UserError names
    the file, the line and the field whenever something is missing, broken or unknown.
    """
    file = Path(path)
    text = read_text(file)
    if suffix_of(file) == ".txt":
        if columns:
            raise UserError(f"{file} is plain text: it has no columns to map with --columns.")
        return split_documents(text, file)
    records = [rename_columns(record, columns or {}, file) for record in parse_records(text, file)]
    return read_rows(records, file)


NEEDS = {
    "instruction": "this stage needs answers to learn (instructions)",
    "preference": "this method needs preferences (chosen/rejected)",
    "unpaired": "this method needs preferences, or answers with a label (good or bad)",
    "document": "pretraining needs plain text (a text field, or .txt)",
}
HOLDS = {
    "instruction": "instructions with one answer each",
    "preference": "preferences (chosen/rejected)",
    "unpaired": "single answers with a label (good or bad)",
    "document": "plain text",
}
REMEDIES = {
    ("preference", "instruction"): "Use rlhf.train --method dpo, or --use chosen.",
    ("instruction", "preference"): "Use sft.train --stage sft, or give a file of preferences.",
    ("unpaired", "preference"): "Use rlhf.train --method kto.",
    ("unpaired", "instruction"): "Use rlhf.train --method kto.",
    ("document", "instruction"): "Use sft.train --stage pretrain.",
    ("instruction", "document"): "Use sft.train --stage sft.",
}


def require(examples: Examples, kind: Kind) -> Examples:
    """The examples as they are if they are of this kind, and a UserError if not."""
    if examples.kind == kind:
        return examples
    remedy = REMEDIES.get((examples.kind, kind), "Give another file.")
    raise UserError(f"{examples.name} holds {HOLDS[examples.kind]}; {NEEDS[kind]}. {remedy}")


def use_chosen(examples: Examples) -> Examples:
    """Preferences as instructions that have the chosen answer (SFT before DPO)."""
    rows = tuple(
        Instruction(conversation=(*row.prompt, Message("assistant", row.chosen)))
        for row in rows_of_type(Preference, examples)
    )
    note = "The chosen answers are used, the rejected ones are not."
    return replace(examples, rows=rows, kind="instruction", notes=(*examples.notes, note))


def prompt_text(example: Example) -> str:
    """What the model is given: the text by which rows count as the same."""
    if isinstance(example, Document):
        return example.text
    if isinstance(example, Preference | Unpaired):
        return conversation_text(example.prompt)
    return conversation_text(example.conversation[:-1])


def split_by_prompt(
    examples: Examples | Sequence[Example], *, val_fraction: float, seed: int
) -> tuple[Examples, Examples]:
    """(train, validation), no prompt in both: prompts are ordered by SHA-256 of seed and text.

    Prompts go to validation in that order until they bring `val_fraction` of the rows, so the
    split depends on neither the order of the file nor a random generator. 0 gives no validation
    rows. A UserError when the rows are too few to give both sides something.
    """
    found = as_examples(examples)
    if not 0 <= val_fraction < 1:
        raise UserError(f"The validation share {val_fraction} has to be at least 0 and below 1.")
    rows_of: dict[str, list[int]] = {}
    for index, row in enumerate(found.rows):
        rows_of.setdefault(prompt_text(row), []).append(index)
    wanted = round(val_fraction * len(found))
    if val_fraction > 0 and (wanted < 1 or len(rows_of) < 2):
        raise UserError(
            f"{found.name}: {len(found)} rows with {len(rows_of)} different prompts cannot give a "
            f"validation share of {val_fraction:g}. Need {max(2, math.ceil(1 / val_fraction))} "
            "rows of at least 2 prompts, or pass --val-set-size 0."
        )
    val: list[int] = []
    # One prompt at least stays in train, however many rows the others have.
    for prompt in sorted(rows_of, key=lambda text: _digest(text, seed=seed))[:-1]:
        if len(val) >= wanted:
            break
        val.extend(rows_of[prompt])
    chosen = set(val)
    train = [index for index in range(len(found)) if index not in chosen]
    return found.select(train), found.select(sorted(val))


def _digest(text: str, *, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{text}".encode()).digest()


def drop_shared_prompts(held_out: Examples, *, train: Examples) -> Examples:
    """The held-out rows whose prompts `train` does not have; the others are counted in a note."""
    seen = {prompt_text(row) for row in train}
    kept = [index for index, row in enumerate(held_out) if prompt_text(row) not in seen]
    shared = len({prompt_text(row) for row in held_out} & seen)
    if not shared:
        return held_out
    if not kept:
        raise UserError(
            f"Every prompt of {held_out.name} is in {train.name} too: nothing is left to test on."
        )
    note = f"{shared} prompts occur in both files; kept in {train.name} only."
    return replace(held_out.select(kept), notes=(*held_out.notes, note))


ExampleT = TypeVar("ExampleT", Instruction, Preference, Unpaired, Document)


def rows_of_type(kind: type[ExampleT], examples: Examples) -> list[ExampleT]:
    """The rows, all of this type; a UserError if the file holds another."""
    require(examples, KIND_OF[kind])
    return [row for row in examples if isinstance(row, kind)]
