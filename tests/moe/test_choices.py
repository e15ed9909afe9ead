"""Choices out of a trace: real tokens only, in order, whatever the batching."""

import pytest
import torch

from moe.choices import chosen_table, token_choices
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
