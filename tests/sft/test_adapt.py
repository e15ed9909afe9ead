"""Adapters on named parts: what is trained, what stays, and what is put back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from rlhf.reward import scalar_model
from sft.adapt import (
    LoraSpec,
    active_adapter,
    add_lora,
    base_of,
    copy_adapter,
    describe_trainable,
    disable_dropout,
    is_adapted,
    lora_targets,
    merged,
    part_of,
    save_adapter,
    trainable_by_part,
)
from sft.checkpoint import live_tensors
from sft.rows import SupervisedCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import SFTTrainer

EVERY_PART = ("attention", "experts", "router", "ffn")


def tiny_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    """One layer with experts, one without, so that every part is there."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "mlp_layer_types": ["sparse", "dense"],
        "initializer_range": 0.2,
    }
    return MoEForCausalLM(MoEConfig(**{**sizes, **config}))


def spec(*targets: str, rank: int = 2) -> LoraSpec:
    return LoraSpec(rank=rank, alpha=4, targets=targets or EVERY_PART)


def ids(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32, shape or (3, 7), generator=generator)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=ids()).logits


@torch.no_grad()
def disturb(model: nn.Module, *, seed: int = 0) -> None:
    """Move every trainable parameter, so that an adapter is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def train(model: nn.Module, folder: Path, *, steps: int = 2) -> SFTTrainer:
    rows = [
        {"input_ids": row, "labels": row, "sample_id": i}
        for i, row in enumerate(ids(1, 8, 9).tolist())
    ]
    trainer = SFTTrainer(
        model,
        TrainSettings(max_steps=steps, batch_size=8, lr=1e-2, lr_schedule="constant"),
        rows=rows,
        collator=SupervisedCollator(pad_id=0),
        folder=folder,
        balance=BalancePolicy(load_balancing_coef=0.1, z_loss_coef=0.1),
    )
    trainer.fit()
    return trainer


# --- parts


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "ffn"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("model.norm.weight", "norms"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("score.bias", "head"),
        ("base_model.model.score.modules_to_save.default.weight", "head"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.sft.weight", "attention"),
        ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.sft.weight", "experts"),
        ("something.else", "other"),
    ],
)
def test_a_parameter_belongs_to_the_part_that_its_name_says(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_norm_beside_attention_is_a_norm() -> None:
    assert part_of("model.layers.0.post_attention_layernorm.weight") == "norms"


def test_the_parts_of_a_model_add_up_to_all_of_it() -> None:
    model = tiny_lm()
    parts = trainable_by_part(model)
    assert set(parts) == {"attention", "experts", "router", "ffn", "embeddings", "norms"}
    for trained, total in parts.values():
        assert trained == total > 0
    assert sum(total for _, total in parts.values()) == model.num_parameters()
    assert parts["experts"] == (4 * 3 * 16 * 8,) * 2
    assert parts["router"] == (4 * 16,) * 2
    assert parts["ffn"] == (3 * 16 * 24,) * 2
    assert parts["norms"] == (5 * 16,) * 2


@pytest.mark.parametrize("targets", [(part,) for part in EVERY_PART] + [EVERY_PART])
def test_trainable_counts_per_part_add_up_to_those_of_peft(targets: tuple[str, ...]) -> None:
    model: Any = add_lora(tiny_lm(), spec(*targets))
    parts = trainable_by_part(model)
    trained, total = model.get_nb_trainable_parameters()
    assert sum(count for count, _ in parts.values()) == trained
    assert sum(count for _, count in parts.values()) == total
    assert {part for part, (count, _) in parts.items() if count} == set(targets)


def test_the_description_names_each_part_and_the_share() -> None:
    text = describe_trainable(add_lora(tiny_lm(), spec("router", rank=1)))
    assert "router 20," in text  # A 1 x 16 and B 4 x 1
    assert "experts 0" in text
    assert text.startswith("trainable: attention 0")
    assert " % of " in text


# --- LoRA


@pytest.mark.parametrize("targets", [(part,) for part in EVERY_PART] + [EVERY_PART])
def test_lora_at_zero_is_the_base_to_the_bit(targets: tuple[str, ...]) -> None:
    model = tiny_lm()
    before = logits(model)
    adapted = add_lora(model, spec(*targets))
    assert is_adapted(adapted)
    assert not is_adapted(base_of(adapted))
    assert torch.equal(logits(adapted), before)
    disturb(adapted)
    assert not torch.equal(logits(adapted), before)


@pytest.mark.parametrize("part", EVERY_PART)
def test_training_a_part_moves_that_part_and_no_other(tmp_path: Path, part: str) -> None:
    base = tiny_lm()
    original = copy.deepcopy(base)
    model = add_lora(base, spec(part))
    train(model, tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        assert torch.equal(parameter, original.get_parameter(plain)), name  # frozen: bit-identical
    folded = merged(model)
    moved = {
        part_of(name)
        for name, parameter in folded.named_parameters()
        if not torch.equal(parameter, original.get_parameter(name))
    }
    assert moved == {part}


def test_merged_weights_give_the_logits_of_the_adapter() -> None:
    model = add_lora(tiny_lm(), spec())
    disturb(model)
    before = logits(model)
    plain = merged(model)
    assert isinstance(plain, MoEForCausalLM)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    same = tiny_lm()
    assert merged(same) is same


@pytest.mark.parametrize(
    ("config", "missing", "present"),
    [
        ({"mlp_layer_types": ["dense", "dense"]}, "experts", "attention, ffn"),
        ({"mlp_layer_types": ["dense", "dense"]}, "router", "attention, ffn"),
        ({"mlp_layer_types": ["sparse", "sparse"]}, "ffn", "attention, experts, router"),
    ],
)
def test_a_part_that_the_model_lacks_is_refused_with_what_it_has(
    config: dict[str, Any], missing: str, present: str
) -> None:
    with pytest.raises(UserError) as caught:
        add_lora(tiny_lm(**config), spec("attention", missing))
    assert str(caught.value) == (
        f"lora target {missing!r} matches nothing: this model has {present}."
    )


def test_targets_cover_every_layer_and_nothing_else() -> None:
    modules, parameters = lora_targets(tiny_lm(), ("attention", "experts", "router"))
    attention = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "koqv"]
    assert sorted(modules) == ["model.layers.0.mlp.gate", *attention]
    assert sorted(parameters) == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 0}, "lora rank 0 must be at least 1 (0 means a full update)."),
        (
            {"targets": ("attention", "mlp")},
            "lora targets ['attention', 'mlp']: name some of attention, experts, router, ffn.",
        ),
        ({"targets": ()}, "lora targets []: name some of attention, experts, router, ffn."),
        (
            {"targets": ("head",)},
            "lora targets ['head']: name some of attention, experts, router, ffn.",
        ),
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        LoraSpec(**{"rank": 2, "alpha": 4.0, **changes})
    assert str(caught.value) == sentence


def test_a_scalar_head_is_trained_in_full_beside_the_adapter() -> None:
    model = add_lora(scalar_model(tiny_lm()), spec("attention"))
    trained = {part for part, (count, _) in trainable_by_part(model).items() if count}
    assert trained == {"attention", "head"}
    heads = [n for n, p in model.named_parameters() if p.requires_grad and part_of(n) == "head"]
    assert len(heads) == 2  # weight and bias


# --- several adapters


def two_adapters() -> Any:
    model: Any = add_lora(tiny_lm(), spec(), name="sft")
    disturb(model)
    copy_adapter(model, "sft", name="policy")
    return model


def adapter(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        key.replace(f".{name}.", ".*."): parameter.detach().clone()
        for key, parameter in model.named_parameters()
        if f".{name}." in key
    }


def test_a_copied_adapter_is_equal_active_and_alone_trainable() -> None:
    model: Any = add_lora(tiny_lm(), spec(), name="sft")
    disturb(model)
    before = logits(model)
    copy_adapter(model, "sft", name="policy")
    source, target = adapter(model, "sft"), adapter(model, "policy")
    assert set(source) == set(target)
    assert len(source) > 0
    for name, tensor in source.items():
        assert torch.equal(tensor, target[name]), name
    assert model.active_adapter == "policy"
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".policy." in name for name in trained)


def test_a_copied_adapter_is_its_own(tmp_path: Path) -> None:
    model = two_adapters()
    source = adapter(model, "sft")
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    train(model, tmp_path)
    for name, tensor in adapter(model, "sft").items():
        assert torch.equal(tensor, source[name])
    for name, tensor in base.items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert any(not torch.equal(t, source[n]) for n, t in adapter(model, "policy").items())


def state(model: Any) -> tuple[Any, dict[str, bool], bool]:
    return (
        model.active_adapter,
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        model.get_model_status().enabled,
    )


@pytest.mark.parametrize("name", ["sft", "policy", None])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_borrowed_adapter_is_given_back_even_after_an_error(
    name: str | None, fails: bool, frozen: bool
) -> None:
    model = two_adapters()
    if frozen:  # nothing is trainable, and borrowing must not change that
        model.requires_grad_(False)
    before, live = state(model), logits(model)
    error = None
    try:
        with active_adapter(model, name):
            if fails:
                raise RuntimeError("in between")
    except RuntimeError as raised:
        error = str(raised)
    assert error == ("in between" if fails else None)
    assert state(model) == before
    assert torch.equal(logits(model), live)


def test_a_borrowed_adapter_is_the_one_that_runs() -> None:
    base = tiny_lm()
    plain = logits(base)
    model: Any = add_lora(base, spec(), name="sft")
    disturb(model, seed=1)
    first = logits(model)
    copy_adapter(model, "sft", name="policy")
    disturb(model, seed=2)
    second = logits(model)
    for name, expected in (("sft", first), ("policy", second), (None, plain)):
        with active_adapter(model, name):
            assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), second)


def test_borrowing_between_forward_and_backward_does_not_disturb_the_gradient() -> None:
    gradients = []
    for borrow in (False, True):
        model = two_adapters().train()
        loss = model(input_ids=ids()).logits.square().mean()
        if borrow:
            with active_adapter(model, "sft"), torch.no_grad():
                model(input_ids=ids(2))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 0
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


# --- dropout


def test_dropout_switched_off_makes_two_passes_equal() -> None:
    model = tiny_lm(attention_dropout=0.5).train()
    with torch.no_grad():
        torch.manual_seed(0)
        noisy = [model(input_ids=ids()).logits for _ in range(2)]
        assert not torch.equal(*noisy)
        disable_dropout(model)
        calm = [model(input_ids=ids()).logits for _ in range(2)]
    assert torch.equal(*calm)
    assert model.training
    assert model.config.attention_dropout == 0.0


def test_dropout_is_switched_off_under_adapters_and_in_plain_modules() -> None:
    model = add_lora(tiny_lm(attention_dropout=0.5), spec()).train()
    disable_dropout(model)
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=ids()).logits for _ in range(2)))
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
    disable_dropout(plain)
    assert plain[1].p == 0.0


def test_a_saved_adapter_names_its_targets_in_an_order_that_is_no_sets(tmp_path: Path) -> None:
    model = add_lora(tiny_lm(), LoraSpec(rank=2, alpha=4, targets=("attention", "experts")))
    save_adapter(model, tmp_path / "adapter", base="there")
    document = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert len(document["target_modules"]) > 4
    for name in ("target_modules", "target_parameters"):
        assert document[name] == sorted(document[name])
    assert list(document) == sorted(document)


def test_adapters_do_not_tie_or_rename_what_a_checkpoint_holds_of_the_base() -> None:
    base = tiny_lm()
    names = set(live_tensors(base))
    adapted = live_tensors(add_lora(base, spec()))
    plain = {
        name.removeprefix("base_model.model.").replace("base_layer.", "")
        for name in adapted
        if "lora_" not in name
    }
    assert plain == names
