"""Which experts does a model use on a text file, and what does that depend on?

Question: how evenly are the experts of each layer used on these texts; which are chosen together,
and again by the next token; does the use depend on the text's domain (--by domain) or on the single
token (--by token); and how far has it moved from another model, or how much of that model's routing
is there already (--against DIR2)?

Published: Mixtral shows no clear pattern by topic but much regularity by token, and repeats its
first choice for 24 to 28 % of neighbours in the middle layers, where even use gives 12.5 % (Jiang
et al. 2024, section 5, table 5); OLMoE, with more and smaller experts, specialises by domain and by
token (Muennighoff et al. 2024, section 5). Here the chance level stands beside each measure: of
repeats, that of the same tokens in another order within their piece.

Arms: none is trained. One pass over the texts, and with --against one by each model over the same
tokens. It takes our models, adapters and runs, and the families in moe.record.FOREIGN_ROUTERS.

Cost: loading the model and one forward pass: 15 seconds on 2 cores for 500 short texts (43,000
tokens) through 5 million parameters.

Verdict rule, fixed beforehand, with --by domain alone: DIFFERENT if the mean pairwise
Jensen-Shannon divergence between domains, averaged over layers, is above that of at least 95 % of
the shufflings of domain labels over whole texts (p <= 0.05); else NOT DISTINGUISHED. Otherwise the
run describes and judges nothing.

    python -m experiments.expert_utilization DIR --data FILE [--by domain|token] [--against DIR2]
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.lab.expert_terminal import show
from experiments.lab.runfiles import commit_of
from moe.errors import UserError
from sft.flags import main_guard, parse
from sft.run import Run, config_hash

if TYPE_CHECKING:
    from torch import nn

    from experiments.lab.expert_use import Observed, Text
    from sft.examples import Example, Examples
    from sft.models import ModelFolder
    from sft.text import TextPath

EXPERIMENT = "expert_utilization"
QUESTION = "Which experts does this model use on these texts, and what does that depend on?"
RULE = (
    "DIFFERENT if the domains' mean pairwise Jensen-Shannon divergence, averaged over layers, is "
    "above that of at least 95 % of the shufflings of domain labels over texts; else NOT "
    "DISTINGUISHED"
)
THRESHOLD = 0.05
DEFAULT_LENGTH = 512
# Below 19 shufflings no p-value can be 0.05.
LEAST = {
    "max_texts": 1,
    "max_length": 2,
    "batch_size": 1,
    "permutations": 19,
    "min_count": 1,
    "top_tokens": 1,
}
PLACES = ("out", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the experiment."""

    model: str = field(metadata={"positional": True, "help": "folder of a model, adapter or run"})
    data: Path = field(metadata={"help": ".txt, .json or .jsonl, plain or .gz"})
    by: Literal["layer", "domain", "token"] = field(
        default="layer", metadata={"help": "what the use is broken down by, beside layers"}
    )
    against: str | None = field(
        default=None, metadata={"help": "folder of another model: how far has routing moved?"}
    )
    max_texts: int = field(default=500, metadata={"help": "texts, spread evenly over the file"})
    max_length: int | None = field(
        default=None,
        metadata={"help": f"tokens per piece; longer texts are cut into pieces ({DEFAULT_LENGTH})"},
    )
    batch_size: int = field(default=16, metadata={"help": "pieces per forward pass"})
    columns: tuple[str, ...] = field(
        default=(), metadata={"help": "our=theirs pairs, as text=body"}
    )
    template: str | None = field(
        default=None, metadata={"help": "plain, alpaca, chatml, continuation or tokenizer"}
    )
    tokenizer: Path | None = field(
        default=None, metadata={"help": "its folder, if not the model's own"}
    )
    permutations: int = field(
        default=99, metadata={"help": "shufflings of tokens, and of domains with --by domain"}
    )
    seed: int = field(default=0, metadata={"help": "of the shufflings"})
    min_count: int = field(default=10, metadata={"help": "occurrences of a token, --by token"})
    top_tokens: int = field(default=5, metadata={"help": "tokens per expert, --by token"})
    out: Path | None = field(default=None, metadata={"help": "folder of the run"})
    overwrite: bool = field(default=False, metadata={"help": "empty --out first"})

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {value} must be at least {least}.")
        for pair in self.columns:
            if not all(pair.partition("=")):
                raise UserError(f"--columns {pair}: write our=theirs, as in text=body.")

    @property
    def idle(self) -> dict[str, str]:
        """Options without effect here, and the reason."""
        found: dict[str, str] = {}
        if self.by != "token":
            found |= dict.fromkeys(("min_count", "top_tokens"), f"with --by {self.by}")
        if self.out is None:
            found["overwrite"] = "without --out"
        return found

    @property
    def in_force(self) -> dict[str, Any]:
        """What config.yaml holds: the options with an effect on the result."""
        skipped = {*self.idle, *PLACES}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if k not in skipped and v is not None and v != ()}


