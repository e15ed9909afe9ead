"""Sliding-window attention in O(T W): queries in chunks, each against the keys it can see.

Importing this file registers the name "windowed" with Hugging Face's attention and mask interfaces,
so any of its models with sliding layers takes it as `attn_implementation`. What travels as the mask
is one small integer per key, its segment; no T x T mask exists on this path. The decision to know:
padding is one more segment. Padding sees padding only, real tokens see their own sequence only, and
every query sees at least itself, so no softmax is ever empty.

`visible` is the rule written out in full, the oracle of the tests beside `naive_attention`.

Shapes: B batch, S queries, C keys (the last S are the queries' own), H query heads, G kv heads,
R = H / G query heads per kv head, N head width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from moe.errors import UserError

WINDOWED = "windowed"
PADDING = 0  # the segment of padding; real tokens count from 1
CHUNK = 64  # measured: 32 is slower at windows of 1024, 128 at all windows up to there
_LANES = 16  # float32 numbers in a vector register: 319 keys take up to a quarter longer than 320
_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
# What some families hand to their attention, each of which would change the scores.
_CHANGES_SCORES = ("softcap", "s_aux", "position_bias", "cache")


def visible(segment_BC: Tensor, *, num_queries: int, window: int) -> Tensor:
    """The rule, written out: bool (B, 1, S, C), whether query s sees key c.

    It does when c is among the last `window` tokens up to and including s, in the same segment.
    """
    keys = segment_BC.shape[-1]
    key_at = torch.arange(keys, device=segment_BC.device)
    query_at = key_at[keys - num_queries :]
    near_SC = _near(query_at, key_at, window=window)
    same_BSC = segment_BC[:, keys - num_queries :, None] == segment_BC[:, None, :]
    return (near_SC & same_BSC)[:, None]


def windowed_attention(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor,
    window: int,
    segment_BC: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Softmax(q k scaling) v over the `window` last tokens of each query's segment: (B, S, H, N).

    query (B, H, S, N); key and value (B, G, C, N) with C >= S, the queries being the last S tokens.
    segment_BC: integers (B or 1, C), equal exactly within one sequence; None for one sequence
    without padding. The rows of padding hold attention among padding: finite, of no meaning.
    scaling: default 1 / sqrt(N).

    On a CPU the backward keeps query, key, value, output and one number per query and head, and
    computes each chunk's probabilities again (Dao et al. 2022, algorithm 4); it cannot be
    differentiated twice. With dropout, on other devices, and where torch lacks its CPU operator,
    `chunked_sdpa` does the same through torch's public attention.
    Raises UserError for a window below 1, shapes that do not fit, or segments of another shape.
    """
    _check(query, key, value=value, window=window, segment_BC=segment_BC)
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout or not _has_operator(query, value=value):
        return chunked_sdpa(
            query,
            key,
            value=value,
            window=window,
            segment_BC=segment_BC,
            scaling=scaling,
            dropout=dropout,
            chunk=chunk,
        )
    return _Windowed.apply(query, key, value, segment_BC, window, scaling, chunk)


