"""Examples -> rows of token ids -> padded batches with labels.

The decision to know: a row that is too long is cut where the least is lost, and how many were cut
is a note that the commands print; a row of which nothing would be left to learn is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, NotRequired, TypedDict, TypeVar

from moe.errors import UserError
from sft.data import rows_of_type
from sft.examples import (
    Document,
    Example,
    Examples,
    Instruction,
    Preference,
    Unpaired,
    as_examples,
    note_dropped,
)
from sft.text import Conversation, TextPath, conversation_text, pad_batch
from sft.trl_data import pack

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100


class SupervisedRow(TypedDict):
    """`labels[i]` is `input_ids[i]` where it is to be learned, else -100 (the shift is the loss's).

    `sample_id` is the row's index; `domain` its label if the text had one; `seq_lengths` the
    lengths of the texts packed into it.
    """

    input_ids: list[int]
    labels: list[int]
    sample_id: int
    domain: NotRequired[str]
    seq_lengths: NotRequired[list[int]]


class PreferenceRow(TypedDict):
    """One prompt and two completions, the last two with their EOS unless they were cut.

    `margin`: by how much the chosen one is better, in all rows or in none.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    sample_id: int
    margin: NotRequired[float]


class PromptRow(TypedDict):
    """A prompt as ids, and as the text that reward functions and people read."""

    prompt_ids: list[int]
    prompt: str
    sample_id: int


RowT = TypeVar("RowT")


class Rows(list[RowT], Generic[RowT]):
    """A list of rows, with sentences about what was cut or left out on the way."""

    def __init__(self, rows: Iterable[RowT], *, notes: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.notes: tuple[str, ...] = tuple(notes)


def supervised_rows(
    examples: Examples | Sequence[Instruction], text_path: TextPath, *, drop_long: bool = False
) -> Rows[SupervisedRow]:
    """Conversations as ids and labels, with the loss on the answers and their EOS.

    A conversation over `max_length` loses its end. One that has no answer token left is a UserError
    that names it; with `drop_long` every conversation that is too long is left out and counted.
    """
    found = as_examples(examples)
    rows: list[SupervisedRow] = []
    num_cut = num_long = 0
    num_tokens = 0
    for example, place in zip(rows_of_type(Instruction, found), found.places, strict=True):
        encoded = text_path.encode(example.conversation)
        num_tokens += len(encoded.input_ids) + encoded.num_cut
        num_cut += encoded.num_cut
        num_long += encoded.num_cut > 0
        if encoded.num_cut and drop_long:
            continue
        # The first token is never predicted, so it is no use if it is the only one left.
        if not any(encoded.loss_mask[1:]):
            raise _nothing_to_learn(example, text_path, where=f"{found.name} {place}")
        labels = [
            token if is_learned else IGNORED_LABEL
            for token, is_learned in zip(encoded.input_ids, encoded.loss_mask, strict=True)
        ]
        rows.append({"input_ids": encoded.input_ids, "labels": labels, "sample_id": len(rows)})
    if not rows:
        raise UserError(
            f"{found.name}: every row is over --max-length {text_path.max_length}, and "
            "--drop-long leaves none. Raise --max-length."
        )
    share = f"{num_long} of {len(found)} rows ({num_long / len(found):.1%}) are over --max-length "
    outcome = f"lose their end ({num_cut / num_tokens:.1%} of the tokens)"
    outcome = "are dropped" if drop_long else outcome
    notes = [f"{share}{text_path.max_length} and {outcome}."] if num_long else []
    return Rows(rows, notes=notes)


def _nothing_to_learn(example: Instruction, text_path: TextPath, *, where: str) -> UserError:
    num_prompt = len(text_path.encode_prompt(example.conversation[:-1]))
    return UserError(
        f"{where}: nothing left to learn after --max-length {text_path.max_length} (the prompt is "
        f"{num_prompt} tokens). Raise it, or drop long rows with --drop-long."
    )


def document_rows(
    texts: Examples | Sequence[Document] | Sequence[str],
    text_path: TextPath,
    *,
    block: int,
    packing: Literal["contiguous", "whole"] = "contiguous",
) -> Rows[SupervisedRow]:
    """Plain texts as blocks of at most `block` tokens, all of them to be learned.

    Each text stands between BOS and EOS. "contiguous": the texts of a domain follow each other and
    every block but a domain's last is full. "whole": texts are packed by best fit so that one
    that fits a block is never split (TRL's packing; `seq_lengths` says where they end). A block
    holds one domain. A last block of a single token is left out and counted: it predicts nothing.
    """
    if block < 2:
        raise UserError(f"block {block} leaves nothing to predict: give 2 or more tokens.")
    streams: dict[str | None, list[list[int]]] = {}
    for document in _documents(texts):
        ids = text_path.encode_document(document.text)
        streams.setdefault(document.domain, []).append(ids)
    cut_up = _contiguous if packing == "contiguous" else _whole
    rows: list[SupervisedRow] = []
    num_lost = 0
    for domain, token_lists in streams.items():
        for found in cut_up(token_lists, block=block):
            if len(found["input_ids"]) < 2:
                num_lost += 1
                continue
            found["sample_id"] = len(rows)
            if domain is not None:
                found["domain"] = domain
            rows.append(found)
    if not rows:
        raise UserError("There is no text to make blocks of.")
    notes = [f"{num_lost} last tokens stood alone in a block: dropped."] if num_lost else []
    return Rows(rows, notes=notes)


def _documents(texts: Examples | Sequence[Document] | Sequence[str]) -> list[Document]:
    if isinstance(texts, Examples):
        return rows_of_type(Document, texts)
    return [Document(text=text) if isinstance(text, str) else text for text in texts]


def _all_learned(ids: list[int]) -> SupervisedRow:
    return {"input_ids": ids, "labels": list(ids), "sample_id": 0}


def _contiguous(token_lists: list[list[int]], *, block: int) -> Iterator[SupervisedRow]:
    stream = [token for tokens in token_lists for token in tokens]
    for start in range(0, len(stream), block):
        yield _all_learned(stream[start : start + block])


def _whole(token_lists: list[list[int]], *, block: int) -> Iterator[SupervisedRow]:
    pieces = [
        {"input_ids": tokens[start : start + block]}
        for tokens in token_lists
        for start in range(0, len(tokens), block)
    ]
    for packed in pack(pieces, seq_length=block):
        yield _all_learned(packed["input_ids"]) | {"seq_lengths": packed["seq_lengths"]}


def preference_rows(
    examples: Examples | Sequence[Preference], text_path: TextPath
) -> Rows[PreferenceRow]:
    """Preferences as ids. What is over `max_length` is cut, and counted in the notes.

    Completions keep half of `max_length`, or more where the prompt leaves it, and are cut from the
    right (a cut one has no EOS: it did not end there); then the prompt, the same for both, is cut
    from the left behind its BOS. Pairs that the cut made identical are dropped and counted.
    Margins in some rows only are a UserError.
    """
    found = as_examples(examples)
    _check_margins(found)
    rows: list[PreferenceRow] = []
    same: list[str] = []
    num_cut_prompts = num_cut_completions = 0
    for example, place in zip(rows_of_type(Preference, found), found.places, strict=True):
        prompt = prompt_ids_of(example.prompt, text_path, where=f"{found.name} {place}")
        sides = [text_path.encode_completion(text) for text in (example.chosen, example.rejected)]
        room = max(text_path.max_length // 2, text_path.max_length - len(prompt))
        kept = [side[:room] for side in sides]
        kept_prompt = cut_left(
            prompt, length=text_path.max_length - max(map(len, kept)), bos_id=text_path.bos_id
        )
        num_cut_prompts += len(kept_prompt) < len(prompt)
        num_cut_completions += sum(len(side) > room for side in sides)
        if kept[0] == kept[1]:
            same.append(place)
            continue
        rows.append(
            {
                "prompt_ids": kept_prompt,
                "chosen_ids": kept[0],
                "rejected_ids": kept[1],
                "sample_id": len(rows),
            }
        )
        if example.margin is not None:
            rows[-1]["margin"] = example.margin
    limit = f"--max-length {text_path.max_length}"
    skipped = {f"have the same ids for both answers under {limit}": same} if same else {}
    notes = note_dropped(skipped, total=len(found), name=found.name, remedy="Raise --max-length.")
    if num_cut_prompts:
        notes.append(
            f"{num_cut_prompts} of {len(found)} prompts lose their beginning under {limit}."
        )
    if num_cut_completions:
        notes.append(
            f"{num_cut_completions} of {2 * len(found)} completions lose their end, "
            f"and so their EOS, under {limit}."
        )
    return Rows(rows, notes=notes)


def _check_margins(examples: Examples) -> None:
    """A missing margin is not 0: it would ask less of that pair than of the others."""
    with_one = [row.margin is not None for row in rows_of_type(Preference, examples)]
    if any(with_one) and not all(with_one):
        place = examples.places[with_one.index(False)]
        raise UserError(
            f"{examples.name} {place}: this row has no 'margin', and {sum(with_one)} of "
            f"{len(with_one)} rows have one. Give all rows a margin (0 for none), or no row."
        )


def prompt_rows(
    examples: Examples | Sequence[Instruction] | Sequence[Preference],
    text_path: TextPath,
    *,
    max_prompt_length: int | None = None,
) -> Rows[PromptRow]:
    """The prompts of instructions or preferences, cut from the left to `max_prompt_length` tokens.

    Without that, `max_length - 1`, so that one token can follow.
    """
    found = as_examples(examples)
    length = text_path.max_length - 1 if max_prompt_length is None else max_prompt_length
    if length < 1:
        raise UserError(f"A prompt of at most {length} tokens cannot be asked: give 1 or more.")
    rows: list[PromptRow] = []
    num_cut = 0
    for example, place in zip(found.rows, found.places, strict=True):
        conversation = _prompt_of(example, found)
        ids = prompt_ids_of(conversation, text_path, where=f"{found.name} {place}")
        kept = cut_left(ids, length=length, bos_id=text_path.bos_id)
        num_cut += len(kept) < len(ids)
        rows.append(
            {"prompt_ids": kept, "prompt": conversation_text(conversation), "sample_id": len(rows)}
        )
    cut = f"{num_cut} of {len(rows)} prompts lose their beginning: over {length} tokens."
    return Rows(rows, notes=[cut] if num_cut else [])


def _prompt_of(example: Example, examples: Examples) -> Conversation:
    if isinstance(example, Preference | Unpaired):
        return example.prompt
    if isinstance(example, Instruction):
        return example.conversation[:-1]
    raise UserError(f"{examples.name} holds plain text; prompts come from instructions or pairs.")


def prompt_ids_of(prompt: Conversation, text_path: TextPath, *, where: str) -> list[int]:
    """A prompt's ids, uncut; a UserError that says where it stands when there is none."""
    ids = text_path.encode_prompt(prompt)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens, so there is nothing to answer.")
    return ids


def cut_left(ids: list[int], *, length: int, bos_id: int | None) -> list[int]:
    """The last `length` ids, with the BOS kept in front where there was one."""
    if len(ids) <= length:
        return ids
    if ids[0] == bos_id and length > 1:
        return [ids[0], *ids[len(ids) - length + 1 :]]
    return ids[len(ids) - length :]


# --- batches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SupervisedCollator:
    """Rows as a right-padded batch.

    Gives `input_ids` (B, S) int64; `attention_mask` (B, S) int64, 1 on real tokens; `labels` (B, S)
    int64, -100 on padding and on what is not learned; `sample_ids` (B,) int64, the rows' indices.
    """

    pad_id: int

    def __call__(self, rows: Sequence[SupervisedRow]) -> dict[str, torch.Tensor]:
        import torch

        ids, mask = pad_batch([row["input_ids"] for row in rows], pad_id=self.pad_id, side="right")
        labels, _ = pad_batch([row["labels"] for row in rows], pad_id=IGNORED_LABEL, side="right")
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "labels": labels,
            "sample_ids": torch.tensor([row["sample_id"] for row in rows], dtype=torch.int64),
        }


@dataclass(frozen=True)
class PreferenceCollator:
    """Pairs as one right-padded batch of 2B rows: the B chosen first, then the B rejected.

    Gives `input_ids` (2B, S) int64; `attention_mask` (2B, S) int64; `completion_mask` (2B, S) bool,
    True on the completion's tokens, EOS included; `sample_ids` (2B,) int64: 2i for the chosen and
    2i + 1 for the rejected answer of row i, because routing is kept by sample and token. Where the
    rows have them also `margin` (B,) float32.
    """

    pad_id: int

    def __call__(self, rows: Sequence[PreferenceRow]) -> dict[str, torch.Tensor]:
        import torch

        chosen = [(row["prompt_ids"], row["chosen_ids"], 2 * row["sample_id"]) for row in rows]
        rejected = [
            (row["prompt_ids"], row["rejected_ids"], 2 * row["sample_id"] + 1) for row in rows
        ]
        both = [*chosen, *rejected]
        ids, mask = pad_batch(
            [prompt + completion for prompt, completion, _ in both],
            pad_id=self.pad_id,
            side="right",
        )
        in_completion, _ = pad_batch(
            [[0] * len(prompt) + [1] * len(completion) for prompt, completion, _ in both],
            pad_id=0,
            side="right",
        )
        batch = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "completion_mask": in_completion.bool(),
            "sample_ids": torch.tensor([sample for *_, sample in both], dtype=torch.int64),
        }
        if any("margin" in row for row in rows):
            batch["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return batch
