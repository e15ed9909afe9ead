"""Choices, weights and drops by hand, and against naive forms; other authors': test_router_parity.

Shapes: T tokens, E experts, K experts per token.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.balance import load_balancing_loss
from moe.errors import UserError
from moe.router_noise import jittered
from moe.routing import RouterSpec, Routing, capacity_limit, route, top_k_lowest_index


def logits_of(probability_TE: list[list[float]]) -> Tensor:
    return torch.tensor(probability_TE).log()


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_best_experts_come_first_with_their_probabilities_renormalised() -> None:
    routing = route(logits_of([[0.1, 0.6, 0.3]]), RouterSpec(num_experts=3, top_k=2))
    assert routing.expert_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.score_TE, torch.tensor([[0.1, 0.6, 0.3]]))
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[2 / 3, 1 / 3]]))
    assert routing.kept_TK.all() and routing.top_k == 2


def test_without_renormalising_the_weight_is_the_raw_probability() -> None:
    spec = RouterSpec(num_experts=3, top_k=2, normalize_weights=False)
    routing = route(logits_of([[0.1, 0.6, 0.3]]), spec)
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0.6, 0.3]]))


def test_switch_top_1_keeps_the_probability_as_the_gate_and_gives_the_router_a_gradient() -> None:
    logits_TE = logits_of([[0.2, 0.5, 0.3]]).requires_grad_()
    spec = RouterSpec(num_experts=3, top_k=1, normalize_weights=False)
    routing = route(logits_TE, spec)
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0.5]]))
    routing.weight_TK.sum().backward()
    # d p1 / d z = p1 (onehot - p)
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[-0.1, 0.25, -0.15]]))


def test_renormalised_top_1_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="top_k 1.*no gradient.*norm_topk_prob to False"):
        RouterSpec(num_experts=4, top_k=1, normalize_weights=True)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_outside_the_experts_is_refused_naming_both(top_k: int) -> None:
    with pytest.raises(UserError, match=f"top_k {top_k} .*num_experts 4"):
        RouterSpec(num_experts=4, top_k=top_k)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_capacity_factor_that_is_no_capacity_is_refused(factor: float) -> None:
    with pytest.raises(UserError, match="capacity_factor .* above 0, or None"):
        RouterSpec(num_experts=4, top_k=2, capacity_factor=factor)


def test_logits_of_another_width_are_refused_naming_both() -> None:
    with pytest.raises(ValueError, match="3 columns, num_experts 4"):
        route(torch.zeros(2, 3), RouterSpec(num_experts=4, top_k=2))


def test_ties_go_to_the_lowest_index() -> None:
    assert top_k_lowest_index(torch.zeros(3, 64), 5).tolist() == [[0, 1, 2, 3, 4]] * 3
    score_TE = torch.tensor([[0.1, 0.4, 0.1, 0.4]])
    assert top_k_lowest_index(score_TE, 3).tolist() == [[1, 3, 0]]


def test_top_k_equal_to_the_experts_sends_every_token_everywhere() -> None:
    routing = route(random_logits(5, 3), RouterSpec(num_experts=3, top_k=3))
    assert (routing.expert_TK.sort(dim=-1).values == torch.arange(3)).all()
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(5))


def test_scores_are_float32_whatever_the_logits_are() -> None:
    routing = route(random_logits(4, 8).bfloat16(), RouterSpec(num_experts=8, top_k=2))
    for tensor in (routing.logits_TE, routing.score_TE, routing.weight_TK):
        assert tensor.dtype == torch.float32


def test_padding_is_never_kept_and_has_no_weight() -> None:
    mask_T = torch.tensor([True, False, True])
    routing = route(random_logits(3, 4), RouterSpec(num_experts=4, top_k=2), mask_T=mask_T)
    assert routing.kept_TK.tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert routing.weight_TK[1].tolist() == [0.0, 0.0]


def test_beyond_capacity_later_tokens_are_dropped_and_survivors_keep_their_weight() -> None:
    # Four tokens, all want expert 0 then 1; two places each: ceil(0.75 * 2 * 4 / 3) = 2.
    spec = RouterSpec(num_experts=3, top_k=2, capacity_factor=0.75)
    assert capacity_limit(spec, 4) == 2
    routing = route(logits_of([[0.6, 0.3, 0.1]] * 4), spec)
    assert routing.kept_TK.tolist() == [[True] * 2, [True] * 2, [False] * 2, [False] * 2]
    torch.testing.assert_close(routing.weight_TK[0], torch.tensor([2 / 3, 1 / 3]))
    assert routing.weight_TK[2:].abs().sum() == 0


def test_first_choices_take_their_places_before_second_choices() -> None:
    # Token 0's second choice is expert 1, which is token 1's first; one place per expert.
    spec = RouterSpec(num_experts=4, top_k=2, capacity_factor=1.0)
    assert capacity_limit(spec, 2) == 1
    routing = route(logits_of([[0.5, 0.3, 0.1, 0.1], [0.1, 0.5, 0.3, 0.1]]), spec)
    assert routing.expert_TK.tolist() == [[0, 1], [1, 2]]
    assert routing.kept_TK.tolist() == [[True, False], [True, True]]
    torch.testing.assert_close(routing.weight_TK[0], torch.tensor([0.625, 0.0]))


def test_padding_takes_no_place_and_does_not_raise_the_limit() -> None:
    spec = RouterSpec(num_experts=2, top_k=1, normalize_weights=False, capacity_factor=1.0)
    mask_T = torch.tensor([False, False, True, True])
    routing = route(logits_of([[0.9, 0.1]] * 4), spec, mask_T=mask_T)
    assert routing.kept_TK.squeeze(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("factor", "top_k", "tokens", "experts", "expected"),
    [
        (1.0, 1, 8, 8, 1),
        (1.25, 1, 8, 8, 2),
        (1.0, 2, 5, 8, 2),
        (1.1, 1, 80, 8, 11),  # exactly 11; float arithmetic says a hair more, so 12
        (1.4, 2, 100, 8, 35),
        (0.5, 2, 0, 8, 0),
    ],
)
def test_the_capacity_is_the_ceiling_of_the_decimal_as_written(
    factor: float, top_k: int, tokens: int, experts: int, expected: int
) -> None:
    spec = RouterSpec(
        num_experts=experts, top_k=top_k, normalize_weights=False, capacity_factor=factor
    )
    assert capacity_limit(spec, tokens) == expected


def test_ample_capacity_is_dropless() -> None:
    spec = RouterSpec(num_experts=5, top_k=2)
    logits_TE = random_logits(17, 5)
    ample = route(logits_TE, replace(spec, capacity_factor=5.0))
    assert ample.kept_TK.all()
    torch.testing.assert_close(ample.weight_TK, route(logits_TE, spec).weight_TK)


def test_only_capacity_couples_the_tokens_of_a_batch() -> None:
    spec = RouterSpec(num_experts=4, top_k=2)
    assert spec.batch_invariant and not replace(spec, capacity_factor=1.0).batch_invariant


# --- other scores


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_softmax_over_the_chosen_weighs_by_their_logits_and_scores_over_all() -> None:
    logits_TE = torch.tensor([[1.0, 3.0, 2.0]])
    routing = route(logits_TE, RouterSpec(num_experts=3, top_k=2, scoring="softmax_chosen"))
    assert routing.expert_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[sigmoid(1.0), sigmoid(-1.0)]]))
    torch.testing.assert_close(routing.score_TE, torch.softmax(logits_TE, dim=-1))


def test_a_softmax_over_the_chosen_equals_the_renormalised_one_over_all() -> None:
    logits_TE = random_logits(9, 7)
    chosen = route(logits_TE, RouterSpec(num_experts=7, top_k=3, scoring="softmax_chosen"))
    over_all = route(logits_TE, RouterSpec(num_experts=7, top_k=3))
    assert torch.equal(chosen.expert_TK, over_all.expert_TK)
    torch.testing.assert_close(chosen.weight_TK, over_all.weight_TK, atol=1e-6, rtol=0)


def test_where_probabilities_underflow_the_logits_still_tell_experts_apart() -> None:
    logits_TE = torch.tensor([[0.0, -300.0, -200.0]])
    options: dict[str, Any] = {"num_experts": 3, "top_k": 2}
    by_logit = route(logits_TE, RouterSpec(**options, scoring="softmax_chosen"))
    by_probability = route(logits_TE, RouterSpec(**options))
    assert by_logit.expert_TK.tolist() == [[0, 2]]
    assert by_probability.expert_TK.tolist() == [[0, 1]]  # both are 0: the lowest index


def test_sigmoid_scores_by_hand_raw_shared_and_scaled() -> None:
    logits_TE = torch.tensor([[0.0, 1.0, -1.0]])
    raw = RouterSpec(num_experts=3, top_k=2, scoring="sigmoid", normalize_weights=False)
    half, high = 0.5, sigmoid(1.0)
    routing = route(logits_TE, raw)
    assert routing.expert_TK.tolist() == [[1, 0]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[high, half]]))
    shared = route(logits_TE, replace(raw, normalize_weights=True, routed_scaling_factor=2.5))
    expected = [[2.5 * high / (high + half), 2.5 * half / (high + half)]]
    torch.testing.assert_close(shared.weight_TK, torch.tensor(expected))
    # The distribution for balance losses is s / sum s, whatever the weights are: 3 sigmoids of
    # -1, 0, 1 sum to 1.5.
    probability = torch.tensor([[half, high, 1 - high]]) / 1.5
    torch.testing.assert_close(routing.score_TE, probability)
    torch.testing.assert_close(shared.score_TE, probability)


def test_sigmoids_that_are_all_zero_neither_divide_by_zero_nor_lose_their_distribution() -> None:
    logits_TE = torch.tensor([[-200.0, -201.0, -300.0]])
    routing = route(logits_TE, RouterSpec(num_experts=3, top_k=2, scoring="sigmoid"))
    assert routing.weight_TK.tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(routing.score_TE, torch.softmax(logits_TE, dim=-1))


@pytest.mark.parametrize("scoring", ["softmax", "softmax_chosen", "sigmoid"])
def test_scores_are_a_distribution_and_weights_a_share_under_every_scoring(scoring: Any) -> None:
    routing = route(random_logits(9, 7), RouterSpec(num_experts=7, top_k=3, scoring=scoring))
    torch.testing.assert_close(routing.score_TE.sum(-1), torch.ones(9))
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(9))
    assert routing.score_TE.dtype == routing.weight_TK.dtype == torch.float32


# --- selection bias and groups


def test_the_bias_chooses_and_the_unbiased_score_weighs() -> None:
    logits_TE = torch.tensor([[0.0, 1.0, -1.0]]).requires_grad_()
    bias_E = torch.tensor([0.0, -1.0, 0.3]).requires_grad_()
    spec = RouterSpec(num_experts=3, top_k=2, scoring="sigmoid", selection_bias=True)
    routing = route(logits_TE, spec, bias_E=bias_E)
    low = sigmoid(-1.0)
    assert routing.expert_TK.tolist() == [[2, 0]]  # 0.269 + 0.3 before 0.5; 0.731 - 1 is last
    weights = torch.tensor([[low / (low + 0.5), 0.5 / (low + 0.5)]])
    torch.testing.assert_close(routing.weight_TK, weights)
    torch.testing.assert_close(routing.score_TE, torch.tensor([[0.5, 1 - low, low]]) / 1.5)
    (routing.weight_TK[:, 0].sum() + routing.score_TE[0, 1]).backward()
    assert bias_E.grad is None and logits_TE.grad is not None


def test_a_bias_of_zero_or_the_same_for_all_changes_nothing() -> None:
    spec = RouterSpec(num_experts=7, top_k=3, selection_bias=True)
    logits_TE = random_logits(11, 7)
    plain = route(logits_TE, replace(spec, selection_bias=False))
    for level in (0.0, 0.5):
        biased = route(logits_TE, spec, bias_E=torch.full((7,), level))
        assert torch.equal(biased.expert_TK, plain.expert_TK)
        assert torch.equal(biased.weight_TK, plain.weight_TK)


def test_a_spec_and_its_bias_go_together() -> None:
    spec = RouterSpec(num_experts=4, top_k=2)
    with pytest.raises(ValueError, match="bias_E is given and the spec's selection_bias False"):
        route(torch.zeros(2, 4), spec, bias_E=torch.zeros(4))
    with pytest.raises(ValueError, match="bias_E is None and the spec's selection_bias True"):
        route(torch.zeros(2, 4), replace(spec, selection_bias=True))


@pytest.mark.parametrize(("value", "expected"), [("max", [0, 1]), ("top2_sum", [3, 2])])
def test_a_group_is_worth_its_best_or_its_two_best_together(
    value: Any, expected: list[int]
) -> None:
    # Groups (0, 1), (2, 3): the first has the best expert, the second the better pair.
    spec = RouterSpec(num_experts=4, top_k=2, n_group=2, topk_group=1, group_score=value)
    routing = route(logits_of([[0.4, 0.05, 0.25, 0.3]]), spec)
    assert routing.expert_TK.tolist() == [expected]
    torch.testing.assert_close(routing.weight_TK.sum(), torch.tensor(1.0))


def naive_groups(score_E: list[float], spec: RouterSpec) -> list[int]:
    assert spec.n_group is not None and spec.topk_group is not None
    size = spec.num_experts // spec.n_group
    best = 2 if spec.group_score == "top2_sum" else 1
    members = [list(range(g * size, (g + 1) * size)) for g in range(spec.n_group)]
    worth = [sum(sorted((score_E[e] for e in group), reverse=True)[:best]) for group in members]
    kept = sorted(range(spec.n_group), key=lambda g: (-worth[g], g))[: spec.topk_group]
    candidates = [e for g in kept for e in members[g]]
    return sorted(candidates, key=lambda e: (-score_E[e], e))[: spec.top_k]


@pytest.mark.parametrize("value", ["max", "top2_sum"])
def test_group_limited_choices_equal_the_naive_form_with_a_bias(value: Any) -> None:
    spec = RouterSpec(
        num_experts=12, top_k=5, scoring="sigmoid", selection_bias=True,
        n_group=4, topk_group=2, group_score=value,
    )  # fmt: skip
    logits_TE, bias_E = random_logits(23, 12), 0.3 * random_logits(12, seed=1)
    routing = route(logits_TE, spec, bias_E=bias_E)
    biased = (torch.sigmoid(logits_TE) + bias_E).tolist()
    assert routing.expert_TK.tolist() == [naive_groups(row, spec) for row in biased]


# --- places


def naive_capacity(routing: Routing, spec: RouterSpec) -> list[list[bool]]:
    """Serve the assignments one by one in the order of the spec's name."""
    num_tokens, top_k = routing.expert_TK.shape
    real, row = routing.mask_T.tolist(), routing.sequence_T.tolist()
    by_sequence = spec.capacity_scope == "sequence"
    weight = route_weights(routing)
    order = [(t, k) for k in range(top_k) for t in range(num_tokens)]
    if spec.drop_order == "position":
        order = [(t, k) for t in range(num_tokens) for k in range(top_k)]
    if spec.drop_order == "score":
        order.sort(key=lambda place: -weight[place[0]][place[1]])  # stable
    taken: dict[tuple[int, int], int] = {}
    kept = [[False] * top_k for _ in range(num_tokens)]
    for t, k in order:
        if not real[t]:
            continue
        peers = [u for u in range(num_tokens) if real[u] and (not by_sequence or row[u] == row[t])]
        queue = (row[t] if by_sequence else 0, int(routing.expert_TK[t, k]))
        if taken.get(queue, 0) < capacity_limit(spec, len(peers)):
            taken[queue] = taken.get(queue, 0) + 1
            kept[t][k] = True
    return kept


