"""The formats of data files: rows of JSON -> examples.

The decision to know: the format is detected from the columns of the first row, nothing has to be
registered. A row that does not fit it is an error; one that fits but teaches nothing is left out
and counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe.errors import UserError
from sft.examples import (
    Document,
    Example,
    Examples,
    Instruction,
    Kind,
    Preference,
    Unpaired,
    note_dropped,
)
from sft.files import Record
from sft.text import ROLES, Conversation, Message
from sft.trl_data import as_turns, extract_prompt

DOCUMENT_SEPARATOR = "<|endoftext|>"
KNOWN_FORMATS = (
    "alpaca (instruction, output), messages, prompt+chosen+rejected, chosen+rejected, "
    "conversations+chosen+rejected, prompt+completion+label, messages+label, text"
)


class _Skip(Exception):  # noqa: N818 - a verdict on one row, not an error
    """This row is left out, and counted under its reason."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row under its fields' names; knows how to complain about itself."""

    where: str
    value: dict[str, Any]

    def text(self, name: str) -> str:
        if name not in self.value:
            raise self.error(f"field {name!r} is missing")
        return self.check(self.value[name], f"field {name!r}")

    def optional_text(self, name: str) -> str:
        value = self.value.get(name)
        return "" if value is None else self.check(value, f"field {name!r}")

    def check(self, value: object, what: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{what} is {_kind_of_json(value)}, not a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.error(f"{what} has half a Unicode pair (\\ud8xx alone)") from None
        return value

    def optional_amount(self, name: str) -> float | None:
        """A finite number of at least 0, or None where the row has none."""
        value = self.value.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"field {name!r} is {_kind_of_json(value)}, not a number")
        if not 0 <= value < math.inf:
            raise self.error(f"field {name!r} is {value}: it has to be finite and at least 0")
        return float(value)

    def truth(self, name: str) -> bool:
        value = self.value.get(name)
        if not isinstance(value, bool):
            raise self.error(f"field {name!r} is {_kind_of_json(value)}, not true or false")
        return value

    def turns(self, name: str, *, role_key: str = "role", text_key: str = "content") -> list[Any]:
        turns = self.value.get(name)
        if not isinstance(turns, list) or not turns:
            raise self.error(f"field {name!r} is {_kind_of_json(turns)}, not a list of turns")
        return [self.turn(turn, name, role_key=role_key, text_key=text_key) for turn in turns]

    def turn(
        self, turn: object, name: str, *, role_key: str = "role", text_key: str = "content"
    ) -> Message:
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            raise self.error(f"a turn of {name!r} needs {role_key!r} and {text_key!r}")
        self.check(turn[role_key], f"{role_key!r} of a turn of {name!r}")
        role = SHAREGPT_ROLES.get(turn[role_key]) if role_key == "from" else turn[role_key]
        if role not in ROLES:
            known = ", ".join(SHAREGPT_ROLES if role_key == "from" else ROLES)
            raise self.error(f"role {turn[role_key]!r} in {name!r} is not one of {known}")
        return Message(role, self.check(turn[text_key], f"{text_key!r} of a {role} turn"))

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}. Mend or delete this row.")


def _kind_of_json(value: object) -> str:
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "true/false"
    names = {dict: "an object", list: "a list", int: "a number", float: "a number", str: "text"}
    article = names.get(type(value), type(value).__name__)
    return article if value or not isinstance(value, list) else "an empty list"


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"} | {
    role: role for role in ("user", "assistant")
}


def _read_alpaca(row: _Row) -> Instruction:
    instruction, extra = row.text("instruction"), row.optional_text("input")
    turns: list[Message] = []
    if system := row.optional_text("system"):
        turns.append(Message("system", system))
    for pair in row.value.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error("each entry of 'history' has to be a list of a question and an answer")
        question, answer = (row.check(text, "a text of 'history'") for text in pair)
        turns += [Message("user", question), Message("assistant", answer)]
    joined = f"{instruction}\n{extra}" if instruction and extra else instruction + extra
    input_at = len(joined) - len(extra) if extra else None
    turns += [Message("user", joined, input_at), Message("assistant", row.text("output"))]
    return _instruction(turns)


