"""The decoder against other authors' models, and what must not change its numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moe import MoEConfig, MoEForCausalLM, MoEModel
from moe.balance import load_balancing_loss, z_loss
from moe.record import record_routing
from moe.stats import RouterStats

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_theta": 1000.0},
}
OURS: dict[str, Any] = SHAPE | {"moe_intermediate_size": 14, "num_experts": 5}
DENSE: dict[str, Any] = SHAPE | {"mlp_layer_types": ["dense"] * 3}


def make_model(seed: int = 0, **changes: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(MoEConfig(**OURS | changes)).eval()


def some_ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


# --- parity with other authors ------------------------------------------------------------------


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """Same names and shapes; then same logits, loss and gradients, float32 within 1e-5."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        # eval: neither adds a balance term, so the losses are the cross-entropies
        out = model.eval()(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        results.append((out.logits[mask.bool()], out.loss, gradients(model)))
    (logits, loss, grads), (other_logits, other_loss, other_grads) = results
    torch.testing.assert_close(logits, other_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, other_loss, atol=1e-5, rtol=1e-5)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_the_model_is_mixtral(window: int | None, tied: bool) -> None:
    torch.manual_seed(3)
    theirs = MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_local_experts=5, sliding_window=window, tie_word_embeddings=tied)
    )
    theirs.set_experts_implementation("eager")  # the fused kernel wants widths that divide by 4
    ours = make_model(sliding_window=window, tie_word_embeddings=tied)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_dense_layers_make_it_llama(tied: bool) -> None:
    torch.manual_seed(3)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    assert_same_model(MoEForCausalLM(MoEConfig(**DENSE, tie_word_embeddings=tied)), theirs)


@pytest.mark.parametrize("window", [None, 4])
def test_dense_layers_and_a_window_make_it_mistral(window: int | None) -> None:
    torch.manual_seed(3)
    theirs = MistralForCausalLM(
        MistralConfig(**SHAPE, sliding_window=window, tie_word_embeddings=False)
    )
    ours = MoEForCausalLM(MoEConfig(**DENSE, sliding_window=window, tie_word_embeddings=False))
    assert_same_model(ours, theirs)


# --- what must not change the numbers -----------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pads", [1, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_real_tokens(side: str, pads: int, attention: str) -> None:
    model = make_model(sliding_window=4, window_pattern="SL")
    model.set_attn_implementation(attention)
    ids = some_ids()
    padding = torch.full((2, pads), 7)
    parts = [padding, ids] if side == "left" else [ids, padding]
    masks = [torch.zeros_like(p) if p is padding else torch.ones_like(p) for p in parts]
    padded, mask = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
    with torch.no_grad(), record_routing(model) as alone:
        expected = model(input_ids=ids).logits
    with torch.no_grad(), record_routing(model) as with_padding:
        logits = model(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()
    stats = [RouterStats.from_trace(trace) for trace in (alone, with_padding)]
    assert torch.equal(stats[0].count_LE, stats[1].count_LE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_leaves_every_gradient_finite_and_as_it_was(attention: str) -> None:
    ids = some_ids()
    padded = torch.cat([torch.full((2, 3), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 9)], dim=1).long()
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 3] = -100  # nothing real predicts the first token
    found = []
    for batch in (
        {"input_ids": ids, "labels": ids},
        {"input_ids": padded, "attention_mask": mask, "labels": labels},
    ):
        model = make_model().train()
        model.set_attn_implementation(attention)
        model(**batch).loss.backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_the_rest_of_the_batch_changes_nothing() -> None:
    model, ids = make_model(), some_ids(batch=4)
    with torch.no_grad():
        together = model(input_ids=ids).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["L", "SL"])
def test_a_cache_changes_nothing_even_past_the_window(pattern: str) -> None:
    window = 4 if "S" in pattern else None
    model = make_model(sliding_window=window, window_pattern=pattern)
    ids = some_ids(length=14)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in ids.split([5, 1, 1, 3, 4], dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_generate_gives_the_same_text_with_and_without_a_cache(window: int | None) -> None:
    model, ids = make_model(sliding_window=window), some_ids(length=5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with_cache, without = (
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_embeddings_stand_in_for_ids_but_not_beside_them() -> None:
    model, ids = make_model(), some_ids()
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds)


def test_only_the_last_logits_are_computed_when_only_they_are_wanted() -> None:
    model, ids = make_model(), some_ids()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=1).logits, whole[:, -1:])


# --- loss -----------------------------------------------------------------------------------------


