"""When PPO makes no step: the epochs after a KL above its target, a minibatch with a wild ratio.

The decision to know: the loop's count of steps goes on over what is left out, so that the learning
rate, the draws and a checkpoint's place stay those of the plan. A step that is left out has no
gradients, and an optimizer without gradients moves neither weights nor moments and decays nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.ppo_settings import PPOSettings

_READ = ("policy/approx_kl_k3", "policy/ratio")


class Brake:
    """Watches the ratio of each step; its verdicts are the same on every process.

    stopped_update: the update whose remaining steps are left out. skipped_steps: how many were, for
    either reason, since the training began.
    """

    def __init__(self, ppo: PPOSettings, all_sum: Callable[[Tensor], Tensor]) -> None:
        self.ppo = ppo
        self.all_sum = all_sum
        self.stopped_update: int | None = None
        self.skipped_steps = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    @property
    def is_on(self) -> bool:
        return self.ppo.target_kl > 0 or self.ppo.ratio_threshold > 0

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """The metrics of a micro-batch of the step at hand."""
        kl, ratio = (metrics[name] for name in _READ)
        self._sums += torch.tensor([float(kl[0]), float(ratio[0]), float(kl[1])]).double()

    def judge_step(self, update: int, epoch: int, minibatch: int, *, device: torch.device) -> bool:
        """Whether the step, all of whose micro-batches were added, is to be made.

        The KL, by k3, is that of the epoch's last minibatch before its step, as CleanRL measures
        it; one above the target ends the update after this step.
        """
        kl, ratio, count = self.all_sum(self._sums.to(device)).tolist()
        self._sums = torch.zeros(3, dtype=torch.float64)
        ends_epoch = minibatch == self.ppo.minibatches - 1
        if self.ppo.target_kl and ends_epoch and kl / count > self.ppo.target_kl:
            self.stopped_update = update
        # Written so that a ratio that is no number makes no step either.
        return not self.ppo.ratio_threshold or ratio / count <= self.ppo.ratio_threshold

    def has_stopped(self, update: int) -> bool:
        return self.stopped_update == update

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_update": self.stopped_update, "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stopped_update = state["stopped_update"]
        self.skipped_steps = state["skipped_steps"]
