"""The decoder: the only file that turns a configuration into layers.

HF-shaped (names, caches, masks, `generate`), so that other tools open it. Each forward hands its
routing decisions to whoever records (`moe.record`); the model keeps none.

Shapes: B batch, S sequence, D width, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from moe.attention import GroupedQueryAttention, RotaryEmbedding, takes_windowed
from moe.balance import balance_sums, balance_values
from moe.config import MoEConfig
from moe.dense_ffn import DenseFFN
from moe.experts import FusedExperts
from moe.norm import RMSNorm
from moe.reentrant import RouterGradients, give, take
from moe.router_spec import refuse_undecodable
from moe.routing import Routing
from moe.switch_ffn import SELECTION_BIAS, Router, SwitchFFN
from moe.windowed_attention import WINDOWED

RoutingSink = Callable[[Tensor, Tensor, tuple[Routing, ...]], None]


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and FFN, each behind a norm and a residual."""

    def __init__(self, config: MoEConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None and config.mlp_layer_types is not None
        slides = config.layer_types[layer_idx] == "sliding_attention"
        self.self_attn = GroupedQueryAttention(
            config, layer_idx, window=config.sliding_window if slides else None
        )
        self.mlp: nn.Module
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = SwitchFFN(
                config.router_spec,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                shared_intermediate_size=config.shared_expert_intermediate_size,
                shared_mode=config.shared_expert_mode,
                router_bias=config.router_bias,
            )
        else:
            self.mlp = DenseFFN(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        real_BS: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_BS: Tensor | None = None,
        forced_TK: Tensor | None = None,
        router_gradients: RouterGradients | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Routing | None]:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, SwitchFFN):
            mixed, routing = self.mlp(normed, real_BS, token_BS=token_BS, forced_TK=forced_TK)
            return hidden_states + give(mixed, routing, router_gradients), routing
        return hidden_states + self.mlp(normed), None


class MoEPreTrainedModel(PreTrainedModel):
    """What all heads share: loading, initialisation, what the backbone supports."""

    config: MoEConfig
    config_class = MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Gathered by HF's hooks when asked for; hidden states the backbone keeps by itself, because a
    # hook inside reentrant checkpointing would see them without a graph.
    _can_record_outputs = {"attentions": GroupedQueryAttention}

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        if config.router_selection_bias:
            self._keep_in_fp32_modules_strict = [SELECTION_BIAS]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FusedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Router) and SELECTION_BIAS in module._buffers:
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, RotaryEmbedding(self.config).inv_freq)

    def _has_balance(self) -> bool:
        weights = self.config.load_balancing_coef + self.config.z_loss_coef
        return weights > 0 and bool(self.config.sparse_layers)

    @contextmanager
    def _routings_to_balance(self, *, with_loss: bool) -> Iterator[list[tuple[Routing, ...]]]:
        """Where a loss is computed in training, collects what the backbone's forward decides."""
        collected: list[tuple[Routing, ...]] = []
        if not (with_loss and self.training and self._has_balance()):
            yield collected
            return

        def sink(sample_ids: Tensor, real_BS: Tensor, routings: tuple[Routing, ...]) -> None:
            collected.append(routings)

        self.base_model.routing_sinks.append(sink)
        try:
            yield collected
        finally:
            self.base_model.routing_sinks.remove(sink)

    def balance_penalty(self, routings: tuple[Routing, ...]) -> Tensor:
        """Coefficient-weighted balance and z-loss of one micro-batch, means over the MoE layers."""
        balance, z = balance_values([balance_sums(routing) for routing in routings])
        return self.config.load_balancing_coef * balance + self.config.z_loss_coef * z


