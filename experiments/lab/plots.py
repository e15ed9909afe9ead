"""Figures as SVG text, the same bytes for the same numbers.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, and every line also has its
own dash and marker, so that nothing is said by colour alone. Text stays text (no glyph outlines),
each figure brings its own white ground, and sizes are chosen to be read at 700 px. Matplotlib is
imported inside functions and used without pyplot: no display, no global state.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.lab.verdict import paired_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
DEAD = "#00283F"

FULL_WIDTH, HALF_WIDTH = 7.2, 4.2  # inches; 7.2 in shown at 700 px makes 9 pt text 12 px tall
MAX_POINTS = 200  # per line; more are averaged in buckets, or a report outgrows its megabyte
MAX_VECTOR_CELLS = 1500  # beyond this a heat map is one embedded picture instead of paths
DEAD_SHARE = 0.1  # moe.stats.DEAD_SHARE, repeated because importing it would bring in torch
LOAD_LIMIT = 2.0  # heat maps end at 2**-2 and 2**2 times the fair share

ORDER = (
    *("base", "few_shot", "pretrain"),
    *("sft", "sft_reseeded", "rm", "rm_reseeded", "dpo", "dpo_reseeded", "ppo", "ppo_reseeded"),
    "best_of_n",
)
LABELS = {
    "base": "base",
    "few_shot": "few-shot",
    "pretrain": "pretraining",
    "sft": "SFT",
    "rm": "RM",
    "dpo": "DPO",
    "ppo": "PPO",
    "best_of_n": "best-of-n",
    "longer_wins": "longer wins",
    "length_rule": "direction of length",
    "bag_of_words": "bag of words",
    "sft_reseeded": "SFT twice",
    "rm_reseeded": "RM twice",
    "dpo_reseeded": "DPO twice",
    "ppo_reseeded": "PPO twice",
}


class Style(NamedTuple):
    """How one arm or stage is drawn, everywhere."""

    color: str
    dash: str | tuple[float, tuple[float, ...]]
    marker: str


STYLES = {
    "base": Style(GREY, "--", "s"),
    "few_shot": Style(SKY, "-.", "D"),
    "pretrain": Style(GREY, "--", "s"),
    "sft": Style(BLACK, "-", "o"),
    "rm": Style(PURPLE, "-", "P"),
    "dpo": Style(BLUE, "-", "^"),
    "ppo": Style(VERMILLION, "-", "v"),
    "best_of_n": Style(GREEN, (0, (5, 1.5)), "X"),
    # What a stage is held against, never beside the base models.
    **dict.fromkeys(
        ("sft_reseeded", "rm_reseeded", "dpo_reseeded", "ppo_reseeded"), Style(GREY, ":", "o")
    ),
}
OTHER_STYLES = (
    Style(ORANGE, "-", "o"),
    Style(BLUE, "--", "^"),
    Style(PURPLE, "-.", "D"),
    Style(GREEN, "-", "v"),
    Style(VERMILLION, ":", "s"),
    Style(SKY, "--", "P"),
    Style(BLACK, "-.", "X"),
)


def label(name: str) -> str:
    """What a reader calls an arm or stage; unknown names stay as they are."""
    return LABELS.get(name, name)


def in_order(names: Iterable[str]) -> list[str]:
    """The known arms and stages in the order in which they are made, then the others as given."""
    given = list(dict.fromkeys(names))
    return [name for name in ORDER if name in given] + [n for n in given if n not in ORDER]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """One style per name: known names always look the same, others take turns."""
    ordered = in_order(names)
    others = [name for name in ordered if name not in STYLES]
    return {
        name: STYLES.get(name) or OTHER_STYLES[others.index(name) % len(OTHER_STYLES)]
        for name in ordered
    }


def numbers(values: Iterable[Any]) -> list[float]:
    """The finite numbers among values that may be None."""
    return [
        float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)
    ]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class Curve(NamedTuple):
    """Mean over seeds with the range of the seeds; all four have one entry per x."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def curve(rows_by_seed: Iterable[Iterable[Row]], name: str, **fields: str | None) -> Curve:
    """One metric over steps: rows {step, name, value, count, ...}, one iterable per seed.

    `fields` (stage, split) must match where they are not None. Rows of one seed at one step are
    averaged by `count`; steps beyond MAX_POINTS share buckets of equal width.
    """
    wanted = {key: value for key, value in fields.items() if value is not None}
    seeds = [
        [
            (float(row["step"]), float(row["value"]), float(row.get("count") or 1))
            for row in rows
            if row.get("name") == name
            and all(row.get(key) == value for key, value in wanted.items())
            and numbers([row.get("value")])
        ]
        for rows in rows_by_seed
    ]
    steps = sorted({step for seed in seeds for step, _, _ in seed})
    width = (steps[-1] - steps[0]) / MAX_POINTS if len(steps) > MAX_POINTS else 0.0

    def bucket(step: float) -> float:
        if not width:
            return step
        index = min(int((step - steps[0]) / width), MAX_POINTS - 1)
        return steps[0] + (index + 0.5) * width

    values: dict[float, list[float]] = {}
    for seed in seeds:
        sums: dict[float, list[float]] = {}
        for step, value, count in seed:
            total = sums.setdefault(bucket(step), [0.0, 0.0])
            total[0] += value * count
            total[1] += count
        for place, (total_value, total_count) in sums.items():
            values.setdefault(place, []).append(total_value / total_count)
    places = sorted(values)
    return Curve(
        places,
        [mean(values[place]) for place in places],
        [min(values[place]) for place in places],
        [max(values[place]) for place in places],
    )


