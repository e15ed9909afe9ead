"""Expert use on a terminal: heat maps in colour and numbers, and the tables beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.lab import plots

MEASURES = {
    "max_load": "busiest",
    "min_load": "idlest",
    "dead_experts": "dead",
    "load_entropy": "entropy",
    "max_vio": "MaxVio",
    "max_vio_floor": "MaxVio by chance",
    "load_cv": "CV",
    "load_cv_floor": "CV by chance",
    "dropped_share": "dropped",
    "margin": "margin",
    "tie_rate": "ties",
}
MOST_PAIRS = 5

if TYPE_CHECKING:
    from rich.console import Console


def show(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Heat map, table per layer, and what was asked for beside; then where the files are."""
    shape = summary["shape"]
    console.print(
        f"{summary['model']}: {shape['layers']} MoE layers, {shape['experts']} experts "
        f"top-{shape['top_k']}; {summary['num_texts']:,} texts, {summary['num_tokens']:,} tokens",
        markup=False,
        highlight=False,
    )
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    for name, found in summary["routing"].items():
        _show_loads(console, f"{name}: load / fair share", found["load_share"][0])
        console.print(_layer_table(found))
    if "coactivation" in summary:
        _show_pairs(console, summary["coactivation"])
    if "repeats" in summary:
        _show_repeats(console, summary["repeats"])
    if "drift" in summary:
        _show_drift(console, summary["drift"])
    if "domains" in summary:
        _show_domains(console, summary["domains"], summary["verdict"])
    if "tokens" in summary:
        _show_tokens(console, summary["tokens"], summary["shape"])
        _show_vocabulary(console, summary["vocabulary"])
    console.print()
    for sentence in summary["answers"]:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"\nfiles  {folder}: report.html, summary.json, *.csv, figures/", highlight=False)


def _show_loads(
    console: Console, title: str, load_RE: Sequence[Sequence[float]], names: Sequence[str] = ()
) -> None:
    """Rows of cells, colour and number; where numbers do not fit, one sign per expert."""
    from rich.text import Text as RichText

    names = names or [f"layer {row}" for row in range(len(load_RE))]
    width = max(map(len, names))
    experts = max(map(len, load_RE))
    with_numbers = width + 6 * experts + 1 <= console.width
    _print_title(console, title)
    if with_numbers:
        heads = "".join(f"{expert:^6}" for expert in range(experts))
        console.print(f"{'':<{width}} {heads}", highlight=False)
    else:
        console.print("x below 1/10   - below 1/2   = near fair   + above 2   # above 4")
    # Signs that do not fit a line go on in the next: experts stay in order.
    step = experts if with_numbers else max(1, console.width - width - 1)
    for name, row in zip(names, load_RE, strict=True):
        for at in range(0, len(row), step):
            line = RichText(f"{name if at == 0 else '':<{width}} ")
            for value in row[at : at + step]:
                line.append(f"{value:^6.2f}" if with_numbers else sign(value), style=shade(value))
            console.print(line, no_wrap=True)


def _print_title(console: Console, title: str) -> None:
    console.print(f"\n{title}", style="bold", markup=False, highlight=False)


def sign(value: float) -> str:
    """One character for a load over fair share."""
    for limit, character in ((0.1, "x"), (0.5, "-"), (2.0, "="), (4.0, "+")):
        if value < limit:
            return character
    return "#"


def shade(value: float) -> str:
    """Rich's style for a load over fair share: the colours of the figures."""
    if value < plots.DEAD_SHARE:
        return f"white on {plots.DEAD}"
    height = max(-1.0, min(1.0, math.log2(value) / plots.LOAD_LIMIT))
    end = plots.VERMILLION if height > 0 else plots.BLUE
    mixed = (round(255 + abs(height) * (int(end[i : i + 2], 16) - 255)) for i in (1, 3, 5))
    ink = "white" if height < -0.6 else "black"
    return f"{ink} on #{''.join(f'{part:02x}' for part in mixed)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text as RichText

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(RichText(_cell(value)) for value in row))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _layer_table(found: Mapping[str, Any]) -> Any:
    rows: list[list[object]] = []
    num_layers = len(found["max_vio"][0])
    for layer in range(num_layers):
        rows.append([str(layer), *(found[key][0][layer] for key in MEASURES)])
    if num_layers > 1:
        rows.append(["mean", *(_mean_or_none(found[key][0]) for key in MEASURES)])
    return _table(["layer", *MEASURES.values()], rows)


def _show_pairs(console: Console, found: Mapping[str, Any]) -> None:
    """The strongest pairs of all layers, P(other | expert)."""
    pairs = sorted(
        (pair for layer in found["strongest"] for pair in layer), key=lambda pair: -pair["share"]
    )[:MOST_PAIRS]
    rows: list[list[object]] = [
        [
            str(pair["layer"]),
            f"{pair['expert']} -> {pair['other']}",
            pair["tokens"],
            pair["share"],
            pair["by_usage"],
        ]
        for pair in pairs
    ]
    _print_title(
        console,
        f"chosen together: the largest P(other | expert), {found['uniform_null']:.3f} without "
        "preference (all pairs: coactivation.csv)",
    )
    console.print(_table(["layer", "expert -> other", "tokens", "share", "loads alone"], rows))


