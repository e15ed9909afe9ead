"""Other families' layouts as data: their configuration fields and their tensors' names.

The decision to know: one table serves both directions. What it says of a family tells `load` how
to fill our configuration and `save` what that family cannot express, and the pieces of a tensor
are read into place by the same names by which they are cut out again.

E experts, F expert width, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe.config import MoEConfig
from moe.errors import UserError

OWN = MoEConfig.model_type
# Fields that every family has, under the same name and with the same meaning.
COMMON = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id"
    " bos_token_id eos_token_id tie_word_embeddings attention_dropout rope_parameters"
).split()
PLAIN = {
    "attention_bias": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "qk_norm": None,
    "clip_qkv": None,
}
# What the routers of these families cannot do; the fields' own defaults are what they do.
PLAIN_ROUTER = {
    "router_kind": "top_k",
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
    "router_selection_bias": False,
    "router_bias": False,
    "n_group": None,
    "topk_group": None,
    "group_score": "top2_sum",
    "capacity_factor": None,
    "capacity_scope": "batch",
    "capacity_rounding": "ceil",
    "drop_order": "gshard",
    "hash_seed": 0,
    "router_jitter_noise": 0.0,
    "router_logit_noise": 0.0,
}
PLAIN_MOE = {
    **PLAIN,
    **PLAIN_ROUTER,
    "shared_expert_intermediate_size": None,
    "shared_expert_mode": "gated",
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One family. Its name is the `model_type` of its config.json.

    ffn: which kinds of layers it has. windows: "none" of its layers slides, "all" of them do or
    none, or "each" is named. fields: ours -> its name for the same, where it has the choice.
    fixed: ours -> the one value that it has. block, expert: where a sparse layer's tensors lie, and
    what one expert's gate, up and down are called.
    """

    name: str
    ffn: tuple[str, ...]
    windows: Literal["none", "all", "each"]
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    @property
    def has_window_switch(self) -> bool:
        return self.name.startswith("qwen")

    @property
    def mixes_ffn(self) -> bool:
        return len(self.ffn) > 1


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


_CHOICE = _same("num_experts_per_tok", "norm_topk_prob")
_QWEN_MOE = _CHOICE | _same("num_experts", "moe_intermediate_size", "intermediate_size")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="llama",
            ffn=("dense",),
            windows="none",
            fields=_same("intermediate_size", "attention_bias", "mlp_bias"),
            fixed=_without(PLAIN, "attention_bias", "mlp_bias"),
        ),
        Layout(
            name="mistral",
            ffn=("dense",),
            windows="all",
            fields=_same("intermediate_size"),
            fixed=PLAIN,
        ),
        Layout(
            name="qwen2",
            ffn=("dense",),
            windows="each",
            fields=_same("intermediate_size"),
            fixed={**PLAIN, "qkv_bias": True},
        ),
        Layout(
            name="mixtral",
            ffn=("sparse",),
            windows="all",
            fields={
                **_same("num_experts_per_tok"),
                "num_experts": "num_local_experts",
                "moe_intermediate_size": "intermediate_size",
            },
            fixed={**PLAIN_MOE, "norm_topk_prob": True},
            block="block_sparse_moe",
            expert=("w1", "w3", "w2"),
        ),
        Layout(
            name="olmoe",
            ffn=("sparse",),
            windows="none",
            fields={
                **_CHOICE,
                **_same("num_experts", "attention_bias", "clip_qkv"),
                "moe_intermediate_size": "intermediate_size",
            },
            fixed={**_without(PLAIN_MOE, "attention_bias", "clip_qkv"), "qk_norm": "projection"},
        ),
        Layout(
            name="qwen2_moe",
            ffn=("sparse", "dense"),
            windows="each",
            fields={**_QWEN_MOE, **_same("qkv_bias", "shared_expert_intermediate_size")},
            fixed=_without(PLAIN_MOE, "qkv_bias", "shared_expert_intermediate_size"),
        ),
        Layout(
            name="qwen3_moe",
            ffn=("sparse", "dense"),
            windows="all",
            fields={**_QWEN_MOE, **_same("attention_bias")},
            fixed={**_without(PLAIN_MOE, "attention_bias"), "qk_norm": "head"},
        ),
    )
}


# --- tensors -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A published tensor, and which part of our tensor it is."""

    name: str
    place: tuple[int | slice, ...] = ()


def pieces(name: str, shape: torch.Size, *, layout: Layout) -> list[Piece]:
    """The published tensors that one of ours is made of; experts are published one by one.

    name, shape: of our parameter; experts.gate_up_proj is (E, 2F, D) with the gate's rows first,
    experts.down_proj (E, D, F).
    """
    place, _, part = name.rpartition(".mlp.")
    if not place or not (part.startswith("experts.") or part == "gate.weight"):
        return [Piece(name=name)]
    block = f"{place}.{layout.block}"
    if part == "gate.weight":
        return [Piece(name=f"{block}.gate.weight")]
    gate, up, down = (f"{block}.experts.{{}}.{word}.weight" for word in layout.expert)
    if part == "experts.down_proj":
        return [Piece(name=down.format(e), place=(e,)) for e in range(shape[0])]
    width = shape[1] // 2
    halves = ((gate, slice(0, width)), (up, slice(width, 2 * width)))
    return [
        Piece(name=half.format(e), place=(e, rows))
        for e in range(shape[0])
        for half, rows in halves
    ]


# --- configurations ------------------------------------------------------------------------------


