"""Every backend does what the loop over tokens and experts does, gradients included."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.errors import UserError
from moe.experts import Backend, FusedExperts, run_experts_naive, set_experts_backend
from moe.routing import RouterSpec, Routing, route

BACKENDS = get_args(Backend)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_experts(
    num_experts: int,
    width: int,
    hidden: int,
    *,
    backend: Backend = "loop",
    dtype: torch.dtype = torch.float64,
) -> FusedExperts:
    experts = FusedExperts(num_experts=num_experts, hidden_size=width, intermediate_size=hidden)
    with torch.no_grad():
        experts.gate_up_proj.copy_(normal(num_experts, 2 * hidden, width, seed=1))
        experts.down_proj.copy_(normal(num_experts, width, hidden, seed=2))
    experts = experts.to(dtype)
    set_experts_backend(experts, backend)
    return experts


def weighed(routing: Routing, weight_TK: Tensor) -> Routing:
    """The decision with weights that carry their own gradient, zero where not kept."""
    return replace(routing, weight_TK=torch.where(routing.kept_TK, weight_TK, 0.0))


def expert_choice(num_tokens: int, num_experts: int, *, each: int) -> Routing:
    """Every expert takes the `each` tokens that score highest with it; K = E."""
    logits_TE = normal(num_tokens, num_experts, seed=3)
    spec = RouterSpec(num_experts=num_experts, top_k=num_experts, normalize_weights=False)
    routing = route(logits_TE, spec)
    chosen_CE = routing.score_TE.topk(each, dim=0).indices
    return replace(
        routing,
        expert_TK=torch.arange(num_experts).expand(num_tokens, num_experts),
        kept_TK=torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter(0, chosen_CE, True),
        weight_TK=routing.score_TE,
    )


def top_k(
    num_tokens: int,
    num_experts: int,
    k: int,
    *,
    capacity: float | None = None,
    padding: tuple[int, ...] = (),
) -> Routing:
    mask_T = torch.ones(num_tokens, dtype=torch.bool)
    mask_T[list(padding)] = False
    spec = RouterSpec(num_experts=num_experts, top_k=k, capacity_factor=capacity)
    return route(normal(num_tokens, num_experts, seed=3), spec, mask_T=mask_T)


CASES: Mapping[str, Callable[[], Routing]] = {
    "nothing divides evenly": lambda: top_k(11, 5, 3),
    "one token": lambda: top_k(1, 4, 2),
    "every expert": lambda: top_k(6, 3, 3),
    "one expert": lambda: expert_choice(5, 1, each=5),
    "more experts than assignments": lambda: top_k(3, 16, 2),
    "capacity": lambda: top_k(13, 4, 2, capacity=0.5),
    "padding": lambda: top_k(9, 4, 2, padding=(0, 3, 8)),
    "everything dropped": lambda: top_k(4, 3, 2, padding=(0, 1, 2, 3)),
    "no token at all": lambda: top_k(0, 3, 2),
    "expert choice": lambda: expert_choice(12, 5, each=3),
}


def run(
    experts: FusedExperts,
    routing: Routing,
    *,
    naive: bool = False,
    call: Callable[..., Tensor] = lambda run_it, *inputs: run_it(*inputs),
) -> list[Tensor]:
    """Output, then the gradients of x, combine weights, gate_up and down; zeros for None."""
    dtype, width = experts.down_proj.dtype, experts.down_proj.shape[1]
    tokens, k = routing.expert_TK.shape
    x_TD = normal(tokens, width, seed=4).to(dtype).requires_grad_()
    # As the router gives them: float32, whatever the model runs in.
    weight_TK = normal(tokens, k, seed=5).to(torch.promote_types(dtype, torch.float32))
    weight_TK.requires_grad_()

    def output(x_TD: Tensor, weight_TK: Tensor) -> Tensor:
        decided = weighed(routing, weight_TK)
        if not naive:
            return experts(x_TD, decided)
        if tokens == 0:
            return 0.0 * x_TD
        return run_experts_naive(
            x_TD, decided, gate_up_EGD=experts.gate_up_proj, down_EDF=experts.down_proj
        )

    experts.zero_grad()
    y_TD = call(output, x_TD, weight_TK)
    # A term in x keeps the graph alive where every assignment was dropped.
    ((y_TD * normal(tokens, width, seed=6).to(dtype)).sum() + 0.0 * x_TD.sum()).backward()
    leaves = (x_TD, weight_TK, experts.gate_up_proj, experts.down_proj)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    return [y_TD.detach(), *gradients]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["loop", "lean"])
def test_a_backend_equals_naive_in_output_and_every_gradient(case: str, backend: Backend) -> None:
    routing = CASES[case]()
    experts = make_experts(routing.num_experts, width=7, hidden=3, backend=backend)
    for ours, naive in zip(run(experts, routing), run(experts, routing, naive=True), strict=True):
        torch.testing.assert_close(ours, naive, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_float32_every_backend_is_within_rounding_of_float64(
    case: str, backend: Backend
) -> None:
    routing = CASES[case]()
    exact = make_experts(routing.num_experts, width=8, hidden=12)
    experts = make_experts(
        routing.num_experts, width=8, hidden=12, backend=backend, dtype=torch.float32
    )
    for ours, naive in zip(run(experts, routing), run(exact, routing, naive=True), strict=True):
        scale = naive.abs().max().item() if naive.numel() else 0.0
        torch.testing.assert_close(ours.double(), naive, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_bfloat16_every_backend_is_within_rounding_of_the_same_weights(backend: Backend) -> None:
    routing = CASES["nothing divides evenly"]()
    experts = make_experts(5, width=8, hidden=16, backend=backend, dtype=torch.bfloat16)
    exact = make_experts(5, width=8, hidden=16, dtype=torch.bfloat16)
    for ours, naive in zip(run(experts, routing), run(exact, routing, naive=True), strict=True):
        assert ours.dtype == naive.dtype
        # A few of bfloat16's roundings (2**-9 each) in each of the five products.
        scale = naive.abs().max().item()
        torch.testing.assert_close(ours, naive, atol=0.03 * scale, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_products_are_bfloat16_and_gradients_float32(backend: Backend) -> None:
    routing = CASES["nothing divides evenly"]()
    experts = make_experts(5, width=8, hidden=16, backend=backend, dtype=torch.float32)
    full = run(experts, routing)

    def autocast(run_it: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run_it(*inputs)

    cast = run(experts, routing, call=autocast)
    assert not torch.equal(cast[0], full[0])
    for ours, naive in zip(cast, full, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, naive, atol=0.03 * naive.abs().max().item(), rtol=0)


@pytest.mark.parametrize("backend", ["loop", "lean"])
def test_gradients_agree_with_finite_differences(backend: Backend) -> None:
    experts = make_experts(3, width=4, hidden=2, backend=backend)
    routing = route(normal(5, 3, seed=3), RouterSpec(num_experts=3, top_k=2))

    def outputs(x_TD: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.func.functional_call(
            experts,
            {"gate_up_proj": gate_up, "down_proj": down},
            (x_TD, weighed(routing, weight_TK)),
        )

    inputs = (
        normal(5, 4, seed=4).requires_grad_(),
        normal(5, 2, seed=5).requires_grad_(),
        experts.gate_up_proj.detach().requires_grad_(),
        experts.down_proj.detach().requires_grad_(),
    )
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("case", ["nothing divides evenly", "one token", "capacity"])
def test_the_default_is_to_the_bit_what_autograd_makes_of_one_ffn_per_expert(case: str) -> None:
    routing = CASES[case]()
    experts = make_experts(routing.num_experts, width=24, hidden=10, dtype=torch.float32)

    def plain(_: Callable[..., Tensor], x_TD: Tensor, weight_TK: Tensor) -> Tensor:
        """Unstacked weights, sort, linear, silu * up, linear, index_add: no function of ours."""
        decided = weighed(routing, weight_TK)
        kept_A = decided.kept_TK.flatten().nonzero().squeeze(-1)
        expert_A, order_A = torch.sort(decided.expert_TK.flatten()[kept_A], stable=True)
        slot_A = kept_A[order_A]
        sizes = torch.bincount(expert_A, minlength=routing.num_experts).tolist()
        parts = []
        for x_nD, gate_up_GD, down_DF in zip(
            x_TD[slot_A // routing.top_k].split(sizes),
            experts.gate_up_proj.unbind(0),
            experts.down_proj.unbind(0),
            strict=True,
        ):
            gate_nF, up_nF = nn.functional.linear(x_nD, gate_up_GD).chunk(2, dim=-1)
            parts.append(nn.functional.linear(nn.functional.silu(gate_nF) * up_nF, down_DF))
        y_AD = torch.cat(parts) * decided.weight_TK.flatten()[slot_A, None]
        return torch.zeros_like(x_TD).index_add(0, slot_A // routing.top_k, y_AD)

    for ours, theirs in zip(run(experts, routing), run(experts, routing, call=plain), strict=True):
        assert torch.equal(ours, theirs)


def test_one_token_without_gradients_gives_the_bits_of_the_general_path() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        experts = make_experts(6, width=24, hidden=10, dtype=dtype)
        for routing in (top_k(1, 6, 3), top_k(1, 6, 3, padding=(0,)), expert_choice(1, 6, each=1)):
            x_TD = normal(1, 24, seed=4).to(dtype)
            general = experts(x_TD, routing)
            with torch.no_grad():
                assert torch.equal(experts(x_TD, routing), general)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_runs_give_the_same_bits(backend: Backend) -> None:
    routing = CASES["nothing divides evenly"]()
    experts = make_experts(5, width=8, hidden=12, backend=backend, dtype=torch.float32)
    first = run(experts, routing)
    for again, once in zip(run(experts, routing), first, strict=True):
        assert torch.equal(again, once)


@pytest.mark.parametrize("backend", ["lean", "grouped_mm"])
def test_the_order_of_a_tokens_choices_does_not_move_a_bit(backend: Backend) -> None:
    routing = CASES["nothing divides evenly"]()
    experts = make_experts(5, width=8, hidden=12, backend=backend, dtype=torch.float32)
    x_TD = normal(11, 8, seed=4).float()
    turned = replace(
        routing,
        expert_TK=routing.expert_TK.flip(-1),
        kept_TK=routing.kept_TK.flip(-1),
        weight_TK=routing.weight_TK.flip(-1),
    )
    assert torch.equal(experts(x_TD, turned), experts(x_TD, routing))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_checkpointing_modes_give_the_same_bits(backend: Backend, use_reentrant: bool) -> None:
    routing = CASES["capacity"]()
    experts = make_experts(4, width=8, hidden=12, backend=backend, dtype=torch.float32)

    def again(run_it: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return checkpoint(run_it, *inputs, use_reentrant=use_reentrant)

    plain, recomputed = run(experts, routing), run(experts, routing, call=again)
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", ["x", "weights", "gate_up_proj", "down_proj", "parameters"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    backend: Backend, frozen: str
) -> None:
    routing = CASES["capacity"]()
    experts = make_experts(4, width=8, hidden=12, backend=backend, dtype=torch.float32)
    full = run(experts, routing)
    x_TD = normal(13, 8, seed=4).float().requires_grad_(frozen != "x")
    weight_TK = normal(13, 2, seed=5).float().requires_grad_(frozen != "weights")
    for name, parameter in experts.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(frozen not in (name, "parameters"))
    (experts(x_TD, weighed(routing, weight_TK)) * normal(13, 8, seed=6).float()).sum().backward()
    leaves = (x_TD, weight_TK, experts.gate_up_proj, experts.down_proj)
    for leaf, gradient in zip(leaves, full[1:], strict=True):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_without_strides_is_taken(backend: Backend) -> None:
    experts = make_experts(4, width=8, hidden=12, backend=backend, dtype=torch.float32)
    routing = CASES["capacity"]()
    x_TD = normal(13, 8, seed=4).float().requires_grad_()
    experts(x_TD, routing).sum().backward()
    summed = x_TD.grad
    assert summed is not None
    x_TD.grad = None
    (experts(x_TD, routing) * torch.ones(13, 8)).sum().backward()
    assert torch.equal(summed, x_TD.grad)


def kept_bytes(experts: FusedExperts, routing: Routing) -> int:
    """Bytes that the forward pass holds on to for backward, beside x and the parameters."""
    x_TD = normal(routing.expert_TK.shape[0], experts.down_proj.shape[1]).float().requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x_TD, *experts.parameters())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    weight_TK = routing.weight_TK.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = experts(x_TD, replace(routing, weight_TK=weight_TK))
    assert y_TD.requires_grad
    return sum(storages.values())


def test_lean_keeps_the_pre_activation_and_the_plan_and_nothing_else() -> None:
    tokens, k, width, hidden = 50, 2, 32, 64
    routing = top_k(tokens, 4, k)
    experts = make_experts(4, width=width, hidden=hidden, backend="lean", dtype=torch.float32)
    z_bytes = tokens * k * 2 * hidden * 4
    # Three integers and a weight per assignment, one more integer per token.
    plan_bytes = tokens * k * (3 * 8 + 4) + tokens * 8
    assert z_bytes <= kept_bytes(experts, routing) <= z_bytes + plan_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_a_token_gets_a_zero_gradient(backend: Backend) -> None:
    experts = make_experts(4, width=4, hidden=4, backend=backend, dtype=torch.float32)
    logits_TE = torch.tensor([[9.0, 8.0, -9.0, -9.0]] * 3)
    routing = route(logits_TE, RouterSpec(num_experts=4, top_k=2))
    experts(normal(3, 4).float(), weighed(routing, normal(3, 2).float())).sum().backward()
    for gradient in (experts.down_proj.grad, experts.gate_up_proj.grad):
        assert gradient is not None
        assert gradient[2:].abs().sum() == 0 and gradient[:2].abs().amin(dim=(1, 2)).min() > 0


def test_one_expert_on_one_token_by_hand() -> None:
    experts = FusedExperts(num_experts=1, hidden_size=1, intermediate_size=1)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.tensor([[[2.0], [3.0]]]))
        experts.down_proj.copy_(torch.tensor([[[5.0]]]))
    spec = RouterSpec(num_experts=1, top_k=1, normalize_weights=False)
    silu_of_1 = 1 / (1 + torch.e**-1)
    for backend in ("loop", "lean"):
        set_experts_backend(experts, backend)
        y_TD = experts(torch.tensor([[0.5]]), route(torch.zeros(1, 1), spec))
        torch.testing.assert_close(y_TD, torch.tensor([[5.0 * silu_of_1 * 1.5]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_that_holds_nan_reaches_no_real_token(backend: Backend) -> None:
    experts = make_experts(3, width=4, hidden=4, backend=backend, dtype=torch.float32)
    mask_T = torch.tensor([True, False, True])
    routing = route(normal(3, 3), RouterSpec(num_experts=3, top_k=2), mask_T=mask_T)
    x_TD = normal(3, 4).float()
    x_TD[1] = float("nan")
    x_TD.requires_grad_()
    y_TD = experts(x_TD, routing)
    assert y_TD.isfinite().all() and y_TD[1].abs().sum() == 0
    y_TD.sum().backward()
    for gradient in (x_TD.grad, experts.gate_up_proj.grad, experts.down_proj.grad):
        assert gradient is not None and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused_not_wrong(backend: Backend) -> None:
    experts = make_experts(3, width=4, hidden=4, backend=backend, dtype=torch.float32)
    x_TD = normal(3, 4).float().requires_grad_()
    (gradient,) = torch.autograd.grad(
        experts(x_TD, top_k(3, 3, 2)).square().sum(), x_TD, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_backend_is_chosen_for_every_layer_and_lives_in_no_checkpoint() -> None:
    model = nn.ModuleList([make_experts(2, 4, 4), make_experts(2, 4, 4)])
    keys = set(model.state_dict())
    set_experts_backend(model, "lean")
    assert [layer.backend for layer in model] == ["lean", "lean"]
    assert (
        set(model.state_dict())
        == keys
        == {f"{i}.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")}
    )
    assert make_experts(2, 4, 4).backend == "loop"


def test_unknown_backends_and_models_without_experts_are_refused() -> None:
    with pytest.raises(UserError, match="'fast': it must be one of loop, lean, grouped_mm"):
        set_experts_backend(make_experts(2, 4, 4), "fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no effect: Linear has no mixture-of-experts layer"):
        set_experts_backend(nn.Linear(2, 2), "lean")


@pytest.mark.parametrize(
    ("dtype", "width", "hidden", "told"),
    [
        (torch.float64, 8, 8, "does not take float64"),
        (torch.float32, 6, 8, "multiples of 4 in float32, not hidden_size 6"),
        (torch.float32, 8, 6, "not hidden_size 8 and intermediate_size 6"),
        (torch.bfloat16, 12, 8, "multiples of 8 in bfloat16"),
    ],
)
def test_grouped_mm_refuses_what_the_operator_cannot_do(
    dtype: torch.dtype, width: int, hidden: int, told: str
) -> None:
    experts = make_experts(2, width, hidden, dtype=dtype)
    with pytest.raises(UserError, match=told):
        set_experts_backend(experts, "grouped_mm")
    assert experts.backend == "loop"
    experts.backend = "grouped_mm"  # a cast after the choice is caught when the experts run
    with pytest.raises(UserError, match=told):
        experts(normal(3, width).to(dtype), top_k(3, 2, 2))
