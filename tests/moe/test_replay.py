"""A replayed pass takes the recorded experts and the live weights, whatever the batching was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from transformers import (
    DynamicCache,
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

from moe import MoEConfig, MoEForCausalLM, MoEForReward, MoEForValue
from moe.balance import load_balancing_loss
from moe.errors import UserError
from moe.experts import run_experts_naive
from moe.generation import Rollout, positions, sample
from moe.pass_keys import pass_keys
from moe.record import FOREIGN_ROUTERS, RoutingTrace, record_routing, replay_routing
from moe.replay import FREE, choices_of, is_replaying
from moe.routing import RouterSpec, Routing, route

EXPERTS, TOP_K = 6, 2
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
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": EXPERTS}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": EXPERTS}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": 12,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
}
ROUTERS: dict[str, dict[str, Any]] = {
    "normalised": {},
    "raw": {"norm_topk_prob": False},
    "switch": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "capacity": {"capacity_factor": 0.8},
    "grouped": {
        "scoring_func": "sigmoid",
        "router_selection_bias": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "chosen": {"scoring_func": "softmax_chosen"},
    "hash": {"router_kind": "hash", "load_balancing_coef": 0.0},
    "shared": {"shared_expert_intermediate_size": 8},
    "dense between": {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense", "sparse"]},
}
BOTH = ["ours", "mixtral"]


def make(kind: str = "ours", **changes: Any) -> Any:
    torch.manual_seed(0)
    if kind == "ours":
        settings = SHAPE | {"moe_intermediate_size": 12, "num_experts": EXPERTS}
        model: Any = MoEForCausalLM(MoEConfig(**settings | changes))
    else:
        make_config, make_model, own = FAMILIES[kind]
        model = make_model(make_config(**SHAPE, num_experts_per_tok=TOP_K, **own, **changes))
    return model.eval()


def some_ids(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


IDS = some_ids()
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])


def routers(model: nn.Module) -> list[nn.Parameter]:
    found = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert found
    return found


def perturbed(model: Any, scale: float = 0.5) -> Any:
    """The same model with other routers."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in routers(other):
            weight += scale * torch.randn(weight.shape, generator=generator)
    return other


@contextmanager
def recorded(model: nn.Module) -> Iterator[RoutingTrace]:
    with torch.no_grad(), record_routing(model) as trace:
        yield trace


def record(model: nn.Module, ids: Tensor = IDS, **inputs: Any) -> RoutingTrace:
    with recorded(model) as trace:
        model(input_ids=ids, **inputs)
    return trace


def choices(trace: RoutingTrace) -> dict[int, Tensor]:
    return dict(trace.choices().samples())


def same_choices(first: RoutingTrace, second: RoutingTrace) -> bool:
    one, other = choices(first), choices(second)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def changed_share(first: RoutingTrace, second: RoutingTrace) -> float:
    """Share of (token, layer) whose set of experts differs."""
    one, other = choices(first), choices(second)
    differ = [(one[k].sort(-1).values != other[k].sort(-1).values).any(-1).flatten() for k in one]
    return float(torch.cat(differ).double().mean())


