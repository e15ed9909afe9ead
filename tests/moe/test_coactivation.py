"""Experts chosen together: by hand, at the limits, and against a count of neighbouring ranks."""

import pytest
import torch
from torch import Tensor

from moe.coactivation import CoActivation
from moe.record import RecordedForward, RoutingTrace
from moe.routing import RouterSpec, Routing, route


def choosing(expert_TK: list[list[int]] | Tensor, num_experts: int, **options: Tensor) -> Routing:
    """A routing with these choices, best first."""
    chosen_TK = torch.as_tensor(expert_TK)
    spec = RouterSpec(num_experts=num_experts, top_k=chosen_TK.shape[1], normalize_weights=False)
    logits_TE = torch.zeros(len(chosen_TK), num_experts)
    return route(logits_TE, spec, forced_TK=chosen_TK, **options)


def test_three_tokens_by_hand() -> None:
    pairs = CoActivation.from_routings((choosing([[0, 1], [1, 0], [0, 2]], 3),))
    assert pairs.pair_LEE[0].tolist() == [[3, 2, 1], [2, 2, 0], [1, 0, 1]]
    expected = torch.tensor([[1, 2 / 3, 1 / 3], [1, 1, 0], [1, 0, 1]]).double()
    torch.testing.assert_close(pairs.conditional_LEE[0], expected)
    # u = (1, 2/3, 1/3): P(1 | 0) by the loads alone is u_1 / (2 - u_0) = 2/3, P(0 | 1) = 1 / (4/3).
    null_EE = pairs.usage_null_LEE[0]
    assert null_EE[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    assert null_EE[1].tolist() == pytest.approx([3 / 4, 1, 1 / 4])


def test_off_the_diagonal_a_row_and_its_null_sum_to_k_minus_one() -> None:
    chosen_TK = torch.rand(200, 12, generator=torch.Generator().manual_seed(0)).argsort()[:, :5]
    pairs = CoActivation.from_routings((choosing(chosen_TK, 12),))
    for table_LEE in (pairs.conditional_LEE, pairs.usage_null_LEE):
        torch.testing.assert_close(table_LEE.sum(dim=-1) - 1, torch.full((1, 12), 4.0).double())
    assert pairs.uniform_null == 4 / 11
    assert torch.equal(pairs.pair_LEE, pairs.pair_LEE.transpose(1, 2))


def test_even_use_without_preference_gives_both_nulls() -> None:
    every = torch.combinations(torch.arange(6), 3)
    pairs = CoActivation.from_routings((choosing(every, 6),))
    off = ~torch.eye(6, dtype=torch.bool)
    for table_LEE in (pairs.conditional_LEE, pairs.usage_null_LEE):
        assert table_LEE[0][off].tolist() == pytest.approx([pairs.uniform_null] * 30)


def test_an_expert_that_nobody_chose_has_an_empty_row() -> None:
    pairs = CoActivation.from_routings((choosing([[0, 1]], 3),))
    assert pairs.conditional_LEE[0, 2].tolist() == [0, 0, 0]


def test_padding_is_left_out_and_parts_add_up_to_the_whole() -> None:
    rows = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).argsort()[:, :2]
    whole = CoActivation.from_routings((choosing(rows, 5),))
    first = CoActivation.from_routings((choosing(rows[:4], 5),))
    mask_T = torch.tensor([False] * 4 + [True] * 5)
    second = CoActivation.from_routings((choosing(rows, 5, mask_T=mask_T),))
    assert torch.equal(first.merge(second).pair_LEE, whole.pair_LEE)
    assert first.merge(second).tokens_L.tolist() == [9]
    forwards = [
        RecordedForward(
            sample_ids=torch.arange(1),
            mask_BS=torch.ones(1, len(part), dtype=torch.bool),
            routings=(choosing(part, 5),),
        )
        for part in (rows[:4], rows[4:])
    ]
    found = CoActivation.from_trace(RoutingTrace(forwards=forwards))
    assert torch.equal(found.pair_LEE, whole.pair_LEE)


def partners(num_tokens: int, together: float) -> Tensor:
    """Top-8 of 64: expert 0 in every token, expert 1 in a share of them; ranks say nothing."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for token in range(num_tokens):
        others = (torch.randperm(62, generator=draw) + 2).tolist()
        partner = [1] if token < round(together * num_tokens) else []
        chosen = [0, *partner, *others][:8]
        rows.append([chosen[i] for i in torch.randperm(8, generator=draw).tolist()])
    return torch.tensor(rows)


def test_partners_far_apart_in_the_ranking_are_seen_where_neighbouring_ranks_miss_them() -> None:
    chosen_TK = partners(2000, together=0.9)
    found = CoActivation.from_routings((choosing(chosen_TK, 64),)).conditional_LEE[0, 0, 1]
    assert found.item() == pytest.approx(0.90)
    # What a count of neighbours in the ranking makes of it: 7 of the 28 pairs.
    left, right = chosen_TK[:, :-1], chosen_TK[:, 1:]
    neighbours = ((left == 0) & (right == 1)) | ((left == 1) & (right == 0))
    adjacent_only = neighbours.any(dim=1).sum() / (chosen_TK == 0).any(dim=1).sum()
    # 0.9 * 7/28 = 0.225, a standard deviation of 0.01
    assert adjacent_only.item() == pytest.approx(0.225, abs=0.04)


def test_what_does_not_add_up_is_refused() -> None:
    two, three = choosing([[0, 1]], 4), choosing([[0, 1, 2]], 4)
    with pytest.raises(ValueError, match="top_k 2 and 3"):
        CoActivation.from_routings((two,)).merge(CoActivation.from_routings((three,)))
    with pytest.raises(ValueError, match="the trace is empty"):
        CoActivation.from_trace(RoutingTrace())
    spec = RouterSpec(num_experts=3, top_k=1, kind="expert_choice", normalize_weights=False)
    with pytest.raises(ValueError, match="expert choice"):
        CoActivation.from_routings((route(torch.randn(6, 3), spec),))
