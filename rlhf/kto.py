"""Learning from answers judged one by one: KTO's trainer.

The decision to know: the point of reference z0 is estimated once an optimizer step, from all its
micro-batches on all processes, before the first of them is learned from. So a step is the same
however it is split, though every answer's loss depends on the others; it costs a second pass
without gradients through policy and reference, on the mismatched pairs.

Shapes: B answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.alarms import PREFERENCE
from rlhf.dpo import check_start, completion_logps
from rlhf.losses.kto import KTOLoss, reference_point
from rlhf.reference import Reference, beside_the_policy
from rlhf.routing_guard import FLAG, has_noisy_router, refuse_batch_coupling
from sft.adapt import disable_dropout
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import StageTrainer


@torch.no_grad()
def mismatched_log_ratios(
    policy: nn.Module, reference: Reference, batch: Mapping[str, Tensor]
) -> Tensor:
    """log pi(y'|x) - log pi_ref(y'|x) of the prompts with their other answers, (B,) float64."""
    names = ("input_ids", "attention_mask", "completion_mask")
    other = {name: batch[f"other_{name}"] for name in names}
    logp_B, _ = completion_logps(policy, other)
    with reference.lend() as frozen:
        reference_logp_B, _ = completion_logps(frozen, other)
    return logp_B.double() - reference_logp_B.double()


class KTOTrainer(StageTrainer):
    """Trains `model` on rows of `sft.unpaired` against `reference`; balance is off unless asked.

    Metrics beside the loss's: preference/reference_point, z0 in nats, before KTO's beta.
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
        loss: KTOLoss | None = None,
        allow_batch_dependent_routing: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("stage", "kto")
        kwargs.setdefault("balance", BalancePolicy(scope="off"))
        self.loss = KTOLoss() if loss is None else loss
        self.reference = reference
        self.reference_point = torch.zeros(())  # of the step at hand
        refuse_batch_coupling(model, allowed=allow_batch_dependent_routing)
        self.routing_flag = {FLAG: True} if allow_batch_dependent_routing else {}
        self.is_noisy = has_noisy_router(model)
        disable_dropout(model)
        super().__init__(model, settings, **kwargs)

    def own_settings(self) -> dict[str, Any]:
        return {"loss": repr(self.loss), **self.routing_flag}

    def frozen_models(self) -> Mapping[str, nn.Module]:
        return beside_the_policy(self.reference)

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[0]

    def measure_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model.train()  # as in the passes to come; a loaded model may still be in eval mode
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            here = self._prepare_inputs(dict(batch))
            ratio_B = mismatched_log_ratios(self.model, self.reference, here)
            total += torch.stack([ratio_B.sum(), torch.full_like(ratio_B, 1.0).sum()])
        total = self._all_sum(total)
        self.reference_point = reference_point(total[0], total[1])
        super().measure_step(batches)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad(), self.reference.lend() as reference:
            logp_B, _ = completion_logps(reference, batch)
        return {**batch, "reference": logp_B}

    def objective(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        logp_B, _ = completion_logps(model, batch)
        output = self.loss(
            logp_B,
            batch["reference"],
            is_good_B=batch["is_good"],
            reference_point=self.reference_point.to(logp_B.dtype),
        )
        if self.state.global_step == 0 and not self.is_noisy:
            good = int(batch["is_good"].sum())
            expected = self.loss.value_at_reference(good, int(output.count) - good)
            check_start(float(output.loss.detach()), expected)
        point = {"preference/reference_point": (self.reference_point * output.count, output.count)}
        return replace(output, metrics={**output.metrics, **point})
