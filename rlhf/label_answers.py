"""The answers that raters compare: both models on the same prompts, drawn once and kept.

The decision to know: each model answers by its own tokenizer and template, and no prompt is asked
twice, however often the file holds it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.errors import UserError
from moe.generation import sample
from rlhf.label_files import Answer, LabelFiles, Pair, key_of
from sft.data import read_examples
from sft.examples import Document, Example, Examples, Preference, Unpaired
from sft.models import (
    ModelFolder,
    check_fit,
    find_model,
    fingerprint_files,
    fingerprint_tokenizer,
    load_causal_lm,
    tokenizer_of,
)
from sft.rows import prompt_rows
from sft.text import Conversation, TextPath, pad_batch, pick_template

BATCH = 16  # prompts answered at a time


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers are drawn. num: prompts, 0 for all; temperature 0 is greedy."""

    num: int
    seed: int
    max_new_tokens: int
    temperature: float
    max_length: int
    template: str | None


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of the two models, not yet loaded."""

    found: ModelFolder
    text_path: TextPath
    fingerprint: str


def contestant(folder: str, drawing: Drawing) -> Contestant:
    found = find_model(folder)
    tokenizer = tokenizer_of(found, None)
    template = pick_template(tokenizer, drawing.template or found.template)
    weights, words = fingerprint_files(found.files), fingerprint_tokenizer(tokenizer)
    return Contestant(
        found=found,
        text_path=TextPath(tokenizer, template, max_length=drawing.max_length),
        fingerprint=f"{weights}:{words}:{template.name}",
    )


def made_of(
    a: Contestant, b: Contestant, drawing: Drawing, *, prompts: Path, columns: Sequence[str]
) -> dict[str, Any]:
    """Everything that the answers follow from, as OUT.answers.json holds it."""
    return {
        "model_a": a.found.named,
        "weights_a": a.fingerprint,
        "model_b": b.found.named,
        "weights_b": b.fingerprint,
        "prompts": fingerprint_files([prompts]),
        "columns": list(columns),
        "num": drawing.num,
        "seed": drawing.seed,
        "max_new_tokens": drawing.max_new_tokens,
        "temperature": drawing.temperature,
        "max_length": drawing.max_length,
    }


def load_pairs(
    folders: tuple[str, str],
    drawing: Drawing,
    *,
    prompts: Path,
    columns: dict[str, str],
    files: LabelFiles,
    say: Callable[[str], None],
) -> list[Pair]:
    """The pairs of OUT.answers.json, made now if there are none yet.

    Raises UserError when they were made from something else, or would all be the same.
    """
    examples = read_examples(prompts, columns=columns)
    a, b = (contestant(folder, drawing) for folder in folders)
    origin = made_of(
        a, b, drawing, prompts=prompts, columns=[f"{k}={v}" for k, v in columns.items()]
    )
    held = files.read_answers(origin)
    if held is not None:
        return held
    if a.fingerprint == b.fingerprint and drawing.temperature == 0:
        raise UserError(
            f"{folders[0]} and {folders[1]} are the same model, and at --temperature 0 it gives "
            "the same answer twice: raise it, or compare two models."
        )
    chosen, notes = choose_prompts(examples, num=drawing.num, seed=drawing.seed)
    for note in (*examples.notes, *notes, *_input_notes(chosen, (a, b))):
        say(note)
    answers = [
        draw_answers(one, chosen, drawing, purpose=f"label-{side}", say=say)
        for side, one in (("a", a), ("b", b))
    ]
    pairs = [
        Pair(prompt=prompt_of(row), a=ours, b=theirs)
        for row, ours, theirs in zip(chosen, *answers, strict=True)
    ]
    files.write_answers(pairs, made_of=origin)
    return pairs


def prompt_of(example: Example) -> Conversation:
    if isinstance(example, Preference | Unpaired):
        return example.prompt
    assert not isinstance(example, Document)
    return example.conversation[:-1]


def choose_prompts(examples: Examples, *, num: int, seed: int) -> tuple[Examples, list[str]]:
    """`num` different prompts by lot, in the file's order, and what there is to say of it."""
    if examples.kind == "document":
        raise UserError(
            f"{examples.name} holds plain text; prompts come from instructions or preferences."
        )
    first: dict[str, int] = {}
    for index, row in enumerate(examples):
        first.setdefault(key_of(prompt_of(row)), index)
    notes = []
    if repeats := len(examples) - len(first):
        notes.append(f"{repeats} rows repeat an earlier prompt of {examples.name}: asked once.")
    indices = list(first.values())
    if num > len(indices):
        notes.append(f"{examples.name} has {len(indices)} prompts, fewer than --num {num}.")
    if 0 < num < len(indices):
        indices = sorted(random.Random(f"{seed}\nprompts").sample(indices, k=num))
    return examples.select(indices), notes


def _input_notes(examples: Examples, both: Sequence[Contestant]) -> list[str]:
    """An Alpaca row's `input` has a heading of its own, which a preference file cannot keep."""
    if all(one.text_path.template.name != "alpaca" for one in both):
        return []
    count = sum(any(turn.input_at is not None for turn in prompt_of(row)) for row in examples)
    if not count:
        return []
    return [
        f"{count} prompts have an 'input': the models see it under its heading, the preference "
        "file has it as the end of the prompt."
    ]


def draw_answers(
    one: Contestant,
    examples: Examples,
    drawing: Drawing,
    *,
    purpose: str,
    say: Callable[[str], None],
) -> list[Answer]:
    """One answer to each prompt; what is drawn does not depend on the batches."""
    text_path = one.text_path
    model = load_causal_lm(one.found)
    check_fit(model, text_path, named=one.found.named)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    room = drawing.max_length - drawing.max_new_tokens
    rows = prompt_rows(examples, text_path, max_prompt_length=room)
    for note in rows.notes:
        say(f"{one.found.named}: {note}")
    answers: list[Answer] = []
    for start in range(0, len(rows), BATCH):
        ids, mask = pad_batch(
            [row["prompt_ids"] for row in rows[start : start + BATCH]],
            pad_id=text_path.pad_id,
            side="left",
        )
        rollout = sample(
            model,
            ids.to(device),
            prompt_mask_BP=mask.to(device),
            max_new_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            stop_ids=text_path.stop_ids,
            seed=drawing.seed,
            purpose=purpose,
            sample_ids=range(start, start + len(ids)),
            pad_id=text_path.pad_id,
        )
        for response, kept, ended in zip(
            rollout.response_BR.cpu(), rollout.mask_BR.cpu(), rollout.ended_B.tolist(), strict=True
        ):
            text = text_path.decode(response[kept].tolist())
            answers.append(Answer(text=text, ended=bool(ended)))
        say(f"{one.found.named}: {len(answers)}/{len(rows)} answers")
    return answers