def learning_curves(
    rows_by_arm_seed: Mapping[str, Mapping[int, Sequence[Row]]],
    name: str,
    *,
    stage: str | None = None,
    title: str | None = None,
    png: Path | None = None,
) -> str:
    """One metric over optimizer steps: a line per arm (mean), a band from min to max over seeds.

    Held-out splits are dashed and strong, train beside them is thin.
    """
    from matplotlib.ticker import MaxNLocator

    splits = splits_of(rows_by_arm_seed, name, stage)
    looks = styles(rows_by_arm_seed)
    with drawing(f"curve {title} {stage} {name}", (HALF_WIDTH, 2.8)) as figure:
        axes = figure.subplots()
        for arm in in_order(rows_by_arm_seed):
            for split in splits:
                line = curve(rows_by_arm_seed[arm].values(), name, stage=stage, split=split)
                if not line.x:
                    continue
                text = f"{label(arm)}, {split}" if len(splits) > 1 else label(arm)
                # Train is noise in the background as soon as there is a held-out line to read.
                behind = split == "train" and len(splits) > 1
                axes.plot(
                    line.x,
                    line.mean,
                    color=looks[arm].color,
                    alpha=0.5 if behind else 1.0,
                    lw=1.0 if behind else 1.7,
                    linestyle="--" if len(splits) > 1 and not behind else "-",
                    marker=looks[arm].marker if len(line.x) <= 20 else "",
                    label=text,
                )
                axes.fill_between(
                    line.x, line.low, line.high, color=looks[arm].color, alpha=0.15, lw=0
                )
        axes.set_title(title or (f"{label(stage)}: {name}" if stage else name))
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend()
        return finished(figure, png)


def splits_of(
    rows_by_arm_seed: Mapping[str, Mapping[int, Sequence[Row]]],
    name: str,
    stage: str | None = None,
) -> list[str | None]:
    """The splits in which a metric was measured, train first."""
    found = {
        row.get("split")
        for seeds in rows_by_arm_seed.values()
        for rows in seeds.values()
        for row in rows
        if row.get("name") == name and (stage is None or row.get("stage") == stage)
    }
    return sorted(found, key=lambda split: (split != "train", str(split)))


class FrontierPoint(NamedTuple):
    """One step of one arm, averaged over the n seeds that reached it."""

    step: float
    kl: float
    gold: float | None
    proxy: float | None
    n: int


