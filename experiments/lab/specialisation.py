"""How far experts that began as copies have come apart: in weights, and in the texts they serve.

The decision to know: divergence between domains is told beside what whole texts shuffled over the
domains give, because a router that ignores the domain has a divergence above zero too.

Shapes: L MoE layers, E experts, N texts.
"""

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from moe.chance import p_values
from moe.record import RoutingTrace
from moe.specialisation import domain_divergence, row_counts, shuffled_divergence
from sft.adapt import is_adapted, merged

PERMUTATIONS = 99
STACKED = ("gate_up_proj", "down_proj")


@torch.no_grad()
def expert_distance_L(model: nn.Module) -> list[float]:
    """Per MoE layer, the mean over pairs of experts of ||W_i - W_j|| / mean ||W||; 0 for copies.

    W is all of an expert's weights; adapters count, folded in. sqrt(2) for unrelated experts.
    """
    plain = merged(copy.deepcopy(model)) if is_adapted(model) else model
    distances = []
    for module in plain.modules():
        weights = [getattr(module, name, None) for name in STACKED]
        if not all(isinstance(w, Tensor) and w.dim() == 3 for w in weights):
            continue
        flat_EX = torch.cat([w.flatten(1).double() for w in weights if w is not None], dim=1)
        gaps = [
            float((flat_EX[i] - flat_EX[j]).norm()) for i, j in combinations(range(len(flat_EX)), 2)
        ]
        size = float(flat_EX.norm(dim=1).mean())
        distances.append(sum(gaps) / len(gaps) / size)
    return distances


def domain_use(trace: RoutingTrace, domains: Sequence[str], *, seed: int) -> dict[str, list[float]]:
    """Per layer: divergence of expert use between the texts' domains, in bits, and by chance.

    domains: of each recorded row, in the order of the passes. domain_jsd: Jensen-Shannon, mean over
    pairs of domains; domain_jsd_by_chance: its mean over shufflings of whole texts; domain_p: share
    of the shufflings, the observed one among them, that reach it.
    """
    names = sorted(set(domains))
    count_NLE = torch.cat([row_counts(forward) for forward in trace.forwards])
    labels_N = torch.tensor([names.index(domain) for domain in domains])
    found_L = domain_divergence(count_NLE, labels_N, num_domains=len(names))
    shuffled_PL = shuffled_divergence(
        count_NLE, labels_N, num_domains=len(names), permutations=PERMUTATIONS, seed=seed
    )
    return {
        "domain_jsd": found_L.tolist(),
        "domain_jsd_by_chance": shuffled_PL.mean(dim=0).tolist(),
        "domain_p": p_values(found_L, shuffled_PL),
    }


def specialisation_sentence(routing: dict[str, Any], *, stage: str, name: str) -> str | None:
    """What a stage's experts have become, means over layers and seeds; None if it is not told."""
    found = routing.get(stage, {})
    if "domain_jsd" not in found:
        return None

    def mean(metric: str) -> float:
        values = [value for layers in found[metric] for value in layers]
        return sum(values) / len(values)

    certain = [max(layers) for layers in found["domain_p"]]
    return (
        f"Experts after {name}: distance of their weights {mean('expert_distance'):.3f} (0: "
        "copies, 1.41: unrelated); divergence of their use between domains "
        f"{mean('domain_jsd'):.4f} bits, by chance {mean('domain_jsd_by_chance'):.4f} (p at most "
        f"{max(certain):.2f} in any layer)."
    )
