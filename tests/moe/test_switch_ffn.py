"""The whole FFN: shapes, padding, permutation, precision."""

import pytest
import torch
from torch import Tensor

from moe.balance import expert_counts
from moe.experts import run_experts_naive
from moe.routing import RouterSpec, route
from moe.switch_ffn import SwitchFFN


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_ffn(spec: RouterSpec, width: int = 6, hidden: int = 5) -> SwitchFFN:
    ffn = SwitchFFN(spec, hidden_size=width, intermediate_size=hidden)
    with torch.no_grad():
        for i, parameter in enumerate(ffn.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + i, std=0.5))
    return ffn


SPEC = RouterSpec(num_experts=5, top_k=2)


def test_the_output_is_the_specification_applied_to_the_routers_logits() -> None:
    ffn, x_BSD = make_ffn(SPEC), normal(3, 4, 6)
    y_BSD, routing = ffn(x_BSD)
    x_TD = x_BSD.flatten(0, 1)
    by_hand = run_experts_naive(
        x_TD,
        route(x_TD @ ffn.gate.weight.T, SPEC),
        gate_up_EGD=ffn.experts.gate_up_proj,
        down_EDF=ffn.experts.down_proj,
    )
    torch.testing.assert_close(y_BSD.flatten(0, 1), by_hand, atol=1e-6, rtol=1e-5)
    assert routing.sequence_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_padding_comes_out_as_zero_and_changes_nothing_elsewhere() -> None:
    ffn, x_BSD = make_ffn(SPEC), normal(2, 5, 6)
    mask_BS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    y_BSD, routing = ffn(x_BSD, mask_BS)
    assert y_BSD[~mask_BS].abs().sum() == 0
    torch.testing.assert_close(y_BSD[mask_BS], ffn(x_BSD)[0][mask_BS])
    assert expert_counts(routing).sum() == 2 * mask_BS.sum()


def test_permuting_experts_permutes_the_loads_and_keeps_the_output() -> None:
    ffn, x_BSD = make_ffn(SPEC), normal(2, 7, 6)
    before, routing_before = ffn(x_BSD)
    order = [2, 0, 4, 1, 3]
    with torch.no_grad():
        for parameter in (ffn.gate.weight, ffn.experts.gate_up_proj, ffn.experts.down_proj):
            parameter.copy_(parameter[order].clone())
    after, routing_after = ffn(x_BSD)
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-5)
    assert torch.equal(expert_counts(routing_before)[order], expert_counts(routing_after))


def test_a_token_that_is_dropped_everywhere_contributes_nothing() -> None:
    spec = RouterSpec(num_experts=2, top_k=1, normalize_weights=False, capacity_factor=0.5)
    ffn = make_ffn(spec)
    x_BSD = normal(1, 1, 6).expand(1, 4, 6)  # four equal tokens want one expert with one place
    y_BSD, routing = ffn(x_BSD)
    assert routing.kept_TK.squeeze(-1).tolist() == [True, False, False, False]
    assert y_BSD[0, 1:].abs().sum() == 0 and y_BSD[0, 0].abs().sum() > 0


def test_every_weight_gets_a_gradient_the_router_too() -> None:
    ffn = make_ffn(RouterSpec(num_experts=3, top_k=1, normalize_weights=False))
    ffn(normal(4, 8, 6))[0].square().sum().backward()
    for name, parameter in ffn.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_the_routers_logits_are_float32_in_a_bfloat16_model(how: str) -> None:
    ffn, x_BSD = make_ffn(SPEC), normal(2, 3, 6)
    if how == "parameters":
        ffn, x_BSD = ffn.bfloat16(), x_BSD.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y_BSD, routing = ffn(x_BSD)
    exact = x_BSD.flatten(0, 1).float() @ ffn.gate.weight.float().T
    assert routing.logits_TE.dtype == torch.float32 and y_BSD.dtype == x_BSD.dtype
    torch.testing.assert_close(routing.logits_TE, exact, atol=1e-6, rtol=1e-6)


def test_the_names_and_shapes_are_those_of_the_fused_layout() -> None:
    shapes = {name: tuple(p.shape) for name, p in make_ffn(SPEC).named_parameters()}
    assert shapes == {
        "gate.weight": (5, 6),
        "experts.gate_up_proj": (5, 10, 6),
        "experts.down_proj": (5, 6, 5),
    }
