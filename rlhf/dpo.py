"""Learning from pairs: a policy, a reference, a loss of `rlhf.losses.table`, nothing generated.

The reference's log-probabilities are computed on the same micro-batch in the same shape, so that at
step 0 both are equal and the preference term must be the loss's value at the reference (ln 2 for
DPO); a run where it is not is stopped. A loss without a reference costs no reference pass.

Shapes: B pairs, S sequence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import UserError
from moe.generation import positions
from rlhf.alarms import PREFERENCE
from rlhf.logprobs import sequence_logps, token_logps
from rlhf.losses import PairLogps, PreferenceLoss
from rlhf.losses.dpo import DPOLoss
from rlhf.reference import Reference, beside_the_policy
from rlhf.routing_guard import FLAG, has_noisy_router, refuse_batch_coupling
from sft.adapt import disable_dropout
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import StageTrainer

# Float32 sums over some hundred tokens, times beta; of the value where that is above 1 (IPO's).
STEP_ZERO_TOLERANCE = 1e-4


class SelfCheckFailed(RuntimeError):
    """A quantity known beforehand came out otherwise, so the run would measure something else."""


def completion_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Each row's log-probability summed over its completion, and the tokens of that: (B,) each."""
    mask_BS = batch["attention_mask"]
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=mask_BS.long(),
        position_ids=positions(mask_BS),
        use_cache=False,
    )
    logp_BS = token_logps(outputs.logits, batch["input_ids"])
    return sequence_logps(logp_BS, batch["completion_mask"])


def pair_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> PairLogps:
    """Summed completion log-probabilities of chosen (first half of the rows) and rejected."""
    sum_B, length_B = completion_logps(model, batch)
    chosen, rejected = sum_B.chunk(2)
    chosen_length, rejected_length = length_B.chunk(2)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )


def check_start(value: float, expected: float) -> None:
    """Raises SelfCheckFailed unless a loss begins where it must when policy is reference."""
    if abs(value - expected) > STEP_ZERO_TOLERANCE * max(1.0, expected):
        raise SelfCheckFailed(
            f"the preference loss starts at {value:.6f}, not at {expected:.6f}: policy and "
            "reference are not the same model before the first step."
        )


class DPOTrainer(StageTrainer):
    """Trains `model` on pairs with any loss of pairs; balance is off unless asked for.

    reference: what the loss measures from; never lent, so `NoReference()` will do, where the loss
    needs none.
    allow_batch_dependent_routing: train also where a router couples tokens or draws noise; under
    noise the check at step 0 is left out. Raises UserError for such a router without it.
    """

    alarms = PREFERENCE

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        *,
        reference: Reference,
        loss: PreferenceLoss | None = None,
        allow_batch_dependent_routing: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("stage", "dpo")
        kwargs.setdefault("balance", BalancePolicy(scope="off"))
        self.loss: PreferenceLoss = DPOLoss() if loss is None else loss
        if self.loss.couples_batch:
            raise UserError(
                f"{type(self.loss).__name__} couples the pairs of a batch, so that it would depend "
                "on the size of micro-batches: DPOTrainer takes losses of single pairs."
            )
        self.reference = reference
        refuse_batch_coupling(model, allowed=allow_batch_dependent_routing)
        self.routing_flag = {FLAG: True} if allow_batch_dependent_routing else {}
        self.is_noisy = has_noisy_router(model)
        disable_dropout(model)
        super().__init__(model, settings, **kwargs)

    def own_settings(self) -> dict[str, Any]:
        # A sum goes without saying, as in the checkpoints from before there was a choice.
        return {"loss": repr(self.loss).replace(", normalisation='sum'", ""), **self.routing_flag}

    def frozen_models(self) -> Mapping[str, nn.Module]:
        return beside_the_policy(self.reference) if self.loss.needs_reference else {}

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[0] // 2

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        if not self.loss.needs_reference:
            return batch
        with torch.no_grad(), self.reference.lend() as reference:
            return {**batch, "reference": pair_logps(reference, batch)}

    def objective(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        policy = pair_logps(model, batch)
        output = (
            self.loss(policy, batch["reference"]) if "reference" in batch else self.loss(policy)
        )
        expected = self.loss.value_at_reference
        if self.state.global_step == 0 and expected is not None and not self.is_noisy:
            check_start(float(output.loss.detach()), expected)
        return output
