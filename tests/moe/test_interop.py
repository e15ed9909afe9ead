"""Other families' models as ours and back: equal to their own classes, switch by switch.

The models are random and small (4 layers, width 24), written by transformers as it publishes them.
Tolerance 1e-5 throughout: float32 sums in another order differ by 1e-7 to 1e-6 at these sizes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moe import MoEConfig, MoEForCausalLM, MoEForReward
from moe.budget import budget, known_config, known_names
from moe.errors import UserError
from moe.interop import load, save
from moe.layouts import LAYOUTS, our_config, their_config
from moe.record import record_routing
from sft.adapt import lora_targets

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS: dict[str, Any] = {**EXPERTS, "moe_intermediate_size": 12}
SHARED: dict[str, Any] = {**QWEN_EXPERTS, "shared_expert_intermediate_size": 28}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# family and switches -> the family's own configuration
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama biases tied head_dim": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "llama theta": (LlamaConfig, {"rope_parameters": {"rope_theta": 300.0}}),
    "llama rope linear": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama rope llama3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "mistral rope yarn": (MistralConfig, {"rope_parameters": YARN, "sliding_window": None}),
    "mistral window head_dim": (MistralConfig, {"sliding_window": 5, "head_dim": 10}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 windows tied": (
        Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2 named layers": (
        Qwen2Config,
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "sliding_window": None}),
    "mixtral window tied": (
        MixtralConfig,
        {"num_local_experts": 5, "sliding_window": 4, "tie_word_embeddings": True},
    ),
    "olmoe": (OlmoeConfig, EXPERTS),
    "olmoe clip renormalised biases": (
        OlmoeConfig,
        {**EXPERTS, "clip_qkv": 0.6, "norm_topk_prob": True, "attention_bias": True},
    ),
    "qwen2_moe": (Qwen2MoeConfig, SHARED),
    "qwen2_moe steps windows no bias": (
        Qwen2MoeConfig,
        {
            **SHARED,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": (Qwen3MoeConfig, {**QWEN_EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3_moe dense window bias": (
        Qwen3MoeConfig,
        {
            **QWEN_EXPERTS,
            "head_dim": 10,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
}


def foreign(case: str) -> PreTrainedModel:
    """The family's own random model; weights large enough that each switch is felt."""
    kind, fields = FAMILIES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, MoEForCausalLM]:
    theirs = foreign(request.param)
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder)
    return theirs, load(folder)


def padded() -> dict[str, Tensor]:
    """Three rows: padding on the left, on the right, and none; longer than every window."""
    torch.manual_seed(1)
    ids = torch.randint(1, TINY["vocab_size"], (3, 17))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, -6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """The ids of real tokens that a real token predicts."""
    mask = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~mask, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(~mask[:, :-1], -100)
    return labels


def equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_model_is_of_our_class_in_eval_mode(
    pair: tuple[PreTrainedModel, MoEForCausalLM],
) -> None:
    theirs, ours = pair
    assert type(ours) is MoEForCausalLM and not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()


def test_logits_of_real_tokens_are_equal(pair: tuple[PreTrainedModel, MoEForCausalLM]) -> None:
    batch = padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs, ours = (model(**batch).logits[real] for model in pair)
    assert theirs.std() > 0.1  # a model of zeros would agree with everything
    equal(ours, theirs)


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_every_gradient_are_equal(
    pair: tuple[PreTrainedModel, MoEForCausalLM], training: bool
) -> None:
    batch = padded()
    losses = []
    for model in pair:
        model.train(training)
        model.zero_grad()
        loss = model(**batch, labels=labels_of(batch)).loss
        loss.backward()
        losses.append(loss.detach())
        model.eval()
    equal(losses[1], losses[0])
    theirs, ours = (dict(model.named_parameters()) for model in pair)
    for name, parameter in ours.items():
        assert parameter.grad is not None and theirs[name].grad is not None, name
        equal(parameter.grad, theirs[name].grad)


