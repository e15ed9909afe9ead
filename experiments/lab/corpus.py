"""The pretraining mixture of the world `tales`: the grammar's domains and the standard library's.

Prose (`pydoc`) and source (`python`) are read at run time from the interpreter that runs, so
nothing is fetched or shipped; their text differs between Python versions, so a corpus names its
version. Shares are of tokens: document counts follow from them by measured tokens per document.
"""

import ast
import platform
import random
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.lab import tales
from experiments.lab.tales import Split, seeded, split_of
from moe.errors import UserError

# Of tokens; the tales together have 0.68.
SHARES: dict[str, float] = {
    "tales_forest": 0.17,
    "tales_sea": 0.17,
    "tales_town": 0.17,
    "tales_zh": 0.17,
    "arithmetic": 0.06,
    "lists": 0.06,
    "pydoc": 0.10,
    "python": 0.10,
}
# Mean tokens per document under a byte-level BPE of 1,024 trained on this very mixture (6,000
# documents, Python 3.11). Only ratios matter, and they move little with version and vocabulary.
TOKENS_PER_DOCUMENT: dict[str, float] = {
    "tales_forest": 53,
    "tales_sea": 53,
    "tales_town": 54,
    "tales_zh": 48,
    "arithmetic": 40,
    "lists": 65,
    "pydoc": 192,
    "python": 184,
}
PIECE_CHARACTERS = 320


@dataclass(frozen=True, kw_only=True)
class Document:
    """One pretraining text and the domain it was drawn from."""

    domain: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in training order; `notes` says, a sentence each, what could not be had."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...]
    python_version: str


def pretraining_documents(
    seed: int,
    num_documents: int,
    *,
    split: Split = "train",
    shares: Mapping[str, float] = SHARES,
    library: Path | None = None,
) -> Corpus:
    """The mixture, shuffled; no text of the held-out side is ever drawn for the training side.

    `library` is a folder of `*.py` files, by default the running interpreter's own. A library
    domain that is absent is left out with a note, and its share goes to the others in proportion.
    """
    _check(num_documents, shares)
    folder = library or Path(sysconfig.get_path("stdlib"))
    present = {domain: share for domain, share in shares.items() if share > 0}
    pieces: dict[str, list[str]] = {}
    notes: list[str] = []
    for domain, read in {"pydoc": _prose, "python": _source}.items():
        if domain not in present:
            continue
        pieces[domain] = [piece for text in read(folder) for piece in _pieces(text, split=split)]
        if not pieces[domain]:
            del present[domain]
            notes.append(_absence(domain, library=folder))
    if not present:
        raise UserError(f"the corpus would be empty: {' '.join(notes)}")
    documents: list[Document] = []
    for domain, count in _counts(present, num_documents=num_documents).items():
        if domain in pieces:
            rng = seeded(seed, "corpus", domain, split)
            texts = _draw(pieces[domain], count, rng=rng)
        else:
            texts = tales.documents(seed, count, domain=domain, split=split)
        documents.extend(Document(domain=domain, text=text) for text in texts)
    seeded(seed, "corpus", split).shuffle(documents)
    return Corpus(
        documents=tuple(documents),
        notes=tuple(notes),
        python_version=platform.python_version(),
    )


def _check(num_documents: int, shares: Mapping[str, float]) -> None:
    unknown = sorted(set(shares) - set(SHARES))
    if unknown:
        raise UserError(
            f"no domain is called {', '.join(unknown)}; choose among {', '.join(SHARES)}."
        )
    if any(share < 0 for share in shares.values()) or not any(shares.values()):
        raise UserError(f"shares are {dict(shares)}; each must be zero or more and one above zero.")
    if num_documents < 1:
        raise UserError(f"num_documents is {num_documents}; a corpus needs at least one.")


def _counts(shares: Mapping[str, float], *, num_documents: int) -> dict[str, int]:
    """Documents per domain by largest remainder, so that a small corpus keeps its mixture too."""
    rates = {domain: share / TOKENS_PER_DOCUMENT[domain] for domain, share in shares.items()}
    exact = {domain: num_documents * rate / sum(rates.values()) for domain, rate in rates.items()}
    counts = {domain: int(number) for domain, number in exact.items()}
    by_remainder = sorted(exact, key=lambda domain: counts[domain] - exact[domain])
    for domain in by_remainder[: num_documents - sum(counts.values())]:
        counts[domain] += 1
    return counts


def _draw(pieces: Sequence[str], count: int, *, rng: random.Random) -> list[str]:
    """`count` pieces; one comes again only after all the others had a turn."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn.extend(rng.sample(pieces, min(len(pieces), count - len(drawn))))
    return drawn


def _prose(library: Path) -> Iterator[str]:
    """The language reference as `pydoc` prints it, one topic at a time; read, never executed."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            yield from (topics[name] for name in sorted(topics))


def _source(library: Path) -> Iterator[str]:
    """The library's top-level modules; its packages hold tests and tables that would swamp them."""
    for path in sorted(library.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _pieces(text: str, *, split: Split) -> Iterator[str]:
    """Runs of whole lines of about PIECE_CHARACTERS, ASCII only, of one side.

    The side is a hash of the piece, so that a passage that occurs twice cannot be on both sides.
    """
    for piece in _chunks(text.split("\n")):
        if piece.isascii() and split_of(piece) == split:
            yield piece


def _chunks(lines: Sequence[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line) + 1
        if size >= PIECE_CHARACTERS:
            yield "\n".join(held).strip("\n")
            held, size = [], 0
    # The rest of a text is dropped: a stray closing line teaches nothing.


def _absence(domain: str, *, library: Path) -> str:
    missing = "pydoc_data/topics.py" if domain == "pydoc" else "*.py sources"
    return (
        f"The domain {domain} was left out: the standard library at {library} has no {missing}; "
        "its share went to the other domains."
    )
