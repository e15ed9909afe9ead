"""Which experts does a model use on a text file, and what does that depend on?

Question: how evenly are the experts of each layer used on these texts; does the use depend on the
text's domain (--by domain) or on the single token (--by token); and how far has it moved from
another model (--against DIR2)?

Published: Mixtral shows no clear pattern by topic but much regularity by token (Jiang et al. 2024,
section 5); OLMoE, with more and smaller experts, specialises by domain and by token (Muennighoff et
al. 2024, section 5). Here the chance level stands beside a divergence.

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

import csv
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.lab.expert_terminal import MEASURES, show
from experiments.lab.runfiles import commit_of
from moe.errors import UserError
from sft.flags import main_guard, parse
from sft.run import Run, config_hash, write_text_atomic

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
MOST_PANELS = 12  # domains drawn; the files hold all
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
    permutations: int = field(default=99, metadata={"help": "shufflings of domains, --by domain"})
    seed: int = field(default=0, metadata={"help": "of the shufflings, --by domain"})
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
        if self.by != "domain":
            found |= dict.fromkeys(("permutations", "seed"), f"with --by {self.by}")
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
    from sft.examples import Document, Preference
    from sft.text import Message

    if isinstance(row, Document):
        return text_path.encode_document(row.text)
    if isinstance(row, Preference):
        conversation = (*row.prompt, Message("assistant", row.chosen))
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

    from experiments.lab.expert_use import observe

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
            per_token=config.by == "token",
        )
        summary = summarise(config, state.folder, ready, observed)
        summary["timings"] = {"seconds": round(time.perf_counter() - start, 3)}
        write_files(state.folder, summary, observed)
        draw(state.folder, summary)
        state.write_json("summary.json", summary)
    show(summary, state.folder, Console(width=None if sys.stdout.isatty() else 140))
    return summary


def summarise(config: Config, folder: Path, ready: Prepared, observed: Observed) -> dict[str, Any]:
    """The whole summary but for its timings."""
    from experiments.lab.expert_use import measures

    name, other = model_names(config)
    stats = observed.stats
    layers, experts = stats.count_LE.shape
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
        "routing": {name: {key: [value] for key, value in measures(stats).items()}},
        "notes": list(ready.notes),
    }
    if observed.other_stats is not None:
        from moe.stats import jensen_shannon_bits

        assert observed.jaccard_L is not None
        moved_L = jensen_shannon_bits(stats.load_LE, observed.other_stats.load_LE)
        theirs = {key: [value] for key, value in measures(observed.other_stats).items()}
        summary["routing"][other] = theirs
        summary["drift"] = {
            "against": other,
            "jaccard": observed.jaccard_L.tolist(),
            # |A and B| is K^2 / E on average for two random sets of K.
            "jaccard_by_chance_about": stats.top_k / (2 * experts - stats.top_k),
            "jsd_bits": moved_L.tolist(),
        }
    if config.by == "domain":
        summary["domains"] = by_domain(observed, ready.labels, config)
        summary["verdict"] = verdict(summary["domains"])
    if config.by == "token":
        summary["tokens"] = by_token(observed, ready.text_path, config)
    return summary


def model_names(config: Config) -> tuple[str, str]:
    """What the two models are called in tables and figures: never the same."""
    names = [Path(config.model).resolve(), Path(config.against or ".").resolve()]
    if names[0].name != names[1].name:
        return names[0].name, names[1].name
    pair = ["/".join(path.parts[-2:]) for path in names]
    return (pair[0], pair[1]) if pair[0] != pair[1] else ("model", "against")


def by_domain(observed: Observed, labels: Sequence[str], config: Config) -> dict[str, Any]:
    """The summary's `domains`: loads, divergence per layer beside chance, p-values."""
    import torch

    from experiments.lab import expert_use

    text_count_NLE = observed.text_count_NLE
    assert text_count_NLE is not None
    names = list(dict.fromkeys(labels))
    labels_N = torch.tensor([names.index(label) for label in labels])
    groups = {"num_domains": len(names)}
    observed_L = expert_use.domain_divergence(text_count_NLE, labels_N, **groups)
    shuffled_PL = expert_use.shuffled_divergence(
        text_count_NLE, labels_N, **groups, permutations=config.permutations, seed=config.seed
    )
    load_GLE = expert_use.domain_loads(text_count_NLE, labels_N, **groups)
    overall = float(observed_L.mean())
    return {
        "names": names,
        "texts": [labels.count(name) for name in names],
        "relative_load": (load_GLE * text_count_NLE.shape[-1]).tolist(),
        "jsd_bits": observed_L.tolist(),
        "jsd_bits_shuffled_mean": shuffled_PL.mean(dim=0).tolist(),
        "jsd_bits_shuffled": shuffled_PL.tolist(),
        "p_value": [
            expert_use.p_value(value, shuffled_PL[:, layer].tolist())
            for layer, value in enumerate(observed_L.tolist())
        ],
        "mean_jsd_bits": overall,
        "mean_jsd_bits_shuffled": float(shuffled_PL.mean()),
        "mean_p_value": expert_use.p_value(overall, shuffled_PL.mean(dim=1).tolist()),
    }


