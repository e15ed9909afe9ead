"""What is recorded is what the routers did, in our model and in other families."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe import MoEConfig, MoEForCausalLM
from moe.balance import load_balancing_loss
from moe.errors import UserError
from moe.record import FOREIGN_ROUTERS, has_router, record_routing
from moe.stats import RouterStats

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 5}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 5}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            "num_experts": 5,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8},
    ),
}


def make_foreign(family: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    make_config, make_model, own = FAMILIES[family]
    return make_model(make_config(**SHAPE, num_experts_per_tok=2, **own, **changes)).eval()


def make_ours(**changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    settings = SHAPE | {"moe_intermediate_size": 12, "num_experts": 5}
    return MoEForCausalLM(MoEConfig(**settings | changes)).eval()


def some_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


class Expectations:
    """What a model's own routers returned, caught by hooks of the test's own."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: list[tuple[Tensor, ...]] = []
        routers = [m for m in model.modules() if type(m).__name__ in FOREIGN_ROUTERS.values()]
        for router in routers:
            router.register_forward_hook(lambda module, inputs, out: self.outputs.append(out))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_models_routing_is_its_own(family: str) -> None:
    model, ids = make_foreign(family), some_ids()
    seen = Expectations(model)
    with torch.no_grad(), record_routing(model) as trace:
        model(input_ids=ids, attention_mask=PADDING)
    (forward,) = trace.forwards
    assert (trace.num_layers, trace.num_experts) == (2, 5)
    assert torch.equal(forward.mask_BS, PADDING.bool())
    for routing, (logits_TE, weight_TK, expert_TK) in zip(
        forward.routings, seen.outputs, strict=True
    ):
        assert torch.equal(routing.expert_TK, expert_TK)
        real_T1 = PADDING.bool().flatten()[:, None]
        torch.testing.assert_close(routing.logits_TE, logits_TE)
        torch.testing.assert_close(routing.score_TE, logits_TE.softmax(-1))
        torch.testing.assert_close(routing.weight_TK, torch.where(real_T1, weight_TK, 0.0))
        assert torch.equal(routing.kept_TK, real_T1.expand(-1, 2))
        assert routing.sequence_T.tolist() == [0] * 7 + [1] * 7


def test_every_family_that_is_named_is_tested() -> None:
    assert FAMILIES.keys() == FOREIGN_ROUTERS.keys()


def test_layers_without_experts_are_skipped() -> None:
    model = make_foreign("qwen3_moe", mlp_only_layers=[0])
    with torch.no_grad(), record_routing(model) as trace:
        model(input_ids=some_ids())
    assert trace.num_layers == 1


def test_a_bare_decoder_called_with_a_mask_by_position_is_masked() -> None:
    model = make_foreign("mixtral").model
    with torch.no_grad(), record_routing(model) as trace:
        model(some_ids(), PADDING)
    assert torch.equal(trace.forwards[0].mask_BS, PADDING.bool())


def test_ours_and_mixtral_with_the_same_weights_are_recorded_alike() -> None:
    theirs, ours = make_foreign("mixtral", tie_word_embeddings=True), make_ours(rms_norm_eps=1e-5)
    ours.load_state_dict(theirs.state_dict())
    theirs.set_experts_implementation("eager")
    counts = []
    for model in (ours, theirs):
        with torch.no_grad(), record_routing(model) as trace:
            model(input_ids=some_ids(), attention_mask=PADDING)
        counts.append(RouterStats.from_trace(trace).count_LE)
    assert torch.equal(*counts)


def test_each_pass_is_recorded_with_its_sample_ids_and_mask() -> None:
    model, ids = make_ours(), some_ids()
    with torch.no_grad(), record_routing(model) as trace:
        model(input_ids=ids, attention_mask=PADDING, sample_ids=torch.tensor([41, 7]))
        model(input_ids=ids)
    assert [f.sample_ids.tolist() for f in trace.forwards] == [[41, 7], [0, 1]]
    assert torch.equal(trace.forwards[0].mask_BS, PADDING.bool())
    assert trace.forwards[1].mask_BS.all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_pass_is_recorded_with_its_sample_ids(family: str) -> None:
    model = make_foreign(family)
    with torch.no_grad(), record_routing(model) as trace:
        model(input_ids=some_ids(), attention_mask=PADDING, sample_ids=torch.tensor([41, 7]))
    assert trace.forwards[0].sample_ids.tolist() == [41, 7]


@pytest.mark.parametrize("make", [make_ours, lambda: make_foreign("mixtral")])
def test_steps_with_a_cache_are_recorded_as_parts_of_one_text(make: Any) -> None:
    model = make()
    with torch.no_grad(), record_routing(model) as trace:
        cache = model(
            input_ids=some_ids()[:, :5], attention_mask=PADDING[:, :5], use_cache=True
        ).past_key_values
        model(input_ids=some_ids()[:, 5:], attention_mask=PADDING, past_key_values=cache)
    tokens = [forward.token_BS for forward in trace.forwards]
    assert tokens[0] is not None and tokens[1] is not None
    assert tokens[0].tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert tokens[1].tolist() == [[3, 4], [5, 6]]
    assert [tuple(c.shape) for _, c in trace.choices().samples()] == [(2, 5, 2), (2, 7, 2)]


def test_nothing_is_recorded_outside_the_block_or_left_behind() -> None:
    for model in (make_ours(), make_foreign("olmoe")):
        with torch.no_grad():
            with record_routing(model) as trace:
                model(input_ids=some_ids())
            model(input_ids=some_ids())
        assert len(trace.forwards) == 1
        trace.clear()
        assert (trace.num_layers, trace.num_experts) == (0, 0)


def test_recording_changes_no_number() -> None:
    model, ids = make_ours(), some_ids()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with record_routing(model):
            assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("make", [make_ours, lambda: make_foreign("mixtral")])
def test_scores_are_detached_unless_the_graph_is_asked_for(make: Any) -> None:
    model = make()
    with record_routing(model) as loose:
        model(input_ids=some_ids())
    assert not loose.forwards[0].routings[0].score_TE.requires_grad
    with record_routing(model, keep_graph=True) as attached:
        model(input_ids=some_ids())
    load_balancing_loss(attached.forwards[0].routings[0]).backward()
    gate = model.model.layers[0].mlp.gate.weight
    assert gate.grad is not None and gate.grad.abs().sum() > 0


def test_checkpointed_layers_that_run_twice_are_recorded_once() -> None:
    model = make_foreign("mixtral").train()
    model.set_experts_implementation("eager")
    model.gradient_checkpointing_enable()
    with record_routing(model) as trace:
        for _ in range(2):
            model(input_ids=some_ids(), labels=some_ids(), use_cache=False).loss.backward()
    assert [len(forward.routings) for forward in trace.forwards] == [2, 2]


def test_a_pass_that_breaks_off_leaves_nothing_in_the_next() -> None:
    model = make_foreign("mixtral")
    norm = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError()))
    with torch.no_grad(), record_routing(model) as trace:
        with pytest.raises(KeyError):
            model(input_ids=some_ids())
        norm.remove()
        model(input_ids=some_ids())
    assert [len(forward.routings) for forward in trace.forwards] == [2]


def test_a_model_without_a_router_is_refused_by_name() -> None:
    dense = make_ours(mlp_layer_types=["dense"] * 2)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for model in (dense, llama):
        assert not has_router(model)
        told = f"{type(model).__name__} has no router.*mixtral, olmoe"
        with pytest.raises(UserError, match=told), record_routing(model):
            pass
    assert has_router(make_ours()) and has_router(make_foreign("olmoe"))
