"""Files -> conversations -> labelled batches.

The format is detected from the columns; nothing has to be registered. The decision to know: no row
vanishes quietly. What is left out is counted in `notes` with its lines, and a file of which more
than a tenth would be left out is refused, because then the file is not what its reader thinks.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NotRequired, TypedDict, TypeVar

from moe.errors import UserError
from sft.text import (
    ROLES,
    Conversation,
    Message,
    TextPath,
    conversation_text,
    pad_batch,
)

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
LARGEST_DROPPED_SHARE = 0.10
SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt")
DOCUMENT_SEPARATOR = "<|endoftext|>"
KNOWN_FORMATS = (
    "alpaca (instruction, output), messages, prompt+chosen+rejected, chosen+rejected, "
    "conversations+chosen+rejected, text"
)

Kind = Literal["instruction", "preference", "document"]


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A conversation that ends with the answer to learn."""

    conversation: Conversation


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A prompt with a better and a worse answer."""

    prompt: Conversation
    chosen: str
    rejected: str


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


Example = Instruction | Preference | Document
KIND_OF: dict[type, Kind] = {
    Instruction: "instruction",
    Preference: "preference",
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


# --- reading files -----------------------------------------------------------------------------


def read_examples(path: str | Path, *, columns: Mapping[str, str] | None = None) -> Examples:
    """The examples in a JSON, JSONL or text file, plain or .gz.

    `columns` maps our field names to the file's ({"instruction": "question"}). A UserError names
    the file, the line and the field whenever something is missing, broken or unknown.
    """
    file = Path(path)
    text = _decode(_read_bytes(file), file)
    if _suffix(file) == ".txt":
        if columns:
            raise UserError(f"{file} is plain text: it has no columns to map with --columns.")
        return _split_documents(text, file)
    records = _parse(text, file)
    if not records:
        raise UserError(f"{file} holds no rows.")
    records = [_renamed(record, columns or {}, file) for record in records]
    reader = _pick_reader(records[0], file)
    return _read_records(records, reader, file)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """One row of a file as it was parsed; `place` is "line 17" or "row 3"."""

    place: str
    value: Any


def _suffix(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_bytes(file: Path) -> bytes:
    if file.is_dir():
        raise UserError(f"{file} is a folder: give a file of it, {_neighbours(file)}.")
    if not file.is_file():
        where = f"No file {file} (looked from {Path.cwd()})."
        if file.parent.is_dir():
            raise UserError(f"{where} In that folder: {_neighbours(file.parent)}.")
        raise UserError(f"{where} The folder {file.parent} does not exist either.")
    if _suffix(file) not in SUFFIXES:
        raise UserError(
            f"{file}: cannot read this kind of file. Give one of {', '.join(SUFFIXES)}, "
            "plain or with .gz."
        )
    content = file.read_bytes()
    if file.suffix.lower() != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise UserError(f"{file} is not a whole gzip file: {error}. Fetch it again.") from error


def _neighbours(folder: Path) -> str:
    files = sorted(found.name for found in folder.iterdir() if _suffix(found) in SUFFIXES)
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return (", ".join(files[:8]) + more) or "no data file"


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        guess = _guess_encoding(content)
        raise UserError(
            f"{file} is {guess}, not UTF-8 (line {line}, byte 0x{content[error.start]:02x}). "
            f"Convert it: iconv -f {guess} -t UTF-8 {file.name} > {file.stem}.utf8{file.suffix}"
        ) from error


def _guess_encoding(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        content.decode("gbk")
    except UnicodeDecodeError:
        return "LATIN1"
    return "GBK"


def _parse(text: str, file: Path) -> list[_Record]:
    if _suffix(file) in (".jsonl", ".ndjson"):
        return _parse_lines(text, file)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        # Many a .json file holds a value per line, and then the first one ends before the text.
        begins_line = text.rfind("\n", 0, error.pos) >= len(text[: error.pos].rstrip())
        if error.msg == "Extra data" and begins_line:
            return _parse_lines(text, file)
        raise _broken_json(error, file, line=error.lineno) from error
    except RecursionError as error:
        raise UserError(f"{file}: the JSON is nested too deeply to be a data file.") from error
    rows = whole if isinstance(whole, list) else [whole]
    if rows and all(isinstance(row, dict) and {"role", "content"} <= row.keys() for row in rows):
        rows = [rows]
    return [_Record(place=f"row {number}", value=row) for number, row in enumerate(rows, 1)]


def _parse_lines(text: str, file: Path) -> list[_Record]:
    records = []
    # Only "\n" ends a line: U+2028 and U+0085 are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_Record(place=f"line {number}", value=json.loads(line)))
        except json.JSONDecodeError as error:
            raise _broken_json(error, file, line=number) from error
        except RecursionError as error:
            raise UserError(f"{file} line {number}: the JSON is nested too deeply.") from error
    return records


def _broken_json(error: json.JSONDecodeError, file: Path, *, line: int) -> UserError:
    problem = error.msg[:1].lower() + error.msg[1:]
    near = error.doc[max(0, error.pos - 20) : error.pos + 20].strip()
    return UserError(
        f"{file} line {line}, column {error.colno}: {problem}. Near: {near!r}. "
        "Mend or delete this line."
    )


def _renamed(record: _Record, columns: Mapping[str, str], file: Path) -> _Record:
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


# --- formats -----------------------------------------------------------------------------------


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
        return _preference(tuple(turns), row.text("chosen"), row.text("rejected"))
    chosen, rejected = row.turns("chosen"), row.turns("rejected")
    if isinstance(row.value.get("prompt"), list):
        prompt_turns = row.turns("prompt")
        if chosen[: len(prompt_turns)] != prompt_turns:
            chosen, rejected = prompt_turns + chosen, prompt_turns + rejected
    elif "prompt" in row.value and [turn.role for turn in chosen] == ["assistant"]:
        opening = [Message("user", row.text("prompt"))]
        chosen, rejected = opening + chosen, opening + rejected
    return _pair(chosen, rejected)


def _read_implicit_preference(row: _Row) -> Preference:
    """`chosen`, `rejected` alone: whole dialogues that share their beginning."""
    if isinstance(row.value.get("chosen"), list):
        return _pair(row.turns("chosen"), row.turns("rejected"))
    return _pair(_transcript(row, "chosen"), _transcript(row, "rejected"))


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
    return _preference(tuple(prompt), *sides)


def _pair(chosen: list[Message], rejected: list[Message]) -> Preference:
    """Two dialogues that may differ in their last turn only."""
    from sft.trl_data import as_turns, extract_prompt

    prompt, *sides = extract_prompt(as_turns(tuple(chosen)), as_turns(tuple(rejected)))
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in sides):
        raise _Skip("have a chosen and a rejected that differ before the last answer")
    return _preference(tuple(chosen[: len(prompt)]), *(side[0]["content"] for side in sides))


def _preference(prompt: Conversation, chosen: str, rejected: str) -> Preference:
    if not prompt or prompt[-1].role == "assistant":
        raise _Skip("have a prompt that does not end with a user turn")
    if not chosen.strip() or not rejected.strip():
        raise _Skip("have an empty answer")
    if chosen == rejected:
        raise _Skip("have an identical chosen and rejected")
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


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
        read=_read_sharegpt_ranking,
    ),
    _Reader(
        name="preference",
        kind="preference",
        needs=("prompt", "chosen", "rejected"),
        read=_read_preference,
    ),
    _Reader(
        name="implicit-preference",
        kind="preference",
        needs=("chosen", "rejected"),
        read=_read_implicit_preference,
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
    "messages": ("label", "tools"),
    "alpaca": ("chosen", "rejected", "label"),
}
LIKELY_FIELDS = {
    "instruction": ("question", "query", "prompt", "problem", "input"),
    "output": ("answer", "response", "completion", "solution", "target"),
}


def _pick_reader(record: _Record, file: Path) -> _Reader:
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


def _read_records(records: list[_Record], reader: _Reader, file: Path) -> Examples:
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
    notes = [*_dropped(skipped, total=len(records), name=str(file))]
    notes += _unused_columns(records, reader) + _placeholders(rows, places)
    return Examples(
        rows=tuple(rows),
        kind=reader.kind,
        format=reader.name,
        name=str(file),
        places=tuple(places),
        notes=tuple(notes),
    )


def _dropped(
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


def _unused_columns(records: list[_Record], reader: _Reader) -> list[str]:
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


def _split_documents(text: str, file: Path) -> Examples:
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


# --- choosing rows -----------------------------------------------------------------------------

NEEDS = {
    "instruction": "this stage needs answers to learn (instructions)",
    "preference": "this method needs preferences (chosen/rejected)",
    "document": "pretraining needs plain text (a text field, or .txt)",
}
HOLDS = {
    "instruction": "instructions with one answer each",
    "preference": "preferences (chosen/rejected)",
    "document": "plain text",
}
REMEDIES = {
    ("preference", "instruction"): "Use rlhf.train --method dpo, or --use chosen.",
    ("instruction", "preference"): "Use sft.train --stage sft, or give a file of preferences.",
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
        for row in _only(Preference, examples)
    )
    note = "The chosen answers are used, the rejected ones are not."
    return replace(examples, rows=rows, kind="instruction", notes=(*examples.notes, note))


def prompt_text(example: Example) -> str:
    """What the model is given: the text by which rows count as the same."""
    if isinstance(example, Document):
        return example.text
    if isinstance(example, Preference):
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


ExampleT = TypeVar("ExampleT", Instruction, Preference, Document)


def _only(kind: type[ExampleT], examples: Examples) -> list[ExampleT]:
    require(examples, KIND_OF[kind])
    return [row for row in examples if isinstance(row, kind)]


# --- rows of ids -------------------------------------------------------------------------------


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
    """One prompt and two completions, the last two with their EOS unless they were cut."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    sample_id: int


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
    for example, place in zip(_only(Instruction, found), found.places, strict=True):
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
        return _only(Document, texts)
    return [Document(text=text) if isinstance(text, str) else text for text in texts]


