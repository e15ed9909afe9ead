"""What a pass over texts says about a model's experts, as the parts of `summary.json`.

The decision to know: a divergence, a repeat rate or a share of common choices is never written
without what chance alone gives beside it.

Shapes: L MoE layers, E experts, K experts per token, N texts, G domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.lab.expert_use import Observed
from moe.chance import p_value, p_values
from moe.coactivation import CoActivation
from moe.repeats import Repeats, repeats
from moe.specialisation import (
    Vocabulary,
    domain_divergence,
    domain_loads,
    joint_divergence,
    shuffled_divergence,
    vocabulary_divergence,
)
from moe.stats import RouterStats, jensen_shannon_bits

DIGITS = 4  # of the co-activation table in the summary; coactivation.csv has all
MOST_PAIRS = 5  # per layer
LEAST_EXPECTED = 5  # tokens by the loads alone; the share of a rarer pair is mostly chance


def measures(stats: RouterStats) -> dict[str, list[Any]]:
    """Every measure per layer, and `load_share` (load / fair share) per layer and expert.

    None for the margin and ties of a router that chooses all its experts.
    """
    stats = stats.cpu()
    relative_LE = stats.relative_load_LE
    return {
        "max_load": relative_LE.amax(dim=-1).tolist(),
        "min_load": relative_LE.amin(dim=-1).tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "load_entropy": stats.load_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "load_cv": stats.load_cv_L.tolist(),
        "load_cv_floor": stats.load_cv_floor_L.tolist(),
        "dropped_share": stats.dropped_share_L.tolist(),
        "margin": _finite(stats.mean_margin_L),
        "tie_rate": _finite(stats.tie_rate_L),
        "load_share": relative_LE.tolist(),
    }


def _finite(values_L: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values_L.tolist()]


# --- neighbours and pairs ------------------------------------------------------------------------


def neighbours(observed: Observed, *, permutations: int, seed: int) -> dict[str, Any]:
    """The summary's `repeats`; empty where no token follows another."""
    if not bool((observed.sequence_T[1:] == observed.sequence_T[:-1]).any()):
        return {}
    experts = observed.stats.count_LE.shape[1]
    wanted: dict[str, Literal[1, 2]] = {"first": 1, "first_or_second": 2}
    found: dict[str, Any] = {}
    for name, choices in wanted.items():
        if choices > observed.stats.top_k:
            continue
        counted = repeats(
            observed.expert_LTK,
            observed.sequence_T,
            num_experts=experts,
            choices=choices,
            permutations=permutations,
            seed=seed,
        )
        found[name] = _as_summary(counted)
        found["num_pairs"] = counted.num_pairs
    return found


def _as_summary(counted: Repeats) -> dict[str, Any]:
    return {
        "rate": counted.rate_L.tolist(),
        "usage_null": counted.usage_null_L.tolist(),
        "shuffle_null": counted.shuffle_null_L.tolist(),
        "shuffled": counted.shuffled_PL.tolist(),
        "p_value": list(counted.p_value),
    }


@dataclass(frozen=True, kw_only=True)
class Partners:
    """Two experts of a layer: how often a token of the one is a token of the other too.

    share: P(other | expert); by_usage: about what the loads alone would give; tokens: with both.
    """

    layer: int
    expert: int
    other: int
    tokens: int
    share: float
    by_usage: float


def partners(pairs: CoActivation) -> list[Partners]:
    """Every ordered pair of different experts, layer by layer."""
    pair_LEE = pairs.pair_LEE.long().tolist()
    share_LEE, null_LEE = pairs.conditional_LEE.tolist(), pairs.usage_null_LEE.tolist()
    layers, experts = pairs.usage_LE.shape
    return [
        Partners(
            layer=layer,
            expert=i,
            other=j,
            tokens=pair_LEE[layer][i][j],
            share=share_LEE[layer][i][j],
            by_usage=null_LEE[layer][i][j],
        )
        for layer in range(layers)
        for i in range(experts)
        for j in range(experts)
        if i != j
    ]