# --- texts ---------------------------------------------------------------------------------------


def spread(total: int, most: int) -> list[int]:
    """At most `most` indices below `total`, evenly spaced, so that a sorted file keeps its mix."""
    if total <= most:
        return list(range(total))
    return [i * total // most for i in range(most)]


def encode_texts(examples: Examples, text_path: TextPath, *, max_length: int) -> list[Text]:
    """Every text's ids as the model would see them, cut into pieces of `max_length` tokens."""
    from experiments.lab.expert_use import Text

    texts = []
    for row, place in zip(examples.rows, examples.places, strict=True):
        ids = _ids(row, text_path)
        pieces = [tuple(ids[at : at + max_length]) for at in range(0, len(ids), max_length)]
        texts.append(Text(place=place, domain=getattr(row, "domain", None), pieces=tuple(pieces)))
    return texts


def _ids(row: Example, text_path: TextPath) -> list[int]:
    from sft.examples import Document, Preference, Unpaired
    from sft.text import Message

    if isinstance(row, Document):
        return text_path.encode_document(row.text)
    if isinstance(row, Preference):
        conversation = (*row.prompt, Message("assistant", row.chosen))
    elif isinstance(row, Unpaired):
        conversation = (*row.prompt, Message("assistant", row.completion))
    else:
        conversation = row.conversation
    return text_path.encode(conversation).input_ids


def domains_of(texts: Sequence[Text], file: Path) -> list[str]:
    """The domain of each text.

    Raises UserError, saying what to do, unless every text has one and two texts of each are there.
    """
    missing = [text.place for text in texts if not text.domain]
    if missing:
        raise UserError(
            f"--by domain: {len(missing)} of {len(texts)} texts in {file} have no domain (first: "
            f"{missing[0]}). Give a .jsonl file whose rows have `text` and `domain`, map the "
            "column with --columns domain=NAME, or leave --by out."
        )
    labels = [str(text.domain) for text in texts]
    sizes = {name: labels.count(name) for name in dict.fromkeys(labels)}
    small = [name for name, size in sizes.items() if size < 2]
    if len(sizes) < 2 or small:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"--by domain needs two domains or more with two texts or more each, got {shown} from "
            f"{file}: add texts, or raise --max-texts."
        )
    return labels


# --- model ---------------------------------------------------------------------------------------


def load_decoder(directory: str) -> tuple[nn.Module, ModelFolder]:
    """The decoder of a language, reward or value model, in eval, and where it was found.

    Raises UserError for a folder without a model, or a model without a router to record.
    """
    import torch

    from moe.record import FOREIGN_ROUTERS, has_router
    from sft.adapt import base_of
    from sft.models import find_model, load_causal_lm, load_scalar_model

    found = find_model(directory)
    document = json.loads((found.base / "config.json").read_text(encoding="utf-8"))
    kind = (document.get("architectures") or [""])[0]
    is_scalar = found.adapter is None and kind.endswith(("ForTokenClassification", "ForValue"))
    model: Any = load_scalar_model(directory) if is_scalar else load_causal_lm(found)
    # The decoder alone: logits over a large vocabulary would be most of the memory.
    decoder: Any = base_of(model).base_model
    if not has_router(decoder):
        raise UserError(
            f"{directory} is a {kind or 'model'} without a router to record: give a Switchyard "
            f"model with sparse layers or one of {', '.join(FOREIGN_ROUTERS)}."
        )
    return decoder.eval().to("cuda" if torch.cuda.is_available() else "cpu"), found


