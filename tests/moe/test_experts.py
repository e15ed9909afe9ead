"""The fast path does what the loop over tokens and experts does, gradients included."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.experts import FusedExperts, run_experts_naive
from moe.routing import RouterSpec, Routing, route


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_experts(num_experts: int, width: int, hidden: int) -> FusedExperts:
    experts = FusedExperts(
        num_experts=num_experts, hidden_size=width, intermediate_size=hidden
    ).double()
    with torch.no_grad():
        experts.gate_up_proj.copy_(normal(num_experts, 2 * hidden, width, seed=1))
        experts.down_proj.copy_(normal(num_experts, width, hidden, seed=2))
    return experts


def in_float64(routing: Routing, weight_TK: Tensor) -> Routing:
    """The decision with float64 weights that carry their own gradient, zero where not kept."""
    return replace(routing, weight_TK=torch.where(routing.kept_TK, weight_TK, 0.0))


CASES = {
    "nothing divides evenly": (11, 5, 3, None, None),
    "one token": (1, 4, 2, None, None),
    "every expert": (6, 3, 3, None, None),
    "capacity": (13, 4, 2, 0.5, None),
    "padding": (9, 4, 2, None, [0, 3, 8]),
    "everything dropped": (4, 3, 2, None, [0, 1, 2, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_fast_equals_naive_in_output_and_every_gradient(case: str) -> None:
    tokens, num_experts, top_k, capacity, padding = CASES[case]
    mask_T = torch.ones(tokens, dtype=torch.bool)
    mask_T[padding or []] = False
    spec = RouterSpec(num_experts=num_experts, top_k=top_k, capacity_factor=capacity)
    routing = route(normal(tokens, num_experts, seed=3), spec, mask_T=mask_T)
    experts = make_experts(num_experts, width=7, hidden=3)

    results = []
    for path in ("fast", "naive"):
        x_TD = normal(tokens, 7, seed=4).requires_grad_()
        weight_TK = normal(tokens, top_k, seed=5).requires_grad_()
        decided = in_float64(routing, weight_TK)
        experts.zero_grad()
        if path == "fast":
            y_TD = experts(x_TD, decided)
        else:
            y_TD = run_experts_naive(
                x_TD, decided, gate_up_EGD=experts.gate_up_proj, down_EDF=experts.down_proj
            )
        # A term in x keeps the graph alive where every assignment was dropped.
        ((y_TD * normal(tokens, 7, seed=6)).sum() + 0.0 * x_TD.sum()).backward()
        gradients = [x_TD.grad, weight_TK.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
        results.append([y_TD.detach(), *gradients])
    for fast, naive in zip(*results, strict=True):
        zero = torch.zeros_like(naive if fast is None else fast)
        torch.testing.assert_close(
            zero if fast is None else fast, zero if naive is None else naive, atol=1e-12, rtol=1e-12
        )


def test_gradients_agree_with_finite_differences() -> None:
    experts = make_experts(3, width=4, hidden=2)
    routing = route(normal(5, 3, seed=3), RouterSpec(num_experts=3, top_k=2))

    def outputs(x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(
            experts,
            {"gate_up_proj": gate_up, "down_proj": down},
            (x_TD, in_float64(routing, weight_TK)),
        )

    inputs = (
        normal(5, 4, seed=4).requires_grad_(),
        normal(5, 2, seed=5).requires_grad_(),
        experts.gate_up_proj.detach().requires_grad_(),
        experts.down_proj.detach().requires_grad_(),
    )
    assert torch.autograd.gradcheck(outputs, inputs)


def test_an_expert_without_a_token_gets_a_zero_gradient() -> None:
    experts = make_experts(4, width=3, hidden=2)
    logits_TE = torch.tensor([[9.0, 8.0, -9.0, -9.0]] * 3)
    routing = route(logits_TE, RouterSpec(num_experts=4, top_k=2))
    experts(normal(3, 3), in_float64(routing, normal(3, 2))).sum().backward()
    gradient = experts.down_proj.grad
    assert gradient is not None
    assert gradient[2:].abs().sum() == 0 and gradient[:2].abs().amin(dim=(1, 2)).min() > 0


def test_one_expert_on_one_token_by_hand() -> None:
    experts = FusedExperts(num_experts=1, hidden_size=1, intermediate_size=1)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.tensor([[[2.0], [3.0]]]))
        experts.down_proj.copy_(torch.tensor([[[5.0]]]))
    spec = RouterSpec(num_experts=1, top_k=1, normalize_weights=False)
    y_TD = experts(torch.tensor([[0.5]]), route(torch.zeros(1, 1), spec))
    silu_of_1 = 1 / (1 + torch.e**-1)
    torch.testing.assert_close(y_TD, torch.tensor([[5.0 * silu_of_1 * 1.5]]))


def test_padding_that_holds_nan_reaches_no_real_token() -> None:
    experts = make_experts(3, width=4, hidden=2)
    mask_T = torch.tensor([True, False, True])
    routing = route(normal(3, 3), RouterSpec(num_experts=3, top_k=2), mask_T=mask_T)
    x_TD = normal(3, 4)
    x_TD[1] = float("nan")
    y_TD = experts(x_TD, routing)
    assert y_TD.isfinite().all() and y_TD[1].abs().sum() == 0
