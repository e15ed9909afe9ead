"""Figures: numbers behind the lines by hand, the same bytes twice, text that stays text."""

import re
import xml.dom.minidom
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.lab import plots
from moe.stats import DEAD_SHARE

ROWS = {
    arm: {
        seed: [
            {
                "step": step,
                "stage": "dpo",
                "split": split,
                "name": "train/loss",
                "value": 0.69 - 0.01 * step - 0.01 * seed,
                "count": 4,
            }
            for step in range(0, 30, 10)
            for split in ("train", "val")
        ]
        for seed in range(2)
    }
    for arm in ("dpo", "ppo")
}
POINTS = {
    "ppo": [
        [{"step": s, "kl": s + 0.1 * seed, "gold": 1 + s - s * s, "proxy": 1 + s} for s in range(3)]
        for seed in range(3)
    ],
    "best_of_n": [[{"step": 1, "kl": 0.5, "gold": 1.2, "proxy": None}]],
}
LOAD = {"sft": [[1.0, 0.0], [1.5, 0.5]], "ppo": [[0.05, 1.95], [1.0, 1.0]]}
PAIRS = {"layer 0": [[1.0, 0.9, 0.0], [0.45, 1.0, 0.35], [0.0, 0.8, 1.0]]}
NULLS: dict[str, list[list[float | None]]] = {
    "layer 0": [[1.0, 0.3, 0.5], [0.45, 1.0, 0.7], [0.5, None, 1.0]]
}
FIGURES: dict[str, Callable[[Path | None], str]] = {
    "curves": lambda png: plots.learning_curves(ROWS, "train/loss", stage="dpo", png=png),
    "frontier": lambda png: plots.frontier(POINTS, png=png),
    "heat": lambda png: plots.heat_map(LOAD, title="seed 0", png=png),
    "drift": lambda png: plots.drift({"Jaccard": {"ppo": [[0.9, 0.8], [0.7, None]]}}, png=png),
    "pairs": lambda png: plots.pair_maps(PAIRS, NULLS, title="seed 0", png=png),
    "minutes": lambda png: plots.stage_minutes({"sft": [60.0, 66.0], "rm": [None]}, png=png),
    "bars": lambda png: plots.bars({"sft": [1.0, 1.2, None], "dpo": [2.0]}, metric="m", png=png),
}


def texts(svg: str) -> list[str]:
    """Every piece of text in a figure, as a reader sees it."""
    found = xml.dom.minidom.parseString(svg).getElementsByTagName("text")
    return ["".join(n.data for n in t.childNodes if n.nodeType == n.TEXT_NODE) for t in found]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_bytes_twice_with_and_without_its_png(
    name: str, tmp_path: Path
) -> None:
    png = tmp_path / "figures" / "x.png"
    first = FIGURES[name](None)
    assert FIGURES[name](png) == first
    bytes_ = png.read_bytes()
    assert bytes_.startswith(b"\x89PNG")
    FIGURES[name](png)
    assert png.read_bytes() == bytes_


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_no_date_no_version_no_outlined_text_and_a_white_ground(name: str) -> None:
    svg = FIGURES[name](None)
    assert svg.startswith("<svg ") and "viewBox" in svg
    assert not re.search(r"<metadata|<style|Matplotlib|<!DOCTYPE|<\?xml|dc:date", svg)
    assert "fill: #ffffff" in svg
    assert texts(svg)


def test_two_figures_on_one_page_share_no_id() -> None:
    ids = [set(re.findall(r' id="([^"]+)"', draw(None))) for draw in FIGURES.values()]
    assert sum(map(len, ids)) == len(set().union(*ids)) > 0


def test_drawing_leaves_the_callers_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    FIGURES["heat"](None)
    assert dict(matplotlib.rcParams) == before


def test_a_curve_is_the_mean_and_range_of_seeds_at_each_step() -> None:
    def rows(*values: float | None) -> list[dict[str, Any]]:
        return [{"step": i, "name": "a", "value": v, "count": 1} for i, v in enumerate(values)]

    line = plots.curve([rows(1.0, 2.0, None), rows(3.0, float("nan"), None)], "a")
    assert line.x == [0.0, 1.0]
    assert (line.mean, line.low, line.high) == ([2.0, 2.0], [1.0, 2.0], [3.0, 2.0])


def test_a_curve_weighs_rows_of_one_step_by_their_count_and_heeds_stage_and_split() -> None:
    row = {"step": 1, "name": "a", "stage": "sft", "split": "train"}
    rows = [
        {**row, "value": 1.0, "count": 3},
        {**row, "value": 5.0, "count": 1},
        {**row, "value": 99.0, "count": 1, "split": "val"},
        {**row, "value": 99.0, "count": 1, "stage": "dpo"},
        {**row, "value": 99.0, "count": 1, "name": "b"},
    ]
    assert plots.curve([rows], "a", stage="sft", split="train").mean == [2.0]
    assert plots.curve([rows], "absent").x == []