def frontier_mean(seeds: Sequence[Sequence[Row]]) -> list[FrontierPoint]:
    """Mean over seeds at equal steps; KL and reward are averaged apart."""
    by_step: dict[float, list[Row]] = {}
    for rows in seeds:
        for row in rows or ():
            if numbers([row.get("kl")]):
                by_step.setdefault(float(row.get("step", 0)), []).append(row)

    def over_seeds(rows: Sequence[Row], key: str) -> float | None:
        values = numbers(row.get(key) for row in rows)
        return mean(values) if values else None

    return [
        FrontierPoint(
            step,
            mean(numbers(row["kl"] for row in rows)),
            over_seeds(rows, "gold"),
            over_seeds(rows, "proxy"),
            len(rows),
        )
        for step, rows in sorted(by_step.items())
    ]


def frontier(
    points_by_arm: Mapping[str, Sequence[Sequence[Row]]], *, png: Path | None = None
) -> str:
    """Reward against KL: points {step, kl, gold, proxy}, a list per seed and arm.

    Gold on the left, the learned proxy on the right: over-optimisation is the left falling while
    the right still rises. Seeds are faint, the mean at equal steps is strong, its last point large.
    """
    looks = styles(points_by_arm)
    with drawing("frontier", (FULL_WIDTH, 3.5)) as figure:
        panels = figure.subplots(1, 2, sharex=True)
        sides = (("gold", "gold reward"), ("proxy", "proxy reward (learned)"))
        for axes, (key, title) in zip(panels, sides, strict=True):
            for arm in in_order(points_by_arm):
                _frontier_line(axes, points_by_arm[arm], key, label(arm), looks[arm])
            axes.set_title(title)
            axes.set_xlabel("KL to the reference (nats per sequence)")
        handles, texts = panels[0].get_legend_handles_labels()
        if not handles:
            handles, texts = panels[1].get_legend_handles_labels()
        if handles:
            figure.legend(handles, texts, loc="outside lower center", ncols=len(handles))
        return finished(figure, png)


def _frontier_line(
    axes: Axes, seeds: Sequence[Sequence[Row]], key: str, text: str, look: Style
) -> None:
    color, dash, marker = look
    for rows in seeds:
        points = sorted(
            (row.get("step", 0), row["kl"], row[key])
            for row in rows or ()
            if len(numbers([row.get("kl"), row.get(key)])) == 2
        )
        axes.plot([p[1] for p in points], [p[2] for p in points], color=color, lw=0.8, alpha=0.3)
    middle = [point for point in frontier_mean(seeds) if getattr(point, key) is not None]
    if middle:
        x, y = [p.kl for p in middle], [getattr(p, key) for p in middle]
        marks = marker if len(middle) <= 20 else ""
        axes.plot(x, y, color=color, linestyle=dash, marker=marks, markersize=4, label=text)
        axes.plot(x[-1:], y[-1:], color=color, marker=marker, markersize=8, linestyle="")