def our_config(theirs: PreTrainedConfig, layout: Layout) -> MoEConfig:
    """Our configuration of a model that was configured as `theirs`.

    The balance coefficients follow Hugging Face: its loss has a balance term where
    `output_router_logits` is True, and none otherwise.
    Raises UserError for an option that we cannot build, by its name.
    """
    jitter = getattr(theirs, "router_jitter_noise", 0.0)
    if jitter:
        raise UserError(
            f"router_jitter_noise {jitter} is not built as that family has it (there the experts' "
            "input is multiplied by noise too; here the router's alone): set it to 0."
        )
    fields = {name: getattr(theirs, name, None) for name in COMMON}
    fields["attention_dropout"] = fields["attention_dropout"] or 0.0
    fields["rope_parameters"] = dict(fields["rope_parameters"] or {})
    fields |= {ours: getattr(theirs, name) for ours, name in layout.fields.items()}
    fields |= layout.fixed
    fields |= _our_windows(theirs, layout)
    fields["mlp_layer_types"] = kinds = _our_ffn(theirs, layout)
    if "sparse" not in kinds:
        fields["shared_expert_intermediate_size"] = None
    else:
        observed = bool(theirs.output_router_logits)
        fields["output_router_logits"] = observed
        fields["load_balancing_coef"] = theirs.router_aux_loss_coef if observed else 0.0
        fields["z_loss_coef"] = 0.0
    return MoEConfig(**fields)


def _our_windows(theirs: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    window = getattr(theirs, "sliding_window", None)
    named = getattr(theirs, "layer_types", None)
    count = theirs.num_hidden_layers
    if layout.windows == "none" and window is not None:
        raise UserError(
            f"sliding_window {window} has no meaning in the {layout.name} layout, whose attention "
            "is full: leave it out, or use a family with windows."
        )
    kinds = [SLIDING if window else FULL] * count
    if layout.windows == "each":
        kinds = list(named or kinds)
    if named is not None and list(named) != kinds:
        raise UserError(
            f"layer_types {list(named)} has no effect in the {layout.name} layout, where all "
            f"layers are {kinds[0]}: leave it out."
        )
    return {"layer_types": kinds, "sliding_window": window if SLIDING in kinds else None}


def _our_ffn(theirs: PreTrainedConfig, layout: Layout) -> list[str]:
    count = theirs.num_hidden_layers
    if not layout.mixes_ffn:
        return [layout.ffn[0]] * count
    step, dense = theirs.decoder_sparse_step, set(theirs.mlp_only_layers)
    return [
        "sparse" if i not in dense and theirs.num_experts > 0 and (i + 1) % step == 0 else "dense"
        for i in range(count)
    ]


def problems(config: MoEConfig, layout: Layout) -> list[str]:
    """What the layout cannot express of our configuration: options with their values."""
    found = [
        f"{name} {getattr(config, name)} (it has only {value})"
        for name, value in layout.fixed.items()
        if getattr(config, name) != value
    ]
    shared = layout.fields.get("shared_expert_intermediate_size")
    if shared and config.sparse_layers and config.shared_expert_intermediate_size is None:
        found.append(
            "shared_expert_intermediate_size None (its sparse layers have a shared expert)"
        )
    kinds, windows = set(config.mlp_layer_types or []), set(config.layer_types or [])
    if kinds - set(layout.ffn):
        found.append(
            f"mlp_layer_types {config.mlp_layer_types} (its layers are all {layout.ffn[0]})"
        )
    if layout.windows == "none" and SLIDING in windows:
        found.append(f"sliding_window {config.sliding_window} (its attention is full)")
    if layout.windows == "all" and len(windows) > 1:
        found.append(f"layer_types {config.layer_types} (its layers all slide or none does)")
    assert config.head_dim is not None
    whole = config.head_dim * config.num_attention_heads
    if layout.fixed["qk_norm"] == "projection" and whole != config.hidden_size:
        found.append(
            f"head_dim {config.head_dim} (its {config.num_attention_heads} heads together are as "
            f"wide as hidden_size {config.hidden_size})"
        )
    return found


def their_config(config: MoEConfig, layout: Layout) -> PreTrainedConfig:
    """The family's own configuration of our model.

    Settings of training alone do not travel (z_loss_coef); the load-balancing coefficient goes to
    `router_aux_loss_coef`, which its owner adds only where `output_router_logits` is True.
    Raises UserError naming every option that the family cannot express, and the families that can.
    """
    found = problems(config, layout)
    if found:
        able = [other.name for other in LAYOUTS.values() if not problems(config, other)]
        instead = (
            f"use layout {' or '.join(able)}"
            if able
            else "no family's layout can: save_pretrained keeps it as ours"
        )
        raise UserError(f"The {layout.name} layout cannot express {'; '.join(found)}: {instead}.")
    fields = {name: getattr(config, name) for name in COMMON}
    fields["rope_parameters"] = dict(config.rope_parameters or {})
    fields |= {name: getattr(config, ours) for ours, name in layout.fields.items()}
    slides = config.sliding_window is not None
    if layout.windows != "none":
        fields["sliding_window"] = config.sliding_window
    if layout.has_window_switch:
        fields["use_sliding_window"] = slides
    if layout.windows == "each":
        fields["layer_types"] = list(config.layer_types or [])
    if layout.mixes_ffn:
        kinds = config.mlp_layer_types or []
        fields["decoder_sparse_step"] = 1
        fields["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if kind == "dense"]
    if config.sparse_layers:
        fields["output_router_logits"] = config.output_router_logits
        fields["router_aux_loss_coef"] = float(config.load_balancing_coef)
    fields["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[layout.name]]
    try:
        return CONFIG_MAPPING[layout.name](**fields)
    except Exception as problem:  # each config class refuses bad values in its own way
        raise UserError(
            f"The {layout.name} layout refuses this model: {first_line(problem)}"
        ) from problem


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