def _read_messages(row: _Row) -> Instruction:
    return _instruction(row.turns("messages"))


def _instruction(turns: list[Message]) -> Instruction:
    if turns[-1].role != "assistant":
        raise _Skip("do not end with an answer")
    if any(turn.role == "assistant" and not turn.content.strip() for turn in turns):
        raise _Skip("have an empty answer")
    return Instruction(conversation=tuple(turns))


def _read_preference(row: _Row) -> Preference:
    """`prompt`, `chosen`, `rejected`: texts, or lists of turns, with or without the prompt."""
    sides = [row.value.get("chosen"), row.value.get("rejected")]
    if not any(isinstance(side, list) for side in sides):
        prompt = row.value.get("prompt")
        as_turns = isinstance(prompt, list)
        turns = row.turns("prompt") if as_turns else [Message("user", row.text("prompt"))]
        return _preference(row, tuple(turns), row.text("chosen"), row.text("rejected"))
    chosen, rejected = row.turns("chosen"), row.turns("rejected")
    if isinstance(row.value.get("prompt"), list):
        prompt_turns = row.turns("prompt")
        if chosen[: len(prompt_turns)] != prompt_turns:
            chosen, rejected = prompt_turns + chosen, prompt_turns + rejected
    elif "prompt" in row.value and [turn.role for turn in chosen] == ["assistant"]:
        opening = [Message("user", row.text("prompt"))]
        chosen, rejected = opening + chosen, opening + rejected
    return _pair(row, chosen, rejected)


def _read_implicit_preference(row: _Row) -> Preference:
    """`chosen`, `rejected` alone: whole dialogues that share their beginning."""
    if isinstance(row.value.get("chosen"), list):
        return _pair(row, row.turns("chosen"), row.turns("rejected"))
    return _pair(row, _transcript(row, "chosen"), _transcript(row, "rejected"))


TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")


def _transcript(row: _Row, name: str) -> list[Message]:
    """The turns of an Anthropic HH transcript (Bai et al. 2022)."""
    before, *parts = TRANSCRIPT_TURN.split(row.text(name))
    if before.strip() or not parts:
        raise row.error(
            f"field {name!r} is not a transcript that begins with a Human turn "
            "('\\n\\nHuman: ... \\n\\nAssistant: ...'), and there is no 'prompt' field"
        )
    speakers, texts = parts[0::2], parts[1::2]
    return [
        Message("user" if speaker == "Human" else "assistant", text.strip())
        for speaker, text in zip(speakers, texts, strict=True)
    ]


def _read_sharegpt_ranking(row: _Row) -> Preference:
    prompt = row.turns("conversations", role_key="from", text_key="value")
    sides = []
    for name in ("chosen", "rejected"):
        turn = row.turn(row.value.get(name), name, role_key="from", text_key="value")
        if turn.role != "assistant":
            raise row.error(f"{name!r} is a {turn.role} turn, not an answer")
        sides.append(turn.content)
    return _preference(row, tuple(prompt), *sides)


def _pair(row: _Row, chosen: list[Message], rejected: list[Message]) -> Preference:
    """Two dialogues that may differ in their last turn only."""
    prompt, *sides = extract_prompt(as_turns(tuple(chosen)), as_turns(tuple(rejected)))
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in sides):
        raise _Skip("have a chosen and a rejected that differ before the last answer")
    return _preference(row, tuple(chosen[: len(prompt)]), *(side[0]["content"] for side in sides))


def _preference(row: _Row, prompt: Conversation, chosen: str, rejected: str) -> Preference:
    if not prompt or prompt[-1].role == "assistant":
        raise _Skip("have a prompt that does not end with a user turn")
    if not chosen.strip() or not rejected.strip():
        raise _Skip("have an empty answer")
    if chosen == rejected:
        raise _Skip("have an identical chosen and rejected")
    margin = row.optional_amount("margin")
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin)