def heat_map(
    load_LE_by_stage: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    title: str = "",
    png: Path | None = None,
) -> str:
    """Load over fair share, layers down and experts across, one panel per stage, one colour scale.

    1 is fair (white), blue below, vermillion above, on a log2 scale cut at 1/4 and 4; an expert
    below a tenth of its share counts as dead and is nearly black. Numbers stand in the cells where
    they fit.
    Show one seed at a time: expert 3 of one seed is not expert 3 of another.
    """
    stages = in_order(load_LE_by_stage)
    load = {stage: _grid(load_LE_by_stage[stage]) for stage in stages}
    num_layers = max(grid.shape[0] for grid in load.values())
    num_experts = max(grid.shape[1] for grid in load.values())
    columns = max(1, min(len(stages), int(FULL_WIDTH / (0.33 * num_experts + 0.5)), 4))
    rows = math.ceil(len(stages) / columns)
    layer_height = min(0.3, 4.0 / num_layers)
    height = rows * (num_layers * layer_height + 0.75) + (0.75 if title else 0.5)
    with drawing(f"heat map {title}", (FULL_WIDTH, height)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        small = num_experts * columns <= 24 and num_layers <= 24
        as_picture = num_layers * num_experts * len(stages) > MAX_VECTOR_CELLS
        for panel, stage in zip(panels.flat, stages, strict=False):
            shade = _heat_panel(panel, load[stage], as_picture=as_picture, with_numbers=small)
            panel.set_title(label(stage))
        for panel in panels.flat[len(stages) :]:
            panel.remove()
        for panel in panels[:, 0]:
            panel.set_ylabel("layer")
        bottom = panels.flat[max(0, len(stages) - columns) : len(stages)]
        for panel in bottom:
            panel.set_xlabel("expert")
        _ratio_bar(
            figure,
            shade,
            list(panels.flat[: len(stages)]),
            label="load / fair share (dark end: dead, below 1/10)",
            has_dead=True,
        )
        if title:
            figure.suptitle(title)
        return finished(figure, png)


def pair_maps(
    share_EE_by_panel: Mapping[str, Sequence[Sequence[float]]],
    null_EE_by_panel: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    title: str = "",
    png: Path | None = None,
) -> str:
    """P(column | row) of experts chosen together: the number in the cell, where it fits.

    The colour is that share over its null, what the loads alone would give, on a log2 scale cut at
    1/4 and 4: white is no preference. Grey: the diagonal, and where there is no null.
    """
    import numpy as np

    names = list(share_EE_by_panel)
    num_experts = max(len(share) for share in share_EE_by_panel.values())
    small = num_experts <= 10
    side = 0.33 * num_experts + 0.6 if small else FULL_WIDTH / min(len(names), 3)
    columns = max(1, min(len(names), int(FULL_WIDTH / side), 4))
    rows = math.ceil(len(names) / columns)
    height = rows * (side + 0.1) + 0.8
    with drawing(f"pair maps {title}", (max(columns * side + 0.4, HALF_WIDTH), height)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        cells = sum(len(share) ** 2 for share in share_EE_by_panel.values())
        for panel, name in zip(panels.flat, names, strict=False):
            share, null = _grid(share_EE_by_panel[name]), _grid(null_EE_by_panel[name])
            with np.errstate(divide="ignore", invalid="ignore"):
                # Two experts that never meet are no dead ones: their colour is the blue end.
                ratio = np.maximum(share / null, DEAD_SHARE)
            ratio[np.eye(len(share), dtype=bool)] = np.nan
            shade = _heat_panel(
                panel,
                ratio,
                as_picture=cells > MAX_VECTOR_CELLS,
                with_numbers=small,
                number_LE=share,
            )
            if not small:
                for axis in (panel.xaxis, panel.yaxis):
                    whole_ticks(axis, len(share), 8)
            panel.set_aspect("equal")
            panel.set_title(name)
        for panel in panels.flat[len(names) :]:
            panel.remove()
        for panel in panels[:, 0]:
            panel.set_ylabel("expert of the token")
        for panel in panels.flat[max(0, len(names) - columns) : len(names)]:
            panel.set_xlabel("also chosen")
        _ratio_bar(
            figure,
            shade,
            list(panels.flat[: len(names)]),
            label="share / share by the loads alone",
            has_dead=False,
        )
        if title:
            figure.suptitle(title)
        return finished(figure, png)


def _ratio_bar(
    figure: Figure, shade: Any, panels: Sequence[Axes], *, label: str, has_dead: bool
) -> None:
    import numpy as np

    bar = figure.colorbar(
        shade,
        ax=list(panels),
        location="bottom",
        ticks=np.arange(-LOAD_LIMIT, LOAD_LIMIT + 1),
        extend="min" if has_dead else "neither",
        aspect=45,
        shrink=0.7,
        label=label,
    )
    bar.ax.set_xticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.outline.set_visible(False)


def _grid(load_LE: Sequence[Sequence[float | None]]) -> Any:
    import numpy as np

    num_experts = max((len(row or ()) for row in load_LE), default=0)
    grid = np.full((len(load_LE), num_experts), np.nan)
    for layer, row in enumerate(load_LE):
        for expert, value in enumerate(row or ()):
            grid[layer, expert] = np.nan if value is None else value
    return grid


def _heat_panel(
    axes: Axes,
    load_LE: Any,
    *,
    as_picture: bool,
    with_numbers: bool,
    number_LE: Any | None = None,
) -> Any:
    """Colours by `load_LE`, numbers by `number_LE` if they are others."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    ends = LinearSegmentedColormap.from_list("load", [BLUE, "#FFFFFF", VERMILLION])
    colors = ends.with_extremes(under=DEAD, bad="#EEEEEE")
    scale = Normalize(-LOAD_LIMIT, LOAD_LIMIT)
    with np.errstate(divide="ignore"):
        log_LE = np.log2(load_LE)
    # Idle must not look dead: only dead experts stay below the range of the scale.
    dead = -LOAD_LIMIT - 1
    shown_LE = np.where(load_LE < DEAD_SHARE, dead, np.clip(log_LE, -LOAD_LIMIT, LOAD_LIMIT))
    num_layers, num_experts = load_LE.shape
    box = (-0.5, num_experts - 0.5, num_layers - 0.5, -0.5)
    shade: Any
    if as_picture:
        shade = axes.imshow(
            shown_LE, cmap=colors, norm=scale, extent=box, aspect="auto", interpolation="none"
        )
    else:
        edges = np.arange(num_experts + 1) - 0.5, np.arange(num_layers + 1) - 0.5
        shade = axes.pcolormesh(
            *edges, np.ma.masked_invalid(shown_LE), cmap=colors, norm=scale, edgecolor="white", lw=1
        )
        axes.set_xlim(box[0], box[1])
        axes.set_ylim(box[2], box[3])
    for layer, expert in np.ndindex(load_LE.shape) if with_numbers else ():
        value = (load_LE if number_LE is None else number_LE)[layer, expert]
        if np.isfinite(load_LE[layer, expert]):
            ink = _ink(colors(scale(shown_LE[layer, expert])))
            text = "0" if value == 0 else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            axes.text(expert, layer, text, ha="center", va="center", fontsize=7.5, color=ink)
    whole_ticks(axes.xaxis, num_experts, 16)
    whole_ticks(axes.yaxis, num_layers, 12)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return shade


def whole_ticks(axis: Any, count: int, most: int) -> None:
    axis.set_ticks(range(0, count, max(1, math.ceil(count / most))))


def _ink(color: Sequence[float]) -> str:
    """Black or white, whichever stands out more on this colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def drift(
    layers_by_metric: Mapping[str, Mapping[str, Sequence[Sequence[float | None]]]],
    *,
    name: str = "drift",
    one_scale: Collection[str] = (),
    png: Path | None = None,
) -> str:
    """Distance of routing from the SFT model per layer: {title: {stage: [[per layer] per seed]}}.

    One panel per title, one line per stage (mean), a band from min to max over seeds.
    name: salts the ids, so that two such figures can share a page.
    one_scale: the titles whose panels share one y axis.
    """
    looks = styles(stage for stages in layers_by_metric.values() for stage in stages)
    with drawing(name, (FULL_WIDTH, 3.2)) as figure:
        panels = figure.subplots(1, len(layers_by_metric), squeeze=False)[0]
        alike = [
            axes for axes, title in zip(panels, layers_by_metric, strict=True) if title in one_scale
        ]
        for axes in alike[1:]:
            axes.sharey(alike[0])
        for axes, (title, stages) in zip(panels, layers_by_metric.items(), strict=True):
            num_layers = 0
            for stage in in_order(stages):
                rows = [
                    [{"step": i, "name": "", "value": value} for i, value in enumerate(layers)]
                    for layers in stages[stage]
                    if layers
                ]
                line = curve(rows, "")
                if not line.x:
                    continue
                num_layers = max(num_layers, int(line.x[-1]) + 1)
                color, dash, marker = looks[stage]
                axes.plot(
                    line.x, line.mean, color=color, ls=dash, marker=marker, label=label(stage)
                )
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, lw=0)
            axes.set_title(title)
            axes.set_xlabel("layer")
            whole_ticks(axes.xaxis, num_layers, 12)
        handles, texts = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, texts, loc="outside lower center", ncols=min(len(handles), 6))
        return finished(figure, png)