class MoEModel(MoEPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.routing_sinks: list[RoutingSink] = []
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        sample_ids: Tensor | None = None,
        forced_experts: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """input_ids (B, S); attention_mask (B, past + S), 1 for real tokens, or a ready 4-D mask,
        which says nothing about padding: every token then counts as real to routers and records.

        sample_ids: int64 (B,), names of the rows in a recorded trace; default the row number. Of
        packed rows also (B, S), the name of each token's text.
        forced_experts: int64 (B*S, K) per MoE layer, the choice made elsewhere, rows of -1 left to
        the router; `moe.replay` fills it from a trace.
        output_hidden_states: L + 1 of (B, S, D), the embeddings first, the last one normed;
        output_attentions: L of (B, H, S, C), probabilities; the "eager" form then runs.
        Raises ValueError unless exactly one of input_ids and inputs_embeds is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        use_cache = self.config.use_cache if use_cache is None else use_cache
        checkpointing = self.training and any(
            getattr(layer, "gradient_checkpointing", False) for layer in self.layers
        )
        if use_cache and past_key_values is None and not checkpointing:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=device) + past)[None]
        # Probabilities are formed by "eager" alone, whatever the configuration says.
        implementation = "eager" if output_attentions else self.config._attn_implementation
        masks = self._masks(
            inputs_embeds, attention_mask, past_key_values, position_ids, implementation
        )
        real_BS = torch.ones(batch, length, dtype=torch.bool, device=device)
        if attention_mask is not None and attention_mask.dim() == 2:
            real_BS = attention_mask[:, -length:].bool()

        hidden_states = inputs_embeds
        positions = self.rotary_emb(position_ids)
        routings: list[Routing] = []
        hidden: list[Tensor] = [hidden_states]
        assert self.config.layer_types is not None
        forced = self._forced_by_layer(forced_experts)
        for layer, kind, forced_TK in zip(
            self.layers, self.config.layer_types, forced, strict=True
        ):
            router_gradients = RouterGradients() if checkpointing else None
            hidden_states, routing = layer(
                hidden_states,
                position_embeddings=positions,
                attention_mask=masks[kind],
                real_BS=real_BS,
                token_BS=input_ids,
                forced_TK=forced_TK,
                past_key_values=past_key_values,
                position_ids=position_ids,
                router_gradients=router_gradients,
                implementation=implementation,
                **kwargs,
            )
            if routing is not None:
                hidden_states, routing = take(hidden_states, routing, router_gradients)
                routings.append(routing)
            hidden.append(hidden_states)
        hidden_states = self.norm(hidden_states)

        if sample_ids is None:
            sample_ids = torch.arange(batch, device=device)
        for sink in self.routing_sinks:
            sink(sample_ids, real_BS, tuple(routings))
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*hidden[:-1], hidden_states) if output_hidden_states else None,
            router_logits=tuple(r.logits_TE for r in routings) if output_router_logits else None,
        )

    def _forced_by_layer(self, forced_experts: Sequence[Tensor] | None) -> list[Tensor | None]:
        sparse = self.config.sparse_layers
        if forced_experts is None:
            return [None] * len(self.layers)
        if len(forced_experts) != len(sparse):
            raise ValueError(
                f"{len(forced_experts)} forced_experts for {len(sparse)} MoE layers: give one each"
            )
        by_layer = dict(zip(sparse, forced_experts, strict=True))
        return [by_layer.get(i) for i in range(len(self.layers))]

    def _masked_by(self, implementation: str | None) -> MoEConfig:
        """The configuration, for HF's mask makers, which read the kind of mask from its backend."""
        if implementation == self.config._attn_implementation:
            return self.config
        config = copy.copy(self.config)
        config._attn_implementation = implementation
        return config

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor,
        implementation: str | None,
    ) -> dict[str, Tensor | None]:
        makers = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        assert self.config.layer_types is not None
        backends = dict.fromkeys(makers, implementation)
        if takes_windowed(
            implementation,
            attention_mask,
            length=inputs_embeds.shape[1],
            window=self.config.sliding_window,
        ):
            backends["sliding_attention"] = WINDOWED
        return {
            kind: makers[kind](
                config=self._masked_by(backends[kind]),
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for kind in sorted(set(self.config.layer_types))
        }


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """The language model. Its `loss` is for other libraries' trainers; ours sum their own."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.model = MoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, S, V); with labels (B, S), -100 where not learned, also a loss.

        shift_labels (B, S): the targets of these very positions, already moved by one, in place of
        `labels`; a sequence that is cut over devices knows its next token only this way.
        The loss is the summed cross-entropy over `num_items_in_batch` (default: over the labelled
        tokens here). In training the balance terms are added, each micro-batch weighted by its
        share of those items, so that accumulation and more processes do not multiply them; in eval
        never.
        """
        has_targets = labels is not None or shift_labels is not None
        with self._routings_to_balance(with_loss=has_targets) as collected:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
            logits = self.lm_head(hidden_states[:, kept])
        else:
            logits = self.lm_head(hidden_states[:, logits_to_keep])
        loss = aux_loss = None
        if has_targets:
            loss, share = self._cross_entropy(logits, labels, shift_labels, num_items_in_batch)
            if collected:
                aux_loss = self.balance_penalty(collected[0])
                loss = loss + share * aux_loss
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's. Raises UserError for a router that is not decodable."""
        if self.config.sparse_layers:
            refuse_undecodable(self.config.router_spec)
        return super().generate(*args, **kwargs)

    @staticmethod
    def _cross_entropy(
        logits_BSV: Tensor,
        labels_BS: Tensor | None,
        target_BS: Tensor | None,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor, Tensor]:
        if target_BS is None:
            assert labels_BS is not None
            logits_BSV, target_BS = logits_BSV[:, :-1], labels_BS[:, 1:]
        total = nn.functional.cross_entropy(
            logits_BSV.float().flatten(0, 1), target_BS.flatten(), reduction="sum"
        )
        here = (target_BS != -100).sum()
        items = here.clamp(min=1) if num_items is None else num_items
        return total / items, here / items


def meta_causal_lm(config: MoEConfig) -> MoEForCausalLM:
    """The model without memory: its names and shapes."""
    with torch.device("meta"):
        return MoEForCausalLM(config)


def stored_tensors(model: MoEForCausalLM) -> dict[str, Tensor]:
    """What a folder of the model holds, by name: each parameter once, and the selection biases."""
    biases = {name: t for name, t in model.named_buffers() if name.endswith(SELECTION_BIAS)}
    return dict(model.named_parameters()) | biases


def assembled(config: MoEConfig, tensors: Mapping[str, Tensor]) -> MoEForCausalLM:
    """The model of these tensors, in eval mode; none is initialised only to be overwritten.

    tensors: as `stored_tensors` names them, the parameters in one dtype, biases of selection in
    float32; a tied head counts as the embedding.
    """
    model = meta_causal_lm(config)
    names = stored_tensors(model).keys()
    assert names == tensors.keys(), sorted(names ^ tensors.keys())
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = RotaryEmbedding(config)  # its buffer is computed, not stored
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    config.dtype = model.dtype
    return model.eval()
