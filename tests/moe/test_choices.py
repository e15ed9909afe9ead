"""Choices out of a trace: real tokens only, in order, whatever the batching."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import MoEConfig, MoEForCausalLM
from moe.choices import paired_sets, token_choices
from moe.record import RecordedForward, RoutingTrace, record_routing
from moe.repeats import repeats
from moe.routing import RouterSpec, chosen_table, route
from moe.saturation import saturation
from moe.stats import drift


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


def test_passes_that_go_on_from_a_cache_are_refused_where_neighbours_count() -> None:
    routing = route(torch.zeros(3, 4), RouterSpec(num_experts=4, top_k=2))
    mask_BS = torch.ones(1, 3, dtype=torch.bool)

    def trace(sample_ids: Tensor, token_BS: Tensor) -> RoutingTrace:
        forward = RecordedForward(
            sample_ids=sample_ids, mask_BS=mask_BS, routings=(routing,), token_BS=token_BS
        )
        return RoutingTrace(forwards=[forward])

    whole = trace(torch.tensor([0]), torch.tensor([[0, 1, 2]]))
    assert token_choices(whole).sequence_T.tolist() == [0, 0, 0]
    for sample_ids, token_BS in (([0], [[3, 4, 5]]), ([[0, 0, 1]], [[3, 4, 0]])):
        with pytest.raises(ValueError, match="go on from a cache"):
            token_choices(trace(torch.tensor(sample_ids), torch.tensor(token_BS)))


# --- packed rows

LENGTHS = {4: 5, 9: 7, 2: 3, 7: 4}  # sample id -> tokens
PAD = -1


def logits_of(sample: int, seed: int) -> Tensor:
    """What a text's tokens ask of each expert, (2, tokens, 6): its own, wherever it stands."""
    generator = torch.Generator().manual_seed(100 * seed + sample)
    return torch.randn(2, LENGTHS[sample], 6, generator=generator)


def forward_of(rows: list[list[int]], *, seed: int, packed: bool) -> RecordedForward:
    """One pass of two layers; a row is samples one after the other, PAD a place of padding."""
    ids_BS = [[s for s in row for _ in range(LENGTHS.get(s, 1))] for row in rows]
    length = max(map(len, ids_BS))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in ids_BS])
    mask_BS = ids != PAD
    logits = torch.zeros(2, *ids.shape, 6)
    logits[:, mask_BS] = torch.cat(
        [logits_of(s, seed) for row in rows for s in row if s != PAD], dim=1
    )
    spec, mask_T = RouterSpec(num_experts=6, top_k=2), mask_BS.flatten()
    return RecordedForward(
        sample_ids=ids if packed else torch.tensor([row[-1] for row in rows]),
        mask_BS=mask_BS,
        routings=tuple(route(each.flatten(0, 1), spec, mask_T=mask_T) for each in logits),
    )


def alone(seed: int = 0) -> RoutingTrace:
    """Each text in a row of its own, in two passes, padded on either side."""
    batches = [[[PAD, PAD, 4], [9]], [[2], [PAD, 7]]]
    return RoutingTrace(forwards=[forward_of(b, seed=seed, packed=False) for b in batches])


def together(seed: int = 0) -> RoutingTrace:
    """The same texts in two packed rows, with padding before, between and after them."""
    rows = [[PAD, 4, PAD, 9], [2, 7, PAD]]
    return RoutingTrace(forwards=[forward_of(rows, seed=seed, packed=True)])


def numbers(found: Any) -> dict[str, Any]:
    held = {f.name: getattr(found, f.name) for f in fields(found)}
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in held.items()}


def test_packed_texts_have_the_neighbours_they_have_in_rows_of_their_own() -> None:
    apart, packed = token_choices(alone()), token_choices(together())
    assert torch.equal(packed.expert_LTK, apart.expert_LTK)
    assert packed.sequence_T.tolist() == [0] * 5 + [1] * 7 + [2] * 3 + [3] * 4
    assert torch.equal(packed.sequence_T, apart.sequence_T)
    found = [
        repeats(c.expert_LTK, c.sequence_T, num_experts=6, choices=2, permutations=9)
        for c in (apart, packed)
    ]
    assert numbers(found[1]) == numbers(found[0]) and found[0].num_pairs == 4 + 6 + 2 + 3


def test_a_model_that_reads_packed_texts_has_the_neighbours_it_has_in_single_rows() -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(
        MoEConfig(
            vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_experts=6, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    texts = {s: torch.arange(n) * (s + 3) % 32 for s, n in LENGTHS.items()}
    with torch.no_grad(), record_routing(model) as apart:
        for sample, ids in texts.items():
            model(input_ids=ids[None], sample_ids=torch.tensor([sample]), use_cache=False)
    with torch.no_grad(), record_routing(model) as packed:
        model(
            input_ids=torch.cat(list(texts.values()))[None],
            position_ids=torch.cat([torch.arange(n) for n in LENGTHS.values()])[None],
            sample_ids=torch.cat([torch.full((n,), s) for s, n in LENGTHS.items()])[None],
            use_cache=False,
        )
    assert numbers(token_choices(packed)) == numbers(token_choices(apart))
    assert saturation(packed, apart).share_L.tolist() == [1.0, 1.0]
    assert numbers(drift(packed, apart)) == {"jaccard_L": [1.0, 1.0], "jsd_bits_L": [0.0, 0.0]}


def test_texts_compare_alike_packed_and_in_rows_of_their_own() -> None:
    apart, packed, other = alone(), together(), alone(seed=1)
    for measure in (saturation, drift):
        expected = numbers(measure(apart, other))
        assert numbers(measure(packed, together(seed=1))) == expected
        assert numbers(measure(packed, other)) == expected
        assert numbers(measure(apart, together(seed=1))) == expected
    assert drift(apart, packed).jaccard_L.tolist() == [1.0, 1.0]
    assert 0 < drift(apart, other).jaccard_L.min() and drift(apart, other).jaccard_L.max() < 1


def test_a_sample_in_two_packed_rows_is_two_texts_as_it_is_in_two_rows() -> None:
    rows = [[4, 9], [4]]
    twice = RoutingTrace(forwards=[forward_of(rows, seed=0, packed=True)])
    apart = RoutingTrace(forwards=[forward_of([[4], [9], [4]], seed=0, packed=False)])
    assert [len(chosen_LTE[0]) for chosen_LTE, _ in paired_sets(twice, apart)] == [5, 7, 5]
    assert token_choices(twice).sequence_T.tolist() == [0] * 5 + [1] * 7 + [2] * 5
    with pytest.raises(ValueError, match="different samples or tokens"):
        drift(twice, alone())


def test_a_pass_of_padding_alone_has_no_packed_text() -> None:
    nothing = RecordedForward(
        sample_ids=torch.full((1, 3), PAD),
        mask_BS=torch.zeros(1, 3, dtype=torch.bool),
        routings=forward_of([[2]], seed=0, packed=True).routings,
    )
    trace = RoutingTrace(forwards=[nothing])
    assert list(paired_sets(trace, trace)) == [] and not len(token_choices(trace).sequence_T)