def chunked_sdpa(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor,
    window: int,
    segment_BC: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    chunk: int = CHUNK,
) -> Tensor:
    """`windowed_attention` through torch's public attention, chunk by chunk; for any device.

    Keys and values are split into pieces of a chunk and joined anew for every chunk of queries: the
    gradient of a slice would fill a tensor of the whole length with zeros each time.
    """
    rows = _Rows(query, key, window=window, segment_BC=segment_BC, chunk=chunk)
    keys, values = key.split(chunk, dim=2), value.split(chunk, dim=2)
    outs = []
    for start, stop in rows.chunks():
        first, last = rows.span(start, stop)
        pieces = slice(first // chunk, -(-last // chunk))
        here = slice(first - pieces.start * chunk, last - pieces.start * chunk)
        out_BGQN = nn.functional.scaled_dot_product_attention(
            rows.fold(query, start, stop),
            torch.cat(keys[pieces], dim=2)[:, :, here],
            torch.cat(values[pieces], dim=2)[:, :, here],
            attn_mask=rows.bias(start, stop),
            dropout_p=dropout,
            scale=scaling,
        )
        outs.append(rearrange(out_BGQN, "b g (r s) n -> b s (g r) n", s=stop - start))
    return torch.cat(outs, dim=1)


class _Windowed(torch.autograd.Function):
    """Torch's CPU flash operator and its gradient, called once per chunk on slices, not copies."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segment_BC: Tensor | None,
        window: int,
        scaling: float,
        chunk: int,
    ) -> Tensor:
        flash = getattr(torch.ops.aten, _FLASH)
        rows = _Rows(query, key, window=window, segment_BC=segment_BC, chunk=chunk)
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width)
        log_sums = []
        for start, stop in rows.chunks():
            first, last = rows.span(start, stop)
            out_BGQN, log_sum_BGQ = flash(
                rows.fold(query, start, stop),
                key[:, :, first:last],
                value[:, :, first:last],
                attn_mask=rows.bias(start, stop),
                scale=scaling,
            )
            rows.unfold(out_BGQN, out.transpose(1, 2), start, stop)
            log_sums.append(log_sum_BGQ)
        ctx.save_for_backward(query, key, value, segment_BC, out, torch.cat(log_sums, dim=-1))
        ctx.window, ctx.scaling, ctx.chunk = window, scaling, chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, segment_BC, out, log_sum_BGQ = ctx.saved_tensors
        flash_backward = getattr(torch.ops.aten, _FLASH + "_backward")
        rows = _Rows(query, key, window=ctx.window, segment_BC=segment_BC, chunk=ctx.chunk)
        # A key gets a share from every chunk that sees it: half precision would lose the small.
        sums = torch.float64 if query.dtype == torch.float64 else torch.float32
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=sums)
        grad_value = torch.zeros_like(value, dtype=sums)
        for start, stop in rows.chunks():
            first, last = rows.span(start, stop)
            share_query, share_key, share_value = flash_backward(
                rows.fold(grad_out.transpose(1, 2), start, stop),
                rows.fold(query, start, stop),
                key[:, :, first:last],
                value[:, :, first:last],
                rows.fold(out.transpose(1, 2), start, stop),
                log_sum_BGQ[:, :, start * rows.repeats : stop * rows.repeats],
                0.0,
                False,
                attn_mask=rows.bias(start, stop),
                scale=ctx.scaling,
            )
            rows.unfold(share_query, grad_query, start, stop)
            grad_key[:, :, first:last] += share_key
            grad_value[:, :, first:last] += share_value
        grad_key, grad_value = grad_key.to(key.dtype), grad_value.to(value.dtype)
        return grad_query, grad_key, grad_value, None, None, None, None


class _Rows:
    """How the queries are cut: which keys a chunk needs, and the bias that hides the rest of them.

    The R query heads of a kv head become R times as many rows, so that keys are not repeated.
    """

    def __init__(
        self, query: Tensor, key: Tensor, *, window: int, segment_BC: Tensor | None, chunk: int
    ) -> None:
        self.window, self.chunk = min(window, key.shape[2]), chunk
        self.length = query.shape[2]
        self.groups = key.shape[1]
        self.repeats = query.shape[1] // self.groups
        self.offset = key.shape[2] - self.length
        self.dtype, self.device = query.dtype, query.device
        self.segment_BC = segment_BC
        self.bands: dict[int, tuple[Tensor, Tensor]] = {}
        self.changes: list[int] = []
        if segment_BC is not None:
            changes_C = (segment_BC[:, 1:] != segment_BC[:, :-1]).any(dim=0)
            self.changes = [0, *changes_C.cumsum(dim=0).tolist()]

    def chunks(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.length, self.chunk):
            yield start, min(start + self.chunk, self.length)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """All keys that the queries start:stop can see, and a few before them, hidden."""
        return max(0, self.offset + stop - self._widest(stop - start)), self.offset + stop

    def fold(self, x_BHSN: Tensor, start: int, stop: int) -> Tensor:
        """A chunk of (B, H, S, N) as (B, G, R * chunk, N)."""
        # Plain reshape: it runs for every chunk, and einops costs as much as the copy.
        batch, _, _, width = x_BHSN.shape
        return x_BHSN[:, :, start:stop].reshape(batch, self.groups, -1, width)

    def unfold(self, x_BGQN: Tensor, into_BHSN: Tensor, start: int, stop: int) -> None:
        """Write what `fold` made back to its place."""
        batch, heads, _, width = into_BHSN.shape
        into_BHSN[:, :, start:stop] = x_BGQN.reshape(batch, heads, stop - start, width)

    def bias(self, start: int, stop: int) -> Tensor:
        """What is added to the scores of queries start:stop against their span: 0 or -inf.

        (B or 1, 1, R * chunk, span); four axes, or torch takes its slow path.
        """
        first, last = self.span(start, stop)
        near_SC, bias = self._band(stop - start)
        near_SC, bias = near_SC[:, first - last :], bias[..., first - last :]
        if not self.changes or self.changes[first] == self.changes[last - 1]:
            # Kernels of other devices load the bias in vectors, from an aligned beginning.
            return bias if self.device.type == "cpu" else bias.contiguous()
        assert self.segment_BC is not None
        query_BS = self.segment_BC[:, self.offset + start : last]
        same_BSC = query_BS[:, :, None] == self.segment_BC[:, None, first:last]
        return self._additive(near_SC & same_BSC)

    def _band(self, count: int) -> tuple[Tensor, Tensor]:
        """Of `count` queries and the widest span that ends with them: what is near, and its bias.

        A span cut short by the first key has the same columns, counted from its end.
        """
        if count not in self.bands:
            at = torch.arange(self._widest(count), device=self.device)
            near_SC = _near(at[-count:], at, window=self.window)
            self.bands[count] = near_SC, self._additive(near_SC[None])
        return self.bands[count]

    def _widest(self, count: int) -> int:
        return -(-(self.window + count - 1) // _LANES) * _LANES

    def _additive(self, seen_BSC: Tensor) -> Tensor:
        bias_BSC = torch.full(seen_BSC.shape, float("-inf"), dtype=self.dtype, device=self.device)
        bias_BSC = bias_BSC.masked_fill_(seen_BSC, 0.0)
        return repeat(bias_BSC, "b s c -> b 1 (r s) c", r=self.repeats)


def _near(query_at_S: Tensor, key_at_C: Tensor, *, window: int) -> Tensor:
    distance_SC = query_at_S[:, None] - key_at_C
    return (distance_SC >= 0) & (distance_SC < window)


def _has_operator(query: Tensor, *, value: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and hasattr(torch.ops.aten, _FLASH)
        and hasattr(torch.ops.aten, _FLASH + "_backward")
    )


def _check(
    query: Tensor, key: Tensor, *, value: Tensor, window: int, segment_BC: Tensor | None
) -> None:
    if window < 1:
        raise UserError(f"window {window} must be at least 1: a query sees itself.")
    (batch, heads, length, _), (groups, keys) = query.shape, key.shape[1:3]
    if heads % groups:
        raise UserError(f"{heads} query heads cannot share {groups} key heads evenly.")
    if keys < length or value.shape[:3] != key.shape[:3]:
        raise UserError(
            f"{length} queries need at least as many keys, ending with their own, and a value for "
            f"each: keys {tuple(key.shape)}, values {tuple(value.shape)}."
        )
    if segment_BC is not None and tuple(segment_BC.shape) not in {(batch, keys), (1, keys)}:
        raise UserError(
            f"segments {tuple(segment_BC.shape)} must be one number per row and key: "
            f"({batch}, {keys}) or (1, {keys})."
        )


def windowed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What the name "windowed" makes of a mask (HF's mask interface, whose names these are).

    For a sliding layer the segment of each key, int32 (B or 1, kv_length), 0 for padding; for a
    full layer, a single query, or keys that do not end with the queries (static caches), what HF
    gives to "sdpa". Raises UserError for a rule that segments and a window cannot say: one that
    sees the future, or a function of the caller's own.
    """
    ends_alike = bool(q_offset + q_length == kv_offset + kv_length)
    if local_size is None or q_length == 1 or not ends_alike:
        if local_size is not None and q_length > 1:
            kwargs["allow_is_causal_skip"] = False  # None would read as: the queries come last
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    if use_vmap:
        raise UserError(
            f'attention "{WINDOWED}" has windows, padding and packing, and no mask function added '
            'by the caller: use attn_implementation="sdpa".'
        )
    at = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    segment_BC = _segments(mask_function, at, batch=batch_size, window=local_size)
    if attention_mask is not None:
        real_BC = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, at].bool()
        segment_BC = segment_BC.where(real_BC, PADDING)
    return segment_BC