def stage_minutes(
    seconds_by_stage: Mapping[str, Sequence[float | None]], *, png: Path | None = None
) -> str:
    """Minutes of wall time per stage: a bar for the mean over seeds, a dot per seed."""
    stages = [stage for stage in in_order(seconds_by_stage) if numbers(seconds_by_stage[stage])]
    minutes = {s: [value / 60 for value in numbers(seconds_by_stage[s])] for s in stages}
    with drawing("minutes", (FULL_WIDTH, 0.9 + 0.3 * len(stages))) as figure:
        axes = figure.subplots()
        for y, stage in enumerate(stages):
            middle = mean(minutes[stage])
            axes.barh(y, middle, height=0.62, color=SKY, alpha=0.55)
            axes.plot(minutes[stage], [y] * len(minutes[stage]), "o", ms=3.5, color=BLUE)
            axes.annotate(
                f"{middle:.2g}" if middle < 10 else f"{middle:.0f}",
                (max(minutes[stage]), y),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
            )
        _named_rows(axes, [label(stage) for stage in stages])
        axes.set_xlabel("minutes (bar: mean, dots: seeds)")
        axes.margins(x=0.08)
        axes.set_xlim(left=0)
        return finished(figure, png)


def bars(
    values_by_arm: Mapping[str, Sequence[float | None]],
    *,
    metric: str,
    png: Path | None = None,
) -> str:
    """One metric per arm: a bar for the mean, a dot per seed, the 95 % interval of the mean.

    The interval (Student t) is drawn from three seeds on. It is of each arm alone; the comparison
    of two arms is paired by seed and usually sharper than two overlapping intervals suggest.
    """
    arms = [arm for arm in in_order(values_by_arm) if numbers(values_by_arm[arm])]
    looks = styles(values_by_arm)
    with drawing(f"bars {metric}", (FULL_WIDTH, 0.9 + 0.42 * len(arms))) as figure:
        axes = figure.subplots()
        for y, arm in enumerate(arms):
            values = numbers(values_by_arm[arm])
            color = looks[arm].color
            axes.barh(y, mean(values), height=0.62, color=color, alpha=0.25)
            axes.plot([mean(values)] * 2, [y - 0.31, y + 0.31], color=color, lw=2)
            interval = paired_interval(values)
            if interval:
                axes.plot(interval, [y, y], color=color, lw=1.3, marker="|", ms=9, mew=1.3)
            axes.plot(values, [y] * len(values), "o", ms=4, color=color, alpha=0.75, mew=0)
        _named_rows(axes, [label(arm) for arm in arms])
        axes.axvline(0, color="#444444", lw=0.8)
        axes.set_xlabel(f"{metric} (bar: mean, dots: seeds, whisker: 95 % interval)")
        return finished(figure, png)


