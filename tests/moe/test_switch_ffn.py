"""The whole FFN: shapes, padding, permutation, precision, the shared expert, bias and noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import MoEConfig, MoEForCausalLM
from moe.balance import expert_counts
from moe.errors import UserError
from moe.experts import run_experts_naive
from moe.routing import RouterSpec, route
from moe.switch_ffn import Router, SwitchFFN


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_ffn(spec: RouterSpec, width: int = 6, hidden: int = 5, **options: Any) -> SwitchFFN:
    ffn = SwitchFFN(spec, hidden_size=width, intermediate_size=hidden, **options)
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


# --- the shared expert


@pytest.mark.parametrize("mode", ["gated", "added", "averaged"])
def test_the_shared_expert_joins_as_its_mode_says_and_not_on_padding(mode: str) -> None:
    ffn, x_BSD = make_ffn(SPEC, shared_intermediate_size=7, shared_mode=mode), normal(2, 4, 6)
    mask_BS = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    y_BSD, _ = ffn(x_BSD, mask_BS)
    assert ffn.shared_expert is not None
    shared_BSD, ffn.shared_expert = ffn.shared_expert(x_BSD), None
    routed_BSD, _ = ffn(x_BSD, mask_BS)
    expected = {
        "gated": lambda: routed_BSD + torch.sigmoid(ffn.shared_expert_gate(x_BSD)) * shared_BSD,
        "added": lambda: routed_BSD + shared_BSD,
        "averaged": lambda: routed_BSD * 2 / 3 + shared_BSD / 3,  # two routed experts
    }[mode]()
    assert y_BSD[~mask_BS].abs().sum() == 0
    torch.testing.assert_close(y_BSD[mask_BS], expected[mask_BS])
    assert hasattr(ffn, "shared_expert_gate") == (mode == "gated")


def test_averaged_means_the_average_of_equal_experts() -> None:
    """All experts equal, the shared one too, renormalised weights: the mean is that expert."""
    ffn = make_ffn(SPEC, shared_intermediate_size=5, shared_mode="averaged")
    assert ffn.shared_expert is not None
    with torch.no_grad():
        ffn.experts.gate_up_proj.copy_(
            ffn.experts.gate_up_proj[:1].expand_as(ffn.experts.gate_up_proj)
        )
        ffn.experts.down_proj.copy_(ffn.experts.down_proj[:1].expand_as(ffn.experts.down_proj))
        gate, up = ffn.experts.gate_up_proj[0].chunk(2)
        ffn.shared_expert.gate_proj.weight.copy_(gate)
        ffn.shared_expert.up_proj.weight.copy_(up)
        ffn.shared_expert.down_proj.weight.copy_(ffn.experts.down_proj[0])
    x_BSD = normal(2, 4, 6)
    torch.testing.assert_close(ffn(x_BSD)[0], ffn.shared_expert(x_BSD))


def test_an_unknown_way_of_sharing_is_refused() -> None:
    with pytest.raises(UserError, match="shared_expert_mode 'summed'.*gated, added, averaged"):
        make_ffn(SPEC, shared_intermediate_size=5, shared_mode="summed")


def test_every_weight_of_fine_grained_experts_beside_dense_layers_gets_a_gradient() -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=30,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=3,
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_experts=16,
        num_experts_per_tok=6,
        moe_intermediate_size=3,
        shared_expert_intermediate_size=6,
        shared_expert_mode="added",
        initializer_range=0.2,
    )
    model = MoEForCausalLM(config)
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["DenseFFN", "SwitchFFN", "SwitchFFN"]
    assert tuple(model.model.layers[1].mlp.experts.down_proj.shape) == (16, 16, 3)
    ids = torch.randint(0, 30, (8, 16), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# --- router bias and selection bias

BIASED = RouterSpec(num_experts=5, top_k=2, scoring="sigmoid", selection_bias=True)
BUFFER = "gate.e_score_correction_bias"


def test_the_router_bias_is_added_to_the_logits() -> None:
    ffn, x_BSD = make_ffn(SPEC, router_bias=True), normal(2, 3, 6)
    exact = x_BSD.flatten(0, 1) @ ffn.gate.weight.T + ffn.gate.bias
    torch.testing.assert_close(ffn(x_BSD)[1].logits_TE, exact)


def test_the_selection_bias_is_a_saved_buffer_that_no_gradient_moves_and_only_if_asked() -> None:
    ffn = make_ffn(BIASED)
    assert BUFFER in ffn.state_dict() and BUFFER not in dict(ffn.named_parameters())
    assert torch.equal(ffn.gate.e_score_correction_bias, torch.zeros(5))
    assert make_ffn(SPEC).selection_bias_E is None and BUFFER not in make_ffn(SPEC).state_dict()
    ffn.gate.e_score_correction_bias[3] = 2.0
    routing = ffn(normal(2, 7, 6))[1]
    assert (routing.expert_TK[:, 0] == 3).all()
    routing.weight_TK.sum().backward()
    assert ffn.gate.e_score_correction_bias.grad is None


def test_an_adapter_on_the_router_leaves_the_selection_bias_in_force() -> None:
    from sft.adapt import LoraSpec, add_lora

    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, scoring_func="sigmoid",
        router_selection_bias=True,
    )  # fmt: skip
    model: Any = add_lora(MoEForCausalLM(config), LoraSpec(rank=2, alpha=4, targets=("router",)))
    ffn = model.base_model.model.model.layers[0].mlp
    assert type(ffn.gate) is not Router
    ffn.selection_bias_E[5] = 3.0
    assert (ffn(normal(1, 4, 16))[1].expert_TK[:, 0] == 5).all()


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast_leaves_the_routers_scores_in_float32_under_an_adapter_too(adapted: bool) -> None:
    from sft.adapt import LoraSpec, add_lora

    torch.manual_seed(0)
    model: Any = MoEForCausalLM(MoEConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1))
    ffn = model.model.layers[0].mlp
    if adapted:
        add_lora(model, LoraSpec(rank=2, alpha=4, targets=("router",)))
        assert type(ffn.gate) is not Router
        for i, parameter in enumerate(ffn.gate.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=i))  # B is 0 at the start
    x_BSD = normal(2, 5, 16)
    plain = ffn(x_BSD)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ffn(x_BSD)[1]
        assert ffn.shared_expert is None and (x_BSD @ x_BSD.mT).dtype == torch.bfloat16
    assert mixed.logits_TE.dtype == torch.float32
    assert torch.equal(mixed.logits_TE, plain.logits_TE)
    grads = [
        torch.autograd.grad(r.logits_TE.square().sum(), list(ffn.gate.parameters())[-1])[0]
        for r in (plain, mixed)
    ]
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("how", ["bfloat16", "half", "to"])
def test_casting_the_model_leaves_the_selection_bias_exact(how: str) -> None:
    ffn = make_ffn(BIASED)
    exact_E = 1.0 + torch.arange(5) * 1e-3  # not bfloat16 numbers
    ffn.gate.e_score_correction_bias.copy_(exact_E)
    cast = ffn.to(torch.bfloat16) if how == "to" else getattr(ffn, how)()
    assert cast.gate.weight.dtype != torch.float32
    assert torch.equal(cast.gate.e_score_correction_bias, exact_E)


def test_the_selection_bias_gets_memory_where_a_model_without_any_does() -> None:
    with torch.device("meta"):
        router = Router(6, 5, selection_bias=True)
    assert router.bfloat16().e_score_correction_bias.is_meta
    router.to_empty(device="cpu")
    assert router.e_score_correction_bias.dtype == torch.float32
    assert not router.e_score_correction_bias.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_opens_with_the_selection_bias_it_had(tmp_path: Path, dtype: Any) -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, scoring_func="sigmoid",
        router_selection_bias=True,
    )  # fmt: skip
    model = MoEForCausalLM(config)
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]
    assert all(torch.equal(bias, torch.zeros(8)) for bias in biases)
    for i, bias in enumerate(biases):
        bias.copy_(1 + 1e-3 * normal(8, seed=i))
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for bias, layer in zip(biases, loaded.model.layers, strict=True):
        assert layer.mlp.gate.weight.dtype == dtype
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, bias)


# --- noise, token ids, a forced choice


def test_jitter_moves_what_the_router_sees_and_not_what_the_experts_do() -> None:
    ffn = make_ffn(RouterSpec(num_experts=3, top_k=3, jitter_noise=0.5, scoring="sigmoid"))
    x_BSD = normal(2, 5, 6)
    drawn = ffn.train()(x_BSD, generator=torch.Generator().manual_seed(1))[1]
    again_BSD, again = ffn(x_BSD, generator=torch.Generator().manual_seed(1))
    plain = ffn.eval()(x_BSD, generator=torch.Generator().manual_seed(1))[1]
    assert torch.equal(drawn.logits_TE, again.logits_TE)
    assert not torch.equal(drawn.logits_TE, plain.logits_TE)
    x_TD = x_BSD.flatten(0, 1)
    torch.testing.assert_close(plain.logits_TE, x_TD @ ffn.gate.weight.T)
    assert torch.equal(again_BSD.flatten(0, 1), ffn.experts(x_TD, again))


def test_noise_without_a_generator_is_torchs_own_as_dropout_is() -> None:
    ffn = make_ffn(RouterSpec(num_experts=5, top_k=2, jitter_noise=0.2, logit_noise=0.3)).train()
    x_BSD = normal(2, 5, 6)
    torch.manual_seed(4)
    first, second = ffn(x_BSD)[1], ffn(x_BSD)[1]
    torch.manual_seed(4)
    assert torch.equal(ffn(x_BSD)[1].logits_TE, first.logits_TE)
    assert not torch.equal(first.logits_TE, second.logits_TE)


def test_a_router_without_noise_draws_no_random_number_in_training() -> None:
    ffn = make_ffn(SPEC).train()
    before = torch.get_rng_state()
    ffn(normal(2, 5, 6))
    assert torch.equal(before, torch.get_rng_state())


def test_token_ids_reach_a_hash_and_a_forced_choice_its_experts() -> None:
    spec = RouterSpec(num_experts=5, top_k=2, kind="hash")
    ffn, x_BSD = make_ffn(spec), normal(2, 3, 6)
    token_BS = torch.tensor([[7, 8, 7], [8, 7, 9]])
    routing = ffn(x_BSD, token_BS=token_BS)[1]
    assert torch.equal(routing.expert_TK[0], routing.expert_TK[2])
    assert torch.equal(routing.expert_TK[0], routing.expert_TK[4])
    forced_TK = torch.tensor([[4, 0]] * 6)
    assert torch.equal(ffn(x_BSD, forced_TK=forced_TK)[1].expert_TK, forced_TK)


def test_expert_choice_runs_each_expert_on_the_tokens_it_took() -> None:
    spec = RouterSpec(num_experts=5, top_k=2, kind="expert_choice", normalize_weights=False)
    ffn, x_BSD = make_ffn(spec), normal(3, 4, 6)
    y_BSD, routing = ffn(x_BSD)
    by_hand = run_experts_naive(
        x_BSD.flatten(0, 1),
        routing,
        gate_up_EGD=ffn.experts.gate_up_proj,
        down_EDF=ffn.experts.down_proj,
    )
    assert routing.kept_TK.sum(dim=0).tolist() == [5] * 5  # ceil(2 * 12 / 5)
    torch.testing.assert_close(y_BSD.flatten(0, 1), by_hand, atol=1e-6, rtol=1e-5)
