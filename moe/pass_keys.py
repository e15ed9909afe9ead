"""Whose token stands where in one forward pass: the key (sample id, token) of each place.

The decision to know: a token's number counts the real tokens of its text, those in the cache
included, and nothing else. So the side and the amount of padding, the split into micro-batches and
step-by-step decoding with a cache all give a token the same key.

Shapes: B batch, S sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from moe.errors import UserError

# How our decoder and those of the Hugging Face families name their first arguments, in order.
_BY_POSITION = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


@dataclass(frozen=True, kw_only=True)
class PassKeys:
    """The keys of one pass.

    sample_ids: int64 (B,), or (B, S) for packed rows. token_BS: int64, the token's number in its
    text, -1 on padding. is_whole: whether every text is here from its first token to its last;
    False where a cache is used.
    """

    sample_ids: Tensor
    token_BS: Tensor
    is_whole: bool

    @property
    def sample_BS(self) -> Tensor:
        if self.sample_ids.dim() == 2:
            return self.sample_ids
        return repeat(self.sample_ids, "b -> b s", s=self.token_BS.shape[1])


def token_numbers(mask_BS: Tensor, sample_ids: Tensor, *, past_B: Tensor | None = None) -> Tensor:
    """Number (B, S) of each real token within its text, from 0; -1 on padding.

    sample_ids: (B,), a row is one text, whatever its position ids say; (B, S), a row is several
    texts one after the other (packing), and each run of one id is counted by itself.
    past_B: real tokens of each row that the cache holds; for rows of one text only.
    """
    seen_BS = mask_BS.long().cumsum(dim=1)
    if sample_ids.dim() == 2:
        starts_BS = torch.ones_like(mask_BS)
        starts_BS[:, 1:] = sample_ids[:, 1:] != sample_ids[:, :-1]
        before_BS = torch.where(starts_BS, seen_BS - mask_BS.long(), 0).cummax(dim=1).values
        seen_BS = seen_BS - before_BS
    elif past_B is not None:
        seen_BS = seen_BS + past_B[:, None]
    return torch.where(mask_BS, seen_BS - 1, -1)


def pass_keys(args: Sequence[Any], kwargs: Mapping[str, Any]) -> PassKeys | None:
    """The keys of a call of a decoder; None of a call without tokens, which the decoder refuses.

    Raises `UserError` if sample_ids fits neither (B,) nor (B, S), or names packed texts beside a
    cache.
    """
    given = dict(zip(_BY_POSITION, args, strict=False)) | dict(kwargs)
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    cache, mask = given.get("past_key_values"), given.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask_BS = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    past_B = torch.full((batch,), past, device=tokens.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask_BS = mask[:, -length:].bool()
        past_B = mask[:, :-length].bool().sum(dim=1)
    sample_ids = _sample_ids(given.get("sample_ids"), tokens, past=past)
    return PassKeys(
        sample_ids=sample_ids,
        token_BS=token_numbers(mask_BS, sample_ids, past_B=past_B),
        is_whole=cache is None and given.get("use_cache") is not True,
    )


def _sample_ids(sample_ids: Tensor | None, tokens: Tensor, *, past: int) -> Tensor:
    batch, length = tokens.shape[:2]
    if sample_ids is None:
        return torch.arange(batch, device=tokens.device)
    if tuple(sample_ids.shape) not in ((batch,), (batch, length)):
        raise UserError(
            f"sample_ids has shape {tuple(sample_ids.shape)}: give ({batch},), a name for each "
            f"row, or ({batch}, {length}), a name for each token of packed rows."
        )
    if sample_ids.dim() == 2 and past:
        raise UserError(
            f"sample_ids of shape {tuple(sample_ids.shape)} names packed texts, but the cache "
            f"holds {past} tokens: give ({batch},), a name for each row."
        )
    return sample_ids.to(tokens.device)