def route_weights(routing: Routing) -> list[list[float]]:
    """Renormalised softmax weights before dropping."""
    chosen = routing.score_TE.gather(-1, routing.expert_TK)
    return (chosen / chosen.sum(-1, keepdim=True)).tolist()


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
@pytest.mark.parametrize("order", ["gshard", "position", "score"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_who_finds_a_place_equals_serving_them_one_by_one(
    scope: Any, order: Any, rounding: Any
) -> None:
    spec = RouterSpec(
        num_experts=5, top_k=3, capacity_factor=0.7,
        capacity_scope=scope, drop_order=order, capacity_rounding=rounding,
    )  # fmt: skip
    mask_T = torch.ones(27, dtype=torch.bool)
    mask_T[[0, 1, 8, 25, 26]] = False
    sequence_T = torch.tensor([0] * 9 + [1] * 7 + [3] * 11)  # nothing of row 2 is here
    routing = route(random_logits(27, 5), spec, mask_T=mask_T, sequence_T=sequence_T)
    assert routing.kept_TK.tolist() == naive_capacity(routing, spec)
    assert 0 < routing.kept_TK.sum() < 3 * mask_T.sum()


def test_the_three_orders_differ_by_hand() -> None:
    # Experts 0 and 1 have one place each; token 0 wants 1 then 0, token 1 wants 0 then 1, surely.
    logits_TE = logits_of([[0.4, 0.5, 0.1], [0.8, 0.15, 0.05]])
    spec = RouterSpec(num_experts=3, top_k=2, capacity_factor=0.75)
    assert capacity_limit(spec, 2) == 1
    kept = {
        order: route(logits_TE, replace(spec, drop_order=order)).kept_TK.tolist()
        for order in ("gshard", "position", "score")
    }
    assert kept["gshard"] == [[True, False], [True, False]]
    assert kept["position"] == [[True, True], [False, False]]
    assert kept["score"] == [[True, False], [True, False]]
    late = route(logits_TE[[0, 1, 1]], replace(spec, capacity_factor=0.5, drop_order="score"))
    assert late.kept_TK.tolist() == [[True, False], [True, False], [False, False]]


def test_the_lowest_weights_are_dropped_first_even_where_they_came_first() -> None:
    logits_TE = logits_of([[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]])
    spec = RouterSpec(
        num_experts=2, top_k=1, normalize_weights=False, capacity_factor=1.0, drop_order="score"
    )
    assert capacity_limit(spec, 3) == 2
    assert route(logits_TE, spec).kept_TK[:, 0].tolist() == [False, True, True]


def test_per_sequence_no_sequence_takes_anothers_place() -> None:
    spec = RouterSpec(num_experts=4, top_k=2, capacity_factor=0.6, capacity_scope="sequence")
    logits_TE = random_logits(24, 4)
    sequence_T = torch.arange(3).repeat_interleave(8)
    together = route(logits_TE, spec, sequence_T=sequence_T)
    for row in range(3):
        own = sequence_T == row
        assert torch.equal(together.kept_TK[own], route(logits_TE[own], spec).kept_TK)


def test_rounding_down_is_the_integer_part_and_may_leave_no_place() -> None:
    spec = RouterSpec(
        num_experts=8, top_k=1, normalize_weights=False, capacity_factor=1.25,
        capacity_rounding="floor",
    )  # fmt: skip
    assert capacity_limit(spec, 100) == 15 and capacity_limit(replace(spec, top_k=2), 100) == 31
    assert capacity_limit(replace(spec, capacity_rounding="ceil"), 100) == 16
    assert not route(random_logits(5, 8), spec).kept_TK.any()


# --- expert choice

CHOICE = RouterSpec(num_experts=4, top_k=2, kind="expert_choice", normalize_weights=False)


def test_each_expert_takes_its_best_tokens_and_every_column_is_an_expert() -> None:
    spec = RouterSpec(num_experts=2, top_k=1, kind="expert_choice", normalize_weights=False)
    routing = route(logits_of([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2]]), spec)
    assert routing.expert_TK.tolist() == [[0, 1]] * 4 and routing.top_k == 2
    assert routing.kept_TK.tolist() == [[True, False], [False, True], [False, True], [True, False]]
    weights = [[0.9, 0.0], [0.0, 0.4], [0.0, 0.3], [0.8, 0.0]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor(weights))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_expert_choice_equals_each_expert_sorting_the_tokens(scope: Any) -> None:
    spec = replace(CHOICE, capacity_scope=scope, capacity_factor=0.75)
    mask_T = torch.arange(20) % 7 != 3
    sequence_T = torch.tensor([0] * 9 + [1] * 11)
    routing = route(random_logits(20, 4), spec, mask_T=mask_T, sequence_T=sequence_T)
    wanted = torch.zeros(20, 4, dtype=torch.bool)
    parts = [mask_T] if scope == "batch" else [mask_T & (sequence_T == row) for row in (0, 1)]
    for part in parts:
        tokens = part.nonzero().squeeze(-1)
        places = math.ceil(0.75 * 2 * len(tokens) / 4)
        for e in range(4):
            best = routing.score_TE[tokens, e].sort(descending=True, stable=True).indices
            wanted[tokens[best[:places]], e] = True
    assert torch.equal(routing.kept_TK, wanted)


def test_the_load_of_expert_choice_is_equal_and_its_ties_go_to_the_first_tokens() -> None:
    routing = route(torch.zeros(6, 4), CHOICE)
    assert routing.kept_TK.sum(dim=0).tolist() == [3] * 4
    assert routing.kept_TK[:3].all() and not routing.kept_TK[3:].any()


def test_expert_choice_refuses_balance_losses_and_a_forced_choice() -> None:
    routing = route(random_logits(6, 4), CHOICE)
    assert routing.balanced_by_construction
    with pytest.raises(UserError, match="expert_choice"):
        load_balancing_loss(routing)
    with pytest.raises(UserError, match="'expert_choice' cannot be forced"):
        route(random_logits(6, 4), CHOICE, forced_TK=torch.zeros(6, 2, dtype=torch.long))
    assert not route(
        random_logits(6, 4), RouterSpec(num_experts=4, top_k=2)
    ).balanced_by_construction


# --- hash


def python_hash(token: int, expert: int, seed: int) -> int:
    """The documented hash in Python's integers, read as a signed number."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    x = mix((mix((token + seed * golden) % 2**64) + (expert + 1) * golden) % 2**64)
    return x - 2**64 if x >= 2**63 else x


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_hash_is_the_documented_function_of_token_and_seed(seed: int) -> None:
    spec = RouterSpec(num_experts=7, top_k=3, kind="hash", hash_seed=seed)
    token_T = torch.tensor([0, 1, 2, 31999, 10**9, 5])
    routing = route(random_logits(6, 7), spec, token_T=token_T)
    expected = [
        sorted(range(7), key=lambda e: -python_hash(token, e, seed))[:3]
        for token in token_T.tolist()
    ]
    assert routing.expert_TK.tolist() == expected


def test_a_hash_spreads_tokens_evenly_over_different_experts() -> None:
    spec = RouterSpec(num_experts=8, top_k=2, kind="hash")
    token_T = torch.arange(8000)
    expert_TK = route(torch.zeros(8000, 8), spec, token_T=token_T).expert_TK
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    loads = torch.bincount(expert_TK.flatten(), minlength=8)
    assert (loads - 2000).abs().max() < 200  # more than 5 standard deviations of a fair draw
    other = route(torch.zeros(8000, 8), replace(spec, hash_seed=1), token_T=token_T).expert_TK
    assert 0.08 < (other[:, 0] == expert_TK[:, 0]).float().mean() < 0.17  # 1 in 8


def test_the_live_score_weighs_what_a_hash_chose_and_alone_it_weighs_one() -> None:
    logits_TE = random_logits(6, 4).requires_grad_()
    token_T = torch.arange(6)
    raw = RouterSpec(num_experts=4, top_k=1, kind="hash", normalize_weights=False)
    routing = route(logits_TE, raw, token_T=token_T)
    assert torch.equal(routing.weight_TK, routing.score_TE.gather(-1, routing.expert_TK))
    published = route(logits_TE, replace(raw, normalize_weights=True), token_T=token_T)
    assert (published.weight_TK == 1).all()
    published.weight_TK.sum().backward()
    assert (logits_TE.grad == 0).all()


def test_a_hash_without_token_ids_is_refused_with_the_reason() -> None:
    spec = RouterSpec(num_experts=4, top_k=2, kind="hash")
    with pytest.raises(UserError, match="routes by token id and got none: give input_ids"):
        route(torch.zeros(2, 4), spec)


# --- a choice made elsewhere


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_weights": False},
        {"scoring": "softmax_chosen"},
        {"scoring": "sigmoid", "selection_bias": True, "n_group": 4, "topk_group": 2},
        {"capacity_factor": 0.8, "drop_order": "position"},
        {"kind": "hash"},
    ],
    ids=str,
)
def test_forcing_the_free_choice_gives_the_same_routing_to_the_bit(options: Any) -> None:
    spec = RouterSpec(num_experts=8, top_k=3, **options)
    bias_E = 0.2 * random_logits(8, seed=4) if spec.selection_bias else None
    given: dict[str, Any] = {"mask_T": torch.arange(13) % 5 != 4, "bias_E": bias_E}
    free = route(random_logits(13, 8), spec, token_T=torch.arange(13), **given)
    forced = route(random_logits(13, 8), spec, forced_TK=free.expert_TK, **given)
    for name in ("expert_TK", "kept_TK", "weight_TK", "score_TE", "logits_TE"):
        assert torch.equal(getattr(forced, name), getattr(free, name)), name


def test_a_forced_choice_is_weighed_by_the_live_logits_with_a_gradient() -> None:
    logits_TE = logits_of([[0.1, 0.6, 0.3]]).requires_grad_()
    forced_TK = torch.tensor([[0, 2]])
    routing = route(logits_TE, RouterSpec(num_experts=3, top_k=2), forced_TK=forced_TK)
    assert routing.expert_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0.25, 0.75]]))
    routing.weight_TK[0, 0].backward()
    torch.testing.assert_close(logits_TE.grad, torch.tensor([[0.1875, 0.0, -0.1875]]))


def test_mask_and_capacity_apply_to_a_forced_choice() -> None:
    spec = RouterSpec(num_experts=4, top_k=2, capacity_factor=1.0)
    mask_T = torch.tensor([False, True, True, True])
    forced_TK = torch.tensor([[2, 3]] * 4)
    routing = route(random_logits(4, 4), spec, mask_T=mask_T, forced_TK=forced_TK)
    assert capacity_limit(spec, 3) == 2
    assert routing.kept_TK.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]


def test_a_forced_row_of_minus_one_is_left_to_the_router() -> None:
    spec, logits_TE = RouterSpec(num_experts=5, top_k=2), random_logits(3, 5)
    free = route(logits_TE, spec)
    routing = route(logits_TE, spec, forced_TK=torch.tensor([[4, 0], [-1, -1], [1, 3]]))
    assert routing.expert_TK.tolist() == [[4, 0], free.expert_TK[1].tolist(), [1, 3]]
    assert torch.equal(routing.weight_TK[1], free.weight_TK[1])


def test_a_forced_choice_of_another_shape_is_refused_naming_both() -> None:
    with pytest.raises(ValueError, match=r"forced_TK has shape \(2, 1\), not \(2, 2\)"):
        forced_TK = torch.zeros(2, 1, dtype=torch.long)
        route(torch.zeros(2, 4), RouterSpec(num_experts=4, top_k=2), forced_TK=forced_TK)


# --- noise


def test_logit_noise_is_drawn_from_the_generator_and_never_without_one() -> None:
    spec = RouterSpec(num_experts=5, top_k=2, logit_noise=0.5)
    logits_TE = random_logits(4000, 5)
    assert torch.equal(route(logits_TE, spec).logits_TE, logits_TE)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return route(logits_TE, spec, generator=generator).logits_TE - logits_TE

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert abs(float(drawn(0).std()) - 0.5) < 0.02 and abs(float(drawn(0).mean())) < 0.02


def test_jitter_multiplies_every_number_within_its_width() -> None:
    x_TD = torch.full((200, 30), 2.0)
    factor_TD = jittered(x_TD, 0.1, generator=torch.Generator().manual_seed(0)) / 2
    assert 0.9 <= factor_TD.min() < 0.901 and 1.099 < factor_TD.max() <= 1.1
    assert factor_TD.unique().numel() > 5000


# --- the spec itself


def test_a_spec_shows_its_sizes_and_what_is_not_default() -> None:
    assert repr(RouterSpec(num_experts=8, top_k=2)) == "RouterSpec(num_experts=8, top_k=2)"
    spec = RouterSpec(
        num_experts=8, top_k=1, normalize_weights=False, capacity_factor=1.25,
        capacity_scope="sequence",
    )  # fmt: skip
    assert repr(spec) == (
        "RouterSpec(num_experts=8, top_k=1, normalize_weights=False, capacity_factor=1.25, "
        "capacity_scope='sequence')"
    )


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "topk"}, "kind 'topk' is unknown: give one of top_k, expert_choice, hash."),
    ({"scoring": "tanh"}, "scoring 'tanh' is unknown: give one of softmax, softmax_chosen, sig"),
    ({"drop_order": "probs"}, "drop_order 'probs' is unknown: give one of gshard, position, sc"),
    ({"kind": "expert_choice"}, "kind 'expert_choice' with scoring 'softmax' and normalised we"),
    (
        {"kind": "expert_choice", "normalize_weights": False, "scoring": "softmax_chosen"},
        "kind 'expert_choice' with scoring 'softmax_chosen'",
    ),
    (
        {"scoring": "softmax_chosen", "normalize_weights": False},
        "norm_topk_prob False has no effect: set it to True, or scoring to softmax.",
    ),
    ({"scoring": "sigmoid", "top_k": 1}, "the router gets no gradient"),
    ({"scoring": "softmax_chosen", "top_k": 1}, "the router gets no gradient"),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor 0.0 must be above 0."),
    ({"routed_scaling_factor": math.inf}, "routed_scaling_factor inf must be above 0."),
    (
        {"kind": "hash", "selection_bias": True},
        "selection_bias True has no effect with kind 'hash'",
    ),
    ({"kind": "hash", "n_group": 2, "topk_group": 1}, "n_group 2 has no effect with kind 'hash'"),
    (
        {"scoring": "softmax_chosen", "selection_bias": True},
        "selection_bias True goes with scores between 0 and 1",
    ),
    ({"hash_seed": 3}, "hash_seed 3 has no effect with kind 'top_k'"),
    ({"n_group": 2}, "n_group 2 and topk_group None go together"),
    ({"n_group": 3, "topk_group": 1}, "n_group 3 must be at least 2 and divide num_experts 8"),
    ({"n_group": 1, "topk_group": 1}, "n_group 1 must be at least 2"),
    ({"n_group": 4, "topk_group": 4}, "topk_group 4 must be at least 1 and below n_group 4"),
    (
        {"n_group": 4, "topk_group": 1, "top_k": 3},
        "top_k 3 is more than the 2 experts of topk_group 1 groups of 2",
    ),
    ({"n_group": 8, "topk_group": 4}, "n_group 8 of num_experts 8 leaves groups of 1"),
    ({"group_score": "max"}, "group_score 'max' has no effect without n_group"),
    ({"capacity_scope": "sequence"}, "capacity_scope 'sequence' has no effect without capacity_"),
    ({"capacity_rounding": "floor"}, "capacity_rounding 'floor' has no effect without capacity_"),
    ({"drop_order": "score"}, "drop_order 'score' has no effect without capacity_factor"),
    (
        {"kind": "expert_choice", "normalize_weights": False, "drop_order": "score"},
        "drop_order 'score' has no effect with expert choice",
    ),
    ({"jitter_noise": 1.0}, "jitter_noise 1.0 must be at least 0 and below 1."),
    ({"logit_noise": -0.1}, "logit_noise -0.1 must be finite and at least 0."),
]


@pytest.mark.parametrize(("fields", "told"), MISTAKES, ids=lambda v: str(v)[:50])
def test_what_cannot_be_or_changes_nothing_is_refused_in_one_sentence(
    fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as caught:
        RouterSpec(**{"num_experts": 8, "top_k": 2, **fields})
    message = str(caught.value)
    assert told in message, message
    assert "\n" not in message and message.endswith((".", ")."))


def test_a_choice_against_extreme_scores_has_weights_of_zero_and_not_nan() -> None:
    logits_TE = torch.tensor([[120.0, 0.0, 0.0, 0.0]])
    forced_TK = torch.tensor([[2, 3]])
    routing = route(logits_TE, RouterSpec(num_experts=4, top_k=2), forced_TK=forced_TK)
    assert routing.weight_TK.tolist() == [[0.0, 0.0]]


def test_a_selection_bias_is_refused_where_every_expert_is_chosen_anyway() -> None:
    with pytest.raises(UserError, match="selection_bias True has no effect with top_k 4"):
        RouterSpec(num_experts=4, top_k=4, scoring="sigmoid", selection_bias=True)
