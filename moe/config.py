"""The configuration of a Switchyard language model.

Field names are Hugging Face's, so that its tools read them. `router_aux_loss_coef` stays 0: tools
that find it non-zero add Mixtral's balance loss, which pools the layers; ours is
`load_balancing_coef`, one value per layer, averaged.
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from moe.errors import UserError
from moe.router_spec import RouterSpec
from moe.switch_ffn import SHARED_MODES

WINDOW_LETTERS = {"S": "sliding_attention", "L": "full_attention"}
FFN_KINDS = ("sparse", "dense")
# Our fields about the router, and the spec's names for them.
ROUTER_FIELDS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "norm_topk_prob": "normalize_weights",
    "router_kind": "kind",
    "scoring_func": "scoring",
    "routed_scaling_factor": "routed_scaling_factor",
    "router_selection_bias": "selection_bias",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "group_score": "group_score",
    "capacity_factor": "capacity_factor",
    "capacity_scope": "capacity_scope",
    "capacity_rounding": "capacity_rounding",
    "drop_order": "drop_order",
    "hash_seed": "hash_seed",
    "router_jitter_noise": "jitter_noise",
    "router_logit_noise": "logit_noise",
}
# Stretched rotary frequencies that do not depend on the text at hand, and the keys they need.
# "dynamic" and "longrope" do: a token's output would change with the longest row of its batch.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# Normalised queries and keys need other cuts under tensor parallelism: a norm over the whole
# projection needs it whole, one per head is the same on every device.
QK_NORM_PLANS = {
    "projection": {
        **{f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
        "layers.*.self_attn.o_proj": "rowwise_split_input",
    },
    "head": {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"},
}


@strict
class MoEConfig(PreTrainedConfig):
    """A decoder with grouped-query attention and, layer by layer, an MoE or a dense SwiGLU FFN.

    `window_pattern` is read cyclically over the layers, "S" a sliding window of `sliding_window`
    tokens (the token itself included), "L" the whole past: "SSSL" is three short, one long.
    `mlp_layer_types` names each layer "sparse" or "dense" (default: all sparse).
    `moe_intermediate_size` is the width F of one expert, `intermediate_size` that of a dense FFN,
    `shared_expert_intermediate_size` that of an expert which every token passes (None: there is
    none), and `shared_expert_mode` how it joins the others (`moe.switch_ffn.SwitchFFN`).
    The router is `router_spec`, whose docstring (`moe.router_spec.RouterSpec`) says what its fields
    mean; ROUTER_FIELDS has their names here. `router_selection_bias` gives each router the buffer
    `e_score_correction_bias`, `router_bias` its linear map a bias.
    `attention_bias` puts biases on q, k, v and o, `qkv_bias` on the first three, `mlp_bias` on the
    dense FFNs. `qk_norm` normalises queries and keys before the rotation, "head" each head (Qwen3)
    or "projection" all heads together (OLMoE); `clip_qkv` then cuts q, k and v to +- its value.

    Raises `UserError` naming both values when two fields contradict each other.
    """

    model_type = "switchyard"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    window_pattern: str | None = None
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    clip_qkv: float | int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int | None = None
    shared_expert_mode: str = "gated"
    router_kind: str = "top_k"
    scoring_func: str = "softmax"
    routed_scaling_factor: float | int = 1.0
    router_selection_bias: bool = False
    router_bias: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    group_score: str = "top2_sum"
    capacity_factor: float | int | None = None
    capacity_scope: str = "batch"
    capacity_rounding: str = "ceil"
    drop_order: str = "gshard"
    hash_seed: int = 0
    router_jitter_noise: float | int = 0.0
    router_logit_noise: float | int = 0.0
    load_balancing_coef: float | int = 0.01
    z_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.0
    rope_parameters: RopeParameters | dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # The Auto classes of some training libraries read `auto_map` without asking whether it is
        # there; an empty one says that no remote code belongs to this model.
        self.auto_map: dict[str, str] = {}
        heads = self.num_attention_heads
        if self.head_dim is None and heads > 0 and self.hidden_size % heads == 0:
            self.head_dim = self.hidden_size // heads
        if self.layer_types is None:
            pattern = self.window_pattern or ("S" if self.sliding_window else "L")
            unknown = sorted(set(pattern) - set(WINDOW_LETTERS))
            if unknown:
                raise UserError(
                    f"window_pattern {pattern!r} has {''.join(unknown)!r}: use S (window) and L "
                    f"(full)."
                )
            self.layer_types = self._layer_types(pattern)
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        self._check_rope()  # before the parent, which fails on a missing key without naming it
        if self.qk_norm in QK_NORM_PLANS:
            plan = {**type(self).base_model_tp_plan, **QK_NORM_PLANS[self.qk_norm]}
            self.base_model_tp_plan = plan
        super().__post_init__(**kwargs)
        self._check()  # after the names that HF maps onto ours (num_local_experts) are in place

    @property
    def router_spec(self) -> RouterSpec:
        """Raises `UserError` for options that cannot be, or change nothing, together."""
        return RouterSpec(**{spec: getattr(self, ours) for ours, spec in ROUTER_FIELDS.items()})

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose FFN is a mixture of experts."""
        kinds = self.mlp_layer_types or []
        return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")

    def _layer_types(self, pattern: str) -> list[str]:
        letters = (pattern * self.num_hidden_layers)[: self.num_hidden_layers]
        return [WINDOW_LETTERS.get(letter, letter) for letter in letters]

    def _check_rope(self) -> None:
        rope: Any = self.rope_parameters or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_KEYS:
            raise UserError(
                f"rope_parameters {dict(rope)}: rope_type {kind!r} cannot be built, only "
                f"{', '.join(ROPE_KEYS)}, whose angles depend on the position alone."
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(
                f"partial_rotary_factor {rope['partial_rotary_factor']} cannot be built: the whole "
                "head is rotated; leave it out."
            )
        for key in ROPE_KEYS[kind]:
            if not isinstance(rope.get(key), int | float):
                raise UserError(
                    f"rope_parameters {dict(rope)} of rope_type {kind!r} need a number {key!r}."
                )

    def _check_parts(self) -> None:
        """What the parts that only some families have may be."""
        if self.qk_norm is not None and self.qk_norm not in QK_NORM_PLANS:
            raise UserError(
                f"qk_norm {self.qk_norm!r} is unknown: give one of {', '.join(QK_NORM_PLANS)}, or "
                "None."
            )
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise UserError(f"clip_qkv {self.clip_qkv} must be above 0, or None.")
        if self.qkv_bias and self.attention_bias:
            raise UserError(
                "qkv_bias True has no effect with attention_bias True, which has those biases "
                "already: give one of them."
            )
        kinds = self.mlp_layer_types or []
        if self.mlp_bias and "dense" not in kinds:
            raise UserError(
                f"mlp_bias True has no effect: no layer of mlp_layer_types {kinds} is dense, and "
                "experts have no biases."
            )
        shared = self.shared_expert_intermediate_size
        if shared is not None and (shared < 1 or "sparse" not in kinds):
            raise UserError(
                f"shared_expert_intermediate_size {shared} must be at least 1 and needs a sparse "
                f"layer, and mlp_layer_types is {kinds}: change one, or give None for no shared "
                "expert."
            )
        if self.shared_expert_mode not in SHARED_MODES:
            raise UserError(
                f"shared_expert_mode {self.shared_expert_mode!r} is unknown: give one of "
                f"{', '.join(SHARED_MODES)}."
            )
        if shared is None and self.shared_expert_mode != "gated":
            raise UserError(
                f"shared_expert_mode {self.shared_expert_mode!r} has no effect with "
                "shared_expert_intermediate_size None: give its width."
            )

    def _check_router(self) -> None:
        if "sparse" not in (self.mlp_layer_types or []):
            self._refuse_router_options()
            return
        spec = self.router_spec  # its own checks
        if not spec.chooses_by_score and self.load_balancing_coef > 0:
            raise UserError(
                f"load_balancing_coef {self.load_balancing_coef} has no effect with router_kind "
                f"{self.router_kind!r}, whose tokens do not choose by score: set it to 0."
            )
        if spec.kind == "expert_choice" and self.z_loss_coef > 0:
            raise UserError(
                f"z_loss_coef {self.z_loss_coef} goes with the balance losses, which router_kind "
                "'expert_choice' does not have: set it to 0."
            )

    def _refuse_router_options(self) -> None:
        """Without experts; what every configuration has always named is let pass."""
        old = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "capacity_factor")
        for name in (*ROUTER_FIELDS, "router_bias"):
            if name not in old and getattr(self, name) != getattr(type(self), name):
                raise UserError(
                    f"{name} {getattr(self, name)!r} has no effect: no layer of mlp_layer_types "
                    f"{self.mlp_layer_types} is sparse."
                )

    def _check(self) -> None:
        def positive(name: str) -> None:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")

        for name in (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers"
            " num_attention_heads num_key_value_heads max_position_embeddings"
        ).split():
            positive(name)
        if self.head_dim is None:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}: change one or give head_dim."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: rotary embeddings need an even one.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}: each KV head serves whole groups."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"sliding_window {self.sliding_window} must be at least 1, or None.")
        if "sliding_attention" in (self.layer_types or []) and self.sliding_window is None:
            raise UserError(
                "a layer has a sliding window but sliding_window is None: give its size."
            )
        if self.sliding_window is not None and "sliding_attention" not in (self.layer_types or []):
            raise UserError(
                f"sliding_window {self.sliding_window} has no effect: no layer of "
                f"{self.layer_types} slides; drop it or change window_pattern."
            )
        for name, allowed in (
            ("layer_types", tuple(WINDOW_LETTERS.values())),
            ("mlp_layer_types", FFN_KINDS),
        ):
            kinds = getattr(self, name)
            if len(kinds) != self.num_hidden_layers or set(kinds) - set(allowed):
                raise UserError(
                    f"{name} {kinds} must name each of the {self.num_hidden_layers} layers "
                    f"(num_hidden_layers), each one of {', '.join(allowed)}."
                )
        if self.window_pattern and self.layer_types != self._layer_types(self.window_pattern):
            raise UserError(
                f"window_pattern {self.window_pattern!r} and layer_types {self.layer_types} "
                "disagree: give one of them."
            )
        if self.hidden_act != "silu":
            raise UserError(f"hidden_act {self.hidden_act!r} has no effect: experts are 'silu'.")
        self._check_parts()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(
                f"pad_token_id {self.pad_token_id} is not an id below vocab_size {self.vocab_size}."
            )
        if self.rms_norm_eps <= 0:
            raise UserError(f"rms_norm_eps {self.rms_norm_eps} must be above 0.")
        for name in ("load_balancing_coef", "z_loss_coef"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(
                    f"{name} {value} must be finite and at least 0 (0 switches it off)."
                )
        if self.router_aux_loss_coef != 0:
            raise UserError(
                f"router_aux_loss_coef {self.router_aux_loss_coef} must stay 0 (tools that see it "
                "add a loss that pools the layers): set load_balancing_coef."
            )
        self._check_router()
