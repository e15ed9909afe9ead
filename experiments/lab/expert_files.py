"""The tables that a look at a model's experts leaves: one CSV file per question, every number.

The decision to know: figures and the terminal show a choice; these files hold all of it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.lab.expert_summary import partners
from experiments.lab.expert_terminal import MEASURES
from sft.run import write_text_atomic

if TYPE_CHECKING:
    from experiments.lab.expert_use import Observed

DRIFT = ("jaccard", "jsd_bits", "saturation", "saturation_usage_null")
DIVERGENCE = ("jsd_bits", "jsd_bits_shuffled_mean", "p_value")


def write_files(folder: Path, summary: Mapping[str, Any], observed: Observed) -> None:
    """layers.csv, experts.csv; the others where there is something to write."""
    _write_loads(folder, summary, observed)
    if observed.pairs is not None:
        rows = [list(vars(pair).values()) for pair in partners(observed.pairs)]
        header = ["layer", "expert", "other", "tokens", "share", "by_usage"]
        _write_csv(folder / "coactivation.csv", header, rows)
    if "repeats" in summary:
        _write_repeats(folder, summary["repeats"])
    if "drift" in summary:
        _write_columns(folder / "drift.csv", summary["drift"], DRIFT)
    if "domains" in summary:
        _write_domains(folder, summary["domains"])
    if "vocabulary" in summary:
        _write_columns(folder / "vocabulary.csv", summary["vocabulary"], DIVERGENCE)
    if "tokens" in summary:
        # A token may be a line break, a quote or half a character: JSON's spelling keeps it whole.
        spelled = [row | {"text": json.dumps(row["text"])} for row in summary["tokens"]]
        rows_of_tokens = [list(row.values()) for row in spelled]
        _write_csv(folder / "tokens.csv", list(spelled[0]), rows_of_tokens)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    write_text_atomic(path, text.getvalue())


def _write_columns(path: Path, found: Mapping[str, Any], columns: Sequence[str]) -> None:
    """One row per layer."""
    rows = zip(*(found[column] for column in columns), strict=True)
    lines = [[layer, *values] for layer, values in enumerate(rows)]
    _write_csv(path, ["layer", *columns], lines)


def _write_loads(folder: Path, summary: Mapping[str, Any], observed: Observed) -> None:
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


def _write_repeats(folder: Path, repeated: Mapping[str, Any]) -> None:
    columns = ("rate", "usage_null", "shuffle_null", "p_value")
    rows = [
        [choices, layer, *values]
        for choices in ("first", "first_or_second")
        if choices in repeated
        for layer, values in enumerate(zip(*(repeated[choices][c] for c in columns), strict=True))
    ]
    _write_csv(folder / "repeats.csv", ["choices", "layer", *columns], rows)


def _write_domains(folder: Path, domains: Mapping[str, Any]) -> None:
    rows = [
        [name, layer, expert, value / len(row), value]
        for name, load_LE in zip(domains["names"], domains["relative_load"], strict=True)
        for layer, row in enumerate(load_LE)
        for expert, value in enumerate(row)
    ]
    header = ["domain", "layer", "expert", "share", "over_fair_share"]
    _write_csv(folder / "domains.csv", header, rows)
    _write_columns(folder / "divergence.csv", domains, (*DIVERGENCE, "joint_jsd_bits"))
