"""Every measure on loads small enough to do by hand, and what chance alone gives."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe import MoEConfig, MoEForCausalLM
from moe.coactivation import CoActivation
from moe.record import RecordedForward, RoutingTrace, record_routing
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
        "load_cv",
        "margin",
        "tie_rate",
    }


def test_the_loads_variation_by_hand_and_at_its_ends() -> None:
    # Loads 3, 1, 0, 0 around a mean of 1: variance (4 + 0 + 1 + 1) / 4.
    assert stats_of(choosing([0, 0, 0, 1], 4)).load_cv_L.item() == pytest.approx(math.sqrt(1.5))
    assert stats_of(choosing([0, 1, 2], 3)).load_cv_L.item() == 0
    collapsed = stats_of(routed(torch.arange(8.0).flip(0).repeat(5, 1), 2))
    assert collapsed.load_cv_L.item() == pytest.approx(math.sqrt(8 / 2 - 1))


def test_a_fair_routers_variation_is_its_floor() -> None:
    found = [stats_of(routed(random_logits(2048, 16, seed=s), 2)) for s in range(20)]
    mean_square = sum(float(f.load_cv_L.square()) for f in found) / len(found)
    # The square is a mean of 15 degrees of freedom: 20 of them stay within a fifth.
    assert mean_square == pytest.approx(float(found[0].load_cv_floor_L.square()), rel=0.2)
    assert stats_of(routed(random_logits(9, 4), 4)).load_cv_floor_L.item() == 0


def test_the_margin_is_the_last_chosen_score_over_the_first_not_chosen() -> None:
    probability_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.4, 0.4, 0.1, 0.1]])
    stats = stats_of(routed(probability_TE.log(), 2), routed(probability_TE.log(), 1))
    # (0.3 - 0.15 + 0.4 - 0.1) / 2 and (0.5 - 0.3 + 0) / 2
    assert stats.mean_margin_L.tolist() == pytest.approx([0.225, 0.1])
    assert stats.tie_rate_L.tolist() == [0.0, 0.5]


def test_equal_scores_are_all_ties_and_have_no_margin() -> None:
    stats = stats_of(routed(torch.zeros(3, 4)))
    assert stats.mean_margin_L.item() == 0 and stats.tie_rate_L.item() == 1


def test_a_router_that_takes_all_experts_has_no_margin_to_report() -> None:
    stats = stats_of(routed(random_logits(5, 3), 3))
    assert math.isnan(stats.mean_margin_L.item()) and math.isnan(stats.tie_rate_L.item())
    measures = {name.split("/")[1] for name in stats.to_metrics()}
    assert "load_cv" in measures and not measures & {"margin", "tie_rate"}


def test_a_choice_against_the_scores_has_a_margin_below_zero() -> None:
    logits_TE = torch.tensor([[0.6, 0.3, 0.1]]).log()
    forced = stats_of(routed(logits_TE, 1, forced_TK=torch.tensor([[2]])))
    assert forced.mean_margin_L.item() == pytest.approx(0.1 - 0.6)


def test_padding_with_nonsense_in_it_is_left_out_too() -> None:
    logits_TE, mask_T = random_logits(4, 5), torch.tensor([True, True, True, False])
    routing = routed(logits_TE, mask_T=mask_T)
    broken = replace(
        routing,
        score_TE=routing.score_TE.index_fill(0, torch.tensor([3]), math.nan),
        expert_TK=routing.expert_TK.index_fill(0, torch.tensor([3]), -1),
    )
    found, alone = stats_of(broken).to_metrics(), stats_of(routed(logits_TE[:3])).to_metrics()
    assert found == pytest.approx(alone)


def test_sums_without_margins_are_read_and_merged_as_nothing_compared() -> None:
    stats = stats_of(routed(random_logits(6, 5)), routed(random_logits(6, 5, seed=1)))
    older = {name: getattr(stats, name) for name in ("count_LE", "importance_LE", "entropy_L")}
    older |= {"dropped_L": stats.dropped_L, "tokens_L": stats.tokens_L}
    read = RouterStats(**older, top_k=2)
    assert "router/margin" not in read.to_metrics()
    assert read.merge(stats).mean_margin_L.tolist() == stats.mean_margin_L.tolist()


def test_of_expert_choice_what_the_experts_took_is_counted() -> None:
    # 6 tokens, capacity 1: each of 3 experts takes the ceil(6 * 1 / 3) tokens that it scores best.
    spec = RouterSpec(num_experts=3, top_k=1, kind="expert_choice", normalize_weights=False)
    stats = stats_of(route(random_logits(6, 3), spec))
    assert len(set(stats.count_LE[0].tolist())) == 1 and stats.dropped_share_L.item() == 0


# --- where the sums live ------------------------------------------------------------------------

READINGS = {"cpu", "tolist", "item", "numpy", "__float__", "__bool__", "__int__", "__iter__"}


class NoKernelReads(TorchDispatchMode):
    """Fails on every kernel whose result's value or size a device would have to be waited for."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.READS), f"{name} reads a device"
        if name.startswith("index") and isinstance(args[1], list | tuple):  # a mask's size
            masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            assert not masks, f"{name} by a mask reads a device"
        return func(*args, **(kwargs or {}))


