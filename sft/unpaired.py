"""Answers judged one by one, as rows and batches: each beside an answer to another prompt.

The decision to know: that other answer is chosen here, once for the whole file, by handing the
answers on among the rows so that each is handed on exactly once and none to its own prompt. It is
then a property of the row: however rows are cut into batches, the KL that is estimated from these
mismatched pairs (Ethayarajh et al. 2024, KTO, section 4) is the same, and it is estimated from the
very answers that are learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from moe.errors import UserError
from sft.data import require, rows_of_type
from sft.examples import Examples, Preference, Unpaired, as_examples
from sft.rows import Rows, cut_left, preference_rows, prompt_ids_of
from sft.text import TextPath, pad_batch

if TYPE_CHECKING:
    import torch


class UnpairedRow(TypedDict):
    """A prompt with its answer, whether that is good, and an answer to another prompt.

    `completion_ids` ends with EOS unless it was cut, and so does `other_ids`.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    other_ids: list[int]
    is_good: bool
    sample_id: int


def unpaired_rows(
    examples: Examples | Sequence[Unpaired] | Sequence[Preference], text_path: TextPath
) -> Rows[UnpairedRow]:
    """Judged answers as ids; of a preference both answers, the chosen one good (2i and 2i + 1).

    What is over `max_length` is cut as in `sft.rows.preference_rows` and counted in the notes.
    Raises UserError where over half of the rows share one prompt, because then some answer has no
    other prompt to go to.
    """
    found = as_examples(examples)
    rows = _from_pairs(found, text_path) if found.kind == "preference" else _read(found, text_path)
    if not rows:
        return rows
    source = handed_on([row["prompt_ids"] for row in rows], name=found.name)
    num_cut = 0
    for row, index in zip(rows, source, strict=True):
        whole = rows[index]["completion_ids"]
        row["other_ids"] = whole[: text_path.max_length - len(row["prompt_ids"])]
        num_cut += len(row["other_ids"]) < len(whole)
    if num_cut:
        rows.notes += (
            f"{num_cut} of {len(rows)} answers lose their end beside another prompt, where the KL "
            f"is estimated, under --max-length {text_path.max_length}.",
        )
    return rows


def handed_on(prompts: Sequence[Sequence[int]], *, name: str = "rows") -> list[int]:
    """For each row the row whose answer it gets: a permutation that leaves no answer at its prompt.

    With rows in order of their prompts' first appearance, answers move on by the size of the
    largest group of one prompt. Raises UserError when that group is over half of the rows.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(index)
    step = max(map(len, groups.values()))
    if 2 * step > len(prompts):
        raise UserError(
            f"{name}: {step} of {len(prompts)} rows share one prompt, so there are not enough "
            "answers to other prompts to estimate the KL from; give rows of more prompts."
        )
    order = [index for group in groups.values() for index in group]
    source = [0] * len(order)
    for place, index in enumerate(order):
        source[index] = order[(place + step) % len(order)]
    return source


def _from_pairs(examples: Examples, text_path: TextPath) -> Rows[UnpairedRow]:
    pairs = preference_rows(examples, text_path)
    rows: list[UnpairedRow] = []
    for pair in pairs:
        for is_good, completion in ((True, pair["chosen_ids"]), (False, pair["rejected_ids"])):
            rows.append(_row(pair["prompt_ids"], completion, is_good=is_good, sample_id=len(rows)))
    return Rows(rows, notes=pairs.notes)


def _read(examples: Examples, text_path: TextPath) -> Rows[UnpairedRow]:
    require(examples, "unpaired")
    limit = text_path.max_length
    rows: list[UnpairedRow] = []
    num_cut_prompts = num_cut_completions = 0
    for example, place in zip(rows_of_type(Unpaired, examples), examples.places, strict=True):
        prompt = prompt_ids_of(example.prompt, text_path, where=f"{examples.name} {place}")
        whole = text_path.encode_completion(example.completion)
        completion = whole[: max(limit // 2, limit - len(prompt))]
        kept = cut_left(prompt, length=limit - len(completion), bos_id=text_path.bos_id)
        num_cut_prompts += len(kept) < len(prompt)
        num_cut_completions += len(completion) < len(whole)
        rows.append(_row(kept, completion, is_good=example.is_good, sample_id=len(rows)))
    notes = []
    under = f"under --max-length {limit}."
    if num_cut_prompts:
        notes.append(f"{num_cut_prompts} of {len(rows)} prompts lose their beginning {under}")
    if num_cut_completions:
        notes.append(
            f"{num_cut_completions} of {len(rows)} completions lose their end, and so their EOS, "
            f"{under}"
        )
    return Rows(rows, notes=notes)


def _row(prompt: list[int], completion: list[int], *, is_good: bool, sample_id: int) -> UnpairedRow:
    return {
        "prompt_ids": prompt,
        "completion_ids": completion,
        "other_ids": [],
        "is_good": is_good,
        "sample_id": sample_id,
    }


@dataclass(frozen=True)
class UnpairedCollator:
    """Judged answers as two right-padded batches of B rows: as they are, and mismatched.

    Gives `input_ids` (B, S) int64; `attention_mask` (B, S) int64; `completion_mask` (B, S) bool,
    True on the answer's tokens, EOS included; `is_good` (B,) bool; `sample_ids` (B,) int64; and the
    first three under `other_*` for the prompts with their other answers, of a length of their own.
    """

    pad_id: int

    def __call__(self, rows: Sequence[UnpairedRow]) -> dict[str, torch.Tensor]:
        import torch

        own = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        other = [(row["prompt_ids"], row["other_ids"]) for row in rows]
        mismatched = {f"other_{name}": x for name, x in self._texts(other).items()}
        return {
            **self._texts(own),
            **mismatched,
            "is_good": torch.tensor([row["is_good"] for row in rows], dtype=torch.bool),
            "sample_ids": torch.tensor([row["sample_id"] for row in rows], dtype=torch.int64),
        }

    def _texts(self, texts: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_batch([a + b for a, b in texts], pad_id=self.pad_id, side="right")
        inside, _ = pad_batch(
            [[0] * len(a) + [1] * len(b) for a, b in texts], pad_id=0, side="right"
        )
        return {"input_ids": ids, "attention_mask": mask.long(), "completion_mask": inside.bool()}
