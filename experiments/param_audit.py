"""Do published parameter counts follow from the published configurations?

Question: counting every tensor of a model built from its configuration, do we get the figures that
its makers print: total parameters, active parameters, and the trainable share of a LoRA?

Published: the announcements and papers of Mistral-7B, Mixtral (Jiang et al. 2024), OLMoE
(Muennighoff et al. 2024), Qwen1.5-MoE, Qwen3, DeepSeekMoE (Dai et al. 2024), DeepSeek-V3 (2024),
gpt-oss (OpenAI 2025), Llama 2 and Switch Transformers (Fedus et al. 2021, Table 7); for the LoRA,
the line that PEFT prints for Mistral-7B at rank 8 on all linear layers.

Arms: none is trained. `moe.budget` builds each model on the meta device and sums its tensors. What
"active" means differs between makers, so an active figure is held against both conventions: with
both embeddings, and without the input embedding, which a token only looks up.

Cost: about 5 seconds, most of them for importing torch; no network, no weights.

Verdict rule, fixed beforehand: a row is REPRODUCED when our count, rounded to the precision that
the published figure is printed in, is that figure, and NOT REPRODUCED otherwise. The audit is
REPRODUCED when every published figure is, an active figure under at least one convention.

    python -m experiments.param_audit [--out DIR] [--overwrite]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from experiments.lab.verdict import PublishedWord
from moe.budget import Budget, budget, known_config, known_names, meta_model
from moe.errors import UserError

QUESTION = "Do published parameter counts follow from the published configurations?"
ROW_RULE = (
    "a row is REPRODUCED when our count rounds to the published figure at its printed precision"
)
RULE = f"{ROW_RULE}; the audit is, when every figure is (an active one under either convention)"
THRESHOLD = 1.0  # share of the published figures
SCALES = {"": 1, "%": 1, "M": 10**6, "B": 10**9}
CONVENTIONS = {
    "active": "both embeddings",
    "active_without_input_embedding": "without input embedding",
}
# Models that differ from a pinned one in a single field.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-8x22b-v0.3": ("mixtral-8x22b", {"vocab_size": 32768}),
    **{
        f"switch-base-{experts}": ("switch-base-8", {"num_experts": experts})
        for experts in (16, 32, 64, 128, 256)
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """`out` is the folder for summary.json and table.md; default results/param_audit/<UTC time>."""

    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures as printed; None where the makers print none."""

    model: str
    source: str
    total: str | None = None
    active: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure beside one count; rows of one `figure` are conventions for it."""

    figure: str
    claim: str
    published: str
    ours: int | float
    verdict: PublishedWord


PUBLISHED = (
    Published(model="mistral-7b", source="announcement", total="7.3B"),
    Published(model="mixtral-8x7b", source="announcement", total="46.7B", active="12.9B"),
    Published(model="mixtral-8x7b", source="paper", total="47B", active="13B"),
    Published(model="mixtral-8x22b", source="announcement", total="141B", active="39B"),
    Published(model="mixtral-8x22b-v0.3", source="announcement", total="141B", active="39B"),
    Published(model="olmoe-1b-7b", source="paper", total="6.9B", active="1.3B"),
    Published(model="qwen1.5-moe-a2.7b", source="announcement", total="14.3B", active="2.7B"),
    Published(model="qwen3-30b-a3b", source="model card", total="30.5B", active="3.3B"),
    Published(model="deepseek-moe-16b", source="paper", total="16.4B", active="2.8B"),
    Published(model="deepseek-v3", source="paper", total="671B", active="37B"),
    Published(model="gpt-oss-20b", source="model card", total="21B", active="3.6B"),
    Published(model="gpt-oss-120b", source="model card", total="117B", active="5.1B"),
    Published(model="switch-base-8", source="paper, the FLOP-matched T5-Base", active="223M"),
    Published(model="switch-base-16", source="paper", total="1.1B"),
    Published(model="switch-base-32", source="paper", total="2.0B"),
    Published(model="switch-base-64", source="paper", total="3.8B"),
    Published(model="switch-base-128", source="paper", total="7.4B"),
    Published(model="switch-base-256", source="paper", total="14.7B"),
    Published(model="llama-2-7b", source="paper", total="7B"),
)
PRINTED_LORA = {"trainable": "20971520", "total": "7262703616", "percent": "0.2888%"}


def rounded(count: int | Fraction, published: str) -> str:
    """`count` in the unit and with the decimals of `published` ("46.7B", "0.2888%", "20971520")."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB%]?)", published)
    if match is None:
        raise UserError(f"published figure {published!r} is not a number with M, B, % or nothing.")
    figure, unit = match.groups()
    exact = Fraction(count) / SCALES[unit]
    step = Decimal(figure).as_tuple().exponent
    assert isinstance(step, int)
    # One division of two integers, to far more digits than are printed: no double rounding.
    value = Decimal(exact.numerator) / Decimal(exact.denominator)
    return f"{value.quantize(Decimal(1).scaleb(step), rounding=ROUND_HALF_UP)}{unit}"


def judge(count: int | Fraction, published: str) -> PublishedWord:
    """The row's rule."""
    return "REPRODUCED" if rounded(count, published) == published else "NOT REPRODUCED"


