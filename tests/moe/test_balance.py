"""The losses on cases small enough to do by hand, and the limits."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe.balance import (
    balance_sums,
    expert_counts,
    has_selection_bias,
    load_balancing_loss,
    load_balancing_value,
    load_fractions,
    mean_over_layers,
    sequence_balance_loss,
    sequence_sum,
    update_selection_bias,
    z_loss,
    z_value,
)
from moe.errors import UserError
from moe.routing import RouterSpec, Routing, route
from moe.switch_ffn import SwitchFFN


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


def test_the_experts_of_padding_are_not_read_and_those_of_others_counted_one_by_one() -> None:
    mask_T = torch.tensor([True, True, False, True])
    routing = routed(random_logits(4, 5), 2, mask_T=mask_T)
    broken = replace(routing, expert_TK=routing.expert_TK.index_fill(0, torch.tensor([2]), -1))
    naive = [0.0] * 5
    for expert in routing.expert_TK[mask_T].flatten().tolist():
        naive[expert] += 1
    assert expert_counts(broken).tolist() == naive
    assert torch.equal(sequence_sum(broken), sequence_sum(routing))


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


# --- sequence by sequence


def test_the_sequence_loss_of_three_tokens_in_two_sequences_by_hand() -> None:
    probability_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6]])
    routing = routed(probability_TE.log(), 1, sequence_T=torch.tensor([0, 0, 1]))
    # First: f = (1, 0, 0), P = (0.6, 0.3, 0.1), 2 tokens; second: f = (0, 0, 1), P_3 = 0.6.
    first, second = 3 * 0.6, 3 * 0.6
    by_hand = (2 * first + 1 * second) / 3
    torch.testing.assert_close(sequence_balance_loss(routing), torch.tensor(by_hand))
    assert load_balancing_loss(routing) < by_hand  # over both together the load is more even


def test_of_one_sequence_the_sequence_loss_is_the_loss() -> None:
    routing = routed(random_logits(9, 5), 2)
    torch.testing.assert_close(sequence_balance_loss(routing), load_balancing_loss(routing))


def test_the_sequence_loss_is_the_length_weighted_mean_over_sequences() -> None:
    logits_TE = random_logits(10, 5)
    sequence_T = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 1, 1])  # in any order
    routing = routed(logits_TE, 2, sequence_T=sequence_T)
    alone = [load_balancing_loss(routed(logits_TE[sequence_T == s], 2)) for s in (0, 1)]
    expected = (3 * alone[0] + 7 * alone[1]) / 10
    torch.testing.assert_close(sequence_balance_loss(routing), expected)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_limits_of_the_sequence_loss_are_those_of_the_loss(top_k: int) -> None:
    sequence_T = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    even = routed(torch.zeros(8, 8), top_k, sequence_T=sequence_T)
    torch.testing.assert_close(sequence_balance_loss(even), torch.tensor(1.0))
    logits_TE = torch.full((8, 8), -50.0)
    logits_TE[:, :top_k] = 50.0
    collapsed = routed(logits_TE, top_k, sequence_T=sequence_T)
    torch.testing.assert_close(sequence_balance_loss(collapsed), torch.tensor(8.0 / top_k))


def test_sequences_that_collapse_onto_different_experts_look_even_only_together() -> None:
    routing = routed(50.0 * torch.eye(4), 1, sequence_T=torch.arange(4))
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(1.0))
    torch.testing.assert_close(sequence_balance_loss(routing), torch.tensor(4.0))


def test_padding_is_left_out_of_the_sequence_loss_even_when_it_is_nan() -> None:
    logits_TE = random_logits(6, 4)
    mask_T = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    sequence_T = torch.tensor([0, 0, 0, 1, 1, 1])
    padded = logits_TE.clone()
    padded[~mask_T] = float("nan")
    with_padding = routed(padded, 2, mask_T=mask_T, sequence_T=sequence_T)
    alone = routed(logits_TE[mask_T], 2, sequence_T=sequence_T[mask_T])
    torch.testing.assert_close(sequence_balance_loss(with_padding), sequence_balance_loss(alone))
    nothing = routed(logits_TE, 2, mask_T=torch.zeros(6, dtype=torch.bool))
    assert sequence_balance_loss(nothing) == 0


def test_the_sequence_losss_gradient_is_that_of_its_sequences() -> None:
    logits_TE = random_logits(6, 4)
    sequence_T = torch.tensor([0, 0, 1, 1, 1, 1])
    whole = logits_TE.clone().requires_grad_()
    sequence_balance_loss(routed(whole, 2, sequence_T=sequence_T)).backward()
    parts = logits_TE.clone().requires_grad_()
    first, second = (load_balancing_loss(routed(part, 2)) for part in parts.split([2, 4]))
    ((2 * first + 4 * second) / 6).backward()
    torch.testing.assert_close(whole.grad, parts.grad)


# --- shares of counts


def test_shares_are_of_the_layers_own_assignments_and_even_without_any() -> None:
    count_LE = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert load_fractions(count_LE).tolist() == [[0.75, 0.25, 0.0, 0.0], [0.25] * 4]


def test_an_even_share_from_nowhere_gives_one_and_pulls_no_router() -> None:
    logits_TE = random_logits(5, 4).requires_grad_()
    sums = balance_sums(routed(logits_TE, 2))
    value = load_balancing_value(sums, fraction_E=load_fractions(torch.zeros(1, 4))[0])
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(1.0))
    torch.testing.assert_close(logits_TE.grad, torch.zeros(5, 4), atol=1e-7, rtol=0)


def test_expert_choice_is_refused_by_name() -> None:
    chosen = replace(routed(random_logits(4, 4), 1), balanced_by_construction=True)
    for loss in (load_balancing_loss, z_loss, sequence_balance_loss):
        with pytest.raises(UserError, match="no meaning for a router of kind 'expert_choice'"):
            loss(chosen)


# --- the selection bias


def with_bias(spec: RouterSpec, *biases: Tensor | None) -> nn.Sequential:
    layers = [SwitchFFN(spec, hidden_size=4, intermediate_size=4) for _ in biases]
    for layer, bias_E in zip(layers, biases, strict=True):
        if bias_E is not None:
            layer.gate.register_buffer("e_score_correction_bias", bias_E.clone())
    return nn.Sequential(*layers)


THREE = RouterSpec(num_experts=3, top_k=1, normalize_weights=False)


def test_the_bias_of_three_experts_moves_by_hand() -> None:
    model = with_bias(THREE, torch.tensor([0.0, 0.5, -0.5]))
    # The mean load is 4: the first is above it, the second at it, the third below it.
    update_selection_bias(model, torch.tensor([[9.0, 4.0, -1.0]]), gamma=0.25)
    assert model[0].gate.e_score_correction_bias.tolist() == [-0.25, 0.5, -0.25]
    update_selection_bias(model, torch.tensor([[2.0, 2.0, 2.0]]), gamma=0.25)
    assert model[0].gate.e_score_correction_bias.tolist() == [-0.25, 0.5, -0.25]
    assert not model[0].gate.e_score_correction_bias.requires_grad


def test_each_layer_is_moved_by_its_own_row_and_one_without_a_bias_is_left_alone() -> None:
    model = with_bias(THREE, torch.zeros(3), None, torch.zeros(3))
    before = [weight.clone() for weight in model.parameters()]
    count_LE = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    update_selection_bias(model, count_LE, gamma=1.0)
    assert model[0].gate.e_score_correction_bias.tolist() == [-1.0, 1.0, 1.0]
    assert model[2].gate.e_score_correction_bias.tolist() == [1.0, 1.0, -1.0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_counts_that_are_not_the_models_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="counts of 2 layers for a model of 1"):
        update_selection_bias(with_bias(THREE, torch.zeros(3)), torch.ones(2, 3), gamma=0.1)


def test_a_model_without_a_selection_bias_is_refused() -> None:
    model = with_bias(THREE, None)
    assert not has_selection_bias(model)
    with pytest.raises(UserError, match="Sequential has no selection bias to update"):
        update_selection_bias(model, torch.ones(1, 3), gamma=0.1)


def test_many_updates_spread_a_load_that_the_scores_alone_put_on_one_expert() -> None:
    """The paper's point, on scores that no gradient changes."""
    spec = RouterSpec(num_experts=4, top_k=1, normalize_weights=False, selection_bias=True)
    logits_TE = random_logits(64, 4) + torch.tensor([2.0, 0.0, 0.0, -2.0])
    model = with_bias(THREE, torch.zeros(4))
    bias_E = model[0].gate.e_score_correction_bias

    def count_E() -> Tensor:
        return expert_counts(route(logits_TE, spec, bias_E=bias_E))

    crowded = float(count_E().max())
    for _ in range(400):
        update_selection_bias(model, count_E()[None], gamma=0.005)
    assert crowded > 40 and count_E().max() <= 20 and count_E().min() >= 12
    weights = route(logits_TE, spec, bias_E=bias_E).weight_TK
    unbiased = torch.softmax(logits_TE, dim=-1)
    chosen_TK = route(logits_TE, spec, bias_E=bias_E).expert_TK
    assert torch.equal(weights, unbiased.gather(-1, chosen_TK))  # the bias only chooses
