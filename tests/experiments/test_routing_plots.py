"""Charts of routing: same bytes twice, what is measured beside its chance level, one y axis."""

import re
import xml.dom.minidom
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.lab import routing_plots
from experiments.lab.routing_plots import Moved

SHARE = [[[0.3, 0.2], [0.5, None], [1.0, 1.0]], [[0.4, 0.2], [0.7, 0.6], [1.0, 1.0]]]
CHANCE = [[[0.25, 0.26]] * 3] * 2
REPEATS = {"initial": [[0.3, 0.5], [0.4, None]], "trained": [[0.2, 0.1], [0.2, 0.3]]}
SHUFFLED = {"initial": [[0.2, 0.4], [0.3, 0.3]], "trained": [[0.2, 0.1], [0.1, 0.2]]}
POINTS = {
    "rm": [Moved(None, 0.4, 0.5)],
    "sft": [Moved(3.0, 0.5, 0.3), Moved(3.5, 0.4, None)],
    "dpo": [Moved(0.2, 0.1, 0.2), Moved(None, 0.15, 0.2)],
}


def draw_repeats(png: Path | None) -> str:
    return routing_plots.beside_chance(
        REPEATS, SHUFFLED, name="repeats", found="found", chance="shuffled", png=png
    )


FIGURES: dict[str, Callable[[Path | None], str]] = {
    "settled": lambda png: routing_plots.settled(SHARE, CHANCE, marks=[0.0, 0.01, 1.0], png=png),
    "repeats": draw_repeats,
    "change": lambda png: routing_plots.change_against_kl(POINTS, png=png),
}


def texts(svg: str) -> list[str]:
    """Every piece of text in a figure, as a reader sees it."""
    found = xml.dom.minidom.parseString(svg).getElementsByTagName("text")
    return ["".join(n.data for n in t.childNodes if n.nodeType == n.TEXT_NODE) for t in found]


def marks_of(svg: str, color: str, *, hollow: bool) -> int:
    """How many markers have this edge colour, the one in the legend included."""
    fill = "#ffffff" if hollow else color
    style = f'<use [^>]*style="fill: {fill}; stroke: {color}'
    return len(re.findall(style, svg.lower()))


@pytest.mark.parametrize("name", FIGURES)
def test_a_chart_is_the_same_bytes_twice_with_and_without_its_png(
    name: str, tmp_path: Path
) -> None:
    png = tmp_path / "figures" / "x.png"
    first = FIGURES[name](None)
    assert FIGURES[name](png) == first
    bytes_ = png.read_bytes()
    assert bytes_.startswith(b"\x89PNG")
    FIGURES[name](png)
    assert png.read_bytes() == bytes_
    assert "fill: #ffffff" in first and texts(first)


def test_the_charts_share_no_id() -> None:
    ids = [set(re.findall(r' id="([^"]+)"', draw(None))) for draw in FIGURES.values()]
    assert sum(map(len, ids)) == len(set().union(*ids)) > 0


def test_settled_has_a_line_per_layer_the_marks_as_percent_and_chance_dashed() -> None:
    svg = FIGURES["settled"](None)
    assert {"0 %", "1 %", "100 %", "layer 0", "layer 1", "by use alone"} <= set(texts(svg))
    # Two layers and the legend's own.
    assert svg.count("stroke-dasharray") == 3


def test_a_mark_is_of_the_seeds_that_have_the_layer() -> None:
    assert routing_plots._by_mark(SHARE, 1) == [[0.2, 0.2], [0.6], [1.0, 1.0]]
    assert routing_plots._by_mark([[[0.5], [1.0]]], 1) == [[], []]


def test_fifty_six_layers_look_different() -> None:
    colors, markers = routing_plots.LAYER_COLORS, routing_plots.LAYER_MARKERS
    looks = {(colors[i % len(colors)], markers[i % len(markers)]) for i in range(56)}
    assert len(looks) == 56


def test_every_repeat_stands_beside_the_chance_level_of_its_seed() -> None:
    svg = draw_repeats(None)
    assert {"initial", "trained", "found", "shuffled"} <= set(texts(svg))
    # Eight seeds and layers less the one without a rate, which loses its chance level too; and 1.
    blue, grey = (c.lower() for c in (routing_plots.BLUE, routing_plots.GREY))
    assert marks_of(svg, blue, hollow=False) == 7 + 1
    assert marks_of(svg, grey, hollow=True) == 7 + 1


def test_a_stage_has_a_filled_point_per_seed_and_its_two_trainings_hollow() -> None:
    svg = FIGURES["change"](None)
    black, blue = "#000000", routing_plots.BLUE.lower()
    assert marks_of(svg, black, hollow=True) == 1  # the second seed has no second training
    assert marks_of(svg, blue, hollow=True) == 1  # a seed without KL has no place on the axis
    found = texts(svg)
    assert {"SFT", "DPO", "no KL", "between its two trainings"} <= set(found)
    assert found.count("RM") == 2  # below its strip and in the legend


def test_kl_far_apart_takes_a_logarithmic_axis_and_near_does_not() -> None:
    far = texts(FIGURES["change"](None))
    assert {"0.2", "0.5", "1", "2", "3"} <= set(far)
    near = {"sft": [Moved(3.0, 0.5, 0.3), Moved(3.5, 0.4, 0.3)]}
    found = texts(routing_plots.change_against_kl(near))
    assert "3.0" in found and "3.4" in found and "no KL" not in found
    zero = {"sft": [Moved(0.0, 0.5, 0.3), Moved(3.5, 0.4, 0.3)]}
    assert "0.0" in texts(routing_plots.change_against_kl(zero))
