"""Each spec against the Hugging Face router it names: who is chosen, with which weight, and what
the weights ask of the logits.

Weights within 1e-6 and gradients within 1e-6: both sides are float32 sums of at most 8 terms in
(0, 1), one or two roundings apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MoE,
    DeepseekV3TopkRouter,
)
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE, Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeSparseMoeBlock,
    Qwen2MoeTopKRouter,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from moe import MoEConfig
from moe.routing import RouterSpec, route
from moe.switch_ffn import SwitchFFN

WIDTH, TOKENS = 12, 37


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module) -> nn.Module:
    """Every parameter and buffer random: a zero bias or a zero router would prove nothing."""
    with torch.no_grad():
        for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
            tensor.copy_(0.5 * normal(*tensor.shape, seed=i + 1))
    return module


@dataclass(frozen=True, kw_only=True)
class Named:
    """A published router and the fields of our configuration that name it."""

    router: Callable[[], nn.Module]
    fields: dict[str, Any]

    @property
    def spec(self) -> RouterSpec:
        return MoEConfig(num_experts=8, num_experts_per_tok=3, **self.fields).router_spec


def their(config: Any, router: Any, **fields: Any) -> Callable[[], nn.Module]:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_experts_per_tok": 3, **fields}
    return lambda: filled(router(config(**sizes)))


SIGMOID = {"scoring_func": "sigmoid", "router_selection_bias": True}
GROUPS = {"n_group": 4, "topk_group": 2}
SCALED = {"routed_scaling_factor": 2.5}

ROUTERS = {
    "mixtral": Named(
        router=their(MixtralConfig, MixtralTopKRouter, num_local_experts=8), fields={}
    ),
    **{
        f"{name}-{'share' if share else 'raw'}": Named(
            router=their(config, router, num_experts=8, norm_topk_prob=share),
            fields={"norm_topk_prob": share},
        )
        for name, config, router in (
            ("olmoe", OlmoeConfig, OlmoeTopKRouter),
            ("qwen2_moe", Qwen2MoeConfig, Qwen2MoeTopKRouter),
            ("qwen3_moe", Qwen3MoeConfig, Qwen3MoeTopKRouter),
        )
        for share in (False, True)
    },
    "gpt_oss": Named(
        router=their(GptOssConfig, GptOssTopKRouter, num_local_experts=8),
        fields={"scoring_func": "softmax_chosen", "router_bias": True},
    ),
    "deepseek_v2": Named(
        router=their(
            DeepseekV2Config,
            DeepseekV2TopkRouter,
            n_routed_experts=8,
            num_attention_heads=4,
            topk_method="group_limited_greedy",
            **GROUPS,
            **SCALED,
        ),
        fields={**GROUPS, **SCALED, "norm_topk_prob": False, "group_score": "max"},
    ),
    **{
        f"deepseek_v3-{'share' if share else 'raw'}": Named(
            router=their(
                DeepseekV3Config,
                DeepseekV3TopkRouter,
                n_routed_experts=8,
                norm_topk_prob=share,
                **GROUPS,
                **SCALED,
            ),
            fields={**SIGMOID, **GROUPS, **SCALED, "norm_topk_prob": share},
        )
        for share in (False, True)
    },
    "glm4_moe": Named(
        router=their(
            Glm4MoeConfig, Glm4MoeTopkRouter, n_routed_experts=8, n_group=1, topk_group=1, **SCALED
        ),
        fields={**SIGMOID, **SCALED},
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_weights_and_gradients_are_those_of_the_router_it_names(name: str) -> None:
    theirs = ROUTERS[name].router()
    logits_TE, weight_TK, expert_TK = theirs(normal(TOKENS, WIDTH))
    ours_TE = logits_TE.detach().clone().requires_grad_()
    bias_E = getattr(theirs, "e_score_correction_bias", None)
    routing = route(ours_TE, ROUTERS[name].spec, bias_E=bias_E)

    # Some of them leave the chosen experts unsorted: compare expert by expert.
    expert_TK, order_TK = expert_TK.sort(dim=-1)
    own_TK, own_order_TK = routing.expert_TK.sort(dim=-1)
    assert torch.equal(own_TK, expert_TK)
    weight_TK = weight_TK.gather(-1, order_TK)
    own_weight_TK = routing.weight_TK.gather(-1, own_order_TK)
    torch.testing.assert_close(own_weight_TK, weight_TK, atol=1e-6, rtol=0)

    pull_TK = normal(TOKENS, 3, seed=99)
    (their_grad,) = torch.autograd.grad((pull_TK * weight_TK).sum(), logits_TE)
    (own_grad,) = torch.autograd.grad((pull_TK * own_weight_TK).sum(), ours_TE)
    assert their_grad.abs().max() > 1e-3
    torch.testing.assert_close(own_grad, their_grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["deepseek_v3-share", "glm4_moe"])
def test_the_selection_bias_of_these_comparisons_changes_choices(name: str) -> None:
    theirs: Any = ROUTERS[name].router()
    logits_TE = theirs(normal(TOKENS, WIDTH))[0]
    spec, bias_E = ROUTERS[name].spec, theirs.e_score_correction_bias
    with_bias, without = (
        route(logits_TE, spec, bias_E=bias_E),
        route(logits_TE, spec, bias_E=0 * bias_E),
    )
    assert not torch.equal(with_bias.expert_TK.sort().values, without.expert_TK.sort().values)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_switch_top_1_dispatches_as_its_router_does_per_sequence(factor: float) -> None:
    batch, length, experts = 3, 13, 4
    config = SwitchTransformersConfig(
        d_model=WIDTH,
        num_experts=experts,
        expert_capacity=int(factor * length / experts),  # which is what their users compute
        router_bias=True,
    )
    theirs = filled(SwitchTransformersTop1Router(config)).eval()
    dispatch_BSE, weight_BS1, logits_BSE = theirs(normal(batch, length, WIDTH))
    spec = RouterSpec(
        num_experts=experts,
        top_k=1,
        normalize_weights=False,
        capacity_factor=factor,
        capacity_scope="sequence",
        capacity_rounding="floor",
    )
    ours_TE = logits_BSE.detach().flatten(0, 1).requires_grad_()
    routing = route(ours_TE, spec, sequence_T=torch.arange(batch).repeat_interleave(length))
    own_TE = nn.functional.one_hot(routing.expert_TK[:, 0], experts) * routing.kept_TK
    assert 0 < routing.kept_TK.sum() < batch * length
    assert torch.equal(own_TE, dispatch_BSE.flatten(0, 1))

    used_T1 = weight_BS1.flatten(0, 1) * dispatch_BSE.flatten(0, 1).sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weight_TK, used_T1, atol=1e-6, rtol=0)
    pull_T1 = normal(batch * length, 1, seed=99)
    (their_grad,) = torch.autograd.grad((pull_T1 * used_T1).sum(), logits_BSE)
    (own_grad,) = torch.autograd.grad((pull_T1 * routing.weight_TK).sum(), ours_TE)
    torch.testing.assert_close(own_grad, their_grad.flatten(0, 1), atol=1e-6, rtol=0)


# --- whole blocks: router, experts and the shared expert, all weights copied


def deepseek(config: Any, block: Any) -> nn.Module:
    return block(
        config(
            hidden_size=WIDTH,
            moe_intermediate_size=10,
            n_shared_experts=2,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            experts_implementation="eager",
        )
    )


BLOCKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mixtral": (
        lambda: MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=WIDTH,
                intermediate_size=10,
                num_local_experts=8,
                num_experts_per_tok=3,
                experts_implementation="eager",
            )
        ),
        {},
    ),
    "qwen2_moe": (
        lambda: Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(
                hidden_size=WIDTH,
                moe_intermediate_size=10,
                shared_expert_intermediate_size=20,
                num_experts=8,
                num_experts_per_tok=3,
                experts_implementation="eager",
            )
        ),
        {"norm_topk_prob": False, "shared_expert_intermediate_size": 20},
    ),
    "deepseek_v3": (
        lambda: deepseek(DeepseekV3Config, DeepseekV3MoE),
        {
            **SIGMOID,
            **GROUPS,
            **SCALED,
            "shared_expert_intermediate_size": 20,
            "shared_expert_mode": "added",
        },
    ),
    "glm4_moe": (
        lambda: deepseek(Glm4MoeConfig, Glm4MoeMoE),
        {
            **SIGMOID,
            **GROUPS,
            **SCALED,
            "shared_expert_intermediate_size": 20,
            "shared_expert_mode": "added",
        },
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_whole_block_gives_the_familys_output_and_gradient(name: str) -> None:
    make, fields = BLOCKS[name]
    theirs = filled(make()).eval()
    config = MoEConfig(num_experts=8, num_experts_per_tok=3, **fields)
    ours = SwitchFFN(
        config.router_spec,
        hidden_size=WIDTH,
        intermediate_size=10,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        shared_mode=config.shared_expert_mode,
    )
    state = {
        k.replace("shared_experts.", "shared_expert."): v for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    one = normal(2, 9, WIDTH).requires_grad_()
    two = one.detach().clone().requires_grad_()
    expected, found = theirs(one), ours(two)[0]
    # Relative too: scaled by 2.5, outputs are sums of 5 experts, some above 1.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    pull = normal(2, 9, WIDTH, seed=99)
    (expected * pull).sum().backward()
    (found * pull).sum().backward()
    torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=1e-5)
    their_gate: Any = theirs.get_submodule("gate")
    torch.testing.assert_close(ours.gate.weight.grad, their_gate.weight.grad, atol=1e-5, rtol=1e-5)
