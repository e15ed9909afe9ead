"""The one door to TRL: its data functions (shared prompts, unpairing, packing, chat text).

Only `trl.data_utils` is imported, inside the functions: the trainers are slow to import and change
within months, the data functions do not. `public_trainers` lends those to whoever holds ours beside
them; nothing trains with them. Inputs that TRL answers wrongly or with an index error (nothing in
common, nothing at all, a sequence longer than the block) are handled here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moe.errors import UserError
from sft.examples import Preference, Unpaired
from sft.text import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turn = Mapping[str, str]
TextOrTurns = TypeVar("TextOrTurns", str, list[Turn])


def extract_prompt(
    chosen: TextOrTurns, rejected: TextOrTurns
) -> tuple[TextOrTurns, TextOrTurns, TextOrTurns]:
    """What chosen and rejected share at their beginning, and what is left of each.

    Both are texts, or lists of turns with role and content. Of two equal ones the last element
    (character or turn) counts as the answer. A UserError if one of them is empty.
    """
    from trl.data_utils import maybe_extract_prompt

    if not chosen or not rejected:
        empty = "rejected" if chosen else "chosen"
        raise UserError(f"A preference's {empty} is empty: there is no prompt to find in it.")
    if chosen[0] != rejected[0]:
        # TRL looks at the element before the difference, which here would be the very last one.
        return chosen[:0], chosen, rejected
    row = maybe_extract_prompt({"chosen": chosen, "rejected": rejected})
    return row["prompt"], row["chosen"], row["rejected"]


def is_conversational(value: object) -> bool:
    """Whether a field's value is a list of turns with roles, rather than text."""
    from trl.data_utils import is_conversational as trl_is_conversational

    return bool(value) and bool(trl_is_conversational({"messages": value}))


def unpair(preferences: Sequence[Preference]) -> list[Unpaired]:
    """Each preference as two separate judgements, good and bad, in TRL's order."""
    from datasets import Dataset
    from trl.data_utils import maybe_unpair_preference_dataset

    if not preferences:
        return []
    rows = [
        {
            "prompt": as_turns(preference.prompt),
            "chosen": preference.chosen,
            "rejected": preference.rejected,
        }
        for preference in preferences
    ]
    with no_progress_bars():
        unpaired = maybe_unpair_preference_dataset(Dataset.from_list(rows))
    return [
        Unpaired(
            prompt=tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"]),
            completion=row["completion"],
            is_good=row["label"],
        )
        for row in unpaired
    ]


def pack(rows: Sequence[Mapping[str, Sequence[int]]], *, seq_length: int) -> list[dict[str, Any]]:
    """Rows of token lists packed whole into few rows of at most `seq_length` tokens.

    Best fit decreasing, as TRL does it. All lists of a row have one length and every row the same
    keys. The packed rows also have `seq_lengths`, the lengths of the rows in them. TRL cuts a row
    that is too long without a word; here it is a UserError.
    """
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    if not rows:
        return []
    for index, row in enumerate(rows):
        longest = max(len(values) for values in row.values())
        if longest > seq_length:
            raise UserError(
                f"Row {index} has {longest} tokens and does not fit a block of {seq_length}: "
                "split or cut it before packing, or raise the block length."
            )
    table = Dataset.from_list([{key: list(row[key]) for key in row} for row in rows])
    with no_progress_bars():
        packed = pack_dataset(
            table, seq_length=seq_length, strategy="bfd", map_kwargs={"batch_size": len(rows)}
        )
    return [dict(row) for row in packed]


def chat_text(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> str:
    """The conversation as TRL writes it with the tokenizer's chat template, an oracle for ours."""
    from trl.data_utils import apply_chat_template

    row = {"messages": as_turns(conversation)}
    return str(apply_chat_template(row, tokenizer)["text"])


def as_turns(conversation: Conversation) -> list[Turn]:
    """A conversation in the form TRL and chat templates take."""
    return [{"role": message.role, "content": message.content} for message in conversation]


@dataclass(frozen=True, kw_only=True)
class PublicTrainers:
    """TRL's trainers for text and what each is configured with, from the installed version."""

    version: str
    sft: Any
    sft_config: Any
    reward: Any
    reward_config: Any
    dpo: Any
    dpo_config: Any


def public_trainers() -> PublicTrainers:
    """TRL's own SFT, reward and DPO trainers. A UserError where they cannot be imported."""
    try:
        import trl
        from trl import (
            DPOConfig,
            DPOTrainer,
            RewardConfig,
            RewardTrainer,
            SFTConfig,
            SFTTrainer,
        )
    except ImportError as missing:
        raise UserError(
            f"TRL's trainers cannot be imported ({missing}): install trl 1.16 or later."
        ) from missing
    return PublicTrainers(
        version=trl.__version__,
        sft=SFTTrainer,
        sft_config=SFTConfig,
        reward=RewardTrainer,
        reward_config=RewardConfig,
        dpo=DPOTrainer,
        dpo_config=DPOConfig,
    )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Data sets are made without a bar for each step."""
    import datasets

    were_shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            datasets.enable_progress_bars()
