"""Choices out of a trace: real tokens only, in order, whatever the batching."""

import pytest
import torch
from torch import Tensor

from moe.choices import chosen_table, paired_sets, token_choices
from moe.record import RecordedForward, RoutingTrace
from moe.routing import RouterSpec, route


def trace_of(expert_BS: list[list[int]], mask_BS: list[list[int]]) -> RoutingTrace:
    """One layer, three experts, top-1; one pass per call."""
    experts, mask = torch.tensor(expert_BS), torch.tensor(mask_BS).bool()
    spec = RouterSpec(num_experts=3, top_k=1, normalize_weights=False)
    routing = route(9.0 * torch.eye(3)[experts.flatten()], spec, mask_T=mask.flatten())
    forward = RecordedForward(
        sample_ids=torch.arange(len(expert_BS)), mask_BS=mask, routings=(routing,)
    )
    return RoutingTrace(forwards=[forward])


def test_rows_are_numbered_through_all_passes_and_padding_is_gone() -> None:
    first = trace_of([[0, 1, 2], [2, 2, 0]], [[0, 1, 1], [1, 1, 0]])
    second = trace_of([[1, 0, 0]], [[1, 0, 0]])
    found = token_choices(RoutingTrace(forwards=[*first.forwards, *second.forwards]))
    assert found.expert_LTK.tolist() == [[[1], [2], [2], [2], [1]]]
    assert found.sequence_T.tolist() == [0, 0, 1, 1, 2] and found.num_experts == 3


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace is empty"):
        token_choices(RoutingTrace())


def test_expert_choice_has_sets_of_tokens_but_no_k_experts_of_a_token() -> None:
    spec = RouterSpec(num_experts=2, top_k=1, kind="expert_choice", normalize_weights=False)
    mask_T = torch.tensor([True, True, True, False])
    routing = route(
        torch.tensor([[3.0, 2.0], [1.0, 3.0], [2.0, 1.0], [9.0, 9.0]]), spec, mask_T=mask_T
    )
    table_TE = chosen_table(routing)
    assert torch.equal(table_TE, routing.kept_TK) and not table_TE[3].any()
    forward = RecordedForward(sample_ids=torch.arange(1), mask_BS=mask_T[None], routings=(routing,))
    with pytest.raises(ValueError, match="expert choice"):
        token_choices(RoutingTrace(forwards=[forward]))


def test_packed_rows_and_passes_on_a_cache_are_refused_where_rows_are_taken_for_texts() -> None:
    routing = route(torch.zeros(3, 4), RouterSpec(num_experts=4, top_k=2))
    mask_BS = torch.ones(1, 3, dtype=torch.bool)

    def trace(sample_ids: Tensor, token_BS: Tensor) -> RoutingTrace:
        forward = RecordedForward(
            sample_ids=sample_ids, mask_BS=mask_BS, routings=(routing,), token_BS=token_BS
        )
        return RoutingTrace(forwards=[forward])

    whole = trace(torch.tensor([0]), torch.tensor([[0, 1, 2]]))
    assert token_choices(whole).sequence_T.tolist() == [0, 0, 0]
    packed = trace(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]]))
    with pytest.raises(ValueError, match="packed rows"):
        token_choices(packed)
    with pytest.raises(ValueError, match="packed rows"):
        list(paired_sets(packed, packed))
    with pytest.raises(ValueError, match="go on from a cache"):
        token_choices(trace(torch.tensor([0]), torch.tensor([[3, 4, 5]])))
