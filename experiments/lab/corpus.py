"""The pretraining mixture of the world `tales`: the grammar's domains and the standard library's.

Prose (`pydoc`) and source (`python`) are read at run time from the interpreter that runs, so
nothing is fetched or shipped; their text differs between Python versions, so a corpus names its
version. Shares are of tokens: document counts follow from them by measured tokens per document.
"""

import importlib
import platform
import random
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.lab import tales
from experiments.lab.tales import Split, seeded, split_of
from moe.errors import UserError

# Of tokens. Tales together 0.68.
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
# Mean tokens per document under a byte-level BPE of 1,024 trained on this very mixture, 8,000
# documents, Python 3.11; only ratios matter, and they move little with the vocabulary.
TOKENS_PER_DOCUMENT: dict[str, float] = {
    "tales_forest": 50,
    "tales_sea": 50,
    "tales_town": 50,
    "tales_zh": 50,
    "arithmetic": 35,
    "lists": 50,
    "pydoc": 120,
    "python": 140,
}
LIBRARY_DOMAINS = ("pydoc", "python")
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
    """The mixture, shuffled; no held-out document's text is ever drawn for training.

    `library` is a folder of `*.py` files (default: the running interpreter's own). A library domain
    that is absent is left out with a note and its share goes to the others in proportion.
    """
    _check(num_documents, shares)
    pieces, notes = _library_pieces(shares, split=split, library=library)
    present = {name: share for name, share in shares.items() if share > 0 and pieces.get(name, [""])}
    documents: list[Document] = []
    for domain, count in _counts(present, num_documents).items():
        rng = seeded(seed, "corpus", domain, split)
        if domain in pieces:
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