def loss_of(model: nn.Module, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    """Minus the mean log-probability of the next tokens, over real ones."""
    logits_BSV = model(input_ids=ids, use_cache=False, **inputs).logits[:, :-1]
    logp_BS = -functional.cross_entropy(
        logits_BSV.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(ids.shape[0], -1)
    mask = inputs.get("attention_mask")
    real_BS = torch.ones_like(ids).bool() if mask is None else mask.bool()
    return -logp_BS[real_BS[:, :-1] & real_BS[:, 1:]].mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def random_choices(
    samples: dict[int, int], *, layers: int = 2, seed: int = 3, top_k: int = TOP_K
) -> dict[int, Tensor]:
    """Sample id -> (L, tokens, K) experts that no router chose."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(layers, tokens, EXPERTS, generator=generator).argsort(-1)[..., :top_k]
        for name, tokens in samples.items()
    }


# --- the same weights


@pytest.mark.parametrize("router", ROUTERS)
def test_with_equal_weights_a_replay_has_the_bits_of_the_recorded_pass(router: str) -> None:
    model = make(**ROUTERS[router]).train()
    with record_routing(model) as trace:
        plain = model(input_ids=IDS, attention_mask=PADDING).logits
        loss_of(model, attention_mask=PADDING).backward()
    trace.forwards.pop()  # the loss was a second pass over the same rows
    expected = gradients(model)
    model.zero_grad()
    with replay_routing(model, trace), record_routing(model) as again:
        assert torch.equal(model(input_ids=IDS, attention_mask=PADDING).logits, plain)
        again.clear()
        loss_of(model, attention_mask=PADDING).backward()
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert same_choices(trace, again)
    for mine, theirs in zip(again.forwards[0].routings, trace.forwards[0].routings, strict=True):
        assert torch.equal(mine.kept_TK, theirs.kept_TK)
        assert torch.equal(mine.weight_TK, theirs.weight_TK)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_replay_with_equal_weights_has_the_bits_of_the_recorded_pass(family: str) -> None:
    model = make(family)
    gates = [m for m in model.modules() if type(m).__name__ == FOREIGN_ROUTERS[family]]
    for normalises in [True] if family == "mixtral" else [True, False]:
        for gate in gates:
            gate.norm_topk_prob = normalises  # Mixtral's does not look at it
        trace = record(model, attention_mask=PADDING)
        model.zero_grad()
        loss = loss_of(model, attention_mask=PADDING)
        loss.backward()
        expected = gradients(model)
        model.zero_grad()
        with replay_routing(model, trace):
            replayed = loss_of(model, attention_mask=PADDING)
            replayed.backward()
        assert torch.equal(replayed, loss)
        found = gradients(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_family_that_can_be_recorded_is_replayed_here() -> None:
    assert FAMILIES.keys() == FOREIGN_ROUTERS.keys()


# --- other weights, other choices


@pytest.mark.parametrize("kind", ["ours", *FAMILIES])
def test_a_perturbed_router_takes_the_recorded_choice_and_learns_from_it(kind: str) -> None:
    model = make(kind)
    trace = record(model, attention_mask=PADDING)
    other = perturbed(model)
    assert changed_share(trace, record(other, attention_mask=PADDING)) >= 0.05
    with replay_routing(other, trace), record_routing(other) as replayed:
        loss = loss_of(other, attention_mask=PADDING)
    loss.backward()  # after the `with`
    assert same_choices(trace, replayed)
    for weight in routers(other):
        assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["ours", *FAMILIES])
def test_choices_from_elsewhere_are_taken_and_weighed_by_the_live_logits(kind: str) -> None:
    model = make(kind)
    foreign = RoutingTrace.from_choices(random_choices({4: 7, 9: 7, 2: 7}), num_experts=EXPERTS)
    ids = torch.tensor([9, 2, 4])
    free = record(model, sample_ids=ids)
    assert changed_share(foreign, free) > 0.5
    with replay_routing(model, foreign), record_routing(model) as replayed:
        loss_of(model, sample_ids=ids).backward()
    assert same_choices(foreign, replayed)
    normalises = kind in ("ours", "mixtral", "qwen3_moe")
    for routing in replayed.forwards[0].routings:
        weight_TK = routing.logits_TE.softmax(-1).gather(-1, routing.expert_TK)
        if normalises:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        torch.testing.assert_close(routing.weight_TK, weight_TK, atol=1e-6, rtol=1e-6)
    assert all(weight.grad.abs().sum() > 0 for weight in routers(model))


def forced_by_hand(model: Any, choice_LTK: Tensor) -> Tensor:
    """Logits (B, S, V) of our model, its FFN written out: softmax, the given experts, their sum."""
    decoder = model.model
    hidden_BSD = decoder.embed_tokens(IDS)
    places = torch.arange(IDS.shape[1])[None]
    causal = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    for layer, choice_TK in zip(decoder.layers, choice_LTK, strict=True):
        attended, _ = layer.self_attn(
            layer.input_layernorm(hidden_BSD),
            position_embeddings=decoder.rotary_emb(places),
            attention_mask=causal,
        )
        hidden_BSD = hidden_BSD + attended
        x_TD = layer.post_attention_layernorm(hidden_BSD).flatten(0, 1)
        logits_TE = x_TD @ layer.mlp.gate.weight.T
        chosen_TK = logits_TE.softmax(-1).gather(-1, choice_TK)
        weight_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)
        everyone_T = torch.ones(len(x_TD), dtype=torch.bool)
        routing = Routing(
            logits_TE=logits_TE,
            score_TE=logits_TE,
            expert_TK=choice_TK,
            kept_TK=torch.ones_like(choice_TK).bool(),
            weight_TK=weight_TK,
            mask_T=everyone_T,
            sequence_T=everyone_T.long(),
            num_experts=EXPERTS,
        )
        experts = layer.mlp.experts
        y_TD = run_experts_naive(
            x_TD, routing, gate_up_EGD=experts.gate_up_proj, down_EDF=experts.down_proj
        )
        hidden_BSD = hidden_BSD + y_TD.view_as(hidden_BSD)
    return model.lm_head(decoder.norm(hidden_BSD))


def test_replay_has_the_outputs_and_gradients_of_a_forced_pass_built_by_hand() -> None:
    model = make()
    foreign = random_choices({0: 7, 1: 7, 2: 7})
    choice_LTK = torch.cat([foreign[row] for row in range(3)], dim=1)
    pull = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(2))
    expected_logits = forced_by_hand(model, choice_LTK)
    (expected_logits * pull).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with replay_routing(model, RoutingTrace.from_choices(foreign, num_experts=EXPERTS)):
        logits = model(input_ids=IDS, use_cache=False).logits
    (logits * pull).sum().backward()
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_mixtral_and_ours_with_the_same_weights_replay_alike() -> None:
    theirs = make("mixtral", tie_word_embeddings=True)
    ours = make(rms_norm_eps=1e-5, rope_parameters=theirs.config.rope_parameters)
    ours.load_state_dict(theirs.state_dict())
    foreign = RoutingTrace.from_choices(random_choices({0: 5, 1: 7, 2: 6}), num_experts=EXPERTS)
    for model in (theirs, ours):
        with replay_routing(model, foreign):
            loss_of(model, attention_mask=PADDING).backward()
    mine, expected = gradients(ours), gradients(theirs)
    for name in expected:
        torch.testing.assert_close(mine[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


# --- other batches


def next_logp(model: nn.Module, ids: Tensor, mask: Tensor, **inputs: Any) -> list[Tensor]:
    """Per row the log-probabilities (tokens - 1,) of its real tokens after the first."""
    with torch.no_grad():
        logits_BSV = model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), **inputs
        ).logits
    logp_BSV = logits_BSV.log_softmax(-1)
    rows = []
    for row in range(len(ids)):
        real = mask[row].nonzero().squeeze(-1)
        rows.append(logp_BSV[row, real[:-1]].gather(-1, ids[row, real[1:], None]).squeeze(-1))
    return rows


TEXTS = {40: [5, 6, 7, 8, 9, 10], 7: [11, 12], 12: [13, 14, 15, 16], 3: [17, 18, 19]}


def batch_of(names: list[int], *, width: int, left: bool) -> dict[str, Tensor]:
    ids = torch.zeros(len(names), width, dtype=torch.long)
    mask = torch.zeros(len(names), width, dtype=torch.long)
    for row, name in enumerate(names):
        text = torch.tensor(TEXTS[name])
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return {"ids": ids, "mask": mask, "sample_ids": torch.tensor(names)}


@pytest.mark.parametrize("kind", BOTH)
def test_padding_order_and_size_of_micro_batches_change_nothing(kind: str) -> None:
    model = make(kind)
    with recorded(model) as trace:
        expected = next_logp(model, **batch_of(list(TEXTS), width=7, left=False))
    by_name = dict(zip(TEXTS, expected, strict=True))
    other = perturbed(model)
    for names, width, left in [([12, 40], 9, True), ([7], 2, True), ([3], 5, False)]:
        batch = batch_of(names, width=width, left=left)
        with replay_routing(model, trace):
            found = next_logp(model, **batch)
        for name, logp in zip(names, found, strict=True):
            torch.testing.assert_close(logp, by_name[name], atol=1e-5, rtol=1e-5)
        with replay_routing(other, trace), recorded(other) as replayed:
            next_logp(other, **batch)
        replayed_choices, wanted = choices(replayed), choices(trace)
        assert all(torch.equal(replayed_choices[name], wanted[name]) for name in names)
    assert changed_share(trace, record(other, **_plain(list(TEXTS)))) >= 0.05


def _plain(names: list[int]) -> dict[str, Tensor]:
    batch = batch_of(names, width=7, left=False)
    return {
        "ids": batch["ids"],
        "attention_mask": batch["mask"],
        "sample_ids": batch["sample_ids"],
    }


def packed(names: list[int]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([sum((TEXTS[n] for n in names), [])]),
        "position_ids": torch.cat([torch.arange(len(TEXTS[n])) for n in names])[None],
        "sample_ids": torch.tensor([[n for n in names for _ in TEXTS[n]]]),
    }


@pytest.mark.parametrize("kind", BOTH)
def test_texts_recorded_alone_are_replayed_packed_and_the_other_way_round(kind: str) -> None:
    model, names = make(kind), [12, 40, 3]
    alone = {name: torch.tensor([TEXTS[name]]) for name in names}
    with recorded(model) as apart:
        for name in names:
            model(input_ids=alone[name], sample_ids=torch.tensor([name]), use_cache=False)
    with recorded(model) as together:
        model(**packed(names), use_cache=False)
    assert same_choices(apart, together)
    other = perturbed(model)
    with torch.no_grad(), replay_routing(other, apart), record_routing(other) as replayed:
        in_one = other(**packed(names), use_cache=False).logits[0]
    assert same_choices(replayed, apart)
    with torch.no_grad(), replay_routing(other, together), record_routing(other) as replayed:
        each = [
            other(input_ids=alone[n], sample_ids=torch.tensor([n]), use_cache=False).logits[0]
            for n in names
        ]
    assert same_choices(replayed, apart)
    torch.testing.assert_close(in_one, torch.cat(each), atol=1e-5, rtol=1e-5)
    assert changed_share(apart, record(other, **_renamed(names))) >= 0.05


def _renamed(names: list[int]) -> dict[str, Tensor]:
    inputs = packed(names)
    return {"ids": inputs.pop("input_ids"), **inputs}


def test_a_packed_row_without_names_for_its_texts_is_one_sample() -> None:
    model = make()
    inputs = packed([12, 40, 3])
    del inputs["sample_ids"]
    trace = record(model, **{"ids": inputs["input_ids"], "position_ids": inputs["position_ids"]})
    assert [(name, c.shape[1]) for name, c in choices(trace).items()] == [(0, 13)]
    other = perturbed(model)
    with torch.no_grad(), replay_routing(other, trace), record_routing(other) as replayed:
        other(**inputs)
    assert same_choices(trace, replayed)


@pytest.mark.parametrize("kind", [*BOTH, "window"])
def test_decoding_with_a_cache_replays_token_by_token(kind: str) -> None:
    model = make("ours", sliding_window=3) if kind == "window" else make(kind)
    trace = record(model, attention_mask=PADDING, position_ids=positions(PADDING))
    other = perturbed(model)
    place_BS = positions(PADDING)
    with torch.no_grad(), replay_routing(other, trace):
        whole = other(
            input_ids=IDS, attention_mask=PADDING, position_ids=place_BS, use_cache=False
        ).logits
    logits, cache = [], DynamicCache(config=other.config)
    with torch.no_grad(), replay_routing(other, trace), record_routing(other) as steps:
        for start, stop in [(0, 4), (4, 5), (5, 6), (6, 7)]:
            out = other(
                input_ids=IDS[:, start:stop],
                attention_mask=PADDING[:, :stop],
                position_ids=place_BS[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(out.logits)
    assert same_choices(trace, steps)
    real = PADDING.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], atol=1e-5, rtol=1e-5)
    assert changed_share(trace, record(other, attention_mask=PADDING)) >= 0.05


def test_a_cache_without_a_mask_counts_its_own_length() -> None:
    model = make()
    trace = record(model)
    other = perturbed(model)
    with torch.no_grad(), replay_routing(other, trace), record_routing(other) as steps:
        cache = other(input_ids=IDS[:, :6], use_cache=True).past_key_values
        other(input_ids=IDS[:, 6:], past_key_values=cache)
    assert same_choices(trace, steps)


# --- checkpointing


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["ours", "mixtral", "qwen2_moe"])
def test_what_checkpointing_runs_again_takes_the_same_choice(
    kind: str, reentrant: bool, inside: bool
) -> None:
    model = make(kind)
    trace = record(model)
    other = perturbed(model).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for replaying in (False, True):
            other.zero_grad()
            with replay_routing(other, trace) if replaying else nullcontext():
                # Two micro-batches are under way before the first goes back.
                losses = [
                    loss_of(other, IDS[rows], sample_ids=rows)
                    for rows in (torch.tensor([2, 0]), torch.tensor([1]))
                ]
                if inside:
                    sum(losses).backward()
            if not inside:
                sum(losses).backward()
            results.append(gradients(other))
    free, expected, free_again, found = results
    assert_same_gradients(free_again, free)
    assert_same_gradients(found, expected)
    gate = next(name for name in found if name.endswith("mlp.gate.weight"))
    assert not torch.allclose(found[gate], free[gate], atol=1e-6, rtol=1e-4)
    assert not any(
        "_checkpointed" in str(getattr(m, "_gradient_checkpointing_func", ""))
        for m in other.modules()
    )


def test_a_replay_with_checkpointing_balances_the_forced_choice() -> None:
    model = make(load_balancing_coef=0.1, z_loss_coef=0.0).train()
    trace = record(model)
    other = perturbed(model).train()
    found = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            other.gradient_checkpointing_enable(options)
        other.zero_grad()
        with replay_routing(other, trace):
            out = other(input_ids=IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        found.append(gradients(other))
        with replay_routing(other, trace), record_routing(other) as again:
            other(input_ids=IDS, use_cache=False)
        layers = [load_balancing_loss(r) for r in again.forwards[0].routings]
        torch.testing.assert_close(out.aux_loss, 0.1 * torch.stack(layers).mean())
    for other_gradients in found[1:]:
        assert_same_gradients(other_gradients, found[0])


# --- the sampler's record


def training_logps(model: nn.Module, rollout: Rollout, ids: list[int]) -> Tensor:
    """Log-probabilities (B, R) of the response in one pass over prompt and response."""
    mask = torch.cat([rollout.prompt_mask_BP, rollout.mask_BR], dim=1)
    logits_BSV = model(
        input_ids=torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1),
        attention_mask=mask.long(),
        position_ids=positions(mask),
        sample_ids=torch.tensor(ids),
        use_cache=False,
    ).logits
    width = rollout.response_BR.shape[1]
    logp_BRV = logits_BSV[:, -width - 1 : -1].log_softmax(-1)
    logp_BR = logp_BRV.gather(-1, rollout.response_BR[..., None]).squeeze(-1)
    return torch.where(rollout.mask_BR, logp_BR, 0.0)


@pytest.mark.parametrize("kind", ["ours", "window", "mixtral", "olmoe"])
def test_a_rollouts_recorded_routing_is_replayed_in_the_training_pass(kind: str) -> None:
    model = make("ours", sliding_window=3) if kind == "window" else make(kind)
    ids = [40, 7, 12]
    prompt_BP = torch.tensor([[0, 3, 4], [5, 6, 7], [8, 9, 10]])
    mask_BP = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    rollout = sample(
        model, prompt_BP, prompt_mask_BP=mask_BP, max_new_tokens=8, stop_ids=(2, 5, 7, 9), seed=3,
        sample_ids=ids, record_routing=True,
    )  # fmt: skip
    assert len(set(rollout.mask_BR.sum(dim=1).tolist())) > 1  # rows left the batch on the way
    assert rollout.routing is not None
    other = perturbed(model)
    with torch.no_grad(), replay_routing(model, rollout.routing, free_tail=1):
        logp_BR = training_logps(model, rollout, ids)
    torch.testing.assert_close(logp_BR, rollout.logp_BR, atol=1e-5, rtol=1e-5)
    compact = rollout.routing.choices()
    with replay_routing(other, compact, free_tail=1), record_routing(other) as replayed:
        loss = -training_logps(other, rollout, ids).sum()
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in routers(other))
    wanted = choices(rollout.routing)
    for name, found in choices(replayed).items():
        assert found.shape[1] == wanted[name].shape[1] + 1  # the last token drawn, routed freely
        assert torch.equal(found[:, :-1], wanted[name])
    with (
        pytest.raises(UserError, match=r"sample \d+ has \d+ recorded tokens, this pass has more:"),
        replay_routing(model, rollout.routing),
    ):
        training_logps(model, rollout, ids)


def test_the_free_tail_is_what_the_router_chooses_itself() -> None:
    model = make()
    free = choices(record(model))
    short = {name: choice[:, :-2] for name, choice in free.items()}
    with (
        replay_routing(model, RoutingTrace.from_choices(short, num_experts=EXPERTS), free_tail=2),
        recorded(model) as trace,
    ):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert all(torch.equal(choices(trace)[name], free[name]) for name in free)


# --- recording, heads, adapters, precision


@pytest.mark.parametrize("kind", BOTH)
def test_recording_around_or_inside_a_replay_records_the_forced_choice(kind: str) -> None:
    model = make(kind)
    foreign = RoutingTrace.from_choices(random_choices({0: 7, 1: 7, 2: 7}), num_experts=EXPERTS)
    with replay_routing(model, foreign), recorded(model) as inside:
        model(input_ids=IDS)
    with recorded(model) as around, replay_routing(model, foreign):
        model(input_ids=IDS)
    assert same_choices(inside, foreign) and same_choices(around, foreign)


def breaking(model: Any, error: type[BaseException]) -> Any:
    """A hook behind the last layer: the pass breaks off after its routers have run."""

    def raise_it(*_: Any) -> None:
        raise error

    return model.model.norm.register_forward_hook(raise_it)


def hooks_and_checkpoints(model: nn.Module) -> list[Any]:
    return [
        (
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            getattr(module, "_gradient_checkpointing_func", None),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", BOTH)
def test_nothing_is_left_behind_not_even_by_a_pass_that_breaks_off(
    kind: str, error: type[BaseException], checkpointing: bool
) -> None:
    model = make(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    trace = record(model)
    plain = model(input_ids=IDS, use_cache=False).logits
    before = hooks_and_checkpoints(model)
    broken = breaking(model, error)
    with pytest.raises(error), replay_routing(model, trace):
        assert is_replaying(model)
        model(input_ids=IDS, use_cache=False)
    broken.remove()
    assert not is_replaying(model)
    assert hooks_and_checkpoints(model) == before
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_pass_after_one_that_broke_off_replays_its_own_rows(error: type[BaseException]) -> None:
    model = make("mixtral")
    trace = record(model)
    other = perturbed(model)
    broken = breaking(other, error)
    with replay_routing(other, trace), recorded(other) as replayed:
        with pytest.raises(error):
            other(input_ids=IDS)
        broken.remove()
        other(input_ids=IDS.flip(0), sample_ids=torch.tensor([2, 1, 0]))
    assert same_choices(trace, replayed)


@pytest.mark.parametrize("head", [MoEForReward, MoEForValue])
def test_scalar_heads_replay_too(head: Any) -> None:
    torch.manual_seed(0)
    model = head(make().config).eval()
    trace = record(model, attention_mask=PADDING)
    other = perturbed(model)
    with replay_routing(other, trace), record_routing(other) as replayed:
        other(input_ids=IDS, attention_mask=PADDING).logits.sum().backward()
    assert same_choices(trace, replayed)
    assert all(weight.grad.abs().sum() > 0 for weight in routers(other))


@pytest.mark.parametrize("kind", BOTH)
def test_a_model_under_an_adapter_on_its_routers_replays(kind: str) -> None:
    model = make(kind)
    trace = record(model)
    targets: dict[str, Any] = {"target_modules": ["q_proj"]}
    if kind == "ours":
        targets["target_modules"] = ["q_proj", "gate"]
    else:
        targets["target_parameters"] = ["mlp.gate.weight"]
    adapted = get_peft_model(model, LoraConfig(r=2, **targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "gate" in name and "lora_" in name:
                parameter += torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(4)
                )
    assert changed_share(trace, record(adapted)) >= 0.05
    with replay_routing(adapted, trace), record_routing(adapted) as replayed:
        loss_of(adapted).backward()
    assert same_choices(trace, replayed)
    on_router = [
        p.grad for name, p in adapted.named_parameters() if "gate" in name and "lora_" in name
    ]
    assert on_router and all(g is not None and g.abs().sum() > 0 for g in on_router)


@pytest.mark.parametrize("kind", ["ours", *FAMILIES])
def test_bfloat16_replays_the_same_bits(kind: str) -> None:
    model = make(kind).to(torch.bfloat16)
    if kind != "ours":
        model.set_experts_implementation("eager")  # grouped_mm wants widths of multiples of 8
    with torch.no_grad():
        plain = model(input_ids=IDS, use_cache=False).logits
        trace = record(model, use_cache=False)
        with replay_routing(model, trace):
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain)


def test_embeddings_instead_of_token_ids_are_replayed() -> None:
    model = make()
    trace = record(model)
    other = perturbed(model)
    with replay_routing(other, trace), recorded(other) as replayed:
        other(inputs_embeds=other.model.embed_tokens(IDS))
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            other()
    assert same_choices(trace, replayed)


# --- the forced choice in the router and the model


def test_a_row_of_minus_one_leaves_the_choice_to_the_router() -> None:
    logits_TE = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    forced_TK = torch.tensor([[FREE, FREE], [1, 2]])
    routing = route(logits_TE, RouterSpec(num_experts=3, top_k=2), forced_TK=forced_TK)
    assert routing.expert_TK.tolist() == [[1, 2], [1, 2]]
    score = logits_TE.softmax(-1)
    expected = torch.stack([score[0, [1, 2]], score[1, [1, 2]]])
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weight_TK, expected)


def test_a_model_takes_one_forced_choice_for_each_sparse_layer() -> None:
    model = make(num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"])
    choice_LTK = torch.cat(list(random_choices({0: 7, 1: 7, 2: 7}).values()), dim=1)
    with recorded(model) as trace:
        model(input_ids=IDS, forced_experts=list(choice_LTK))
    for routing, choice_TK in zip(trace.forwards[0].routings, choice_LTK, strict=True):
        assert torch.equal(routing.expert_TK, choice_TK)
    with pytest.raises(ValueError, match="1 forced_experts for 2 MoE layers"):
        model(input_ids=IDS, forced_experts=[choice_LTK[0]])


def test_the_selection_bias_has_no_say_in_a_replay() -> None:
    model = make(scoring_func="sigmoid", router_selection_bias=True)
    trace = record(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias += torch.tensor([0.9, 0, 0, 0, 0, -0.9])
    assert changed_share(trace, record(model)) >= 0.05
    with replay_routing(model, trace), recorded(model) as replayed:
        model(input_ids=IDS)
    assert same_choices(trace, replayed)


# --- what cannot be replayed


def refused(model: nn.Module, trace: Any, told: str, **options: Any) -> None:
    with pytest.raises(UserError, match=told), replay_routing(model, trace, **options):
        pass


@pytest.mark.parametrize("kind", BOTH)
def test_an_unknown_sample_or_another_number_of_tokens_is_refused(kind: str) -> None:
    model = make(kind)
    names = torch.tensor([5, 6, 7])
    trace = record(model, sample_ids=names)
    with replay_routing(model, trace):
        with pytest.raises(UserError, match="sample 0 is not in the trace: give forward the sampl"):
            model(input_ids=IDS)
        with pytest.raises(UserError, match="sample 6 has 7 recorded tokens, this pass has more:"):
            longer = torch.cat([IDS[:, :1], IDS], dim=1)
            mask = torch.ones_like(longer)
            mask[0, 0] = mask[2, 0] = 0
            model(input_ids=longer, attention_mask=mask, sample_ids=names)
        with pytest.raises(UserError, match="sample 5 has 7 recorded tokens, this pass has fewer"):
            model(input_ids=IDS, attention_mask=PADDING, sample_ids=names)
        with pytest.raises(UserError, match=r"sample_ids has shape \(2,\): give \(3,\)"):
            model(input_ids=IDS, sample_ids=names[:2])
        with pytest.raises(UserError, match="names packed texts, but the cache holds 6 tokens"):
            cache = model(input_ids=IDS[:, :6], sample_ids=names, use_cache=True).past_key_values
            model(input_ids=IDS[:, 6:], sample_ids=names[:, None], past_key_values=cache)
        model(input_ids=IDS, sample_ids=names)  # and after all that the right ones are taken
    with (
        replay_routing(model, trace, free_tail=1),
        pytest.raises(UserError, match="this pass has more than 1 beside them"),
    ):
        model(input_ids=some_ids(3, 9), sample_ids=names)


def test_a_row_of_padding_alone_needs_no_record() -> None:
    model = make()
    trace = record(model, IDS[:1])
    mask = torch.tensor([[1] * 7, [0] * 7])
    with torch.no_grad(), replay_routing(model, trace):
        model(input_ids=IDS[:2], attention_mask=mask)


def test_another_number_of_layers_experts_or_experts_per_token_is_refused() -> None:
    model = make()
    trace = record(model)
    told = "the trace has 2 MoE layers, 6 experts and top_k 2, the model {}: replay on the model"
    refused(make(num_hidden_layers=3), trace, told.format("3, 6 and 2"))
    refused(make(num_experts=5), trace, told.format("2, 5 and 2"))
    refused(make(num_experts_per_tok=3), trace, told.format("2, 6 and 3"))
    fewer = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
    refused(fewer, trace, told.format("2, 4 and 2"))
    refused(model, trace, "free_tail -1 must be at least 0", free_tail=-1)


def test_a_trace_that_is_empty_or_names_a_token_twice_is_refused() -> None:
    model = make()
    refused(model, RoutingTrace(), "the trace is empty: run the model inside record_routing")
    twice = record(model)
    twice.forwards.extend(record(model).forwards)
    refused(model, twice, "token 0 of sample 0 was recorded twice: give forward sample_ids that")
    late = record(model)
    with recorded(model) as steps:
        cache = model(input_ids=IDS[:, :6], use_cache=True).past_key_values
        model(input_ids=IDS[:, 6:], past_key_values=cache)
    del steps.forwards[0]
    refused(model, steps, "token 0 of sample 0 was not recorded, token 6 was: record each sample")
    late.forwards.extend(record(make(num_experts=5)).forwards)
    refused(model, late, "passes with other numbers of layers, experts or experts per token")


def test_a_nested_replay_is_refused_and_the_outer_one_goes_on() -> None:
    for kind in BOTH:
        model = make(kind)
        trace = record(model)
        other = perturbed(model)
        with replay_routing(other, trace), recorded(other) as replayed:
            refused(other, trace, f"{type(model).__name__} is replaying a trace already")
            other(input_ids=IDS)
        assert same_choices(trace, replayed)


def test_models_without_routers_or_with_several_are_refused() -> None:
    trace = record(make())
    for model in (make(mlp_layer_types=["dense"] * 2), LlamaForCausalLM(LlamaConfig(**SHAPE))):
        refused(model, trace, f"{type(model).__name__} has no router to replay on.*mixtral, olmoe")
    refused(nn.ModuleList([make(), make()]), trace, "ModuleList holds 2 backbones with routers")
    pair = nn.ModuleList([make("mixtral"), make("mixtral")])
    refused(pair, trace, "ModuleList has routers in more than one decoder: give one of its models")


def test_expert_choice_is_refused_by_name() -> None:
    told = "kind 'expert_choice' cannot be replayed: which tokens an expert takes is no list"
    options = {"norm_topk_prob": False, "load_balancing_coef": 0.0, "z_loss_coef": 0.0}
    model = make(router_kind="expert_choice", **options)
    refused(model, record(model), told)
    refused(model, record(make()), told)


def test_a_foreign_model_in_torchs_own_checkpoint_wrapper_is_refused() -> None:
    model = make("mixtral")
    trace = record(model)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    refused(model, trace, "CheckpointWrapper, which would choose freely in backward")


def test_our_model_in_torchs_own_checkpoint_wrapper_keeps_the_choice() -> None:
    model = make()
    trace = record(model)
    other = perturbed(model).train()
    found = []
    for wrapped in (False, True):
        if wrapped:
            other.model.layers[0] = checkpoint_wrapper(other.model.layers[0])
        other.zero_grad()
        with replay_routing(other, trace):
            loss = loss_of(other)
        loss.backward()
        found.append([weight.grad.clone() for weight in other.parameters()])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)


def test_two_forced_choices_at_once_and_sampling_in_a_replay_are_refused() -> None:
    model = make()
    trace = record(model)
    with replay_routing(model, trace):
        with pytest.raises(UserError, match="forced_experts was given inside replay_routing"):
            model(input_ids=IDS, forced_experts=[torch.zeros(21, 2).long()] * 2)
        with pytest.raises(UserError, match="sample draws new tokens, which have no record"):
            sample(
                model, IDS, prompt_mask_BP=torch.ones_like(IDS), max_new_tokens=2, stop_ids=(1,),
                seed=0,
            )  # fmt: skip


# --- the look-up, by hand


def test_the_choice_of_each_place_is_found_by_sample_and_token() -> None:
    trace = RoutingTrace.from_choices(
        {8: torch.tensor([[[1], [2], [3]]]), 2: torch.tensor([[[4], [5]]])}, num_experts=6
    )
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    keys = pass_keys(
        (torch.zeros(2, 4), mask), {"sample_ids": torch.tensor([2, 8]), "use_cache": False}
    )
    assert keys is not None
    found = choices_of(trace.choices(), keys)
    assert found[0, :, 0].tolist() == [4, 5, FREE, FREE, FREE, 1, 2, 3]
