"""What expert use depends on: a text's domain, a token's identity; in bits, beside chance.

The decision to know: a divergence is above zero by sampling alone, so each has its null. Domains
are shuffled over whole texts, because tokens of one text resemble each other; tokens are shuffled
within their text, so that what a text is about cannot pass for what a word is.

Shapes: B batch, T tokens, L MoE layers, E experts, K experts per token, N texts, G domains,
P shufflings, U distinct tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.chance import order_within, p_values
from moe.counters import permutation
from moe.record import RecordedForward
from moe.routing import chosen_table
from moe.stats import jensen_shannon_bits

PURPOSE = "expert_use"
VOCABULARY_PURPOSE = "vocabulary"


def row_counts(forward: RecordedForward) -> Tensor:
    """Assignments of each row of a pass, (B, L, E) float32 in main memory, padding left out."""
    batch = forward.mask_BS.shape[0]
    layers = []
    for r in forward.routings:
        chosen_TE = chosen_table(r).float()
        count_BE = chosen_TE.new_zeros(batch, r.num_experts)
        layers.append(count_BE.index_add(0, r.sequence_T, chosen_TE))
    return torch.stack(layers, dim=1).cpu()


# --- by domain -----------------------------------------------------------------------------------


def domain_loads(text_count_NLE: Tensor, labels_N: Tensor, *, num_domains: int) -> Tensor:
    """Share of assignments per domain, layer and expert, (G, L, E) float64."""
    _, layers, experts = text_count_NLE.shape
    count_GLE = text_count_NLE.new_zeros(num_domains, layers, experts).double()
    count_GLE = count_GLE.index_add(0, labels_N, text_count_NLE.double())
    return count_GLE / count_GLE.sum(dim=-1, keepdim=True).clamp(min=1)


def joint_divergence(load_GLE: Tensor, weight_G: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence of all G loads at once, in bits, one value per row (L,).

    Entropy of the mixture minus the mean entropy (Lin 1991, eq. 5.1): 0 when all are equal, log2 G
    when no two overlap; of two it is `jensen_shannon_bits`. weight_G: sums to 1; default equal.
    """
    num_domains = load_GLE.shape[0]
    if weight_G is None:
        weight_G = load_GLE.new_full((num_domains,), 1 / num_domains)
    mixture_LE = torch.einsum("g,gle->le", weight_G, load_GLE)
    mean_L = torch.einsum("g,gl->l", weight_G, _entropy_bits(load_GLE))
    return (_entropy_bits(mixture_LE) - mean_L).clamp(min=0)


def _entropy_bits(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(dim=-1) / math.log(2)


def domain_divergence(text_count_NLE: Tensor, labels_N: Tensor, *, num_domains: int) -> Tensor:
    """Mean over pairs of domains of the Jensen-Shannon divergence of their loads, bits, (L,)."""
    load_GLE = domain_loads(text_count_NLE, labels_N, num_domains=num_domains)
    first, second = torch.triu_indices(num_domains, num_domains, offset=1)
    return jensen_shannon_bits(load_GLE[first], load_GLE[second]).mean(dim=0)


def shuffled_divergence(
    text_count_NLE: Tensor, labels_N: Tensor, *, num_domains: int, permutations: int, seed: int
) -> Tensor:
    """The same under shufflings of the labels over whole texts, (P, L).

    Whole texts, because tokens of one text resemble each other: shuffling tokens would call any
    two texts different.
    """
    shuffled = []
    for number in range(permutations):
        order = permutation(seed, PURPOSE, number, length=len(labels_N))
        labels = labels_N[torch.tensor(order)]
        shuffled.append(domain_divergence(text_count_NLE, labels, num_domains=num_domains))
    return torch.stack(shuffled)


# --- by token ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How much a token's identity says about its experts, per layer.

    jsd_bits_L: Jensen-Shannon divergence of the loads of all distinct tokens, weighted by how often
    they occur: the mutual information of a token and one of its experts. 0 if identity says
    nothing; at most the entropy of the load less log2 K, when each token always has the same K.
    shuffled_PL: the same with tokens shuffled within their texts; p_value: one-sided, among them.
    num_kinds, num_tokens: distinct tokens that occur often enough, and their occurrences.
    """

    jsd_bits_L: Tensor
    shuffled_PL: Tensor
    p_value: tuple[float, ...]
    num_kinds: int
    num_tokens: int


def vocabulary_divergence(
    token_T: Tensor,
    expert_LTK: Tensor,
    *,
    sequence_T: Tensor,
    num_experts: int,
    min_count: int = 10,
    permutations: int = 99,
    seed: int = 0,
) -> Vocabulary:
    """Vocabulary specialisation (after Muennighoff et al. 2024, OLMoE, section 5.4) as one number.

    token_T: int64 token ids; expert_LTK: their experts; sequence_T: int64, not falling, the text of
    each. min_count: rarer tokens are left out, their loads are mostly chance.
    Raises ValueError if no token occurs that often.
    """
    _, place_T, count_U = token_T.unique(return_inverse=True, return_counts=True)
    frequent_T = (count_U >= min_count)[place_T]
    if not bool(frequent_T.any()):
        raise ValueError(f"no token occurs {min_count} times: give more text")
    kinds, place_T = token_T[frequent_T].unique(return_inverse=True)
    expert_LTK = expert_LTK[:, frequent_T].long()

    def divergence_L(here_T: Tensor) -> Tensor:
        layers = [
            _token_divergence(here_T, expert_TK, num_kinds=len(kinds), num_experts=num_experts)
            for expert_TK in expert_LTK
        ]
        return torch.stack(layers)

    found_L = divergence_L(place_T)
    rows_T = sequence_T[frequent_T]
    shuffled = []
    for number in range(permutations):
        order_T = order_within(rows_T, seed=seed, purpose=VOCABULARY_PURPOSE, number=number)
        shuffled.append(divergence_L(place_T[order_T]))
    shuffled_PL = torch.stack(shuffled) if shuffled else found_L.new_zeros(0, len(found_L))
    return Vocabulary(
        jsd_bits_L=found_L,
        shuffled_PL=shuffled_PL,
        p_value=tuple(p_values(found_L, shuffled_PL)),
        num_kinds=len(kinds),
        num_tokens=len(place_T),
    )


def _token_divergence(
    place_T: Tensor, expert_TK: Tensor, *, num_kinds: int, num_experts: int
) -> Tensor:
    """The weighted divergence of one layer, 0-dim float64."""
    cells_TK = place_T[:, None] * num_experts + expert_TK
    count_UE = torch.bincount(cells_TK.flatten(), minlength=num_kinds * num_experts)
    count_UE = count_UE.view(num_kinds, num_experts).double()
    total_U = count_UE.sum(dim=-1)
    load_UE = count_UE / total_U[:, None]
    return joint_divergence(load_UE[:, None], total_U / total_U.sum())[0]
