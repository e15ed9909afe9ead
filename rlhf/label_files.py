"""What a comparison by raters leaves on disk, and how it is read again.

The decision to know: the votes file is the record and is only ever appended to, a line and a flush
for each key that is pressed (an undo is a line too). The preference file is rebuilt from it whole,
so that whatever ends the process, no vote is lost and no pair stands twice.

Beside OUT.jsonl (the preferences) lie OUT.answers.json (what is compared, made once, for all
raters), OUT.votes.jsonl and OUT.summary.json.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moe.errors import UserError
from sft.run import write_json_atomic, write_text_atomic
from sft.text import Conversation, Message, conversation_text

Side = Literal["A", "B"]
Outcome = Literal["A", "B", "tie", "identical", "skip", "undone"]
JUDGED: tuple[Outcome, ...] = ("A", "B", "tie")  # somebody looked and said so


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote; ended: by itself, not by the limit of tokens."""

    text: str
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt with the answers of both models."""

    prompt: Conversation
    a: Answer
    b: Answer

    @property
    def key(self) -> str:
        """The prompt's name in the files."""
        return key_of(self.prompt)

    def of(self, side: Side) -> Answer:
        return self.a if side == "A" else self.b


def key_of(prompt: Conversation) -> str:
    """16 hex digits of the prompt's text."""
    return hashlib.sha256(conversation_text(prompt).encode("utf-8")).hexdigest()[:16]


def other(side: Side) -> Side:
    return "B" if side == "A" else "A"


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One rater on one pair.

    first: the side that was shown first, None where both orders were (a judge) or none (identical).
    first_probability: of a judge, that the first shown is better, with A first and with B first.
    """

    key: str
    rater: str
    outcome: Outcome
    first: Side | None = None
    first_probability: tuple[float, float] | None = None

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"key": self.key, "rater": self.rater, "outcome": self.outcome}
        if self.first is not None:
            row["first"] = self.first
        if self.first_probability is not None:
            row["first_probability"] = list(self.first_probability)
        return row


@dataclass(frozen=True, kw_only=True)
class LabelFiles:
    """The files of one comparison, by the name of its preference file."""

    out: Path

    def __post_init__(self) -> None:
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out {self.out} is a file of JSON lines: give it the ending .jsonl.")

    @property
    def answers(self) -> Path:
        return self.out.with_suffix(".answers.json")

    @property
    def votes(self) -> Path:
        return self.out.with_suffix(".votes.jsonl")

    @property
    def summary(self) -> Path:
        return self.out.with_suffix(".summary.json")

    @property
    def judgements(self) -> Path:
        return self.out.with_suffix(".judgements.jsonl")

    def refuse_foreign(self) -> None:
        """Raises UserError where OUT was written by something else, which rebuilding would lose."""
        if self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder: give a file, such as pairs.jsonl.")
        if self.out.exists() and not self.votes.exists():
            raise UserError(
                f"{self.out} holds rows that no labelling wrote (there is no {self.votes.name} "
                "beside it): give another --out."
            )

    # The answers.

    def read_answers(self, made_of: Mapping[str, Any]) -> list[Pair] | None:
        """The pairs made by the same command before, None without; UserError for another's."""
        if not self.answers.is_file():
            return None
        stored = json.loads(self.answers.read_text(encoding="utf-8"))
        held = stored["made_of"]
        for name in dict.fromkeys([*held, *made_of]):
            if held.get(name) != made_of.get(name):
                raise UserError(
                    f"{self.answers} was made with {name.replace('_', ' ')} {held.get(name)}, and "
                    f"now it is {made_of.get(name)}: raters have to see the same texts. Give what "
                    "it was made with, or another --out."
                )
        return [_pair(row) for row in stored["pairs"]]

    def write_answers(self, pairs: Sequence[Pair], *, made_of: Mapping[str, Any]) -> None:
        self.answers.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt],
                "a": {"text": pair.a.text, "ended": pair.a.ended},
                "b": {"text": pair.b.text, "ended": pair.b.ended},
            }
            for pair in pairs
        ]
        write_json_atomic(self.answers, {"made_of": dict(made_of), "pairs": rows})

    # The votes.

    def mend(self) -> str | None:
        """Cut off a last line that a killed process left half written; says so."""
        if not self.votes.is_file():
            return None
        content = self.votes.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return None
        os.truncate(self.votes, whole)
        return f"{self.votes.name}: its last line was half written and is dropped; asked again."

    def read_votes(self) -> list[Vote]:
        """What holds now, in the order it was said: of a pair a rater's last word, undone none."""
        if not self.votes.is_file():
            return []
        votes: dict[tuple[str, str], Vote] = {}
        text = self.votes.read_text(encoding="utf-8")
        for number, line in enumerate(text.split("\n"), start=1):
            if not line:
                continue
            vote = _vote(line, where=f"{self.votes} line {number}")
            votes.pop((vote.rater, vote.key), None)
            if vote.outcome != "undone":
                votes[vote.rater, vote.key] = vote
        return list(votes.values())

    def append(self, *votes: Vote) -> None:
        """The votes are on disk when this returns."""
        if not votes:
            return
        self.votes.parent.mkdir(parents=True, exist_ok=True)
        with self.votes.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(vote.row()) + "\n" for vote in votes))
            file.flush()
            os.fsync(file.fileno())

    # The preferences.

    def rebuild(self, pairs: Sequence[Pair]) -> int:
        """Write OUT from the votes, or nothing while there is no preference; the number of rows."""
        rows = preference_rows(self.read_votes(), pairs)
        if rows or self.out.exists():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text_atomic(self.out, "".join(lines))
        return len(rows)


def is_usable(pair: Pair) -> bool:
    """Whether training could learn from a preference here: no answer is empty."""
    return bool(pair.a.text.strip()) and bool(pair.b.text.strip())


def preference_rows(votes: Iterable[Vote], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Rows that `rlhf.train` reads, one for each vote that prefers a side; with where from.

    A prompt of one user turn is a text, any other a list of turns. Ties are in the votes only, and
    so is a preference over an empty answer, which a data file cannot hold.
    """
    by_key = {pair.key: pair for pair in pairs if is_usable(pair)}
    rows = []
    for vote in votes:
        pair = by_key.get(vote.key)
        if pair is None or vote.outcome not in ("A", "B"):
            continue
        side: Side = "A" if vote.outcome == "A" else "B"
        rows.append(
            {
                "prompt": _prompt_column(pair.prompt),
                "chosen": pair.of(side).text,
                "rejected": pair.of(other(side)).text,
                "chosen_from": side,
                "rater": vote.rater,
                "key": vote.key,
            }
        )
    return rows


def _prompt_column(prompt: Conversation) -> str | list[dict[str, str]]:
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return [{"role": message.role, "content": message.content} for message in prompt]


def _pair(row: Mapping[str, Any]) -> Pair:
    return Pair(
        prompt=tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]),
        a=Answer(**row["a"]),
        b=Answer(**row["b"]),
    )


def _vote(line: str, *, where: str) -> Vote:
    try:
        row = json.loads(line)
        both = row.get("first_probability")
        vote = Vote(
            key=row["key"],
            rater=row["rater"],
            outcome=row["outcome"],
            first=row.get("first"),
            first_probability=None if both is None else (float(both[0]), float(both[1])),
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{where} is no vote: mend or delete this line.") from error
    if vote.outcome not in get_args(Outcome) or vote.first not in (None, "A", "B"):
        raise UserError(f"{where} is no vote ({vote.outcome!r}): mend or delete this line.")
    return vote
