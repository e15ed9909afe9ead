"""What the jobs of the experiment `upcycling` left, as metrics per arm and sentences.

The decision to know: what goes on from the dense start owes it its tokens and FLOPs, so they are
told with and without them.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from experiments.lab.specialisation import specialisation_sentence
from experiments.lab.upcycling_arms import BACKWARD, START

# What of the routing stands beside the losses, as means over layers.
SPECIALISATION = (
    *("expert_distance_before", "expert_distance", "load_entropy", "max_vio", "max_vio_floor"),
    *("dead_experts", "domain_jsd", "domain_jsd_by_chance"),
)


def arm_metrics(
    seeds: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]
) -> dict[str, list[float | None]]:
    """Metric -> per seed; None for what a dense model does not have."""
    found: dict[str, list[float | None]] = {}
    for judged, start in zip(seeds, starts, strict=True):
        own, before = judged["metrics"], start["metrics"]
        extra = before if judged["steps_before"] else dict.fromkeys(before, 0)
        values = {
            **own,
            "tokens_behind_weights": own["tokens_trained"] + extra["tokens_trained"],
            "train_gflops_with_start": own["train_gflops"] + extra["train_gflops"],
        }
        for name in SPECIALISATION:
            values[name] = fmean(judged["routing"][name]) if judged["routing"] else None
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def notes(judged: Mapping[str, Sequence[Mapping[str, Any]]], routing: dict[str, Any]) -> list[str]:
    """What a reader must know beside the tables, computed from what the judge left."""
    first = {arm: seeds[0] for arm, seeds in judged.items()}
    d0 = first[START]["metrics"]["tokens_trained"]
    d1 = first["dense_continued"]["metrics"]["tokens_trained"]
    flops = {arm: found["metrics"]["forward_flops_per_token"] for arm, found in first.items()}
    rates = {arm: f"{found['learning_rate']:g}" for arm, found in first.items()}
    told = [
        f"Tokens (first seed): D0 {d0:,} made the dense start, D1 {d1:,} more went into what goes "
        "on from it; moe_scratch_d1 saw D1 alone, moe_scratch D0 + D1.",
        "Forward FLOPs per token without attention scores: "
        + ", ".join(f"{arm} {value:,}" for arm, value in flops.items())
        + f". Training counts {1 + BACKWARD} times that; train_gflops_with_start adds what the "
        "dense start took.",
        "Learning rates: " + ", ".join(f"{arm} {rate}" for arm, rate in rates.items()) + ".",
        "The curves show the loss on a few of the held-out rows; a step counts from the first that "
        "made the weights, the dense start's included. loss_before is that of the whole held-out "
        "text before an arm's own training: of copies and slices that of the dense start.",
    ]
    told.append(
        "expert_distance is 0 between copies and 1.41 between unrelated weights; the slices of one "
        "copy are unrelated, so upcycled_granular's begins above 0 (expert_distance_before)."
    )
    sentences = [specialisation_sentence(routing, stage=arm, name=arm) for arm in routing]
    told += [sentence for sentence in sentences if sentence]
    for seeds in judged.values():
        for found in seeds:
            told += found["notes"]
    return list(dict.fromkeys(told))