def pair_summary(pairs: CoActivation) -> dict[str, Any]:
    """The summary's `coactivation`: P(column | row) per layer and its level without preference.

    strongest: each layer's pairs with the largest P, of those that are no rarity by their loads.
    """
    layers = pairs.conditional_LEE.tolist()
    usage_LE = pairs.usage_LE.tolist()
    strongest: list[list[dict[str, Any]]] = [[] for _ in layers]
    tokens_L = pairs.tokens_L.tolist()
    for pair in sorted(partners(pairs), key=lambda pair: -pair.share):
        here = strongest[pair.layer]
        expected = pair.by_usage * usage_LE[pair.layer][pair.expert] * tokens_L[pair.layer]
        if len(here) < MOST_PAIRS and expected >= LEAST_EXPECTED:
            here.append(vars(pair))
    return {
        "conditional": [[[round(p, DIGITS) for p in row] for row in layer] for layer in layers],
        "usage": usage_LE,
        "uniform_null": pairs.uniform_null,
        "strongest": strongest,
    }


# --- against another model -----------------------------------------------------------------------


def against(observed: Observed, name: str) -> dict[str, Any]:
    """The summary's `drift`: how far the choices moved, and what unrelated routers would share."""
    stats, other, shared = observed.stats, observed.other_stats, observed.saturation
    assert other is not None and shared is not None and observed.jaccard_L is not None
    experts = stats.count_LE.shape[1]
    return {
        "against": name,
        "jaccard": observed.jaccard_L.tolist(),
        # |A and B| is K^2 / E on average for two random sets of K.
        "jaccard_by_chance_about": stats.top_k / (2 * experts - stats.top_k),
        "jsd_bits": jensen_shannon_bits(stats.load_LE, other.load_LE).tolist(),
        "saturation": shared.share_L.tolist(),
        "saturation_usage_null": shared.usage_null_L.tolist(),
        "saturation_uniform_null": shared.uniform_null,
    }


# --- by domain and by token ----------------------------------------------------------------------


def by_domain(
    text_count_NLE: Tensor, labels: Sequence[str], *, permutations: int, seed: int
) -> dict[str, Any]:
    """The summary's `domains`: loads, divergence per layer beside chance, p-values."""
    names = list(dict.fromkeys(labels))
    labels_N = torch.tensor([names.index(label) for label in labels])
    groups = {"num_domains": len(names)}
    observed_L = domain_divergence(text_count_NLE, labels_N, **groups)
    shuffled_PL = shuffled_divergence(
        text_count_NLE, labels_N, **groups, permutations=permutations, seed=seed
    )
    load_GLE = domain_loads(text_count_NLE, labels_N, **groups)
    overall = float(observed_L.mean())
    return {
        "names": names,
        "texts": [labels.count(name) for name in names],
        "relative_load": (load_GLE * text_count_NLE.shape[-1]).tolist(),
        "jsd_bits": observed_L.tolist(),
        "jsd_bits_shuffled_mean": shuffled_PL.mean(dim=0).tolist(),
        "jsd_bits_shuffled": shuffled_PL.tolist(),
        "p_value": p_values(observed_L, shuffled_PL),
        "joint_jsd_bits": joint_divergence(load_GLE).tolist(),
        "mean_jsd_bits": overall,
        "mean_jsd_bits_shuffled": float(shuffled_PL.mean()),
        "mean_p_value": p_value(overall, shuffled_PL.mean(dim=1).tolist()),
    }


def by_vocabulary(
    observed: Observed, *, min_count: int, permutations: int, seed: int
) -> dict[str, Any]:
    """The summary's `vocabulary`: what a token's identity says about its experts, in bits."""
    found: Vocabulary = vocabulary_divergence(
        observed.token_T,
        observed.expert_LTK,
        sequence_T=observed.sequence_T,
        num_experts=observed.stats.count_LE.shape[1],
        min_count=min_count,
        permutations=permutations,
        seed=seed,
    )
    return {
        "jsd_bits": found.jsd_bits_L.tolist(),
        "jsd_bits_shuffled_mean": found.shuffled_PL.mean(dim=0).tolist(),
        "jsd_bits_shuffled": found.shuffled_PL.tolist(),
        "p_value": list(found.p_value),
        "distinct_tokens": found.num_kinds,
        "tokens": found.num_tokens,
    }
