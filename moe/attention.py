"""Grouped-query attention with rotary positions and an optional sliding window.

The score computation is Hugging Face's attention interface (eager, sdpa, flash, and our own
"windowed"); the mask that comes in already holds causality, window and padding. `naive_attention`
is the written-out form, the oracle of the tests.

Shapes: B batch, S queries, C keys, H query heads, G kv heads, N head width, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe.config import MoEConfig
from moe.norm import RMSNorm
from moe.windowed_attention import WINDOWED

# Up to here "sdpa" keeps its dense mask: the mask is at most 1 MiB a row in float32, and the
# results committed at these lengths stay what they are, to the bit.
DENSE_UP_TO = 512


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021), computed in float32.

    The stretched forms (linear, llama3, yarn) are Hugging Face's functions of the configuration:
    they change the frequencies, and yarn multiplies cosine and sine by `attention_scaling`.
    """

    inv_freq: Tensor

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        parameters = config.rope_parameters or {}
        kind = parameters.get("rope_type", "default")
        self.attention_scaling = 1.0
        if kind == "default":
            theta = parameters.get("rope_theta", 10000.0)
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            inv_freq = 1.0 / theta**exponent
        else:
            inv_freq, self.attention_scaling = ROPE_INIT_FUNCTIONS[kind](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, S, N) float32 tensors; the N/2 angles are repeated for the two halves."""
        angle = position_BS[..., None].float() * self.inv_freq.float()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def rotate(x_BHSN: Tensor, cos_BSN: Tensor, sin_BSN: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + N/2]) by its angle."""
    low, high = x_BHSN.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    cos, sin = cos_BSN[:, None].to(x_BHSN.dtype), sin_BSN[:, None].to(x_BHSN.dtype)
    return x_BHSN * cos + turned * sin


def naive_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax(q k / sqrt(N) + mask) v with every score written out; also HF's name "eager".

    query (B, H, S, N), key and value (B, G, C, N), additive attention_mask (B, 1, S, C) or None.
    Returns the output (B, S, H, N) and the probabilities (B, H, S, C).
    """
    groups = query.shape[1] // key.shape[1]
    key = repeat(key, "b g c n -> b (g r) c n", r=groups)
    value = repeat(value, "b g c n -> b (g r) c n", r=groups)
    score_BHSC = torch.einsum("bhsn,bhcn->bhsc", query, key) * scaling
    if attention_mask is not None:
        score_BHSC = score_BHSC + attention_mask
    probability = torch.softmax(score_BHSC, dim=-1, dtype=torch.float32).to(query.dtype)
    probability = nn.functional.dropout(probability, p=dropout, training=module.training)
    return torch.einsum("bhsc,bhcn->bshn", probability, value), probability


def _forget_all(cache: Cache, layer_idx: int) -> None:
    """For a window of 1: HF keeps the last window - 1 keys by the slice [-0:], which is all."""
    layer = cache.layers[layer_idx]
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
        assert layer.keys is not None and layer.values is not None
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


def takes_windowed(
    implementation: str | None, attention_mask: Tensor | None, *, length: int, window: int | None
) -> bool:
    """Whether sliding layers leave the dense mask of "sdpa" for the chunked form by themselves."""
    if implementation != "sdpa" or window is None or length <= max(DENSE_UP_TO, window):
        return False
    return attention_mask is None or attention_mask.dim() == 2


class GroupedQueryAttention(nn.Module):
    """H query heads share G key/value heads (Ainslie et al. 2023), each query sees `window` tokens.

    window: how many tokens a query sees, itself included; None for the whole past.

    How a sliding layer is computed under "sdpa", the default: up to DENSE_UP_TO tokens (or up to
    the window, where it hides nothing) with a dense mask; beyond, in O(S window) by
    `moe.windowed_attention`, whose mask `takes_windowed` lets the model make. A mask that comes
    ready, with four axes, stays dense at any length. `attn_implementation="windowed"` takes the
    chunked form at every length. One query at a time, decoding, is SDPA on a cache of window - 1
    keys (HF's `DynamicCache` of the configuration), and so is a full layer, without that bound.
    """

    def __init__(self, config: MoEConfig, layer_idx: int, *, window: int | None = None) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config = config
        self.layer_idx = layer_idx
        self.window = window
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, query_width = config.hidden_size, config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        qkv_bias = config.qkv_bias or config.attention_bias
        self.q_proj = nn.Linear(width, query_width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_bias)
        self.clip = config.clip_qkv
        self.norms_each_head = config.qk_norm == "head"
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm is not None:
            each, eps = self.head_dim, config.rms_norm_eps
            self.q_norm = RMSNorm(each if self.norms_each_head else query_width, eps)
            self.k_norm = RMSNorm(each if self.norms_each_head else kv_width, eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        implementation: str | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) to (B, S, D), and the probabilities where the backend gives them.

        implementation: the backend, in place of the configuration's; the mask is of its kind.
        """
        query = self._heads(self.q_proj(hidden_states), self.q_norm)
        key = self._heads(self.k_proj(hidden_states), self.k_norm)
        value = self._heads(self.v_proj(hidden_states))
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            if self.window == 1:
                _forget_all(past_key_values, self.layer_idx)
        name = implementation or self.config._attn_implementation
        if name == "sdpa" and attention_mask is not None and attention_mask.dim() == 2:
            name = WINDOWED
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, naive_attention)
        out_BSHN, probability = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.window,
            **kwargs,
        )
        return self.o_proj(rearrange(out_BSHN, "b s h n -> b s (h n)")), probability

    def _heads(self, projected: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Normalised, clipped and split: (B, S, heads * N) to (B, heads, S, N)."""
        if norm is not None and not self.norms_each_head:
            projected = norm(projected)
        split = rearrange(projected, "b s (h n) -> b h s n", n=self.head_dim)
        if norm is not None and self.norms_each_head:
            split = norm(split)
        return split if self.clip is None else split.clamp(-self.clip, self.clip)
