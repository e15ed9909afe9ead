"""Data files: bytes -> text -> rows of JSON, each with its place in the file.

The decision to know: a file that is broken anywhere is refused whole, by a sentence that names the
line, the column and the text around it; nothing is mended by guessing.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a file as it was parsed; `place` is "line 17" or "row 3"."""

    place: str
    value: Any


def suffix_of(file: Path) -> str:
    """The ending that says what a file holds, without .gz: ".jsonl" of "x.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_text(file: Path) -> str:
    """The text of a data file, unpacked and decoded; a UserError says why it cannot be had."""
    return _decode(_read_bytes(file), file)


def _read_bytes(file: Path) -> bytes:
    if file.is_dir():
        raise UserError(f"{file} is a folder: give a file of it, {_neighbours(file)}.")
    if not file.is_file():
        where = f"No file {file} (looked from {Path.cwd()})."
        if file.parent.is_dir():
            raise UserError(f"{where} In that folder: {_neighbours(file.parent)}.")
        raise UserError(f"{where} The folder {file.parent} does not exist either.")
    if suffix_of(file) not in SUFFIXES:
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
    files = sorted(found.name for found in folder.iterdir() if suffix_of(found) in SUFFIXES)
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


def parse_records(text: str, file: Path) -> list[Record]:
    """The rows of a JSON or JSONL text; a UserError names the line that is broken, or no rows."""
    records = _parse_whole(text, file) if suffix_of(file) == ".json" else _parse_lines(text, file)
    if not records:
        raise UserError(f"{file} holds no rows.")
    return records


def _parse_whole(text: str, file: Path) -> list[Record]:
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
    return [Record(place=f"row {number}", value=row) for number, row in enumerate(rows, 1)]


def _parse_lines(text: str, file: Path) -> list[Record]:
    records = []
    # Only "\n" ends a line: U+2028 and U+0085 are legal inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record(place=f"line {number}", value=json.loads(line)))
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
