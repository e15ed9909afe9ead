"""What the models give on request, the form other libraries ask for it, and the heads' own loss."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from moe import MoEConfig, MoEForCausalLM, MoEForReward, MoEForValue, MoEModel
from moe.balance import load_balancing_loss, z_loss
from moe.errors import UserError
from moe.record import record_routing

SHAPE: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
OURS: dict[str, Any] = SHAPE | {"moe_intermediate_size": 8, "num_experts": 4}
HEADS = (MoEForReward, MoEForValue)
ALL = (MoEModel, MoEForCausalLM, *HEADS)


def make(kind: Any = MoEForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(MoEConfig(**OURS | changes)).eval()


def some_ids(batch: int = 3, length: int = 6) -> Tensor:
    return torch.randint(3, 31, (batch, length), generator=torch.Generator().manual_seed(1))


# --- attention probabilities and other extras ---------------------------------------------------


def test_attention_probabilities_are_those_of_mistral() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, sliding_window=3, attn_implementation="eager")
    theirs = MistralForCausalLM(config).eval()
    dense = {"mlp_layer_types": ["dense"] * 2, "sliding_window": 3, "rms_norm_eps": 1e-6}
    ours = make(**dense, tie_word_embeddings=False)
    ours.load_state_dict(theirs.state_dict())
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0
    asked: dict[str, Any] = {"attention_mask": mask, "output_attentions": True}
    expected, got = theirs(some_ids(), **asked), ours(some_ids(), **asked)
    assert len(got.attentions) == 2
    for ours_BHSC, theirs_BHSC in zip(got.attentions, expected.attentions, strict=True):
        # Rows of padding mean nothing in either.
        torch.testing.assert_close(ours_BHSC[1:], theirs_BHSC[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_BHSC[0, :, 2:], theirs_BHSC[0, :, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "windowed"])
def test_asking_for_probabilities_runs_the_form_that_has_them(implementation: str) -> None:
    model, ids = make(window_pattern="SL", sliding_window=2), some_ids()
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True)
    model.set_attn_implementation(implementation)
    got = model(ids, output_attentions=True)
    assert model.config._attn_implementation == implementation
    for one, other in zip(got.attentions, eager.attentions, strict=True):
        assert torch.equal(one, other)
    windowed_BHSC, full_BHSC = got.attentions
    torch.testing.assert_close(full_BHSC.sum(-1), torch.ones(3, 4, 6))
    assert (windowed_BHSC.tril(-2) == 0).all() and (full_BHSC.tril(-2)[:, :, 2:] > 0).any()
    # The numbers of the forward stay those of the backend, up to rounding.
    torch.testing.assert_close(model(ids).logits, got.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_every_class_gives_what_is_asked_for_and_nothing_else(kind: Any) -> None:
    model, ids = make(kind), some_ids()
    names = ("hidden_states", "attentions", "router_logits")
    plain, full = model(ids), model(ids, **{f"output_{name}": True for name in names})
    assert plain.hidden_states is plain.attentions is plain.router_logits is None
    assert [len(full[name]) for name in names] == [3, 2, 2]
    assert full.router_logits[0].shape == (18, 4)
    model.config.output_hidden_states = True
    by_config = model(ids).hidden_states
    for one, other in zip(by_config, full.hidden_states, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # sdpa beside eager
    assert model(ids, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("kind", ALL)
def test_a_tuple_comes_back_when_no_dictionary_is_wanted(kind: Any) -> None:
    model, ids = make(kind), some_ids()
    whole = model(ids, use_cache=False)
    alone = model(ids, use_cache=False, return_dict=False)
    assert isinstance(alone, tuple) and torch.equal(alone[0], whole[0])
    model.config.return_dict = False
    assert isinstance(model(ids, use_cache=False), tuple)


def test_the_head_may_be_cut_over_devices_tied_or_not() -> None:
    for tied in (False, True):
        assert make(tie_word_embeddings=tied).tp_plan["lm_head"] == "colwise_gather_output"


@pytest.mark.parametrize("biased", [False, True])
def test_only_a_selection_bias_is_kept_in_float32(biased: bool) -> None:
    router = {"scoring_func": "sigmoid", "router_selection_bias": True} if biased else {}
    kept = make(**router)._keep_in_fp32_modules_strict
    assert kept == ({"e_score_correction_bias"} if biased else set())


# --- targets that were moved already ------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_targets_moved_beforehand_give_the_loss_and_gradient_of_labels(training: bool) -> None:
    labels = some_ids()
    labels[0, 2] = -100
    moved = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    losses, gradients = [], []
    for targets in ({"labels": labels}, {"labels": labels.flip(0), "shift_labels": moved}):
        model = make().train(training)
        loss = model(some_ids(), **targets).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    # The same terms in another layout: the sums may round differently.
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


# --- the heads' loss ----------------------------------------------------------------------------


def test_a_rewards_loss_is_the_mean_squared_error() -> None:
    model, ids = make(MoEForReward), some_ids()
    reward_B = model(ids).logits.squeeze(1).tolist()
    labels = torch.tensor([0.5, -1.0, -100.0])
    total = (reward_B[0] - 0.5) ** 2 + (reward_B[1] + 1.0) ** 2
    out = model(ids, labels=labels)
    assert out.aux_loss is None and out.loss.item() == pytest.approx(total / 2, rel=1e-5)
    assert torch.equal(model(ids, labels=labels[:, None]).loss, out.loss)
    split = model(ids, labels=labels, num_items_in_batch=8).loss.item()
    assert split == pytest.approx(total / 8, rel=1e-5)
    assert model(ids, labels=torch.full((3,), -100)).loss.item() == 0.0


def test_a_values_loss_is_the_mean_over_the_tokens_that_are_learned() -> None:
    model, ids = make(MoEForValue), some_ids()
    labels = torch.full((3, 6), -100.0)
    labels[0, 1], labels[2, 5] = 1.0, 0.0
    value = model(ids).logits
    expected = ((value[0, 1, 0] - 1.0) ** 2 + value[2, 5, 0] ** 2) / 2
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


@pytest.mark.parametrize("kind", HEADS)
def test_in_training_the_heads_loss_holds_the_balance_terms_in_eval_not(kind: Any) -> None:
    coefs = {"load_balancing_coef": 0.5, "z_loss_coef": 0.25}
    model, ids = make(kind, **coefs).train(), some_ids()
    labels = torch.zeros(3) if kind is MoEForReward else torch.zeros(3, 6)
    with record_routing(model, keep_graph=True) as trace:
        out = model(ids, labels=labels, num_items_in_batch=2 * labels.numel())
    routings = trace.forwards[0].routings
    balance = sum(load_balancing_loss(r) for r in routings) / len(routings)
    z = sum(z_loss(r) for r in routings) / len(routings)
    torch.testing.assert_close(out.aux_loss, 0.5 * balance + 0.25 * z)
    error = out.logits.square().sum() / (2 * labels.numel())
    torch.testing.assert_close(out.loss, error + 0.5 * out.aux_loss)
    assert not model.model.routing_sinks
    assert model.eval()(ids, labels=labels).aux_loss is None


def test_labels_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(UserError, match=r"\(3, 2\) do not fit MoEForReward.*shape \(3,\)"):
        make(MoEForReward)(some_ids(), labels=torch.zeros(3, 2))


@pytest.mark.parametrize("kind", HEADS)
def test_more_than_one_label_is_refused(kind: Any) -> None:
    with pytest.raises(UserError, match="num_labels 3 cannot be"):
        make(kind, num_labels=3)


@pytest.mark.parametrize("kind", HEADS)
def test_a_trainer_that_reads_signatures_keeps_the_heads_columns(kind: Any) -> None:
    names = set(inspect.signature(kind.forward).parameters)
    assert {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels"} <= names
