"""Every measure on loads small enough to do by hand, and what chance alone gives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.record import RecordedForward, RoutingTrace
from moe.routing import RouterSpec, Routing, route
from moe.stats import RouterStats, drift, jensen_shannon_bits, max_vio_floor


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(logits_TE: Tensor, top_k: int = 2, **options: Any) -> Routing:
    spec = RouterSpec(
        num_experts=logits_TE.shape[1],
        top_k=top_k,
        normalize_weights=False,
        capacity_factor=options.pop("capacity_factor", None),
    )
    return route(logits_TE, spec, **options)


def choosing(experts: list[int], num_experts: int) -> Routing:
    """Top-1 routing of one token per entry."""
    return routed(9.0 * torch.eye(num_experts)[experts], top_k=1)


def stats_of(*layers: Routing) -> RouterStats:
    return RouterStats.from_routings(layers)


def trace_of(*layers: Tensor, top_k: int = 2, batch: int = 1, **options: Any) -> RoutingTrace:
    """A trace of one pass; each layer's logits are (B * S, E)."""
    length = layers[0].shape[0] // batch
    mask_BS = options.pop("mask_BS", torch.ones(batch, length, dtype=torch.bool))
    forward = RecordedForward(
        sample_ids=options.pop("sample_ids", torch.arange(batch)),
        mask_BS=mask_BS,
        routings=tuple(routed(x, top_k, mask_T=mask_BS.flatten()) for x in layers),
    )
    return RoutingTrace(forwards=[forward])


def test_loads_by_hand() -> None:
    stats = stats_of(choosing([0, 0, 0, 1], 4))
    assert stats.load_LE.tolist() == [[0.75, 0.25, 0.0, 0.0]]
    assert stats.relative_load_LE.tolist() == [[3.0, 1.0, 0.0, 0.0]]
    assert stats.max_vio_L.tolist() == [2.0]
    assert stats.dead_experts_L.tolist() == [2]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert stats.load_entropy_L.item() == pytest.approx(entropy)


def test_an_even_load_has_entropy_one_and_no_violation() -> None:
    stats = stats_of(choosing([0, 1, 2, 3, 4, 5], 6))
    assert stats.load_entropy_L.item() == pytest.approx(1.0)
    assert stats.max_vio_L.item() == 0 and stats.dead_experts_L.item() == 0


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_collapse_onto_k_experts_violates_by_e_over_k_minus_one(top_k: int) -> None:
    logits_TE = torch.arange(8.0).flip(0).repeat(5, 1)
    stats = stats_of(routed(logits_TE, top_k))
    assert stats.max_vio_L.item() == pytest.approx(8 / top_k - 1)
    assert stats.load_entropy_L.item() == pytest.approx(math.log(top_k) / math.log(8))
    assert stats.dead_experts_L.item() == 8 - top_k


def test_one_expert_is_always_even() -> None:
    stats = stats_of(choosing([0, 0], 1))
    assert stats.load_entropy_L.item() == 1 and stats.max_vio_floor_L.item() == 0


def test_an_expert_is_dead_below_a_tenth_of_its_share_and_not_at_it() -> None:
    # 40 tokens over 4 experts: the fair share is 10, a tenth of it is 1.
    at_a_tenth = stats_of(choosing([0] * 19 + [1] * 20 + [2], 4))
    assert at_a_tenth.dead_experts_L.item() == 1
    assert stats_of(choosing([0] * 20 + [1] * 20, 4)).dead_experts_L.item() == 2


def test_the_entropy_of_a_token_is_in_nats() -> None:
    stats = stats_of(routed(torch.zeros(3, 4)), routed(100 * torch.eye(4)[:3]))
    torch.testing.assert_close(
        stats.token_entropy_L, torch.tensor([math.log(4), 0.0], dtype=torch.float64)
    )


def test_importance_is_the_summed_probability() -> None:
    probability_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])
    stats = stats_of(routed(probability_TE.log(), 1))
    torch.testing.assert_close(
        stats.importance_LE, torch.tensor([[1.2, 0.6, 0.2]]).double(), atol=1e-6, rtol=0
    )


def test_the_dropped_share_counts_assignments_of_real_tokens() -> None:
    # Four real tokens want expert 0, two places: half of the assignments are dropped.
    mask_T = torch.tensor([1, 1, 1, 1, 0]).bool()
    routing = routed(9.0 * torch.eye(2)[[0] * 5], 1, capacity_factor=1.0, mask_T=mask_T)
    stats = stats_of(routing)
    assert stats.dropped_share_L.item() == 0.5 and stats.load_LE.tolist() == [[1.0, 0.0]]
    assert stats_of(choosing([0, 0], 2)).dropped_share_L.item() == 0


def test_padding_is_left_out_of_every_measure() -> None:
    logits_TE = random_logits(8, 5)
    mask_T = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool()
    padded, alone = stats_of(routed(logits_TE, mask_T=mask_T)), stats_of(routed(logits_TE[mask_T]))
    assert padded.to_metrics() == pytest.approx(alone.to_metrics())


def test_merged_parts_equal_the_whole() -> None:
    layers = random_logits(10, 5), random_logits(10, 5, seed=1)
    whole = stats_of(*(routed(x) for x in layers))
    parts = stats_of(*(routed(x[:3]) for x in layers)).merge(
        stats_of(*(routed(x[3:]) for x in layers))
    )
    assert parts.to_metrics() == pytest.approx(whole.to_metrics())
    trace = RoutingTrace(
        forwards=[
            trace_of(*(x[rows] for x in layers)).forwards[0] for rows in (slice(4), slice(4, 10))
        ]
    )
    assert RouterStats.from_trace(trace).to_metrics() == pytest.approx(whole.to_metrics())


