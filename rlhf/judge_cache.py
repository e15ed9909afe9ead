"""Verdicts on disk: a question is asked once, so a resumed run gets the scores it had.

The decision to know: each verdict is written the moment it is there, an unreadable one too, in the
order in which they come. What an endpoint was paid for is never lost, and asking again cannot
quietly change a score.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe.errors import UserError
from rlhf.judge import Judge, Verdict


@dataclass(kw_only=True)
class CachedJudge:
    """A judge that remembers. The key of a verdict is the judge's identity, labels, question.

    A file may hold several judges, but belongs to one process at a time: opening it cuts off a half
    line at its end, as a killed process leaves it, and that could be what another one is writing.
    Raises UserError for a line that is no verdict.
    """

    judge: Judge
    file: Path
    num_new: int = 0
    _held: dict[str, Verdict] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._held = _read(self.file)

    @property
    def identity(self) -> str:
        return self.judge.identity

    def ask(
        self, questions: Sequence[str], *, labels: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        keys = [self._key(question, labels) for question in questions]
        missing = {
            key: question
            for key, question in zip(keys, questions, strict=True)
            if key not in self._held
        }
        if missing:
            self._learn(missing, labels)
        yield from enumerate(self._held[key] for key in keys)

    def _learn(self, missing: dict[str, str], labels: Sequence[str]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        keys = list(missing)
        verdicts = self.judge.ask(list(missing.values()), labels=labels)
        with self.file.open("a", encoding="utf-8", newline="\n") as file:
            for number, verdict in verdicts:
                self._held[keys[number]] = verdict
                self.num_new += 1
                file.write(json.dumps({"key": keys[number], "verdict": verdict}) + "\n")
                file.flush()

    def _key(self, question: str, labels: Sequence[str]) -> str:
        text = json.dumps([self.identity, list(labels), question])
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def _read(file: Path) -> dict[str, Verdict]:
    if not file.is_file():
        return {}
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):  # a killed process left half a line: that one is asked again
        os.truncate(file, whole)
    held: dict[str, Verdict] = {}
    for number, line in enumerate(content[:whole].decode("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            found = row["verdict"]
            held[row["key"]] = None if found is None else tuple(map(float, found))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{file} line {number} is no verdict of a judge: delete this line."
            ) from error
    return held
