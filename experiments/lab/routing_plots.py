"""Charts of what a router goes by, how early it settles and how far a training moves it.

The decision to know: what is measured is filled and solid, what chance or another training gives is
hollow or dashed, in every chart here, so the two are told apart without colour. The looks are those
of `plots`.

Shapes: S seeds, M marks of a training, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.lab.plots import (
    BLACK,
    BLUE,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    drawing,
    finished,
    in_order,
    label,
    mean,
    numbers,
    styles,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYER_COLORS = (BLACK, BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
LAYER_MARKERS = "o^vDsPX*"  # one more than the colours: 56 layers before a look comes again
MOST_KEYS = 8  # in one row of a legend
LOG_FROM = 10.0  # times the smallest KL: from here on the axis is logarithmic


def settled(
    share_SML: Sequence[Sequence[Sequence[float | None]]],
    chance_SML: Sequence[Sequence[Sequence[float | None]]],
    *,
    marks: Sequence[float],
    png: Path | None = None,
) -> str:
    """Share of a token's final experts that it already has, by mark of the training.

    A line per layer (mean over seeds), a band from the lowest to the highest seed, and dashed in
    the layer's colour the mean of what independent tokens of the same use would share. The marks
    (shares of the training, 0 to 1) stand at equal distances.
    """
    with drawing("settled", (FULL_WIDTH, 3.6)) as figure:
        axes = figure.subplots()
        layers = range(max(len(layers_L) for seed_ML in share_SML for layers_L in seed_ML))
        for layer in layers:
            color = LAYER_COLORS[layer % len(LAYER_COLORS)]
            found = _by_mark(share_SML, layer)
            x = [place for place, values in enumerate(found) if values]
            axes.plot(
                x,
                [mean(found[place]) for place in x],
                color=color,
                marker=LAYER_MARKERS[layer % len(LAYER_MARKERS)],
                label=f"layer {layer}",
            )
            low, high = [min(found[i]) for i in x], [max(found[i]) for i in x]
            axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
            chance = _by_mark(chance_SML, layer)
            x = [place for place, values in enumerate(chance) if values]
            axes.plot(x, [mean(chance[i]) for i in x], color=color, ls="--", lw=0.9)
        axes.plot([], [], color=GREY, ls="--", lw=0.9, label="by use alone")
        axes.set_xticks(range(len(marks)), [f"{mark * 100:g} %" for mark in marks])
        axes.set_xlabel("of the training (marks at equal distances)")
        axes.set_ylabel("share of the final experts")
        axes.set_ylim(0, 1.02)
        columns = min(len(layers) + 1, MOST_KEYS)
        figure.legend(loc="outside lower center", ncols=columns)
        return finished(figure, png)


def _by_mark(
    share_SML: Sequence[Sequence[Sequence[float | None]]], layer: int
) -> list[list[float]]:
    """The seeds' numbers of one layer at every mark."""
    return [
        numbers(layers_L[layer] for layers_L in seeds if layer < len(layers_L))
        for seeds in zip(*share_SML, strict=True)
    ]


def beside_chance(
    found_SL_by_panel: Mapping[str, Sequence[Sequence[float | None]]],
    chance_SL_by_panel: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    name: str,
    found: str,
    chance: str,
    png: Path | None = None,
) -> str:
    """A rate per layer, and beside it what chance gives that layer: one panel per name.

    A dot per seed, filled what was found and hollow what chance gives, a thin line between the two
    of one seed, and a bar at the mean of each. All panels share one y axis.
    name: salts the ids; found, chance: what the legend calls the two.
    """
    with drawing(name, (FULL_WIDTH, 3.3)) as figure:
        panels = figure.subplots(1, len(found_SL_by_panel), sharey=True, squeeze=False)[0]
        for axes, (title, found_SL) in zip(panels, found_SL_by_panel.items(), strict=True):
            chance_SL = chance_SL_by_panel[title]
            layers = range(max(len(seed_L) for seed_L in found_SL))
            for layer in layers:
                pairs = [
                    both
                    for seed_L, null_L in zip(found_SL, chance_SL, strict=True)
                    if len(both := numbers([seed_L[layer], null_L[layer]])) == 2
                ]
                _pair_column(axes, layer, pairs)
            axes.set_title(label(title))
            axes.set_xlabel("layer")
            axes.set_xlim(-0.5, len(layers) - 0.5)
            whole_ticks(axes.xaxis, len(layers), 12)
            axes.grid(False, axis="x")
        panels[0].set_ylim(bottom=0)
        panels[0].plot([], [], "o", color=BLUE, label=found)
        panels[0].plot([], [], "o", color=GREY, mfc="white", label=chance)
        figure.legend(loc="outside lower center", ncols=2)
        return finished(figure, png)