def test_statistics_of_another_top_k_do_not_merge() -> None:
    with pytest.raises(ValueError, match="top_k 2 and 1"):
        stats_of(routed(random_logits(3, 4))).merge(stats_of(routed(random_logits(3, 4), 1)))


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="the trace is empty"):
        RouterStats.from_trace(RoutingTrace())


def test_metrics_carry_every_layer_and_the_mean() -> None:
    metrics = stats_of(choosing([0, 1], 2), choosing([0, 0], 2)).to_metrics()
    assert metrics["router/max_vio/layer_00"] == 0 and metrics["router/max_vio/layer_01"] == 1
    assert metrics["router/max_vio"] == 0.5
    measures = {name.split("/")[1] for name in metrics}
    assert measures == {
        "load_entropy",
        "token_entropy",
        "max_vio",
        "max_vio_floor",
        "dead_experts",
        "dropped_share",
    }


def test_permuting_experts_permutes_the_loads_and_keeps_the_measures() -> None:
    logits_TE = random_logits(20, 6)
    order = [5, 2, 0, 4, 1, 3]
    before, after = stats_of(routed(logits_TE)), stats_of(routed(logits_TE[:, order]))
    assert torch.equal(before.count_LE[:, order], after.count_LE)
    assert before.to_metrics() == pytest.approx(after.to_metrics())


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 1, 4096), (8, 2, 512), (64, 8, 4096)])
def test_a_fair_router_stays_near_the_floor(experts: int, top_k: int, tokens: int) -> None:
    floor = max_vio_floor(experts, top_k, tokens)
    spread = (1 - top_k / experts) * experts / (tokens * top_k)
    assert floor == pytest.approx(math.sqrt(2 * math.log(experts) * spread))
    by_chance = stats_of(routed(random_logits(tokens, experts), top_k)).max_vio_L.item()
    assert 0.4 * floor < by_chance < 1.3 * floor


def test_the_floor_falls_with_tokens_and_vanishes_where_there_is_no_choice() -> None:
    assert max_vio_floor(8, 2, 400) == pytest.approx(2 * max_vio_floor(8, 2, 1600))
    assert max_vio_floor(8, 8, 10) == max_vio_floor(1, 1, 10) == max_vio_floor(8, 2, 0) == 0


# --- drift --------------------------------------------------------------------------------------


def test_a_recording_has_not_drifted_from_itself() -> None:
    trace = trace_of(random_logits(6, 5), random_logits(6, 5, seed=1))
    moved = drift(trace, trace)
    assert moved.jaccard_L.tolist() == [1.0, 1.0]
    torch.testing.assert_close(moved.jsd_bits_L, torch.zeros(2).double(), atol=1e-9, rtol=0)


def test_disjoint_choices_drift_by_one_bit_and_share_nothing() -> None:
    low, high = torch.tensor([[2.0, 1.0, 0.0, 0.0]] * 3), torch.tensor([[0.0, 0.0, 1.0, 2.0]] * 3)
    moved = drift(trace_of(low), trace_of(high))
    assert moved.jaccard_L.item() == 0 and moved.jsd_bits_L.item() == pytest.approx(1.0)


def test_half_shared_choices_by_hand() -> None:
    # {0, 1} against {1, 2} on one token, the same on the other: (1/3 + 1) / 2.
    before = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    after = torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 0.0]])
    moved = drift(trace_of(before), trace_of(after))
    assert moved.jaccard_L.item() == pytest.approx(2 / 3)


def test_the_loads_can_agree_while_the_tokens_swap() -> None:
    before = trace_of(torch.eye(2), top_k=1)
    after = trace_of(torch.eye(2).flip(0), top_k=1)
    moved = drift(before, after)
    assert moved.jaccard_L.item() == 0 and moved.jsd_bits_L.item() == 0


def test_samples_are_matched_by_id_whatever_the_batching_and_padding() -> None:
    rows = random_logits(2, 4, 5)
    together = trace_of(rows.flatten(0, 1), batch=2, sample_ids=torch.tensor([7, 3]))
    padded = torch.cat([torch.zeros(1, 5), rows[1]])
    apart = RoutingTrace(
        forwards=[
            trace_of(
                padded,
                sample_ids=torch.tensor([3]),
                mask_BS=torch.tensor([[False, True, True, True, True]]),
            ).forwards[0],
            trace_of(rows[0], sample_ids=torch.tensor([7])).forwards[0],
        ]
    )
    assert drift(together, apart).jaccard_L.item() == 1.0


def test_unlike_recordings_are_refused() -> None:
    one = trace_of(random_logits(4, 5))
    with pytest.raises(ValueError, match="5 and 6 experts"):
        drift(one, trace_of(random_logits(4, 6)))
    with pytest.raises(ValueError, match="1 and 2 layers"):
        drift(one, trace_of(random_logits(4, 5), random_logits(4, 5)))
    with pytest.raises(ValueError, match="different samples or tokens"):
        drift(one, trace_of(random_logits(3, 5)))
    with pytest.raises(ValueError, match="different samples or tokens"):
        drift(one, trace_of(random_logits(4, 5), sample_ids=torch.tensor([1])))


def test_the_divergence_is_symmetric_and_by_hand() -> None:
    p, q = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.5, 0.5]]).double()
    by_hand = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert jensen_shannon_bits(p, q).item() == pytest.approx(by_hand)
    assert jensen_shannon_bits(q, p).item() == pytest.approx(by_hand)