def _named_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


@contextmanager
def drawing(name: str, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure under the house's settings; `name` salts its ids, so that two can share a page."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"switchyard {name}",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Helvetica Neue", "Arial"],
        "font.size": 9.0,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "figure.titlesize": 9.5,
        "axes.edgecolor": "#888888",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.7,
        "xtick.color": "#666666",
        "ytick.color": "#666666",
        "xtick.labelcolor": "#222222",
        "ytick.labelcolor": "#222222",
        "lines.linewidth": 1.7,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "figure.constrained_layout.w_pad": 0.08,
        "figure.constrained_layout.h_pad": 0.06,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
    with matplotlib.rc_context(settings):
        yield Figure(figsize=size, layout="constrained")


def finished(figure: Figure, png: Path | None) -> str:
    """The figure as SVG without date, version or ids that nothing points to; a PNG beside it."""
    text = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    # Laying out a second time moves things a little: SVG first, or it would depend on the PNG.
    figure.savefig(text, format="svg", metadata=nothing)
    if png is not None:
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return _slim(text.getvalue())


def _slim(svg: str) -> str:
    """Fit to stand inside a page: no prolog, no rule that would style the page, no repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg style="stroke-linejoin:round;stroke-linecap:butt" ', 1)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m.group() if m.group(1) in used else "", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"
