"""A trace is passes; its choices are found whatever passes they were recorded in."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.errors import UserError
from moe.routing import RouterSpec, route
from moe.stats import RouterStats
from moe.trace import RecordedForward, RoutingTrace


def a_pass(batch: int = 2, length: int = 3, *, layers: int = 2, **changes: Any) -> RecordedForward:
    generator = torch.Generator().manual_seed(batch + 10 * length)
    spec = RouterSpec(num_experts=4, top_k=2)
    routings = [
        route(torch.randn(batch * length, 4, generator=generator), spec) for _ in range(layers)
    ]
    forward = RecordedForward(
        sample_ids=torch.arange(batch),
        mask_BS=torch.ones(batch, length).bool(),
        routings=tuple(routings),
    )
    return replace(forward, **changes)


def test_without_numbers_of_its_own_a_pass_counts_its_real_tokens() -> None:
    mask_BS = torch.tensor([[0, 1, 1], [1, 1, 0]]).bool()
    forward = a_pass(mask_BS=mask_BS)
    assert forward.keys().token_BS.tolist() == [[-1, 0, 1], [0, 1, -1]]
    (first, second) = [choice for _, choice in RoutingTrace(forwards=[forward]).choices().samples()]
    assert torch.equal(first[0], forward.routings[0].expert_TK[1:3])
    assert torch.equal(second[1], forward.routings[1].expert_TK[3:5])


def test_parts_of_a_text_are_put_together_by_their_numbers() -> None:
    late = a_pass(length=1, token_BS=torch.tensor([[3], [3]]))
    trace = RoutingTrace(forwards=[late, a_pass()])
    (first, _) = [choice for _, choice in trace.choices().samples()]
    assert torch.equal(first[0, :3], trace.forwards[1].routings[0].expert_TK[:3])
    assert torch.equal(first[0, 3], late.routings[0].expert_TK[0])
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (2, 4, 2)


def test_packed_rows_give_the_choices_of_each_text() -> None:
    names = torch.tensor([[8, 8, 5], [7, 7, 7]])
    forward = a_pass(sample_ids=names)
    found = dict(RoutingTrace(forwards=[forward]).choices().samples())
    assert {name: choice.shape[1] for name, choice in found.items()} == {5: 1, 7: 3, 8: 2}
    assert torch.equal(found[5][1, 0], forward.routings[1].expert_TK[2])


def test_loads_of_a_trace_of_ids_are_counted_and_its_scores_stay_unknown() -> None:
    choice_LTK = torch.tensor([[[0, 1], [0, 2]], [[3, 1], [3, 0]]])
    stats = RouterStats.from_trace(RoutingTrace.from_choices({0: choice_LTK}, num_experts=4))
    assert stats.count_LE.tolist() == [[2, 1, 1, 0], [1, 1, 0, 2]]
    assert stats.importance_LE.isnan().all() and stats.token_entropy_L.isnan().all()


def test_a_trace_without_passes_or_of_several_models_has_no_choices() -> None:
    assert (RoutingTrace().num_layers, RoutingTrace().num_experts, RoutingTrace().top_k) == (
        0,
        0,
        0,
    )
    with pytest.raises(UserError, match="the trace is empty: run the model inside record_routing"):
        RoutingTrace().choices()
    trace = RoutingTrace(forwards=[a_pass(), a_pass(layers=3)])
    with pytest.raises(UserError, match="passes with other numbers of layers, experts or experts"):
        trace.choices()
