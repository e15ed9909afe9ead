"""The figures of a look at a model's experts, each with its words and its numbers as a table.

The decision to know: all is drawn from `summary.json`, so the page can be made again without the
model; where a model has more layers or domains than a page can hold, some are drawn and the caption
says which, and the CSV files have all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lab import plots
from experiments.lab.figures import ReportFigure
from experiments.lab.runfiles import RunFiles, Summary
from experiments.lab.tables import Table, show

EXPERIMENT = "expert_utilization"
MOST_PANELS = 12
LEAST_EXPECTED = 5  # tokens; expert_summary.LEAST_EXPECTED, repeated: that one needs torch
MAX_TABLE_COLUMNS = 16  # experts; of more, the table tells the extremes
CHOICES = {"first": "First choice repeated", "first_or_second": "First or second repeated"}

Png = Callable[[str], Path | None]


def expert_figures(run: RunFiles, *, png_folder: Path | None = None) -> list[ReportFigure]:
    """Every figure that the run's summary allows, in the page's order; PNGs too if asked."""

    def png(name: str) -> Path | None:
        return png_folder / f"{name}.png" if png_folder else None

    summary = run.summary
    figures = [_loads(summary, png)]
    if "coactivation" in summary:
        figures.append(_pairs(summary, png))
    if "repeats" in summary:
        figures.append(_repeats(summary, png))
    if "domains" in summary:
        figures += [_domains(summary, png), _divergence(summary, png)]
    if "vocabulary" in summary:
        figures.append(_vocabulary(summary, png))
    if "drift" in summary:
        figures.append(_drift(summary, png))
    return figures


def spread_over(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _said(summary: Summary) -> str:
    return f"{summary['num_texts']:,} texts, {summary['num_tokens']:,} tokens"


def _load_table(loads: Mapping[str, Sequence[Sequence[float]]], *, what: str) -> Table:
    """Rows of (name, layer), a column per expert, or the extremes where those are too many."""
    num_experts = max(len(row) for load in loads.values() for row in load)
    whole = num_experts <= MAX_TABLE_COLUMNS
    names = list(map(str, range(num_experts))) if whole else ["lowest", "highest"]
    rows = [
        (name, str(layer), *map(show, row if whole else (min(row), max(row))))
        for name, load in loads.items()
        for layer, row in enumerate(load)
    ]
    return Table(header=(what, "layer", *names), rows=tuple(rows), num_names=2)


def _layer_table(columns: Mapping[str, Sequence[Any]]) -> Table:
    rows = [
        (str(layer), *map(show, values))
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    ]
    return Table(header=("layer", *columns), rows=tuple(rows))


def _loads(summary: Summary, png: Png) -> ReportFigure:
    loads = {name: found["load_share"][0] for name, found in summary["routing"].items()}
    told = []
    for name, found in summary["routing"].items():
        low, high = min(found["min_load"][0]), max(found["max_load"][0])
        told.append(f"{name} {show(low)} to {show(high)}, {sum(found['dead_experts'][0])} dead")
    return ReportFigure(
        section="Experts",
        name="experts",
        alt=f"Heat maps of expert load over fair share, layer by expert. {'; '.join(told)}.",
        caption="Load of each expert over its fair share: 1 is fair, below 0.1 is dead.",
        svg=plots.heat_map(loads, title=_said(summary), png=png("experts")),
        table=_load_table(loads, what="model"),
    )


def _usage_null(usage: Sequence[float], *, top_k: int, tokens: int) -> list[list[float | None]]:
    """`CoActivation.usage_null_LEE` of one layer; None where it would make too few tokens."""
    table: list[list[float | None]] = []
    for of in usage:
        row = [(top_k - 1) * to / max(top_k - of, 1e-9) for to in usage]
        table.append([n if n * of * tokens >= LEAST_EXPECTED else None for n in row])
    return table


def _pairs(summary: Summary, png: Png) -> ReportFigure:
    found, top_k = summary["coactivation"], summary["shape"]["top_k"]
    count = len(found["conditional"])
    layers = spread_over(count, MOST_PANELS)
    shares = {f"layer {layer}": found["conditional"][layer] for layer in layers}
    nulls = {
        f"layer {layer}": _usage_null(
            found["usage"][layer], top_k=top_k, tokens=summary["num_tokens"]
        )
        for layer in layers
    }
    strongest = [pair for pairs in found["strongest"] for pair in pairs]
    best = [pairs[0] for pairs in found["strongest"] if pairs][:4]
    said = [
        f"layer {p['layer']}, {p['other']} with {p['expert']}, {show(p['share'])}" for p in best
    ]
    shown = "" if len(layers) == count else f" Of {count} layers {len(layers)} are drawn."
    return ReportFigure(
        section="Experts",
        name="coactivation",
        alt="Heat maps of co-activation, expert by expert, one per layer. Strongest: "
        f"{'; '.join(said)}.",
        caption="Of the tokens that chose the row's expert, the share that also chose the "
        "column's, over all pairs of a token's experts; even use without preference gives "
        f"{show(found['uniform_null'])}. The colour compares with what the loads alone give; "
        f"grey where that is under {LEAST_EXPECTED} tokens.{shown}",
        svg=plots.pair_maps(shares, nulls, title=_said(summary), png=png("coactivation")),
        table=Table(
            header=("layer", "expert", "with", "tokens", "share", "by the loads alone"),
            rows=tuple(
                (
                    *(str(pair[key]) for key in ("layer", "expert", "other")),
                    *(show(pair[key]) for key in ("tokens", "share", "by_usage")),
                )
                for pair in strongest
            ),
        ),
    )


def _repeats(summary: Summary, png: Png) -> ReportFigure:
    found = summary["repeats"]
    panels: dict[str, dict[str, list[list[float]]]] = {}
    columns: dict[str, list[float]] = {}
    for choices, title in CHOICES.items():
        if choices not in found:
            continue
        here = found[choices]
        panels[title] = {
            "found": [here["rate"]],
            "by the loads alone": [here["usage_null"]],
            f"reordered {len(here['shuffled'])} times": here["shuffled"],
        }
        short = "first" if choices == "first" else "either"
        columns |= {
            short: here["rate"],
            f"{short}, loads": here["usage_null"],
            f"{short}, reordered": here["shuffle_null"],
            f"{short}, p": here["p_value"],
        }
    rates = ", ".join(map(show, found["first"]["rate"]))
    return ReportFigure(
        section="Experts",
        name="repeats",
        alt=f"Line charts over layers: how often the next token has the same expert. First choice: "
        f"{rates}.",
        caption="Share of neighbouring tokens with a choice in common. By the loads alone: "
        "independent tokens of the same use. Reordered: the same tokens in another order within "
        "their piece; only what lies above that band is about neighbourhood.",
        svg=plots.drift(panels, name="repeats", png=png("repeats")),
        table=_layer_table(columns),
    )


def _domains(summary: Summary, png: Png) -> ReportFigure:
    found = summary["domains"]
    shown = dict(zip(found["names"], found["relative_load"], strict=True))
    title = _said(summary)
    if len(shown) > MOST_PANELS:
        most = sorted(range(len(shown)), key=lambda i: -found["texts"][i])[:MOST_PANELS]
        shown = {name: shown[name] for i, name in enumerate(found["names"]) if i in most}
        title += f"; the {MOST_PANELS} domains with most texts of {len(found['names'])}"
    return ReportFigure(
        section="Experts",
        name="domains",
        alt=f"Heat maps of expert load over fair share in {len(shown)} domains.",
        caption="Load of each expert over its fair share, by domain of the text.",
        svg=plots.heat_map(shown, title=title, png=png("domains")),
        table=_load_table(shown, what="domain"),
    )


def _divergence(summary: Summary, png: Png) -> ReportFigure:
    found = summary["domains"]
    panel = {
        "domains": [found["jsd_bits"]],
        f"shuffled {len(found['jsd_bits_shuffled'])} times": found["jsd_bits_shuffled"],
    }
    titled = {"Mean JS divergence between domains (bits)": panel}
    return ReportFigure(
        section="Experts",
        name="divergence",
        alt="Line chart over layers: divergence between domains "
        f"{', '.join(map(show, found['jsd_bits']))} bits.",
        caption="Jensen-Shannon divergence of the loads of two domains, mean over pairs; the band: "
        "labels shuffled over whole texts. In the table also that of all domains at once.",
        svg=plots.drift(titled, name="divergence", png=png("divergence")),
        table=_layer_table(
            {
                "pairs": found["jsd_bits"],
                "shuffled": found["jsd_bits_shuffled_mean"],
                "p": found["p_value"],
                "all at once": found["joint_jsd_bits"],
            }
        ),
    )


def _vocabulary(summary: Summary, png: Png) -> ReportFigure:
    found = summary["vocabulary"]
    panel = {
        "tokens": [found["jsd_bits"]],
        f"shuffled {len(found['jsd_bits_shuffled'])} times": found["jsd_bits_shuffled"],
    }
    titled = {"JS divergence between distinct tokens (bits)": panel}
    return ReportFigure(
        section="Experts",
        name="vocabulary",
        alt="Line chart over layers: what a token's identity says about its experts, "
        f"{', '.join(map(show, found['jsd_bits']))} bits.",
        caption=f"Divergence of the loads of {found['distinct_tokens']:,} frequent tokens, "
        "weighted by their occurrences; the band: tokens shuffled within their piece.",
        svg=plots.drift(titled, name="vocabulary", png=png("vocabulary")),
        table=_layer_table(
            {
                "tokens": found["jsd_bits"],
                "shuffled": found["jsd_bits_shuffled_mean"],
                "p": found["p_value"],
            }
        ),
    )


def _drift(summary: Summary, png: Png) -> ReportFigure:
    moved = summary["drift"]
    panels = {
        "Choices shared (1: settled)": {
            "found": [moved["saturation"]],
            "by the loads alone": [moved["saturation_usage_null"]],
        },
        "JS divergence of the loads (bits)": {"found": [moved["jsd_bits"]]},
    }
    return ReportFigure(
        section="Routing drift",
        name="drift",
        alt=f"Line charts over layers against {moved['against']}: choices shared "
        f"{', '.join(map(show, moved['saturation']))}.",
        caption=f"{summary['model']} against {moved['against']} on the same tokens. Choices "
        "shared: experts that a token has in both, over the number it chooses; unrelated routers "
        f"with even loads share {show(moved['saturation_uniform_null'])}.",
        svg=plots.drift(panels, png=png("drift")),
        table=_layer_table(
            {
                "shared": moved["saturation"],
                "by the loads alone": moved["saturation_usage_null"],
                "Jaccard": moved["jaccard"],
                "JSD (bits)": moved["jsd_bits"],
            }
        ),
    )
