"""A rater in front of a terminal: two answers, one key, nothing that tells which model wrote which.

The decision to know: what a model wrote is data that may hold escape sequences, so no character
reaches the terminal that could move the cursor, set a colour or turn the direction of writing; it
is shown as its code instead.

Keys come from a function, so that a file, a pipe and a test can press them.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.errors import UserError
from rlhf.label_files import JUDGED, LabelFiles, Outcome, Pair, Side, Vote, other
from sft.text import conversation_text

Keys = Callable[[], str | None]  # the next key; None when there will be no more
Say = Callable[[str], None]

KEYS = {
    "1": "the first is better",
    "2": "the second is better",
    "t": "tie",
    "s": "skip",
    "u": "undo the last",
    "q": "quit",
}
WIDEST = 100
# Joiners that Indic scripts, Persian and emoji are written with; they change nothing but shapes.
_JOINERS = "\u200c\u200d"


# --- what is shown -------------------------------------------------------------------------------


def shown(text: str) -> str:
    """The text without what could steer a terminal: such characters as their codes, \\x1b."""
    text = text.replace("\r\n", "\n").expandtabs(4).strip()
    return "".join(c if c == "\n" or _is_harmless(c) else _code(c) for c in text)


def _is_harmless(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in (
        *("Cc", "Cf", "Cs", "Co"),
        *("Zl", "Zp"),
    )


def _code(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def are_identical(pair: Pair) -> bool:
    """Whether a rater could see no difference."""
    return shown(pair.a.text) == shown(pair.b.text)


def wrapped(text: str, *, width: int, indent: str = "    ") -> str:
    """Lines of at most `width` cells; Chinese characters take two."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, color_system=None)
    lines: list[str] = []
    for line in shown(text).split("\n"):
        pieces = Text(line).wrap(console, max(width - len(indent), 20))
        lines += [indent + piece.plain.rstrip() for piece in pieces] or [indent]
    return "\n".join(line.rstrip() for line in lines)


def print_safely(text: str) -> None:
    """Print, with codes for what the terminal's own encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _card(pair: Pair, *, first: Side, head: str) -> str:
    width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
    parts = ["-" * width, f" {head}", wrapped(conversation_text(pair.prompt), width=width)]
    for key, side in (("1", first), ("2", other(first))):
        answer = pair.of(side)
        cut = "" if answer.ended else " (cut at its limit of tokens)"
        text = wrapped(answer.text, width=width) if shown(answer.text) else "    (empty)"
        parts += ["", f" [{key}]{cut}", text]
    return "\n".join([*parts, ""])


# --- where keys come from ------------------------------------------------------------------------


def keys_of(text: str, *, name: str) -> Keys:
    """The keys in a text, blanks between them or not; UserError for one that there is not."""
    pressed = [c.lower() for c in text if not c.isspace()]
    for number, key in enumerate(pressed, start=1):
        if key not in KEYS:
            raise UserError(
                f"{name}: key {number} is {key!a}, and there are only {' '.join(KEYS)}."
            )
    left = iter(pressed)
    return lambda: next(left, None)


def keys_from(answers: Path | None) -> Keys:
    """The keys of a file, of a terminal, or of a pipe; UserError where there are none."""
    if answers is not None:
        if not answers.is_file():
            raise UserError(f"No file of keys {answers} (looked from {Path.cwd()}).")
        return keys_of(answers.read_text(encoding="utf-8"), name=str(answers))
    if sys.stdin is not None and sys.stdin.isatty():
        return terminal_key
    text = "" if sys.stdin is None or sys.stdin.closed else sys.stdin.read()
    if not text.strip():
        raise UserError(
            "Labelling needs a terminal, and here is none: give a file of keys by --answers, pipe "
            "them in, or let a model judge by --judge."
        )
    return keys_of(text, name="the piped keys")


def terminal_key() -> str | None:
    """One key without Enter where the system can do that, else the first of a line."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        line = sys.stdin.readline()
        return line.strip()[:1].lower() if line else None
    terminal: Any = termios
    descriptor = sys.stdin.fileno()
    with _restored(terminal, descriptor):
        tty.setcbreak(descriptor, terminal.TCSANOW)  # without the flush that is its default
        byte = os.read(descriptor, 1)
        key = byte.decode("ascii", "replace").lower()
        if key not in KEYS:  # an arrow is three bytes, and the last may look like a key
            terminal.tcflush(descriptor, terminal.TCIFLUSH)
    if not byte or key in ("\x04", "\0"):  # Ctrl-D; Linux keeps an early one as a zero
        return None
    return key


def drop_early_keys() -> None:
    """Forget what was pressed before now: a key that bounces is no word on the next pair."""
    try:
        import termios
    except ImportError:  # Windows
        return
    terminal: Any = termios
    if sys.stdin.isatty():
        terminal.tcflush(sys.stdin.fileno(), terminal.TCIFLUSH)


@contextmanager
def _restored(terminal: Any, descriptor: int) -> Any:
    before = terminal.tcgetattr(descriptor)
    try:
        yield
    finally:
        terminal.tcsetattr(descriptor, terminal.TCSADRAIN, before)


# --- the loop ------------------------------------------------------------------------------------


def ask(
    pairs: Sequence[Pair],
    order: Mapping[str, Side],
    *,
    rater: str,
    files: LabelFiles,
    keys: Keys,
    say: Say = print_safely,
) -> int:
    """Ask what this rater has not judged yet, vote by vote on disk; how many are left at the end.

    order: the keys to ask with the side shown first, as `rating_order` gives.
    """
    by_key = {pair.key: pair for pair in pairs}
    told = False
    while left := _pending(order, files, rater):
        if not told:
            told = True
            listed = "   ".join(f"{key} {meaning}" for key, meaning in KEYS.items())
            say(f"{len(left)} of {len(order)} to judge. Keys: {listed}")
        number = len(order) - len(left) + 1
        head = f"{number}/{len(order)}"
        if keys is terminal_key:
            drop_early_keys()
        say(_card(by_key[left[0]], first=order[left[0]], head=head))
        key = keys()
        while key is not None and key not in KEYS:
            say(f"Keys: {' '.join(KEYS)}")
            key = keys()
        if key is None or key == "q":
            break
        if key == "u":
            _undo(rater, order, files, say)
        else:
            first = order[left[0]]
            vote = Vote(key=left[0], rater=rater, outcome=_outcome(key, first), first=first)
            files.append(vote)
            say(f" {key}: {KEYS[key]}")
        files.rebuild(pairs)
    return len(_pending(order, files, rater))


def _pending(order: Mapping[str, Side], files: LabelFiles, rater: str) -> list[str]:
    done = {vote.key for vote in files.read_votes() if vote.rater == rater}
    return [key for key in order if key not in done]


def _outcome(key: str, first: Side) -> Outcome:
    if key == "1":
        return first
    if key == "2":
        return other(first)
    return "tie" if key == "t" else "skip"


def _undo(rater: str, order: Mapping[str, Side], files: LabelFiles, say: Say) -> None:
    mine = [
        vote
        for vote in files.read_votes()
        if vote.rater == rater and vote.key in order and vote.outcome in (*JUDGED, "skip")
    ]
    if not mine:
        say("There is nothing to undo.")
        return
    files.append(Vote(key=mine[-1].key, rater=rater, outcome="undone"))
    say("Undone; it is asked again.")
