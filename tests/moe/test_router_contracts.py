"""What each router declares, held against the whole model: by changing what follows, by changing
who is beside, and by decoding with a cache. A declaration of False has to be shown to break.

Outputs of tokens that keep their experts move by rounding alone; where a token changes an expert,
or loses one, they move by far more than the tolerance.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.generation import sample
from moe.record import record_routing
from moe.router_spec import RouterSpec

CLOSE = 2e-5  # float32 logits of size 1, other batch shapes; a changed expert moves them by 1e-2
OFF: dict[str, Any] = {"load_balancing_coef": 0.0}
CHOICE: dict[str, Any] = {
    **OFF,
    "z_loss_coef": 0.0,
    "router_kind": "expert_choice",
    "norm_topk_prob": False,
}
SIGMOID: dict[str, Any] = {"scoring_func": "sigmoid", "router_selection_bias": True}
TIGHT: dict[str, Any] = {"capacity_factor": 0.75}
SEQUENCE: dict[str, Any] = {"capacity_scope": "sequence"}

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "raw": {"norm_topk_prob": False},
    "switch dropless": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "softmax over the chosen": {"scoring_func": "softmax_chosen", "router_bias": True},
    "sigmoid, biased": SIGMOID,
    "groups": {**SIGMOID, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.0},
    "hash": {**OFF, "router_kind": "hash"},
    "noise of training": {"router_jitter_noise": 0.3, "router_logit_noise": 1.0},
    "gshard": TIGHT,
    "gshard by sequence": {**TIGHT, **SEQUENCE},
    "position": {**TIGHT, "drop_order": "position"},
    "position by sequence": {**TIGHT, **SEQUENCE, "drop_order": "position"},
    "score": {**TIGHT, "drop_order": "score"},
    "score by sequence": {**TIGHT, **SEQUENCE, "drop_order": "score"},
    "switch": {"norm_topk_prob": False, "num_experts_per_tok": 1, **TIGHT},
    "switch by sequence": {
        **{"norm_topk_prob": False, "num_experts_per_tok": 1, "capacity_rounding": "floor"},
        **TIGHT,
        **SEQUENCE,
    },
    "hash with capacity": {**OFF, "router_kind": "hash", **TIGHT},
    "expert choice": CHOICE,
    "expert choice by sequence": {**CHOICE, **SEQUENCE},
}
LENGTH, PREFIX = 14, 9


def model_of(name: str) -> MoEForCausalLM:
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=40,
        hidden_size=24,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=6,
        initializer_range=0.3,
        **ROUTERS[name],
    )
    model = MoEForCausalLM(config).eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, 6))
    return model


def spec_of(name: str) -> RouterSpec:
    return model_of(name).config.router_spec


def words(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: MoEForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits


def moved(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def other_suffixes(model: MoEForCausalLM) -> float:
    """How far a prefix's logits move when other words follow it, or fewer, or none, or many."""
    text = words(1, LENGTH, seed=1)
    prefix = text[:, :PREFIX]
    seen = logits(model, text)[:, :PREFIX]
    followed = [
        torch.cat([prefix, words(1, LENGTH - PREFIX, seed=seed)], dim=1) for seed in range(2, 8)
    ]
    followed += [text[:, : PREFIX + extra] for extra in (0, 2)]
    followed.append(torch.cat([text, words(1, 3 * LENGTH, seed=8)], dim=1))
    return max(moved(seen, logits(model, other)[:, :PREFIX]) for other in followed)


def other_neighbours(model: MoEForCausalLM) -> float:
    """How far a row's logits move when other rows are beside it, before and after, or padding."""
    row = words(1, LENGTH, seed=1)
    alone = logits(model, row)
    far = []
    for seed in range(2, 6):
        rows = torch.cat([words(2, LENGTH, seed=seed), row, words(1, LENGTH, seed=seed + 10)])
        far.append(moved(alone, logits(model, rows)[2:3]))
    pad = torch.zeros(1, 5, dtype=torch.long)
    for left, right in ((pad, pad[:, :0]), (pad[:, :0], pad), (pad, pad)):
        mask = torch.cat([left, torch.ones_like(row), right], dim=1)
        found = logits(model, torch.cat([left, row, right], dim=1), mask)
        far.append(moved(alone, found[:, left.shape[1] : left.shape[1] + LENGTH]))
    return max(far)