def audit(counts: Mapping[str, Budget]) -> list[Row]:
    """Every published figure of PUBLISHED beside the counts of its model."""
    rows = []
    for entry in PUBLISHED:
        counted = counts[entry.model]
        quantities: list[tuple[str, str | None, str]] = [("total", entry.total, "total")]
        quantities += [
            (word, entry.active, f"active, {text}") for word, text in CONVENTIONS.items()
        ]
        if counted.active == counted.active_without_input_embedding:
            quantities.pop()
        for word, published, text in quantities:
            if published is not None:
                figure = f"{entry.model} {word.split('_')[0]} ({entry.source})"
                claim = f"{entry.model} {text} ({entry.source})"
                rows.append(_row(figure, claim, published, getattr(counted, word)))
    return rows


def _row(figure: str, claim: str, published: str, count: int | Fraction) -> Row:
    return Row(
        figure=figure,
        claim=claim,
        published=published,
        ours=count if isinstance(count, int) else float(count),
        verdict=judge(count, published),
    )


def _routing_biases(name: str) -> int:
    """Numbers in the bias-update buffers of the routers, which are no parameters."""
    buffers = meta_model(name).named_buffers()
    return sum(b.numel() for key, b in buffers if key.endswith("e_score_correction_bias"))


def _special_rows(counts: Mapping[str, Budget]) -> list[Row]:
    lora = budget("mistral-7b", method="lora", lora_rank=8, targets="all-linear")
    ours: dict[str, int | Fraction] = {
        "trainable": lora.trainable,
        "total": lora.total,
        "percent": Fraction(100 * lora.trainable, lora.total),
    }
    name = "deepseek-v3"
    claim = f"{name} total and routing biases (paper)"
    rows = [_row(claim, claim, "671B", counts[name].total + _routing_biases(name))]
    for word, printed in PRINTED_LORA.items():
        claim = f"mistral-7b LoRA r8 all-linear, {word} (PEFT's line)"
        rows.append(_row(claim, claim, printed, ours[word]))
    return rows


def verdict(rows: Sequence[Row]) -> tuple[PublishedWord, list[str]]:
    """The audit's word, and the figures that no convention reproduces."""
    reproduced = {row.figure for row in rows if row.verdict == "REPRODUCED"}
    missed = [
        figure for figure in dict.fromkeys(r.figure for r in rows) if figure not in reproduced
    ]
    share = 1 - len(missed) / len({row.figure for row in rows})
    return ("REPRODUCED" if share >= THRESHOLD else "NOT REPRODUCED"), missed


def run(config: Config) -> dict[str, Any]:
    """Counts, judges, writes summary.json and table.md into `config.out`; returns the summary.

    Raises UserError when that folder holds files and `overwrite` is off.
    """
    out = config.out or default_folder()
    _prepare(out, overwrite=config.overwrite)
    start = time.perf_counter()
    counts = {name: budget(name) for name in known_names()}
    for name, (base, fields) in VARIANTS.items():
        counts[name] = budget({**known_config(base), **fields})
    rows = audit(counts) + _special_rows(counts)
    word, missed = verdict(rows)
    summary = {
        "schema": 1,
        "experiment": "param_audit",
        "question": QUESTION,
        "status": "done",
        "claims": [
            {key: value for key, value in asdict(row).items() if key != "figure"} for row in rows
        ],
        "counts": {
            name: {key: getattr(counted, key) for key in ("total", *CONVENTIONS)}
            for name, counted in counts.items()
        },
        "not_reproduced": missed,
        "verdict": {"word": word, "rule": RULE, "threshold": THRESHOLD},
        "timings": {"seconds": round(time.perf_counter() - start, 3)},
    }
    (out / "table.md").write_text(_markdown(summary), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def default_folder() -> Path:
    """results/param_audit/<UTC time>, under the working directory."""
    return Path("results") / "param_audit" / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _prepare(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"--out {out} is not empty: give another folder, or --overwrite.")
    out.mkdir(parents=True, exist_ok=True)


def _cells(claim: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Claim, published, ours as published, ours exact, verdict."""
    ours, published = claim["ours"], claim["published"]
    exact = f"{ours:,}" if isinstance(ours, int) else f"{ours:.8f}"
    # A float here is only the percentage, far from any rounding edge at its 16 digits.
    short = rounded(Fraction(ours), published)
    return claim["claim"], published, short, exact, claim["verdict"]


COLUMNS = ("question", "published", "ours", "exactly", "verdict")


def _conclusion(summary: Mapping[str, Any]) -> str:
    missed = summary["not_reproduced"]
    tail = f" Not reproduced under any convention: {'; '.join(missed)}." if missed else ""
    return f"{summary['verdict']['word']}: {summary['verdict']['rule']}.{tail}"


def _markdown(summary: Mapping[str, Any]) -> str:
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]

    counts = [
        [name, *(f"{value:,}" for value in counted.values())]
        for name, counted in summary["counts"].items()
    ]
    lines = [
        f"# {QUESTION}",
        "",
        _conclusion(summary),
        "",
        *table(COLUMNS, [_cells(claim) for claim in summary["claims"]]),
        "",
        "## All counts",
        "",
        *table(("model", "total", *(f"active, {text}" for text in CONVENTIONS.values())), counts),
    ]
    return "\n".join(lines) + "\n"


def show(summary: Mapping[str, Any], out: Path) -> None:
    """Prints the claims and the conclusion."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=QUESTION, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("question", "verdict") else "right")
    for claim in summary["claims"]:
        table.add_row(*_cells(claim))
    console = Console()
    console.print(table)
    console.print(_conclusion(summary))
    console.print(f"{out}: summary.json, table.md")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.param_audit", description=QUESTION, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="allow a folder with files in it")
    flags = parser.parse_args(argv)
    out = flags.out or default_folder()
    try:
        show(run(Config(out=out, overwrite=flags.overwrite)), out)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
