"""What a data file says, before any tokenizer: instructions, preferences, judgements, documents.

The decision to know: no row vanishes quietly. What is left out is counted in `notes` with its
lines, and a file of which more than a tenth would be left out is refused, because then the file is
not what its reader thinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe.errors import UserError
from sft.text import Conversation

LARGEST_DROPPED_SHARE = 0.10

Kind = Literal["instruction", "preference", "unpaired", "document"]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A conversation that ends with the answer to learn."""

    conversation: Conversation


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt with a better and a worse answer; `margin` says by how much, where that is known.

    It is in units of the reward (Touvron et al. 2023, Llama 2, eq. 2), finite and at least 0.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class Unpaired:
    """A prompt with one answer and whether it is a good one."""

    prompt: Conversation
    completion: str
    is_good: bool


@dataclass(frozen=True, kw_only=True)
class Document:
    """A plain text, with the domain it belongs to when that is known."""

    text: str
    domain: str | None = None


Example = Instruction | Preference | Unpaired | Document
KIND_OF: dict[type, Kind] = {
    Instruction: "instruction",
    Preference: "preference",
    Unpaired: "unpaired",
    Document: "document",
}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one file, all of one kind.

    `places[i]` names where row i came from ("line 17"), for messages; `notes` are sentences about
    what was left out or not used.
    """

    rows: tuple[Example, ...]
    kind: Kind
    format: str
    name: str
    places: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]

    def select(self, indices: Sequence[int]) -> Examples:
        """These rows in this order, with their places."""
        return replace(
            self,
            rows=tuple(self.rows[index] for index in indices),
            places=tuple(self.places[index] for index in indices),
        )


def as_examples(rows: Examples | Sequence[Example], *, name: str = "examples") -> Examples:
    """Rows made by a program as `Examples`; they have to be of one kind."""
    if isinstance(rows, Examples):
        return rows
    kinds = {KIND_OF[type(row)] for row in rows}
    if len(kinds) != 1:
        raise UserError(f"{name}: need rows of one kind, got {', '.join(sorted(kinds)) or 'none'}.")
    return Examples(
        rows=tuple(rows),
        kind=kinds.pop(),
        format="made",
        name=name,
        places=tuple(f"row {number}" for number in range(1, len(rows) + 1)),
    )


def note_dropped(
    skipped: Mapping[str, Sequence[str]], *, total: int, name: str, remedy: str = "Mend the file."
) -> list[str]:
    """A sentence for each reason to leave rows out; a UserError when they are too many."""
    sentences = []
    for reason, places in skipped.items():
        shown = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
        sentences.append(f"{len(places)} of {total} rows {reason} ({shown}): dropped.")
    num_dropped = sum(len(places) for places in skipped.values())
    if num_dropped > LARGEST_DROPPED_SHARE * total:
        raise UserError(
            f"{name}: {' '.join(sentences)} That is over {LARGEST_DROPPED_SHARE:.0%}. {remedy}"
        )
    return sentences