def by_token(observed: Observed, text_path: TextPath, config: Config) -> list[dict[str, Any]]:
    """The summary's `tokens`: a row per layer, expert and rank.

    Raises UserError when no token occurs often enough to say anything about.
    """
    from experiments.lab.expert_use import specialised_tokens

    assert observed.token_T is not None and observed.expert_LTK is not None
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


# --- files and figures ---------------------------------------------------------------------------


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    write_text_atomic(path, text.getvalue())


def write_files(folder: Path, summary: Mapping[str, Any], observed: Observed) -> None:
    """layers.csv and experts.csv always; domains.csv, tokens.csv, drift.csv where asked for."""
    per_layer, per_expert = [], []
    all_stats = zip(summary["routing"], (observed.stats, observed.other_stats), strict=False)
    for name, stats in all_stats:
        assert stats is not None
        found = summary["routing"][name]
        for layer in range(summary["shape"]["layers"]):
            per_layer.append([name, layer, *(found[key][0][layer] for key in MEASURES)])
            for expert in range(summary["shape"]["experts"]):
                here = (layer, expert)
                count, share = int(stats.count_LE[here]), float(stats.load_LE[here])
                importance = float(stats.importance_LE[here] / stats.tokens_L[layer].clamp(min=1))
                relative = found["load_share"][0][layer][expert]
                per_expert.append([name, layer, expert, count, share, relative, importance])
    _write_csv(folder / "layers.csv", ["model", "layer", *MEASURES], per_layer)
    header = ["model", "layer", "expert", "count", "share", "over_fair_share", "mean_probability"]
    _write_csv(folder / "experts.csv", header, per_expert)
    if "drift" in summary:
        moved = summary["drift"]
        rows = zip(moved["jaccard"], moved["jsd_bits"], strict=True)
        _write_csv(
            folder / "drift.csv",
            ["layer", "jaccard", "jsd_bits"],
            [[layer, *values] for layer, values in enumerate(rows)],
        )
    if "domains" in summary:
        _write_domains(folder, summary["domains"])
    if "tokens" in summary:
        # A token may be a line break, a quote or half a character: JSON's spelling keeps it whole.
        spelled = [row | {"text": json.dumps(row["text"])} for row in summary["tokens"]]
        rows_of_tokens = [list(row.values()) for row in spelled]
        _write_csv(folder / "tokens.csv", list(spelled[0]), rows_of_tokens)


def _write_domains(folder: Path, domains: Mapping[str, Any]) -> None:
    rows = [
        [name, layer, expert, value / len(row), value]
        for name, load_LE in zip(domains["names"], domains["relative_load"], strict=True)
        for layer, row in enumerate(load_LE)
        for expert, value in enumerate(row)
    ]
    header = ["domain", "layer", "expert", "share", "over_fair_share"]
    _write_csv(folder / "domains.csv", header, rows)
    columns = ("jsd_bits", "jsd_bits_shuffled_mean", "p_value")
    per_layer = zip(*(domains[key] for key in columns), strict=True)
    _write_csv(
        folder / "divergence.csv",
        ["layer", *columns],
        [[layer, *values] for layer, values in enumerate(per_layer)],
    )


def draw(folder: Path, summary: Mapping[str, Any]) -> None:
    """figures/: the heat map always; domains, divergence, drift where asked for."""
    from experiments.lab import plots

    figures = folder / "figures"
    figures.mkdir()

    def save(name: str, svg: str) -> None:
        write_text_atomic(figures / f"{name}.svg", svg)

    said = f"{summary['num_texts']:,} texts, {summary['num_tokens']:,} tokens"
    loads = {name: found["load_share"][0] for name, found in summary["routing"].items()}
    save("experts", plots.heat_map(loads, title=said, png=figures / "experts.png"))
    if "domains" in summary:
        found = summary["domains"]
        shown = dict(zip(found["names"], found["relative_load"], strict=True))
        title = said
        if len(shown) > MOST_PANELS:
            most = sorted(range(len(shown)), key=lambda i: -found["texts"][i])[:MOST_PANELS]
            shown = {name: shown[name] for i, name in enumerate(found["names"]) if i in most}
            title += f"; the {MOST_PANELS} domains with most texts of {len(found['names'])}"
        save("domains", plots.heat_map(shown, title=title, png=figures / "domains.png"))
        panel = {
            "domains": [found["jsd_bits"]],
            f"shuffled {len(found['jsd_bits_shuffled'])} times": found["jsd_bits_shuffled"],
        }
        titled = {"Mean JS divergence between domains (bits)": panel}
        save("divergence", plots.drift(titled, png=figures / "divergence.png"))
    if "drift" in summary:
        moved = summary["drift"]
        name = f"{summary['model']} against {moved['against']}"
        panels = {
            "Jaccard of the chosen sets (1: same)": {name: [moved["jaccard"]]},
            "JS divergence of the loads (bits)": {name: [moved["jsd_bits"]]},
        }
        save("drift", plots.drift(panels, png=figures / "drift.png"))


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
