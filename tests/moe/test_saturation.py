"""Saturation: shared choices by hand, at both ends, and what unrelated routers share."""

import pytest
import torch
from torch import Tensor

from moe.errors import UserError
from moe.record import RecordedForward, RoutingTrace
from moe.routing import RouterSpec, route
from moe.saturation import saturation
from moe.stats import drift


def trace_of(expert_TK: list[list[int]] | Tensor, num_experts: int = 4) -> RoutingTrace:
    """One text, one layer, with these choices."""
    chosen_TK = torch.as_tensor(expert_TK)
    spec = RouterSpec(num_experts=num_experts, top_k=chosen_TK.shape[1], normalize_weights=False)
    routing = route(torch.zeros(len(chosen_TK), num_experts), spec, forced_TK=chosen_TK)
    forward = RecordedForward(
        sample_ids=torch.arange(1),
        mask_BS=torch.ones(1, len(chosen_TK), dtype=torch.bool),
        routings=(routing,),
    )
    return RoutingTrace(forwards=[forward])


def test_three_tokens_by_hand() -> None:
    now, end = [[0, 1], [0, 1], [0, 1]], [[1, 0], [1, 2], [2, 3]]
    found = saturation(trace_of(now), trace_of(end))
    assert found.share_L.item() == pytest.approx((2 + 1 + 0) / 6)
    # u = (1, 1, 0, 0), v = (1/3, 2/3, 2/3, 1/3): their product over K.
    assert found.usage_null_L.item() == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found.uniform_null == 0.5


def test_a_model_is_saturated_with_itself_and_shares_nothing_with_its_opposite() -> None:
    assert saturation(trace_of([[0, 3]]), trace_of([[3, 0]])).share_L.item() == 1
    assert saturation(trace_of([[0, 1]]), trace_of([[2, 3]])).share_L.item() == 0


def test_unrelated_routers_share_what_their_loads_say() -> None:
    draw = torch.Generator().manual_seed(0)
    weight_E = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    choices = [torch.multinomial(weight_E.expand(4000, 6), 2, generator=draw) for _ in range(2)]
    found = saturation(trace_of(choices[0], 6), trace_of(choices[1], 6))
    # 4000 tokens: a standard error below 0.006.
    assert found.share_L.item() == pytest.approx(found.usage_null_L.item(), abs=0.03)
    assert found.usage_null_L.item() > found.uniform_null + 0.1
    assert found.uniform_null == pytest.approx(1 / 3)


def test_parts_add_up_to_the_whole() -> None:
    now, end = [[0, 1], [2, 1], [0, 3]], [[1, 0], [1, 2], [2, 3]]
    whole = saturation(trace_of(now), trace_of(end))
    parts = [saturation(trace_of(now[at]), trace_of(end[at])) for at in (slice(1), slice(1, 3))]
    together = parts[0].merge(parts[1])
    assert together.share_L.tolist() == pytest.approx(whole.share_L.tolist())
    assert together.usage_null_L.tolist() == pytest.approx(whole.usage_null_L.tolist())


def test_unlike_recordings_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 experts per token"):
        saturation(trace_of([[0, 1]]), trace_of([[0]]))
    with pytest.raises(ValueError, match="4 and 5 experts"):
        saturation(trace_of([[0, 1]]), trace_of([[0, 1]], 5))
    with pytest.raises(ValueError, match="different samples or tokens"):
        saturation(trace_of([[0, 1]]), trace_of([[0, 1], [0, 1]]))
    with pytest.raises(ValueError, match="no token"):
        saturation(RoutingTrace(), RoutingTrace())


def test_expert_choice_is_refused_and_its_drift_from_itself_is_none() -> None:
    spec = RouterSpec(num_experts=4, top_k=1, kind="expert_choice", normalize_weights=False)
    routing = route(torch.zeros(6, 4), spec)  # ties: all experts take the first tokens
    forward = RecordedForward(
        sample_ids=torch.tensor([0]),
        mask_BS=torch.ones(1, 6, dtype=torch.bool),
        routings=(routing,),
    )
    trace = RoutingTrace(forwards=[forward])
    assert not routing.kept_TK.any(dim=-1).all()  # some token is taken by nobody
    with pytest.raises(UserError, match="no fixed number of experts"):
        saturation(trace, trace)
    assert drift(trace, trace).jaccard_L.tolist() == [1.0]