def piece_length(decoder: Any, *, asked: int | None) -> int:
    """Tokens per piece; raises UserError for more than the model has positions."""
    most = getattr(decoder.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if asked is not None and asked > most:
        raise UserError(
            f"--max-length {asked} is more than the model's {most} positions "
            f"(max_position_embeddings): give at most {most}."
        )
    return asked or min(DEFAULT_LENGTH, most)


def check_same_ids(texts: Sequence[Text], others: Sequence[Text], *, against: str) -> None:
    """Raises UserError unless both tokenizers wrote every text with the same ids."""
    for text, other in zip(texts, others, strict=True):
        if text.pieces != other.pieces:
            raise UserError(
                f"--against {against}: its tokenizer writes {text.place} with other ids "
                f"({sum(map(len, other.pieces))} tokens against {sum(map(len, text.pieces))}), so "
                "tokens do not correspond: compare models with the same tokenizer."
            )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs, read and checked before its folder is made; `labels` with --by domain."""

    decoder: nn.Module
    against: nn.Module | None
    text_path: TextPath
    texts: list[Text]
    labels: list[str]
    notes: tuple[str, ...]


def prepare(config: Config) -> Prepared:
    """Models, tokenizer and texts; raises UserError for whatever does not load or fit."""
    from sft.data import read_examples
    from sft.models import tokenizer_of
    from sft.text import TextPath, pick_template

    columns = dict(pair.split("=", 1) for pair in config.columns)
    examples = read_examples(config.data, columns=columns)
    examples = examples.select(spread(len(examples), config.max_texts))
    decoder, found = load_decoder(config.model)
    tokenizer = tokenizer_of(found, config.tokenizer)
    template = pick_template(tokenizer, config.template or found.template)
    text_path = TextPath(tokenizer, template, max_length=sys.maxsize)
    length = piece_length(decoder, asked=config.max_length)
    against = None
    if config.against is not None:
        against, other = load_decoder(config.against)
        length = min(length, piece_length(against, asked=config.max_length))
        other_path = TextPath(
            tokenizer_of(other, config.tokenizer), template, max_length=sys.maxsize
        )
        others = encode_texts(examples, other_path, max_length=length)
    texts = encode_texts(examples, text_path, max_length=length)
    if config.against is not None:
        check_same_ids(texts, others, against=config.against)
    return Prepared(
        decoder=decoder,
        against=against,
        text_path=text_path,
        texts=texts,
        labels=domains_of(texts, config.data) if config.by == "domain" else [],
        notes=examples.notes,
    )


# --- the run -------------------------------------------------------------------------------------


def run(config: Config) -> dict[str, Any]:
    """Records, writes the run's files and prints; returns the summary.

    Raises UserError for whatever is wrong with the folders, the file or their fit.
    """
    from rich.console import Console

    from experiments.lab.expert_files import write_files
    from experiments.lab.expert_use import observe
    from experiments.lab.report import write_all

    start = time.perf_counter()
    ready = prepare(config)
    state = Run.create(
        Path("results"), EXPERIMENT, config.in_force, out=config.out, overwrite=config.overwrite
    )
    with state:
        observed = observe(
            ready.decoder,
            ready.texts,
            pad_id=ready.text_path.pad_id,
            batch_size=config.batch_size,
            against=ready.against,
            per_text=config.by == "domain",
        )
        summary = summarise(config, state.folder, ready, observed)
        summary["timings"] = {"seconds": round(time.perf_counter() - start, 3)}
        write_files(state.folder, summary, observed)
        state.write_json("summary.json", summary)
        write_all(state.folder)
    show(summary, state.folder, Console(width=None if sys.stdout.isatty() else 140))
    return summary


def summarise(config: Config, folder: Path, ready: Prepared, observed: Observed) -> dict[str, Any]:
    """The whole summary but for its timings."""
    from experiments.lab import expert_summary

    name, other = model_names(config)
    stats = observed.stats
    layers, experts = stats.count_LE.shape
    chance = {"permutations": config.permutations, "seed": config.seed}
    all_stats = {name: stats, other: observed.other_stats}
    summary: dict[str, Any] = {
        "schema": 1,
        "experiment": EXPERIMENT,
        "question": QUESTION,
        "status": "done",
        "config_hash": config_hash(config.in_force),
        "commit": commit_of(folder),
        "by": config.by,
        "model": name,
        "shape": {"layers": layers, "experts": experts, "top_k": stats.top_k},
        "num_texts": len(ready.texts),
        "num_pieces": sum(len(text.pieces) for text in ready.texts),
        "num_tokens": int(stats.tokens_L[0]),
        "routing": {
            key: {k: [v] for k, v in expert_summary.measures(each).items()}
            for key, each in all_stats.items()
            if each is not None
        },
        "notes": list(ready.notes),
    }
    if observed.pairs is not None:
        summary["coactivation"] = expert_summary.pair_summary(observed.pairs)
    if repeated := expert_summary.neighbours(observed, **chance):
        summary["repeats"] = repeated
    if observed.other_stats is not None:
        summary["drift"] = expert_summary.against(observed, other)
    if config.by == "domain":
        assert observed.text_count_NLE is not None
        counts = observed.text_count_NLE
        summary["domains"] = expert_summary.by_domain(counts, ready.labels, **chance)
        summary["verdict"] = verdict(summary["domains"])
    if config.by == "token":
        summary["tokens"] = by_token(observed, ready.text_path, config)
        summary["vocabulary"] = expert_summary.by_vocabulary(
            observed, min_count=config.min_count, **chance
        )
    summary["answers"] = answers(summary)
    return summary


def model_names(config: Config) -> tuple[str, str]:
    """What the two models are called in tables and figures: never the same."""
    names = [Path(config.model).resolve(), Path(config.against or ".").resolve()]
    if names[0].name != names[1].name:
        return names[0].name, names[1].name
    pair = ["/".join(path.parts[-2:]) for path in names]
    return (pair[0], pair[1]) if pair[0] != pair[1] else ("model", "against")


def by_token(observed: Observed, text_path: TextPath, config: Config) -> list[dict[str, Any]]:
    """The summary's `tokens`: a row per layer, expert and rank.

    Raises UserError when no token occurs often enough to say anything about.
    """
    from experiments.lab.expert_use import specialised_tokens

    rows = specialised_tokens(
        observed.token_T,
        observed.expert_LTK,
        load_LE=observed.stats.load_LE.cpu(),
        min_count=config.min_count,
        top=config.top_tokens,
        decode=lambda index: _spelling(index, text_path),
    )
    if not rows:
        raise UserError(
            f"--by token: no token occurs {config.min_count} times in {len(observed.token_T)} "
            "tokens: lower --min-count or give more text."
        )
    return [vars(row) for row in rows]


def _spelling(index: int, text_path: TextPath) -> str:
    """A token as text; part of a character as the vocabulary spells it, so that parts differ."""
    text = str(text_path.tokenizer.decode([index]))
    return str(text_path.tokenizer.convert_ids_to_tokens(index)) if "\ufffd" in text else text


def verdict(domains: Mapping[str, Any]) -> dict[str, Any]:
    word = "DIFFERENT" if domains["mean_p_value"] <= THRESHOLD else "NOT DISTINGUISHED"
    return {"word": word, "rule": RULE, "threshold": THRESHOLD}


def answers(summary: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences with their numbers: means over layers."""
    found = summary["routing"][summary["model"]]
    shape = summary["shape"]
    loads = [
        f"Of {shape['experts']} experts per layer {_mean(found['dead_experts'][0]):.1f} are dead",
        f"MaxVio is {_mean(found['max_vio'][0]):.2f} "
        f"({_mean(found['max_vio_floor'][0]):.2f} by chance alone).",
    ]
    told = ["; ".join(loads)]
    if "repeats" in summary:
        first = summary["repeats"]["first"]
        told.append(
            f"The next token has the same first choice in {_mean(first['rate']):.1%} of cases; "
            f"{_mean(first['usage_null']):.1%} would be from the loads alone, "
            f"{_mean(first['shuffle_null']):.1%} with each piece's tokens in any order."
        )
    if "domains" in summary:
        domains = summary["domains"]
        told.append(
            f"Loads differ between domains by {domains['mean_jsd_bits']:.4f} bits, "
            f"{domains['mean_jsd_bits_shuffled']:.4f} with the labels shuffled over texts: "
            f"{summary['verdict']['word']} (p = {domains['mean_p_value']:.2f})."
        )
    if "vocabulary" in summary:
        words = summary["vocabulary"]
        told.append(
            f"A token's identity says {_mean(words['jsd_bits']):.3f} bits about its experts, "
            f"{_mean(words['jsd_bits_shuffled_mean']):.3f} with tokens shuffled within pieces."
        )
    if "drift" in summary:
        moved = summary["drift"]
        told.append(
            f"{_mean(moved['saturation']):.1%} of the choices are those of {moved['against']}; "
            f"{_mean(moved['saturation_usage_null']):.1%} would be from the loads alone."
        )
    return told


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parsed = parse(
        Config, argv, prog="python -m experiments.expert_utilization", description=QUESTION
    )
    for name, reason in parsed.config.idle.items():
        if parsed.origins[name] != "built-in":
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no effect {reason}: leave it out.")
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading has its own, on stderr, for every file
    run(parsed.config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
