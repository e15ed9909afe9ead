"""The losses on cases small enough to do by hand, and the limits."""

import math

import pytest
import torch
from torch import Tensor

from moe.balance import (
    balance_sums,
    expert_counts,
    load_balancing_loss,
    load_balancing_value,
    mean_over_layers,
    z_loss,
    z_value,
)
from moe.routing import RouterSpec, Routing, route


def routed(logits_TE: Tensor, top_k: int, **options: object) -> Routing:
    spec = RouterSpec(
        num_experts=logits_TE.shape[1],
        top_k=top_k,
        normalize_weights=False,
        capacity_factor=options.pop("capacity_factor", None),  # type: ignore[arg-type]
    )
    return route(logits_TE, spec, **options)  # type: ignore[arg-type]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def even_logits(num_experts: int, sharpness: float) -> Tensor:
    """Each expert is first choice of one token, second of the next, and so on."""
    eye = torch.eye(num_experts)
    return sharpness * (eye + 0.5 * eye.roll(1, dims=1))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_loss_is_one_when_choices_and_probabilities_are_even(top_k: int) -> None:
    loss = load_balancing_loss(routed(even_logits(8, 3.0), top_k))
    torch.testing.assert_close(loss, torch.tensor(1.0))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_loss_is_one_at_zero_logits_whatever_was_chosen(top_k: int) -> None:
    # All ties go to expert 0.., yet P is even, so E sum f P = 1.
    torch.testing.assert_close(
        load_balancing_loss(routed(torch.zeros(5, 8), top_k)), torch.tensor(1.0)
    )


@pytest.mark.parametrize(("top_k", "expected"), [(1, 8.0), (2, 4.0), (4, 2.0), (8, 1.0)])
def test_collapse_onto_the_same_k_experts_costs_e_over_k(top_k: int, expected: float) -> None:
    logits_TE = torch.full((6, 8), -50.0)
    logits_TE[:, :top_k] = 50.0
    torch.testing.assert_close(
        load_balancing_loss(routed(logits_TE, top_k)), torch.tensor(expected)
    )


def test_three_tokens_by_hand() -> None:
    probability_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6]])
    routing = routed(probability_TE.log(), 1)
    # f = (2/3, 0, 1/3), P = (1.3, 0.9, 0.8) / 3
    by_hand = 3 * (2 / 3 * 1.3 / 3 + 1 / 3 * 0.8 / 3)
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(by_hand))
    assert expert_counts(routing).tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("num_experts", [8, 64])
def test_the_z_loss_at_zero_logits_is_the_square_of_ln_e(num_experts: int) -> None:
    loss = z_loss(routed(torch.zeros(3, num_experts), 2))
    torch.testing.assert_close(loss, torch.tensor(math.log(num_experts) ** 2))


def test_the_z_loss_by_hand() -> None:
    logits_TE = torch.tensor([[0.0, math.log(3.0)], [math.log(2.0), math.log(2.0)]])
    torch.testing.assert_close(z_loss(routed(logits_TE, 1)), torch.tensor(math.log(4.0) ** 2))


def test_padding_is_left_out_even_when_it_is_nan() -> None:
    logits_TE = random_logits(6, 4)
    mask_T = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    padded = logits_TE.clone()
    padded[~mask_T] = float("nan")
    with_padding = routed(padded, 2, mask_T=mask_T)
    alone = routed(logits_TE[mask_T], 2)
    for loss in (load_balancing_loss, z_loss):
        torch.testing.assert_close(loss(with_padding), loss(alone))
    assert balance_sums(with_padding).num_tokens == 4


def test_no_token_at_all_costs_nothing() -> None:
    routing = routed(random_logits(3, 4), 2, mask_T=torch.zeros(3, dtype=torch.bool))
    assert load_balancing_loss(routing) == 0 and z_loss(routing) == 0


def test_dropping_changes_no_count() -> None:
    logits_TE = random_logits(9, 4)
    tight = routed(logits_TE, 2, capacity_factor=0.25)
    assert not tight.kept_TK.all()
    assert torch.equal(expert_counts(tight), expert_counts(routed(logits_TE, 2)))


def test_sums_of_parts_add_up_to_the_sums_of_the_whole() -> None:
    logits_TE = random_logits(10, 5)
    parts = balance_sums(routed(logits_TE[:3], 2)) + balance_sums(routed(logits_TE[3:], 2))
    whole = balance_sums(routed(logits_TE, 2))
    torch.testing.assert_close(load_balancing_value(parts), load_balancing_value(whole))
    torch.testing.assert_close(z_value(parts), z_value(whole))


def test_a_wider_fraction_makes_the_parts_average_to_the_whole() -> None:
    logits_TE = random_logits(8, 4)
    whole = balance_sums(routed(logits_TE, 2))
    fraction_E = whole.count_E / whole.count_E.sum()
    halves = [balance_sums(routed(half, 2)) for half in logits_TE.split(4)]
    values = [load_balancing_value(half, fraction_E=fraction_E) for half in halves]
    torch.testing.assert_close(sum(values) / 2, load_balancing_value(whole))


def test_the_gradient_pulls_probability_off_the_busy_expert() -> None:
    logits_TE = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.5]], requires_grad=True)
    load_balancing_loss(routed(logits_TE, 1)).backward()
    assert logits_TE.grad is not None
    assert (logits_TE.grad[:, 0] > 0).all() and (logits_TE.grad[:, 1:] < 0).all()


def test_the_counts_carry_no_gradient() -> None:
    routing = routed(random_logits(4, 3).requires_grad_(), 2)
    sums = balance_sums(routing)
    assert not sums.count_E.requires_grad and sums.score_sum_E.requires_grad


def test_permuting_experts_permutes_the_counts_and_keeps_the_loss() -> None:
    logits_TE = random_logits(12, 5)
    order = [3, 1, 4, 0, 2]
    before, after = routed(logits_TE, 2), routed(logits_TE[:, order], 2)
    assert torch.equal(expert_counts(before)[order], expert_counts(after))
    torch.testing.assert_close(load_balancing_loss(before), load_balancing_loss(after))


def test_layers_are_averaged() -> None:
    assert mean_over_layers([torch.tensor(1.0), torch.tensor(4.0)]) == 2.5