class NoPythonReads(TorchFunctionMode):
    """Fails on every way in which Python can ask a tensor for its values."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in READINGS, f"{name} reads a device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reading() -> Iterator[None]:
    with NoPythonReads(), NoKernelReads():
        yield


def test_the_guard_catches_values_and_masks_that_are_read() -> None:
    for read in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.tolist(), Tensor.cpu):
        values = torch.ones(3)
        with pytest.raises(AssertionError, match="reads a device"), no_reading():
            read(values)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_counting_and_merging_passes_waits_for_no_device(capacity_factor: float | None) -> None:
    options = {"mask_T": torch.tensor([True] * 5 + [False]), "capacity_factor": capacity_factor}
    layers = tuple(routed(random_logits(6, 5, seed=s), 2, **options) for s in range(2))
    with no_reading():
        total = RouterStats.from_routings(layers)
        for _ in range(3):
            total = total.merge(RouterStats.from_routings(layers))
        CoActivation.from_routings(layers)
    assert total.tokens_L.tolist() == [20.0, 20.0]


class Remote(Tensor):
    """A stand-in for sums on a device: every way to read one is counted."""

    transfers = 0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if getattr(func, "__name__", "") in READINGS:
            Remote.transfers += 1
            return found.as_subclass(Tensor) if isinstance(found, Tensor) else found
        return found


def test_reading_all_metrics_is_one_transfer() -> None:
    stats = stats_of(routed(random_logits(6, 5)), routed(random_logits(6, 5, seed=1)))
    sums = {f.name: getattr(stats, f.name) for f in fields(stats) if f.name != "top_k"}
    away = RouterStats(**{k: v.as_subclass(Remote) for k, v in sums.items()}, top_k=2)
    Remote.transfers = 0
    assert away.to_metrics() == stats.to_metrics()
    assert Remote.transfers == 1


def test_the_sums_of_all_processes_travel_as_one_vector() -> None:
    stats = stats_of(routed(random_logits(6, 5)), routed(random_logits(6, 5, seed=1)))
    seen: list[Tensor] = []

    def all_sum(value: Tensor) -> Tensor:
        seen.append(value)
        return 2 * value

    doubled = stats.summed(all_sum)
    assert len(seen) == 1 and seen[0].dim() == 1
    assert doubled.to_metrics() == stats.merge(stats).to_metrics()
    assert torch.equal(doubled.count_LE, 2 * stats.count_LE)


def sum_over_processes(rank: int, folder: str) -> None:
    """One process: its share of the rows is counted and summed; rank 0 writes the metrics."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)  # a port could be another's by now
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def all_sum(value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value)
        return value

    rows = slice(0, 5) if rank == 0 else slice(5, 12)
    metrics = stats_of(*(routed(x[rows]) for x in whole_batch())).summed(all_sum).to_metrics()
    if rank == 0:
        (Path(folder) / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    torch.distributed.destroy_process_group()


def whole_batch() -> tuple[Tensor, Tensor]:
    return random_logits(12, 5), random_logits(12, 5, seed=1)


def test_two_processes_give_the_metrics_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sum_over_processes, args=(str(tmp_path),), nprocs=2)
    together = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert together == pytest.approx(stats_of(*(routed(x) for x in whole_batch())).to_metrics())


# --- recompute ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["ours", "olmoe"])
def test_layers_that_run_again_in_backward_are_counted_once(
    family: str, use_reentrant: bool
) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "num_experts": 4}
    model: Any = (
        MoEForCausalLM(MoEConfig(**size, moe_intermediate_size=8))
        if family == "ours"
        else OlmoeForCausalLM(OlmoeConfig(**size, intermediate_size=8, num_experts_per_tok=2))
    )
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def passes(steps: int) -> RouterStats:
        with record_routing(model) as trace:
            for _ in range(steps):
                hidden = model.model.embed_tokens(ids).detach().requires_grad_()
                logits = model(inputs_embeds=hidden, attention_mask=mask, use_cache=False).logits
                logits.square().mean().backward()
        return RouterStats.from_trace(trace)

    model.train()
    plain = passes(2)
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)
    runs: list[int] = []
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda *_: runs.append(1))
    kept = passes(2)
    assert len(runs) == 4  # the layer did run a second time in each backward
    assert torch.equal(kept.count_LE, plain.count_LE) and kept.tokens_L.tolist() == [20.0, 20.0]


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