def _read_unpaired(row: _Row) -> Unpaired:
    """`prompt`, `completion`, `label`: texts, or lists of turns; true is a good answer."""
    as_turns = isinstance(row.value.get("prompt"), list)
    turns = row.turns("prompt") if as_turns else [Message("user", row.text("prompt"))]
    if not isinstance(row.value.get("completion"), list):
        return _unpaired(row, turns, row.text("completion"))
    answer = row.turns("completion")
    if [turn.role for turn in answer] != ["assistant"]:
        raise row.error("field 'completion' is not one assistant turn")
    return _unpaired(row, turns, answer[0].content)


def _read_labelled_messages(row: _Row) -> Unpaired:
    *prompt, answer = row.turns("messages")
    if answer.role != "assistant":
        raise _Skip("do not end with an answer")
    return _unpaired(row, prompt, answer.content)


def _unpaired(row: _Row, prompt: list[Message], completion: str) -> Unpaired:
    if not prompt or prompt[-1].role == "assistant":
        raise _Skip("have a prompt that does not end with a user turn")
    if not completion.strip():
        raise _Skip("have an empty answer")
    return Unpaired(prompt=tuple(prompt), completion=completion, is_good=row.truth("label"))


def _read_document(row: _Row) -> Document:
    text = row.text("text")
    if not text.strip():
        raise _Skip("have an empty text")
    return Document(text=text, domain=row.optional_text("domain") or None)


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A format: the columns it needs, those it can use, and how a row becomes an example."""

    name: str
    kind: Kind
    needs: tuple[str, ...]
    uses: tuple[str, ...] = ()
    read: Callable[[_Row], Example] = field(repr=False)


# The order matters: a preference file's columns include those of a simpler format.
READERS = (
    _Reader(
        name="sharegpt-ranking",
        kind="preference",
        needs=("conversations", "chosen", "rejected"),
        uses=("margin",),
        read=_read_sharegpt_ranking,
    ),
    _Reader(
        name="preference",
        kind="preference",
        needs=("prompt", "chosen", "rejected"),
        uses=("margin",),
        read=_read_preference,
    ),
    _Reader(
        name="implicit-preference",
        kind="preference",
        needs=("chosen", "rejected"),
        uses=("margin",),
        read=_read_implicit_preference,
    ),
    _Reader(
        name="unpaired",
        kind="unpaired",
        needs=("prompt", "completion", "label"),
        read=_read_unpaired,
    ),
    _Reader(
        name="labelled-messages",
        kind="unpaired",
        needs=("messages", "label"),
        read=_read_labelled_messages,
    ),
    _Reader(name="messages", kind="instruction", needs=("messages",), read=_read_messages),
    _Reader(
        name="alpaca",
        kind="instruction",
        needs=("instruction", "output"),
        uses=("input", "history", "system"),
        read=_read_alpaca,
    ),
    _Reader(name="text", kind="document", needs=("text",), uses=("domain",), read=_read_document),
)
FIELDS = {name for reader in READERS for name in (*reader.needs, *reader.uses)}
# Columns that change what a row means: reading the rest without them would teach the wrong thing.
CONTRADICTIONS = {reader.name: () for reader in READERS} | {
    "labelled-messages": ("tools",),
    "messages": ("tools",),
    "alpaca": ("chosen", "rejected", "label"),
}
LIKELY_FIELDS = {
    "instruction": ("question", "query", "prompt", "problem", "input"),
    "output": ("answer", "response", "completion", "solution", "target"),
}


def rename_columns(record: Record, columns: Mapping[str, str], file: Path) -> Record:
    """The record with the file's column names replaced by ours."""
    if not columns:
        return record
    unknown = sorted(set(columns) - FIELDS)
    if unknown:
        raise UserError(
            f"--columns {unknown[0]}=...: no field of that name. "
            f"Fields: {', '.join(sorted(FIELDS))}."
        )
    if not isinstance(record.value, dict):
        raise UserError(f"{file} {record.place}: --columns needs rows with named columns.")
    missing = [theirs for theirs in columns.values() if theirs not in record.value]
    if missing:
        have = ", ".join(record.value)
        raise UserError(f"{file} {record.place}: no column {missing[0]!r}. It has: {have}.")
    kept = {key: value for key, value in record.value.items() if key not in columns.values()}
    ours = {name: record.value[theirs] for name, theirs in columns.items()}
    return replace(record, value=kept | ours)