def test_every_layer_chooses_the_same_experts(
    pair: tuple[PreTrainedModel, MoEForCausalLM],
) -> None:
    theirs, ours = pair
    if not ours.config.sparse_layers:
        pytest.skip("a dense family has no experts")
    batch = padded()
    real_T = batch["attention_mask"].bool().flatten()
    traces = []
    for model in pair:
        with torch.no_grad(), record_routing(model) as trace:
            model(**batch)
        traces.append(trace.forwards[0].routings)
    assert len(traces[0]) == len(traces[1]) == len(ours.config.sparse_layers)
    for own, other in zip(traces[1], traces[0], strict=True):
        assert torch.equal(own.expert_TK[real_T], other.expert_TK[real_T])
        equal(own.weight_TK[real_T], other.weight_TK[real_T])


def test_greedy_generation_with_a_cache_is_equal(
    pair: tuple[PreTrainedModel, MoEForCausalLM],
) -> None:
    batch = padded()
    left = {name: tensor[[0, 2]] for name, tensor in batch.items()}
    theirs, ours = (
        model.generate(**left, max_new_tokens=9, do_sample=False, pad_token_id=0) for model in pair
    )
    assert torch.equal(ours, theirs)


def test_what_is_saved_opens_in_the_familys_class_and_comes_back_bit_for_bit(
    pair: tuple[PreTrainedModel, MoEForCausalLM], tmp_path: Path
) -> None:
    theirs, ours = pair
    layout = theirs.config.model_type
    assert save(ours, tmp_path / "out", layout=layout) == tmp_path / "out"
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(reopened) is type(theirs)
    batch = padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        equal(reopened(**batch).logits[real], theirs(**batch).logits[real])
    again = load(tmp_path / "out")
    own, other = ours.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    where = {"_name_or_path": "", "load_balancing_coef": 0}
    assert again.config.to_dict() | where == ours.config.to_dict() | where


def test_the_published_names_are_the_familys_own(
    pair: tuple[PreTrainedModel, MoEForCausalLM], tmp_path: Path
) -> None:
    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "theirs")
    save(ours, tmp_path / "ours", layout=theirs.config.model_type)
    own, other = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_experts_stacked_as_transformers_holds_them_are_opened_too(tmp_path: Path) -> None:
    theirs = foreign("mixtral")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118
    ids = padded()["input_ids"][2:]
    with torch.no_grad():
        equal(load(tmp_path)(ids).logits, theirs(ids).logits)


def test_the_budget_counts_every_part_of_the_new_models(
    pair: tuple[PreTrainedModel, MoEForCausalLM],
) -> None:
    theirs, ours = pair
    counted = budget(ours.config)
    assert counted.total == sum(p.numel() for p in ours.parameters())
    assert counted.active == budget(theirs.config).active


@pytest.mark.parametrize("case", ["olmoe", "qwen2_moe", "qwen3_moe dense window bias"])
def test_checkpointing_leaves_the_gradients_of_the_new_parts_alone(
    case: str, tmp_path: Path
) -> None:
    foreign(case).save_pretrained(tmp_path)
    batch = padded()
    gradients = []
    for checkpointed in (False, True):
        model = load(tmp_path).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**batch, labels=labels_of(batch)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize(
    ("case", "part", "told"),
    [
        ("qwen2_moe", "ffn", {"shared_expert.gate_proj", "shared_expert_gate"}),
        ("qwen2_moe", "experts", {"experts.gate_up_proj", "experts.down_proj"}),
        ("olmoe", "attention", {"self_attn.q_proj", "self_attn.o_proj"}),
        ("qwen3_moe", "router", {"mlp.gate"}),
    ],
)
def test_adapters_find_the_new_parts(case: str, part: str, told: set[str], tmp_path: Path) -> None:
    foreign(case).save_pretrained(tmp_path)
    modules, parameters = lora_targets(load(tmp_path), [part])
    found = {".".join(name.split(".")[-2:]) for name in modules + parameters}
    found |= {name.split(".")[-1] for name in modules}
    assert told <= found, found
    assert not [name for name in modules if "norm" in name]