def test_a_long_curve_is_averaged_in_buckets() -> None:
    rows = [{"step": i, "name": "a", "value": float(i % 2)} for i in range(10_000)]
    line = plots.curve([rows], "a")
    assert len(line.x) == plots.MAX_POINTS
    assert line.x == sorted(line.x)
    assert all(value == pytest.approx(0.5, abs=0.02) for value in line.mean)


def test_the_frontier_averages_seeds_at_equal_steps() -> None:
    seeds = [
        [{"step": 0, "kl": 0.0, "gold": 1.0}, {"step": 10, "kl": 2.0, "gold": 3.0, "proxy": 1.0}],
        [{"step": 10, "kl": 4.0, "gold": None, "proxy": 2.0}, {"step": 20, "kl": None, "gold": 9}],
    ]
    assert plots.frontier_mean(seeds) == [
        (0.0, 0.0, 1.0, None, 1),
        (10.0, 3.0, 3.0, 1.5, 2),
    ]


def test_a_heat_map_writes_small_maps_numbers_in_their_cells() -> None:
    found = texts(FIGURES["heat"](None))
    assert {"1.00", "0", "1.50", "0.50", "0.05", "1.95", "SFT", "PPO", "seed 0"} <= set(found)


def test_a_heat_map_paints_dead_experts_alone_in_the_dead_colour() -> None:
    def painted(load: float) -> bool:
        svg = plots.heat_map({"sft": [[load, 1.0]]})
        bar = plots.heat_map({"sft": [[1.0, 1.0]]}).count(plots.DEAD.lower())
        return svg.count(plots.DEAD.lower()) > bar

    assert painted(0.0) and painted(0.099)
    assert not painted(0.1) and not painted(4.0)
    assert plots.DEAD_SHARE == DEAD_SHARE


def test_a_pair_map_writes_shares_and_colours_by_their_null() -> None:
    svg = plots.pair_maps(PAIRS, NULLS)
    # The diagonal and the pair without a null stay empty.
    assert {text for text in texts(svg) if text.startswith("0.") or text == "0"} >= {
        *("0.90", "0.45", "0.35"),
    }
    assert "0.80" not in texts(svg) and "1.00" not in texts(svg)
    assert plots.DEAD.lower() not in svg  # two experts that never meet are not dead


def test_pair_maps_of_many_experts_are_pictures_without_numbers() -> None:
    many = {f"layer {layer}": [[0.5] * 64] * 64 for layer in range(3)}
    svg = plots.pair_maps(many, many)
    # Three maps and the colour bar.
    assert svg.count("<image") == 4 and "0.50" not in texts(svg) and len(svg) < 200_000


def test_a_large_heat_map_becomes_one_picture_and_stays_small() -> None:
    load = [[(layer + expert) % 3 * 0.7 for expert in range(128)] for layer in range(48)]
    svg = plots.heat_map({"sft": load, "ppo": load})
    assert svg.count("<image") == 3  # two stages and the colour bar
    assert len(svg) < 150_000


def test_a_heat_map_takes_a_stage_with_missing_and_dense_layers() -> None:
    assert texts(plots.heat_map({"sft": [[1.0, None], []], "ppo": [[1.0, 1.0, 1.0]]}))


def test_names_are_shown_as_they_are_and_never_as_formulas() -> None:
    svg = plots.bars({"a_$b_1$ <i>": [1.0]}, metric="x & y")
    assert "a_$b_1$ <i>" in texts(svg)
    assert any("x & y" in text for text in texts(svg))


def test_drift_panels_that_are_compared_share_one_y_axis() -> None:
    panels = {"a": {"sft": [[0.25]]}, "b": {"sft": [[40.0]]}, "c": {"sft": [[9000.0]]}}
    apart, alike = (texts(plots.drift(panels, one_scale=one)) for one in ((), ("a", "b")))
    assert apart.count("40") == 1 and alike.count("40") == 2
    assert apart.count("9000") == alike.count("9000") == 1


def test_known_arms_come_in_the_order_they_are_made_and_keep_their_style() -> None:
    assert plots.in_order(["zeta", "ppo", "sft", "base", "ppo"]) == ["base", "sft", "ppo", "zeta"]
    assert plots.styles(["ppo", "zeta"])["ppo"] == plots.styles(["ppo"])["ppo"]
    looks = plots.styles(["dpo", "x", "y", "z"])
    assert len(set(looks.values())) == 4


def test_one_line_needs_no_legend_and_two_splits_do() -> None:
    one = {"dpo": {0: [row for row in ROWS["dpo"][0] if row["split"] == "train"]}}
    assert "DPO" not in texts(plots.learning_curves(one, "train/loss"))
    both = texts(plots.learning_curves({"dpo": ROWS["dpo"]}, "train/loss"))
    assert {"DPO, train", "DPO, val"} <= set(both)


def test_ink_on_a_cell_is_the_one_that_stands_out() -> None:
    assert plots._ink((1.0, 1.0, 1.0)) == "black"
    assert plots._ink((0.0, 0.16, 0.25)) == "white"