def _pick_reader(record: Record, file: Path) -> _Reader:
    if isinstance(record.value, list):
        return next(reader for reader in READERS if reader.name == "messages")
    if not isinstance(record.value, dict):
        raise UserError(
            f"{file} {record.place} is {_kind_of_json(record.value)}; a row has to be an object "
            "with named fields, or a list of turns."
        )
    columns = list(map(str, record.value))
    for reader in READERS:
        if not set(reader.needs) <= set(columns):
            continue
        if contradicting := [name for name in CONTRADICTIONS[reader.name] if name in columns]:
            raise UserError(
                f"{file} is {reader.name} with a column {contradicting[0]!r}, which changes what "
                "the answers mean and is not read. Give a file without it, or convert the rows."
            )
        return reader
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    raise UserError(
        f"{file} has columns {shown}. Need one of: {KNOWN_FORMATS}. "
        f"Map with --columns {_suggested_columns(columns)}"
    )


def _suggested_columns(columns: list[str]) -> str:
    suggestion = []
    for ours, candidates in LIKELY_FIELDS.items():
        theirs = next((name for name in candidates if name in columns), "THEIR_NAME")
        suggestion.append(f"{ours}={theirs}")
    return " ".join(suggestion)


def read_rows(records: list[Record], file: Path) -> Examples:
    """The records as examples, in the format that the columns of the first one say.

    A UserError names the file, the row and the field when one is missing, broken or unknown, and
    the known formats when the columns fit none.
    """
    reader = _pick_reader(records[0], file)
    rows: list[Example] = []
    places: list[str] = []
    skipped: dict[str, list[str]] = {}
    for record in records:
        value = {"messages": record.value} if isinstance(record.value, list) else record.value
        where = f"{file} {record.place}"
        if not isinstance(value, dict):
            raise UserError(f"{where} is {_kind_of_json(value)}, not an object. Mend or delete it.")
        try:
            rows.append(reader.read(_Row(where=where, value=value)))
            places.append(record.place)
        except _Skip as reason:
            skipped.setdefault(str(reason), []).append(record.place)
    notes = [*note_dropped(skipped, total=len(records), name=str(file))]
    notes += _unused_columns(records, reader) + _placeholders(rows, places)
    return Examples(
        rows=tuple(rows),
        kind=reader.kind,
        format=reader.name,
        name=str(file),
        places=tuple(places),
        notes=tuple(notes),
    )


def _unused_columns(records: list[Record], reader: _Reader) -> list[str]:
    known = {*reader.needs, *reader.uses}
    found = {
        str(name): None
        for record in records
        if isinstance(record.value, dict)
        for name in record.value
        if name not in known
    }
    return [f"Columns not used: {', '.join(found)}."] if found else []


PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")


def _placeholders(rows: list[Example], places: list[str]) -> list[str]:
    found = []
    for row, place in zip(rows, places, strict=True):
        answer = row.conversation[-1].content if isinstance(row, Instruction) else ""
        if match := PLACEHOLDER.search(answer):
            found.append((place, match[0]))
    if not found:
        return []
    return [
        f"{len(found)} of {len(rows)} answers hold a placeholder such as {found[0][1]} "
        f"({found[0][0]}): a model would learn to write it. Fill them in."
    ]


def split_documents(text: str, file: Path) -> Examples:
    """A text file is one document, or several between <|endoftext|> marks."""
    text = text.replace("\r\n", "\n")
    parts = [text]
    if DOCUMENT_SEPARATOR in text:
        parts = [part.strip() for part in text.split(DOCUMENT_SEPARATOR)]
    rows = tuple(Document(text=part) for part in parts if part.strip())
    if not rows:
        raise UserError(f"{file} holds no text.")
    return Examples(
        rows=rows,
        kind="document",
        format="text",
        name=str(file),
        places=tuple(f"document {number}" for number in range(1, len(rows) + 1)),
    )
