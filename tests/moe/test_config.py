"""What a configuration derives, and what it says about contradictions."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import moe.heads  # noqa: F401  registers the model type
from moe.config import ROUTER_FIELDS, MoEConfig
from moe.errors import UserError
from moe.layouts import LAYOUTS, PLAIN_ROUTER
from moe.router_spec import RouterSpec


def test_the_default_is_all_sparse_with_full_attention() -> None:
    config = MoEConfig(num_hidden_layers=3)
    assert config.layer_types == ["full_attention"] * 3
    assert config.mlp_layer_types == ["sparse"] * 3 and config.sparse_layers == (0, 1, 2)
    assert config.head_dim == 32


def test_a_pattern_is_read_cyclically() -> None:
    config = MoEConfig(num_hidden_layers=6, sliding_window=4, window_pattern="SSSL")
    assert [kind[0] for kind in config.layer_types or []] == list("sssfss")


def test_a_window_without_a_pattern_slides_everywhere() -> None:
    assert set(MoEConfig(sliding_window=4).layer_types or []) == {"sliding_attention"}


def test_the_router_spec_follows_from_the_fields() -> None:
    spec = MoEConfig(
        num_experts=6, num_experts_per_tok=3, norm_topk_prob=False, capacity_factor=1.5
    ).router_spec
    assert (spec.num_experts, spec.top_k, spec.normalize_weights) == (6, 3, False)
    assert spec.capacity_factor == 1.5


# One value other than the default for every field about the router, in combinations that can be.
ROUTERS: list[dict[str, Any]] = [
    {
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "router_selection_bias": True,
        "router_bias": True,
        "n_group": 4,
        "topk_group": 2,
        "group_score": "max",
        "router_jitter_noise": 0.01,
        "router_logit_noise": 0.1,
        "shared_expert_intermediate_size": 16,
        "shared_expert_mode": "added",
    },
    {
        "capacity_factor": 1.25,
        "capacity_scope": "sequence",
        "capacity_rounding": "floor",
        "drop_order": "score",
    },
    {"router_kind": "hash", "hash_seed": 7, "load_balancing_coef": 0.0},
    {
        "router_kind": "expert_choice",
        "norm_topk_prob": False,
        "load_balancing_coef": 0.0,
        "z_loss_coef": 0.0,
    },
]


@pytest.mark.parametrize("fields", ROUTERS, ids=lambda fields: next(iter(fields)))
def test_every_router_field_reaches_the_spec_and_survives_saving(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = MoEConfig(**fields)
    for name in fields.keys() & ROUTER_FIELDS.keys():
        assert getattr(config.router_spec, ROUTER_FIELDS[name]) == fields[name]
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    where = {"_name_or_path": ""}
    assert loaded.to_dict() | where == config.to_dict() | where
    assert loaded.router_spec == config.router_spec


def test_the_configurations_here_use_every_router_field_and_the_spec_has_no_others() -> None:
    used = {name for fields in ROUTERS for name in fields}
    assert set(ROUTER_FIELDS) - used == {"num_experts", "num_experts_per_tok"}
    assert set(ROUTER_FIELDS.values()) == {f.name for f in dataclasses.fields(RouterSpec)}
    spec = MoEConfig().router_spec
    assert spec == RouterSpec(num_experts=8, top_k=2)


def test_a_configuration_of_before_these_fields_still_opens(tmp_path: Path) -> None:
    written = {"model_type": "switchyard", "hidden_size": 64, "shared_expert_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoEConfig)
    assert repr(config.router_spec) == "RouterSpec(num_experts=8, top_k=2)"
    assert config.shared_expert_mode == "gated"


def test_a_layout_of_another_family_names_every_router_field_it_cannot_express() -> None:
    plain = {name for layout in LAYOUTS.values() for name in layout.fixed}
    ours = {*ROUTER_FIELDS, "router_bias", "shared_expert_mode"}
    travel = {"num_experts", "num_experts_per_tok"}
    assert ours - plain == travel
    sparse = [layout for layout in LAYOUTS.values() if "sparse" in layout.ffn]
    for layout in sparse:
        assert set(PLAIN_ROUTER) <= set(layout.fixed)
        assert all(layout.fixed[name] == getattr(MoEConfig(), name) for name in PLAIN_ROUTER)


def test_the_number_of_experts_has_two_names() -> None:
    config = MoEConfig(num_local_experts=5)
    assert config.num_experts == config.num_local_experts == 5


def test_a_dense_model_needs_no_router() -> None:
    config = MoEConfig(mlp_layer_types=["dense"] * 4, num_experts_per_tok=1)
    assert config.sparse_layers == ()


def test_no_remote_code_and_no_pooled_balance_loss_are_declared() -> None:
    config = MoEConfig()
    assert config.auto_map == {} and config.router_aux_loss_coef == 0


def test_a_configuration_survives_saving(tmp_path: Path) -> None:
    config = MoEConfig(
        sliding_window=5,
        window_pattern="SL",
        mlp_layer_types=["dense", "sparse", "sparse", "dense"],
        rope_parameters={"rope_theta": 500.0},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    where = {"_name_or_path": ""}
    assert isinstance(loaded, MoEConfig)
    assert loaded.to_dict() | where == config.to_dict() | where


SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads max_position_embeddings"
).split()

MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    *(({name: 0}, [name, "0", "at least 1"]) for name in SIZES),
    (
        {"hidden_size": 30, "num_attention_heads": 4},
        ["hidden_size 30", "num_attention_heads 4", "head_dim"],
    ),
    ({"head_dim": 7}, ["head_dim 7", "even"]),
    (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        ["num_attention_heads 4", "num_key_value_heads 3"],
    ),
    ({"sliding_window": 0, "window_pattern": "S"}, ["sliding_window 0", "at least 1"]),
    ({"window_pattern": "SL"}, ["sliding window", "sliding_window is None"]),
    ({"sliding_window": 4, "window_pattern": "L"}, ["sliding_window 4", "no effect", "full_att"]),
    ({"window_pattern": "SXL", "sliding_window": 4}, ["'SXL'", "'X'", "S (window)"]),
    (
        {"window_pattern": "SL", "layer_types": ["full_attention"] * 4},
        ["window_pattern 'SL'", "layer_types ['full_attention'", "give one"],
    ),
    ({"layer_types": ["full_attention"]}, ["layer_types ['full_attention']", "4 layers"]),
    ({"layer_types": ["half"] * 4}, ["'half'", "sliding_attention, full_attention"]),
    ({"mlp_layer_types": ["sparse"] * 3}, ["mlp_layer_types", "4 layers"]),
    ({"mlp_layer_types": ["sparse", "dense", "moe", "moe"]}, ["'moe'", "sparse, dense"]),
    ({"rms_norm_eps": 0.0}, ["rms_norm_eps 0.0", "above 0"]),
    ({"load_balancing_coef": -0.1}, ["load_balancing_coef -0.1", "at least 0"]),
    ({"z_loss_coef": float("nan")}, ["z_loss_coef nan", "finite"]),
    ({"router_aux_loss_coef": 0.01}, ["router_aux_loss_coef 0.01", "load_balancing_coef"]),
    ({"num_experts": 4, "num_experts_per_tok": 5}, ["top_k 5", "num_experts 4"]),
    ({"num_local_experts": 1}, ["top_k 2", "num_experts 1"]),
    ({"num_experts_per_tok": 1}, ["top_k 1", "norm_topk_prob to False"]),
    ({"capacity_factor": 0.0}, ["capacity_factor 0.0", "above 0", "None"]),
    ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "no effect", "silu"]),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["'dynamic'", "default, linear, llama3, yarn"],
    ),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["'linear'", "'factor'"]),
    (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor 0.5", "whole head"],
    ),
    ({"qk_norm": "row"}, ["qk_norm 'row'", "projection, head"]),
    ({"clip_qkv": 0.0}, ["clip_qkv 0.0", "above 0"]),
    ({"qkv_bias": True, "attention_bias": True}, ["qkv_bias", "attention_bias", "one of them"]),
    ({"mlp_bias": True}, ["mlp_bias", "no effect", "dense"]),
    ({"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size 0", "at least 1"]),
    (
        {"shared_expert_intermediate_size": 8, "mlp_layer_types": ["dense"] * 4},
        ["shared_expert_intermediate_size 8", "needs a sparse layer"],
    ),
    (
        {"shared_expert_intermediate_size": 8, "shared_expert_mode": "mean"},
        ["shared_expert_mode 'mean'", "gated, added, averaged"],
    ),
    (
        {"shared_expert_mode": "added"},
        ["shared_expert_mode 'added'", "shared_expert_intermediate_size None"],
    ),
    (
        {"router_kind": "hash"},
        ["load_balancing_coef 0.01", "router_kind 'hash'", "set it to 0"],
    ),
    (
        {"router_kind": "expert_choice", "norm_topk_prob": False, "load_balancing_coef": 0.0},
        ["z_loss_coef 0.001", "'expert_choice'", "set it to 0"],
    ),
    (
        {"scoring_func": "sigmoid", "mlp_layer_types": ["dense"] * 4},
        ["scoring_func 'sigmoid' has no effect", "no layer", "sparse"],
    ),
    ({"router_bias": True, "mlp_layer_types": ["dense"] * 4}, ["router_bias True", "no effect"]),
    ({"router_kind": "soft"}, ["kind 'soft'", "top_k, expert_choice, hash"]),
    ({"drop_order": "score"}, ["drop_order 'score'", "without capacity_factor"]),
]


@pytest.mark.parametrize(("fields", "told"), MISTAKES, ids=lambda v: str(v)[:50])
def test_a_contradiction_is_refused_naming_what_was_given(
    fields: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        MoEConfig(**fields)
    message = str(caught.value)
    assert all(re.search(re.escape(part), message) for part in told), message
    assert "\n" not in message and message.endswith((".", ")."))