def test_hugging_faces_rule_for_the_balance_term_is_followed(tmp_path: Path) -> None:
    theirs = foreign("mixtral")
    theirs.config.router_aux_loss_coef = 0.05
    for observed, coef in ((False, 0.0), (True, 0.05)):
        theirs.config.output_router_logits = observed
        theirs.save_pretrained(tmp_path / str(observed))
        config = load(tmp_path / str(observed)).config
        assert (config.load_balancing_coef, config.z_loss_coef) == (coef, 0.0)


def test_our_own_folders_are_opened_as_well(tmp_path: Path) -> None:
    model = MoEForCausalLM(MoEConfig(hidden_size=16, num_hidden_layers=2, capacity_factor=1.5))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.capacity_factor == 1.5
    other = loaded.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def test_weights_are_float32_unless_another_dtype_is_asked_for(tmp_path: Path) -> None:
    foreign("mixtral").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype=None).dtype == torch.bfloat16
    half = load(tmp_path, dtype=torch.float16)
    assert half.dtype == torch.float16 and half.config.dtype == torch.float16


def test_a_loaded_model_keeps_how_it_generates(tmp_path: Path) -> None:
    theirs = foreign("llama")
    theirs.save_pretrained(tmp_path / "in")
    settings = {"max_new_tokens": 7, "temperature": 0.9, "do_sample": False}  # as Llama 2 has it
    text = json.dumps(settings)
    (tmp_path / "in" / "generation_config.json").write_text(text, encoding="utf-8")
    model = load(tmp_path / "in")
    save(model, tmp_path / "out", layout="llama")
    for loaded in (model, load(tmp_path / "out")):
        assert loaded.generation_config.max_new_tokens == 7
        assert loaded.generation_config.temperature == 0.9


# --- shards --------------------------------------------------------------------------------------


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    theirs = foreign("mixtral")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load(tmp_path / "theirs")
    save(ours, tmp_path / "ours", max_shard_size="20KB")
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file()
    ids = padded()["input_ids"][2:]
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        equal(reopened(ids).logits, theirs(ids).logits)
        assert torch.equal(load(tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_the_files_of_a_hub_cache_are_links_and_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    foreign("llama").save_pretrained(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load(snapshot).config.num_hidden_layers == 4


# --- what a layout cannot express ----------------------------------------------------------------

OURS: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 12,
    "num_experts": 4,
}
UNSAID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mixtral", {"capacity_factor": 1.25}, ["capacity_factor 1.25", "no family's layout can"]),
    ("mixtral", {"norm_topk_prob": False}, ["norm_topk_prob False (it has only True)"]),
    (
        "mixtral",
        {"shared_expert_intermediate_size": 8},
        ["shared_expert_intermediate_size 8", "use layout qwen2_moe"],
    ),
    (
        "mixtral",
        {"sliding_window": 4, "window_pattern": "SL"},
        ["layer_types ['sliding_attention', 'full_attention']", "all slide or none does"],
    ),
    ("mixtral", {"qk_norm": "head"}, ["qk_norm head", "use layout qwen3_moe"]),
    ("mixtral", {"attention_bias": True}, ["attention_bias True"]),
    ("mixtral", {"mlp_layer_types": ["dense", "sparse"]}, ["mlp_layer_types", "all sparse"]),
    ("mixtral", {"mlp_layer_types": ["dense"] * 2}, ["mlp_layer_types", "llama or mistral"]),
    ("llama", {}, ["mlp_layer_types", "use layout mixtral"]),
    ("llama", {"mlp_layer_types": ["dense"] * 2, "sliding_window": 4}, ["sliding_window 4"]),
    ("qwen2", {"mlp_layer_types": ["dense"] * 2}, ["qkv_bias False (it has only True)"]),
    ("olmoe", {}, ["qk_norm None (it has only projection)"]),
    ("olmoe", {"qk_norm": "projection", "head_dim": 8}, ["head_dim 8", "hidden_size 24"]),
    ("qwen2_moe", {}, ["shared_expert_intermediate_size None"]),
    ("qwen3_moe", {"qk_norm": "head", "clip_qkv": 2.0}, ["clip_qkv 2.0"]),
    ("switch", {}, ["layout 'switch' is unknown", "llama, mistral, qwen2, mixtral"]),
]


@pytest.mark.parametrize(("layout", "fields", "told"), UNSAID, ids=lambda v: str(v)[:40])
def test_what_a_layout_cannot_express_is_refused_by_name_and_nothing_is_written(
    layout: str, fields: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    model = MoEForCausalLM(MoEConfig(**{**OURS, **fields}))
    with pytest.raises(UserError) as caught:
        save(model, tmp_path / "out", layout=layout)
    message = str(caught.value)
    assert all(part in message for part in told), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({}, "mixtral"),
        ({"norm_topk_prob": False, "qk_norm": "projection", "num_experts_per_tok": 1}, "olmoe"),
        ({"sliding_window": 3, "window_pattern": "SL", "qkv_bias": True}, "qwen2_moe"),
        ({"qk_norm": "head", "mlp_layer_types": ["sparse", "dense"]}, "qwen3_moe"),
        ({"mlp_layer_types": ["dense"] * 2}, "llama"),
    ],
)
def test_our_own_model_opens_in_transformers(
    fields: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    if layout == "qwen2_moe":
        fields = {**fields, "shared_expert_intermediate_size": 10}
    model = MoEForCausalLM(MoEConfig(**{**OURS, **fields})).eval()
    save(model, tmp_path / "out", layout=layout)
    ids = torch.randint(31, (2, 9))
    with torch.no_grad():
        equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, model(ids).logits)