def test_in_eval_the_loss_is_the_cross_entropy_alone() -> None:
    model, ids = make_model(load_balancing_coef=10.0, z_loss_coef=10.0), some_ids()
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.aux_loss is None


def test_in_training_the_layers_mean_balance_and_z_losses_are_added() -> None:
    model, ids = make_model(load_balancing_coef=0.5, z_loss_coef=0.25).train(), some_ids()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with record_routing(model) as trace:
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
    routings = trace.forwards[0].routings
    balance = sum(load_balancing_loss(r) for r in routings) / 3
    z = sum(z_loss(r) for r in routings) / 3
    torch.testing.assert_close(out.aux_loss, 0.5 * balance + 0.25 * z)
    in_eval = model.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(out.loss, in_eval + out.aux_loss)


@pytest.mark.parametrize(
    "changes", [{"load_balancing_coef": 0.0, "z_loss_coef": 0.0}, DENSE], ids=["zero", "dense"]
)
def test_without_coefficients_or_experts_training_adds_nothing(changes: dict[str, Any]) -> None:
    model, ids = make_model(**changes).train(), some_ids()
    out = model(input_ids=ids, labels=ids)
    assert out.aux_loss is None
    torch.testing.assert_close(out.loss, model.eval()(input_ids=ids, labels=ids).loss)


def test_micro_batches_with_the_steps_item_count_give_the_whole_batchs_gradient() -> None:
    # The balance loss is left out: its fractions are a micro-batch's own, so it does not split.
    ids = some_ids(batch=4)
    found = []
    for parts in ([ids], ids.split([1, 3])):
        model = make_model(load_balancing_coef=0.0, z_loss_coef=0.5).train()
        for part in parts:
            model(input_ids=part, labels=part, num_items_in_batch=4 * 8).loss.backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)


def test_a_batch_without_a_label_has_a_loss_of_zero() -> None:
    ids = some_ids()
    assert make_model()(input_ids=ids, labels=torch.full_like(ids, -100)).loss == 0


# --- precision, checkpointing, files -------------------------------------------------------------


@pytest.mark.parametrize("how", ["parameters", "autocast"])
def test_in_bfloat16_the_router_decides_in_float32(how: str) -> None:
    model, ids = make_model(), some_ids()
    if how == "parameters":
        model = model.bfloat16()
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"),
        record_routing(model) as trace,
    ):
        out = model(input_ids=ids, output_router_logits=True)
    assert out.logits.dtype == torch.bfloat16
    for logits_TE, routing in zip(out.router_logits, trace.forwards[0].routings, strict=True):
        assert logits_TE.dtype == routing.score_TE.dtype == torch.float32
        # More precise than bfloat16 could hold: the logits were not merely cast afterwards.
        assert not torch.equal(logits_TE, logits_TE.bfloat16().float())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [None, "gate", "experts"])
def test_checkpointing_of_either_kind_gives_the_same_bits_the_routers_too(
    reentrant: bool, frozen: str | None
) -> None:
    ids, found = some_ids(), []
    for checkpointing in (False, True):
        model = make_model(load_balancing_coef=0.5, z_loss_coef=0.1).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen is None or f"mlp.{frozen}." not in name)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        found.append((out.loss, gradients(model)))
    (loss, grads), (other_loss, other_grads) = found
    assert torch.equal(loss, other_loss)
    assert grads.keys() == other_grads.keys()
    assert any("mlp.gate.weight" in name for name in grads) == (frozen != "gate")
    for name, grad in grads.items():
        assert torch.equal(other_grads[name], grad), name


def test_under_reentrant_checkpointing_the_penalty_alone_reaches_the_routers() -> None:
    ids, found = some_ids(), []
    for checkpointing in (False, True):
        model = make_model(load_balancing_coef=0.5, z_loss_coef=0.1).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": True})
        model(input_ids=ids, labels=ids).aux_loss.backward()
        found.append(gradients(model)["model.layers.2.mlp.gate.weight"])
    assert torch.equal(found[0], found[1]) and found[0].abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_through_the_auto_classes(tmp_path: Path, tied: bool) -> None:
    model, ids = make_model(tie_word_embeddings=tied, sliding_window=4), some_ids()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEForCausalLM) and isinstance(bare, MoEModel)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        hidden = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(bare(input_ids=ids).last_hidden_state, hidden)


def test_hidden_states_end_with_the_normed_output() -> None:
    model, ids = make_model(), some_ids()
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
