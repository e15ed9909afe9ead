"""Choices, weights and drops by hand, and against other authors' routers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig, Qwen3MoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe.errors import UserError
from moe.routing import RouterSpec, capacity_limit, route, top_k_lowest_index


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


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("make_config", "router_class"),
    [(OlmoeConfig, OlmoeTopKRouter), (Qwen3MoeConfig, Qwen3MoeTopKRouter)],
)
def test_weights_and_choices_equal_those_of_other_routers(
    make_config: type, router_class: type, normalize: bool
) -> None:
    config = make_config(
        hidden_size=12, num_experts=7, num_experts_per_tok=3, norm_topk_prob=normalize
    )
    router = router_class(config)
    with torch.no_grad():
        router.weight.copy_(random_logits(7, 12))
    x_TD = random_logits(11, 12, seed=1)
    logits_TE, weight_TK, expert_TK = router(x_TD)
    spec = RouterSpec(num_experts=7, top_k=3, normalize_weights=normalize)
    routing = route(logits_TE, spec)
    assert torch.equal(routing.expert_TK, expert_TK)
    torch.testing.assert_close(routing.weight_TK, weight_TK, atol=1e-6, rtol=0)