def _segments(
    mask_function: Callable[..., Tensor], at_C: Tensor, *, batch: int, window: int
) -> Tensor:
    """Asks the rule about neighbours only: a token that does not see the one before it begins anew.

    That is O(C), and holds for packed sequences however HF found them.
    """
    row = torch.arange(batch, device=at_C.device)[:, None]

    def sees(query_at: Tensor, key_at: Tensor) -> Tensor:
        return mask_function(row, torch.zeros_like(row), query_at[None], key_at[None])

    before, after = at_C[:-1], at_C[1:]
    beyond = sees(at_C[window:], at_C[:-window]) if len(at_C) > window else at_C[:0]
    if bool(sees(before, after).any()) or bool(beyond.any()):
        raise UserError(
            f'attention "{WINDOWED}" is causal and sees {window} tokens; this model asks for '
            'tokens outside of them: use attn_implementation="sdpa".'
        )
    anew = (~sees(after, before)).int().cumsum(dim=-1, dtype=torch.int32)
    return nn.functional.pad(anew, (1, 0)) + (PADDING + 1)


def windowed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What the name "windowed" computes (HF's attention interface): the output (B, S, H, N), None.

    attention_mask: the segments of `windowed_mask`, or None for one sequence without padding. A
    ready 4-D mask, a layer without a window and a single query (decoding on the bounded cache) go
    to "sdpa". Raises UserError for attention sinks, capped scores, a position bias, and for a layer
    that is not causal or does not say its window.
    """
    for name in _CHANGES_SCORES:
        if kwargs.get(name) is not None:
            raise UserError(
                f'attention "{WINDOWED}" has no {name}, which {type(module).__name__} asks for: '
                'use attn_implementation="eager".'
            )
    segmented = attention_mask is not None and attention_mask.dim() == 2
    if segmented and sliding_window is None:
        raise UserError(
            f'{type(module).__name__} does not hand its sliding_window to attention "{WINDOWED}": '
            'use attn_implementation="sdpa".'
        )
    ready = attention_mask is not None and not segmented
    if ready or sliding_window is None or query.shape[2] == 1:
        return AttentionInterface()["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    if not (getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False):
        raise UserError(
            f'attention "{WINDOWED}" is causal, {type(module).__name__} is not: use '
            'attn_implementation="sdpa".'
        )
    out = windowed_attention(
        query,
        key,
        value=value,
        window=sliding_window,
        segment_BC=attention_mask,
        scaling=scaling,
        dropout=dropout,
    )
    return out, None


AttentionInterface.register(WINDOWED, windowed_attention_forward)
AttentionMaskInterface.register(WINDOWED, windowed_mask)
