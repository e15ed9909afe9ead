"""Sizes, folders and text of the experiment `upcycling`.

The decision to know: a seed's text is cut once into rows that nobody sees twice. The first part is
the dense start's; every arm that goes on from it is trained on the second part, in the same order,
and a model from scratch on the second part or on both.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.lab.corpus import Corpus, pretraining_documents
from moe.counters import permutation
from moe.errors import UserError
from sft.examples import Document
from sft.rows import SupervisedRow, document_rows
from sft.run import write_text_atomic
from sft.text import TextPath, pick_template, train_bpe


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that follows from `--scale`. Sizes in documents, rows, tokens and steps.

    model: fields of MoEConfig. start_steps, more_steps: of the dense start and of what goes on from
    it. curve_steps: between two looks at the first `curve_rows` held-out rows.
    """

    model: Mapping[str, int | float | str]
    vocab_size: int
    num_documents: int
    num_held_out: int
    block: int
    batch: int
    start_steps: int
    more_steps: int
    warmup_steps: int
    curve_steps: int
    curve_rows: int
    save_steps: int


_MODEL: Mapping[str, int | float | str] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "sliding_window": 32,
    "window_pattern": "SSSL",
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}
SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        model=_MODEL,
        vocab_size=1024,
        num_documents=9000,
        num_held_out=640,
        block=128,
        batch=8,
        start_steps=300,
        more_steps=200,
        warmup_steps=20,
        curve_steps=25,
        curve_rows=40,
        save_steps=100,
    ),
    "debug": Scale(
        model={**_MODEL, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32},
        vocab_size=320,
        num_documents=60,
        num_held_out=40,
        block=64,
        batch=4,
        start_steps=4,
        more_steps=4,
        warmup_steps=1,
        curve_steps=2,
        curve_rows=8,
        save_steps=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """One seed of a run: sizes, and where it works.

    folder: parent of `stages/s<seed>` (checkpoints) and of the arms' folders. rates: learning rate
    of each family. trunk_folder: where text and dense start are, if not in `stages/s<seed>`.
    """

    seed: int
    scale: str
    folder: Path
    rates: Mapping[str, float]
    trunk_folder: Path | None = None

    @property
    def sizes(self) -> Scale:
        return SCALES[self.scale]

    @property
    def stages(self) -> Path:
        return self.folder / "stages" / f"s{self.seed}"

    @property
    def trunk(self) -> Path:
        return self.trunk_folder or self.stages

    def arm_folder(self, name: str) -> Path:
        return self.folder / f"{name}-s{self.seed}"

    def judged(self, name: str) -> dict[str, Any]:
        """What the judge left of an arm."""
        text = (self.arm_folder(name) / "judged.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A seed's text as ids.

    start, more: rows of the two parts. held_out: domain by domain. special: fields of MoEConfig.
    sha256: of the whole.
    """

    start: list[SupervisedRow]
    more: list[SupervisedRow]
    held_out: list[SupervisedRow]
    special: dict[str, int]
    notes: list[str]
    sha256: str

    @property
    def pad_id(self) -> int:
        return self.special["pad_token_id"]

    @property
    def whole(self) -> list[SupervisedRow]:
        return [*self.start, *self.more]

    def for_curves(self, count: int) -> list[SupervisedRow]:
        """So many held-out rows, evenly spaced, because rows stand domain by domain."""
        total = len(self.held_out)
        return [self.held_out[i * total // count] for i in range(min(count, total))]


def prepare(lab: Lab) -> None:
    """Tokenizer, training rows and held-out rows of the seed, in one file."""
    path = lab.trunk / "text.json"
    if path.is_file():
        return
    sizes = lab.sizes
    corpus = pretraining_documents(lab.seed, sizes.num_documents)
    tokenizer = train_bpe((d.text for d in corpus.documents), vocab_size=sizes.vocab_size)
    text_path = TextPath(tokenizer, pick_template(tokenizer, "plain"), max_length=sizes.block)
    rows = _rows(corpus, text_path, block=sizes.block)
    wanted = sizes.batch * (sizes.start_steps + sizes.more_steps)
    if len(rows) < wanted:
        raise UserError(
            f"{sizes.num_documents} documents make {len(rows)} rows, and {wanted} are trained on: "
            "no row may come twice, so raise num_documents."
        )
    chosen = permutation(lab.seed, "upcycling rows", 0, length=len(rows))[:wanted]
    held_out_corpus = pretraining_documents(lab.seed, sizes.num_held_out, split="held_out")
    held_out = _rows(held_out_corpus, text_path, block=sizes.block)
    document = {
        "train": [rows[i]["input_ids"] for i in chosen],
        "held_out": [[row["domain"], row["input_ids"]] for row in held_out],
        "special": {
            "vocab_size": len(tokenizer),
            "pad_token_id": text_path.pad_id,
            "bos_token_id": text_path.bos_id,
            "eos_token_id": text_path.eos_id,
        },
        "notes": list(corpus.notes),
    }
    lab.trunk.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(document) + "\n")


def _rows(corpus: Corpus, text_path: TextPath, *, block: int) -> list[SupervisedRow]:
    documents = [Document(text=d.text, domain=d.domain) for d in corpus.documents]
    return list(document_rows(documents, text_path, block=block))


def read_text(lab: Lab) -> Prepared:
    """What `prepare` left."""
    whole = (lab.trunk / "text.json").read_text(encoding="utf-8")
    found = json.loads(whole)
    train: list[SupervisedRow] = [
        {"input_ids": ids, "labels": ids, "sample_id": i} for i, ids in enumerate(found["train"])
    ]
    cut = lab.sizes.batch * lab.sizes.start_steps
    return Prepared(
        start=train[:cut],
        more=train[cut:],
        held_out=[
            {"input_ids": ids, "labels": ids, "sample_id": i, "domain": domain}
            for i, (domain, ids) in enumerate(found["held_out"])
        ],
        special=found["special"],
        notes=found["notes"],
        sha256=hashlib.sha256(whole.encode("utf-8")).hexdigest(),
    )