def _pair_column(axes: Axes, layer: int, pairs: Sequence[Sequence[float]]) -> None:
    left, right = layer - 0.14, layer + 0.14
    for rate, null in pairs:
        axes.plot([left, right], [rate, null], color=GREY, lw=0.6, alpha=0.6)
    for x, side, color in ((left, 0, BLUE), (right, 1, GREY)):
        values = [pair[side] for pair in pairs]
        if not values:
            continue
        face = color if side == 0 else "white"
        axes.plot([x] * len(values), values, "o", ms=4, color=color, mfc=face, ls="")
        axes.plot([x - 0.12, x + 0.12], [mean(values)] * 2, color=color, lw=2)


class Moved(NamedTuple):
    """One seed of one stage: KL from its start (nats per token) and its routing change.

    kl is None where there is no next token; between: the change between its two trainings.
    """

    kl: float | None
    change: float
    between: float | None


def change_against_kl(
    points_by_stage: Mapping[str, Sequence[Moved]], *, png: Path | None = None
) -> str:
    """Routing change from the start against KL from the start, a filled point per seed and stage.

    Hollow at the same KL, joined by a thin line: the change between the stage's two trainings. The
    KL axis is logarithmic where the largest is over `LOG_FROM` times the smallest. Stages without
    KL stand in a strip of their own on the right.
    """
    stages = in_order(points_by_stage)
    without = [s for s in stages if not numbers(point.kl for point in points_by_stage[s])]
    ratios = [6.0, *[1.0 for _ in without]]
    looks = styles(stages)
    with drawing("change against kl", (FULL_WIDTH, 3.6)) as figure:
        panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
        for stage in stages:
            axes = panels[1 + without.index(stage)] if stage in without else panels[0]
            color, _, marker = looks[stage]
            for place, (kl, change, between) in enumerate(points_by_stage[stage]):
                if stage not in without and kl is None:
                    continue
                x = float(place) if kl is None else kl
                if between is not None:
                    axes.plot([x, x], [change, between], color=color, lw=0.8)
                    axes.plot(x, between, marker, color=color, mfc="white", ms=6)
                axes.plot(x, change, marker, color=color, ms=6)
            panels[0].plot([], [], marker, color=color, ms=6, label=label(stage))
        panels[0].plot(
            [], [], "o", color=GREY, mfc="white", ms=6, label="between its two trainings"
        )
        spent = numbers(point.kl for points in points_by_stage.values() for point in points)
        if min(spent) > 0 and max(spent) > LOG_FROM * min(spent):
            _log_axis(panels[0])
        panels[0].set_xlabel("KL from the start (nats per token)")
        panels[0].set_ylabel("share of chosen experts that changed")
        panels[0].set_ylim(bottom=0)
        for axes, stage in zip(panels[1:], without, strict=True):
            count = len(points_by_stage[stage])
            axes.set_xlim(-0.8, count - 0.2)
            axes.set_xticks([(count - 1) / 2], ["no KL"])
            axes.tick_params(axis="x", length=0)
            axes.grid(False, axis="x")
            axes.set_xlabel(label(stage))
        figure.legend(loc="outside lower center", ncols=min(len(stages) + 1, MOST_KEYS))
        return finished(figure, png)


def _log_axis(axes: Axes) -> None:
    """Powers of ten with 2, 3 and 5 between them, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