def _all_learned(ids: list[int]) -> SupervisedRow:
    return {"input_ids": ids, "labels": list(ids), "sample_id": 0}


def _contiguous(token_lists: list[list[int]], *, block: int) -> Iterator[SupervisedRow]:
    stream = [token for tokens in token_lists for token in tokens]
    for start in range(0, len(stream), block):
        yield _all_learned(stream[start : start + block])


def _whole(token_lists: list[list[int]], *, block: int) -> Iterator[SupervisedRow]:
    from sft.trl_data import pack

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
    """
    found = as_examples(examples)
    rows: list[PreferenceRow] = []
    same: list[str] = []
    num_cut_prompts = num_cut_completions = 0
    for example, place in zip(_only(Preference, found), found.places, strict=True):
        prompt = _prompt_ids(example.prompt, text_path, where=f"{found.name} {place}")
        sides = [text_path.encode_completion(text) for text in (example.chosen, example.rejected)]
        room = max(text_path.max_length // 2, text_path.max_length - len(prompt))
        kept = [side[:room] for side in sides]
        kept_prompt = _cut_left(
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
    limit = f"--max-length {text_path.max_length}"
    skipped = {f"have the same ids for both answers under {limit}": same} if same else {}
    notes = _dropped(skipped, total=len(found), name=found.name, remedy="Raise --max-length.")
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
        ids = _prompt_ids(conversation, text_path, where=f"{found.name} {place}")
        kept = _cut_left(ids, length=length, bos_id=text_path.bos_id)
        num_cut += len(kept) < len(ids)
        rows.append(
            {"prompt_ids": kept, "prompt": conversation_text(conversation), "sample_id": len(rows)}
        )
    cut = f"{num_cut} of {len(rows)} prompts lose their beginning: over {length} tokens."
    return Rows(rows, notes=[cut] if num_cut else [])


def _prompt_of(example: Example, examples: Examples) -> Conversation:
    if isinstance(example, Preference):
        return example.prompt
    if isinstance(example, Instruction):
        return example.conversation[:-1]
    raise UserError(f"{examples.name} holds plain text; prompts come from instructions or pairs.")


def _prompt_ids(prompt: Conversation, text_path: TextPath, *, where: str) -> list[int]:
    ids = text_path.encode_prompt(prompt)
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens, so there is nothing to answer.")
    return ids


def _cut_left(ids: list[int], *, length: int, bos_id: int | None) -> list[int]:
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
    2i + 1 for the rejected answer of row i, because routing is kept by sample and token.
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
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "completion_mask": in_completion.bool(),
            "sample_ids": torch.tensor([sample for *_, sample in both], dtype=torch.int64),
        }