def test_other_heads_and_used_folders_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MoEForReward"):
        save(MoEForReward(MoEConfig(**OURS)), tmp_path / "out")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is there already"):
        save(MoEForCausalLM(MoEConfig(**OURS)), tmp_path)


@pytest.mark.parametrize("name", known_names())
def test_published_configurations_are_understood_and_have_the_published_size(name: str) -> None:
    fields = known_config(name)
    if fields["model_type"] not in LAYOUTS:
        pytest.skip("of a family that is not opened")
    layout = LAYOUTS[fields["model_type"]]
    config = our_config(CONFIG_MAPPING[layout.name].from_dict(fields), layout)
    ours, published = budget(config), budget(name)
    assert (ours.total, ours.active) == (published.total, published.active)
    assert their_config(config, layout).model_type == layout.name


def test_every_layout_names_fields_that_both_sides_have() -> None:
    own = set(MoEConfig().to_dict())
    for layout in LAYOUTS.values():
        assert set(layout.fields) | set(layout.fixed) <= own
        assert not set(layout.fields) & set(layout.fixed)


# --- folders that are refused --------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Tensor]]:
    """config.json and tensors of a small Mixtral."""
    folder = tmp_path_factory.mktemp("whole")
    foreign("mixtral").save_pretrained(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    return text, load_file(folder / "model.safetensors")


def write(folder: Path, config: str, tensors: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {**json.loads(config), **changes}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(folder: Path, *told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert all(part in message for part in told), message
    assert "\n" not in message


KEY = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor_is_named(whole: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    config, tensors = whole
    name = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    refused(write(tmp_path, config, rest), "lacks 1 tensors", name)


def test_an_extra_tensor_is_named(whole: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    config, tensors = whole
    more = {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}
    refused(write(tmp_path, config, more), "has 1 tensors", "q_proj.bias", "would be lost")


def test_a_transposed_tensor_is_named(whole: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    config, tensors = whole
    turned = {**tensors, KEY: tensors[KEY].T.contiguous()}
    refused(write(tmp_path, config, turned), KEY, "(24, 12)", "(12, 24)", "transposed")


def test_a_model_of_another_size_is_not_cut_to_fit(
    whole: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    refused(write(tmp_path, *whole, num_local_experts=4), "has 12 tensors", "experts.4.w1.weight")
    refused(write(tmp_path, *whole, num_local_experts=6), "lacks 12 tensors", "experts.5.w1.weight")
    wider = write(tmp_path, *whole, intermediate_size=24)
    refused(wider, "has the shape (20, 24)", "config.json makes it (24, 24)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_an_unexpected_dtype_is_named(
    whole: tuple[str, dict[str, Tensor]], tmp_path: Path, dtype: torch.dtype
) -> None:
    config, tensors = whole
    refused(
        write(tmp_path, config, {**tensors, KEY: tensors[KEY].to(dtype)}),
        KEY,
        "is stored as",
        "only float32, float16, bfloat16",
    )


def test_mixed_dtypes_need_a_choice(whole: tuple[str, dict[str, Tensor]], tmp_path: Path) -> None:
    config, tensors = whole
    write(tmp_path, config, {**tensors, KEY: tensors[KEY].half()})
    with pytest.raises(UserError, match="float16 and float32: say which dtype"):
        load(tmp_path, dtype=None)


def test_a_tied_head_with_values_of_its_own_is_refused(tmp_path: Path) -> None:
    theirs = foreign("llama biases tied head_dim")
    theirs.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    same = write(tmp_path / "same", config, {**tensors, "lm_head.weight": table.clone()})
    assert torch.equal(load(same).lm_head.weight, table)
    other = write(tmp_path / "other", config, {**tensors, "lm_head.weight": table + 1})
    refused(other, "lm_head.weight", "tie_word_embeddings")


def test_stored_rotary_frequencies_of_old_checkpoints_do_no_harm(
    whole: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    config, tensors = whole
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    assert load(write(tmp_path, config, old)).config.num_experts == 5


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"PK\x03\x04 not safetensors at all"])
def test_a_file_that_is_no_safetensors_is_refused(
    whole: tuple[str, dict[str, Tensor]], tmp_path: Path, content: bytes
) -> None:
    folder = write(tmp_path, *whole)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors is no whole safetensors file")


def test_a_file_that_was_cut_off_is_refused(
    whole: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = write(tmp_path, *whole)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-7])
    refused(folder, "no whole safetensors file")


def test_a_pickle_is_not_opened_and_the_reason_is_told(
    whole: tuple[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = write(tmp_path, *whole)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle", "can run code", "safetensors")


def test_folders_without_a_model_say_what_they_lack(tmp_path: Path) -> None:
    refused(tmp_path / "none", "No model folder")
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(tmp_path, "adapter", "merge")


# --- shards and links that do not belong ---------------------------------------------------------


@pytest.fixture()
def sharded(whole: tuple[str, dict[str, Tensor]], tmp_path: Path) -> Path:
    """Two shards with their index."""
    config, tensors = whole
    folder = write(tmp_path / "model", config, {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    reindex(folder, {name: file for file, part in halves.items() for name in part})
    return folder


def reindex(folder: Path, weight_map: Any) -> None:
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def index_of(folder: Path) -> dict[str, str]:
    text = (folder / "model.safetensors.index.json").read_text(encoding="utf-8")
    placed: dict[str, str] = json.loads(text)["weight_map"]
    return placed


def test_shards_that_belong_together_open(sharded: Path) -> None:
    assert load(sharded).config.num_experts == 5


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    both = load_file(sharded / "b.safetensors")
    name = next(iter(index_of(sharded)))
    save_file({**both, name: torch.zeros(2)}, sharded / "b.safetensors")
    refused(sharded, name, "is in both a.safetensors and b.safetensors")


def test_an_index_that_names_another_shard_is_refused(sharded: Path) -> None:
    placed = index_of(sharded)
    name = next(iter(placed))
    reindex(sharded, {**placed, name: "b.safetensors"})
    refused(sharded, f"puts {name} in b.safetensors, but a.safetensors holds it")
    reindex(sharded, {key: file for key, file in placed.items() if key != name})
    refused(sharded, f"puts {name} in no file, but a.safetensors holds it")
    reindex(sharded, {**placed, "ghost.weight": "a.safetensors"})
    refused(sharded, "puts ghost.weight in a.safetensors, but no file holds it")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    refused(sharded, "lacks b.safetensors")


@pytest.mark.parametrize(
    "name", ["../b.safetensors", "deeper/../../b.safetensors", "/b.safetensors"]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded: Path, name: str) -> None:
    outside = sharded.parent / "b.safetensors"
    (sharded / "b.safetensors").rename(outside)
    away = str(outside) if name.startswith("/") else name
    placed = index_of(sharded)
    reindex(sharded, {k: away if f == "b.safetensors" else f for k, f in placed.items()})
    refused(sharded, repr(away), "leads out of the folder")


@pytest.mark.parametrize("name", ["b.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_link_that_leaves_the_folder_is_refused(sharded: Path, name: str) -> None:
    outside = sharded.parent / name
    (sharded / name).rename(outside)
    (sharded / name).symlink_to(outside)
    refused(sharded, name, "leads out of the folder")


def test_an_index_without_sense_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    for weight_map in (None, {}, []):
        reindex(sharded, weight_map)
        refused(sharded, "has no weight_map")
    reindex(sharded, {"lm_head.weight": "a.bin"})
    refused(sharded, "'a.bin'", "only .safetensors")
    reindex(sharded, {"lm_head.weight": 7})
    refused(sharded, "in 7")
    index.write_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "utf-8")
    refused(sharded, "'x' comes twice")
    index.write_text("{", encoding="utf-8")
    refused(sharded, "no JSON")


def test_one_file_beside_an_index_is_ambiguous(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "model.safetensors")
    refused(sharded, "has both model.safetensors and model.safetensors.index.json")


# --- configurations that are refused -------------------------------------------------------------

UNBUILT: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mixtral", {"model_type": "gpt_oss"}, ["type 'gpt_oss'", "llama, mistral", "switchyard"]),
    ("mixtral", {"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
    ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise 0.1"]),
    ("mixtral", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ("mixtral", {"architectures": ["MixtralForSequenceClassification"]}, ["SequenceClass"]),
    ("mixtral", {"layer_types": ["sliding_attention"] * 4}, ["layer_types", "no effect"]),
    ("mixtral", {"hidden_size": "wide"}, ["is no mixtral configuration"]),
    ("mixtral", {"num_experts_per_tok": 9}, ["top_k 9", "num_experts 5"]),
    ("llama", {"sliding_window": 4}, ["sliding_window 4", "llama layout"]),
    (
        "llama",
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ["'dynamic'", "default, linear, llama3, yarn"],
    ),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor 0.5"],
    ),
    ("qwen2", {"layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
]


@pytest.mark.parametrize(("case", "changes", "told"), UNBUILT, ids=lambda v: str(v)[:40])
def test_an_option_that_we_do_not_build_is_refused_by_name(
    case: str, changes: dict[str, Any], told: list[str], tmp_path: Path
) -> None:
    foreign(case).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(fields), encoding="utf-8")
    refused(tmp_path, *told)


def test_old_names_of_rotary_fields_are_understood(tmp_path: Path) -> None:
    theirs = foreign("llama rope linear")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["rope_parameters"]
    fields |= {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    path.write_text(json.dumps(fields), encoding="utf-8")
    ids = padded()["input_ids"][2:]
    with torch.no_grad():
        equal(load(tmp_path)(ids).logits, theirs(ids).logits)


def test_our_own_folder_with_a_selection_bias_comes_back_with_the_bias_exact(
    tmp_path: Path,
) -> None:
    config = MoEConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        scoring_func="sigmoid",
        router_selection_bias=True,
    )
    model = MoEForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias += torch.tensor([0.001, -0.001, 1 / 3, 0.0])
    model.save_pretrained(tmp_path / "own")
    for dtype in (torch.float32, torch.bfloat16):
        again = load(tmp_path / "own", dtype=dtype)
        assert again.dtype == dtype
        for old, new in zip(model.model.layers, again.model.layers, strict=True):
            bias_E = new.mlp.gate.e_score_correction_bias
            assert bias_E.dtype == torch.float32
            assert torch.equal(bias_E, old.mlp.gate.e_score_correction_bias)
