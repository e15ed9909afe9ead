"""Rewards that read texts: any function of prompt and answer as a source of rewards.

The decision to know: such a source gets rows of token ids like every other, and finds the prompt of
a row by its ids among the prompts it was made with. So it may judge by any tokenizer, or by none.

Shapes: B rows, S sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moe.errors import UserError
from sft.rows import PromptRow
from sft.text import TextPath


class TextScore(Protocol):
    """A finite number for each answer; higher is better."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]: ...


@dataclass(frozen=True, kw_only=True)
class TextReward:
    """A `RewardSource` (`rlhf.reward`) whose scores come from `score`.

    rows: the prompts that can occur, as `sft.rows.prompt_rows` gives them. Where one prompt's ids
    begin another's, a row counts for the longer one. Answers are decoded without special tokens.
    Raises UserError for a row that begins with none of the prompts, or for a score that is no
    finite number.
    """

    score: TextScore
    text_path: TextPath
    rows: Sequence[PromptRow]
    _prompts: dict[tuple[int, ...], str] = field(init=False, repr=False, compare=False)
    _lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        prompts = {tuple(row["prompt_ids"]): row["prompt"] for row in self.rows}
        lengths = sorted({len(ids) for ids in prompts}, reverse=True)
        object.__setattr__(self, "_prompts", prompts)
        object.__setattr__(self, "_lengths", tuple(lengths))

    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """(B,) float32 on the rows' device."""
        both = [
            self._texts(ids_S[mask_S].tolist())
            for ids_S, mask_S in zip(
                input_ids_BS.cpu(), attention_mask_BS.bool().cpu(), strict=True
            )
        ]
        scores = list(self.score([prompt for prompt, _ in both], [answer for _, answer in both]))
        if len(scores) != len(both):
            raise UserError(f"The reward gave {len(scores)} scores for {len(both)} answers.")
        for (_, answer), value in zip(both, scores, strict=True):
            if not _is_finite_number(value):
                raise UserError(
                    f"The reward gave {repr(value)[:60]} for the answer {answer[:60]!r}: a score "
                    "must be a finite number."
                )
        return torch.tensor(
            [float(value) for value in scores], dtype=torch.float32, device=input_ids_BS.device
        )

    def _texts(self, ids: list[int]) -> tuple[str, str]:
        for length in self._lengths:
            prompt = self._prompts.get(tuple(ids[:length]))
            if prompt is not None and len(ids) >= length:
                return prompt, self.text_path.decode(ids[length:])
        beginning = self.text_path.decode(ids[:24])
        raise UserError(
            f"No prompt of this reward begins the row {beginning!r}: make it with the rows that "
            "are sampled."
        )


def _is_finite_number(value: object) -> bool:
    """Also for what acts as a number: NumPy's scalars, tensors of one element."""
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
