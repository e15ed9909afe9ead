"""Texts that PPO goes on modelling while it learns from rewards: InstructGPT's PPO-ptx.

The decision to know: a step has as many texts as episodes, drawn by the step's number, so that a
resumed run needs no memory of them; their loss is a mean over the learned tokens of the whole step,
whatever the split (Ouyang et al. 2022, eq. 2, whose expectation is over texts, not tokens).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moe.errors import UserError
from rlhf.episodes import Plan, rows_in_order
from sft.loss import LossOutput, language_model_loss
from sft.rows import SupervisedCollator

PREFIX = "ptx_"
_FIELDS = ("input_ids", "attention_mask", "labels")


class TextMix:
    """rows: `input_ids` and `labels` each, -100 where nothing is learned, as SFT has them."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, pad_id: int) -> None:
        if not rows:
            raise UserError("ptx_rows is empty: there is no text to mix in.")
        self.rows = rows
        self.collator = SupervisedCollator(pad_id)

    def micro_batches(self, step: int, plan: Plan) -> list[dict[str, Tensor]]:
        """This process's texts of an optimizer step, in as many micro-batches as its episodes."""
        size, share = plan.ppo.minibatch_size, plan.own_share
        order = rows_in_order(
            plan.seed, "ppo-ptx", first=step * size, count=size, num_rows=len(self.rows)
        )
        mine: list[Any] = [self.rows[order[i]] for i in share]
        batches = []
        for start in range(0, len(mine), plan.micro):
            rows = [{"sample_id": 0, **row} for row in mine[start : start + plan.micro]]
            batch = self.collator(rows)  # type: ignore[arg-type]
            batches.append({PREFIX + name: batch[name] for name in _FIELDS})
        return batches


def num_learned(batch: Mapping[str, Tensor]) -> int:
    return int((batch[PREFIX + "labels"][:, 1:] != -100).sum())


def num_tokens(batch: Mapping[str, Tensor]) -> int:
    return int(batch[PREFIX + "attention_mask"].sum())


def text_loss(policy: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
    """Summed cross-entropy of the micro-batch's texts under the policy."""
    outputs = policy(
        input_ids=batch[PREFIX + "input_ids"],
        attention_mask=batch[PREFIX + "attention_mask"],
        use_cache=False,
    )
    output = language_model_loss(outputs.logits, batch[PREFIX + "labels"])
    return LossOutput(
        loss_sum=output.loss_sum,
        count=output.count,
        metrics={"policy/ptx_loss": (output.loss_sum.detach(), output.count)},
    )