def _show_repeats(console: Console, found: Mapping[str, Any]) -> None:
    """Both kinds side by side, each with its two chance levels."""
    kinds = [kind for kind in ("first", "first_or_second") if kind in found]
    keys = ("rate", "usage_null", "shuffle_null", "p_value")
    columns = [found[kind][key] for kind in kinds for key in keys]
    rows: list[list[object]] = [
        [str(layer), *values] for layer, values in enumerate(zip(*columns, strict=True))
    ]
    heads = [
        ("first", "loads alone", "reordered", "p"),
        ("either", "loads alone", "reordered", "p"),
    ]
    _print_title(
        console,
        "same expert for the next token: first choice, and first or second; by the loads alone, "
        "and with each piece's tokens reordered",
    )
    console.print(_table(["layer", *(h for head in heads[: len(kinds)] for h in head)], rows))


def _show_vocabulary(console: Console, found: Mapping[str, Any]) -> None:
    keys = ("jsd_bits", "jsd_bits_shuffled_mean", "p_value")
    rows: list[list[object]] = [
        [str(at), *values]
        for at, values in enumerate(zip(*(found[key] for key in keys), strict=True))
    ]
    _print_title(
        console,
        f"divergence between {found['distinct_tokens']:,} distinct tokens, weighted (bits)",
    )
    console.print(_table(["layer", "JSD", "shuffled within pieces", "p"], rows))


def _show_drift(console: Console, moved: Mapping[str, Any]) -> None:
    keys = ("saturation", "saturation_usage_null", "jaccard", "jsd_bits")
    rows: list[list[object]] = [
        [str(layer), *values]
        for layer, values in enumerate(zip(*(moved[key] for key in keys), strict=True))
    ]
    chance = moved["jaccard_by_chance_about"]
    _print_title(
        console,
        f"against {moved['against']} (shared choices: 1 settled, "
        f"{moved['saturation_uniform_null']:.2f} by chance; Jaccard: about {chance:.2f} by chance; "
        "JS divergence: 0 same, 1 disjoint)",
    )
    console.print(_table(["layer", "shared", "loads alone", "Jaccard", "JSD (bits)"], rows))


def _show_domains(console: Console, domains: Mapping[str, Any], judged: Mapping[str, Any]) -> None:
    gap = [
        a - b for a, b in zip(domains["jsd_bits"], domains["jsd_bits_shuffled_mean"], strict=True)
    ]
    layer = max(range(len(gap)), key=gap.__getitem__)
    _show_loads(
        console,
        f"domains: load / fair share in layer {layer}, where they differ most (all: domains.csv)",
        [load_LE[layer] for load_LE in domains["relative_load"]],
        [f"{n} ({c})" for n, c in zip(domains["names"], domains["texts"], strict=True)],
    )
    keys = ("jsd_bits", "jsd_bits_shuffled_mean", "p_value")
    rows: list[list[object]] = [
        [str(at), *values]
        for at, values in enumerate(zip(*(domains[k] for k in keys), strict=True))
    ]
    means = ("mean_jsd_bits", "mean_jsd_bits_shuffled", "mean_p_value")
    rows.append(["mean", *(domains[key] for key in means)])
    _print_title(console, "divergence between domains, mean over pairs (bits)")
    console.print(_table(["layer", "JSD", "labels shuffled", "p"], rows))
    console.print(f"verdict: {judged['word']}  (p = {domains['mean_p_value']:.2f})")


def _show_tokens(
    console: Console, tokens: Sequence[Mapping[str, Any]], shape: Mapping[str, int]
) -> None:
    """Every layer if they fit a screen, else the one with the most specialised tokens."""
    by_layer = [[row for row in tokens if row["layer"] == at] for at in range(shape["layers"])]
    chosen = list(range(shape["layers"]))
    title = "most specialised tokens: P(expert | token), occurrences"
    if shape["layers"] * shape["experts"] > 40:
        chosen = [max(chosen, key=lambda at: _mean([row["share"] for row in by_layer[at]]))]
        title += f"; layer {chosen[0]}, the most specialised (tokens.csv has all)"
    rows = []
    for layer in chosen:
        for expert in range(shape["experts"]):
            here = [row for row in by_layer[layer] if row["expert"] == expert]
            shown = "  ".join(
                f"{json.dumps(r['text'], ensure_ascii=False)} {r['share']:.2f} ({r['count']})"
                for r in here
            )
            rows.append([str(layer), str(expert), here[0]["load"] if here else "", shown])
    _print_title(console, title)
    table = _table(["layer", "expert", "load", "tokens"], rows)
    table.columns[-1].justify = "left"
    console.print(table)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