@torch.no_grad()
def decoded(model: MoEForCausalLM) -> float:
    """How far logits with a cache, a prompt and then token by token, are from those of one pass."""
    ids = words(2, LENGTH, seed=1)
    out = model(input_ids=ids[:, :5], use_cache=True)
    parts = [out.logits]
    for t in range(5, LENGTH):
        out = model(
            input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True
        )
        parts.append(out.logits)
    return moved(torch.cat(parts, dim=1), logits(model, ids))


PROBES = {
    "causal": other_suffixes,
    "batch_invariant": other_neighbours,
    "decodable": decoded,
}


@pytest.mark.parametrize("declared", PROBES)
@pytest.mark.parametrize("name", ROUTERS)
def test_a_declaration_is_what_the_model_does(name: str, declared: str) -> None:
    model = model_of(name)
    distance = PROBES[declared](model)
    if getattr(spec_of(name), declared):
        assert distance < CLOSE, distance
    else:
        assert distance > 100 * CLOSE, distance


def test_every_kind_of_declaration_is_among_the_routers_here() -> None:
    kinds = {
        (spec.causal, spec.batch_invariant, spec.decodable)
        for spec in (spec_of(name) for name in ROUTERS)
    }
    assert kinds == {(True, True, True), (False, True, False), (False, False, False)}


def test_first_come_places_are_not_causal_because_their_number_counts_what_follows() -> None:
    """With the same length another suffix moves nothing, a longer text does."""
    model = model_of("position by sequence")
    text = words(1, LENGTH, seed=1)
    changed = torch.cat([text[:, :PREFIX], words(1, LENGTH - PREFIX, seed=5)], dim=1)
    seen = logits(model, text)[:, :PREFIX]
    assert moved(seen, logits(model, changed)[:, :PREFIX]) < CLOSE
    assert moved(seen, logits(model, text[:, :PREFIX])) > 100 * CLOSE


@pytest.mark.parametrize("name", ROUTERS)
def test_generating_is_refused_where_the_router_is_not_decodable(name: str) -> None:
    model, ids = model_of(name), words(2, 4, seed=1)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def both() -> None:
        sample(model, ids, prompt_mask_BP=mask, max_new_tokens=2, stop_ids=[1], seed=0)
        model.generate(ids, attention_mask=mask.long(), max_new_tokens=2, pad_token_id=0)

    if spec_of(name).decodable:
        both()
        return
    reason = "cannot generate: how many places an expert has depends on all tokens of the text"
    with pytest.raises(UserError, match=f"{spec_of(name).coupling} {reason}"):
        sample(model, ids, prompt_mask_BP=mask, max_new_tokens=2, stop_ids=[1], seed=0)
    with pytest.raises(UserError, match=reason):
        model.generate(ids, max_new_tokens=2)


def test_a_model_without_experts_generates_whatever_its_router_fields_say() -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        mlp_layer_types=["dense"],
        capacity_factor=1.0,
    )
    model = MoEForCausalLM(config).eval()
    model.generate(words(1, 3, seed=0), max_new_tokens=2, pad_token_id=0)


# --- token ids for a hash


def test_a_hash_reads_the_ids_that_the_model_was_given() -> None:
    model, ids = model_of("hash"), words(2, 7, seed=1)
    with record_routing(model) as trace:
        logits(model, ids)
    chosen = [r.expert_TK for r in trace.forwards[0].routings]
    assert torch.equal(*chosen)  # in every layer the same hash of the same ids
    flat = ids.flatten()
    for token in flat.unique():
        assert len(chosen[0][flat == token].unique(dim=0)) == 1


def test_embeddings_without_ids_are_refused_with_the_reason() -> None:
    model = model_of("hash")
    with pytest.raises(UserError, match="routes by token id and got none: give input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 24))
    model_of("softmax")(inputs_embeds=torch.zeros(1, 3, 24))


# --- noise


def noisy_model() -> MoEForCausalLM:
    return model_of("noise of training")


def test_noise_is_drawn_in_training_alone() -> None:
    model, ids = noisy_model(), words(2, 9, seed=1)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    torch.manual_seed(3)
    first, second = logits(model, ids), logits(model, ids)
    torch.manual_seed(3)
    again = logits(model, ids)
    assert not torch.equal(first, second) and torch.equal(first, again)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_draws_its_noise_again(use_reentrant: bool) -> None:
    ids = words(2, 9, seed=1)
    gradients = []
    for checkpointed in (False, True):
        model = noisy_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
