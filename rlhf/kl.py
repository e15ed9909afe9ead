"""How far the policy is from the reference: per-token estimators, and controllers of the price.

With tokens sampled from the policy and d = logp - ref_logp, three estimators of KL(policy ||
reference) are in use (Schulman 2020, joschu.net/blog/kl-approx.html). None is best everywhere:

- In the REWARD use `k1`. The score-function gradient then is that of the KL itself, without bias.
- In a LOSS, differentiated through logp on policy, `k2` has the gradient of this KL. The gradient
  of `k1` is zero in expectation: noise and no pull. That of `k3` is the gradient of the KL in the
  other direction, KL(reference || policy).
- In a LOG use `k1` for the number that the reward pays and a controller steers (unbiased, may be
  negative in a small sample), `k3` for a curve (unbiased, never negative, smaller variance near 0).

The estimators take any shape and know no mask: give them log-probabilities that are zero where
masked (`rlhf.logprobs.response_logps`), and they are zero there too.
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe.errors import UserError


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d = logp - ref_logp: unbiased, of either sign. For the reward."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient is that of the KL on policy. For a loss."""
    return 0.5 * (logp - ref_logp).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased, never negative. For a curve."""
    difference = logp - ref_logp
    # expm1 keeps the digits that exp(-d) - 1 loses when the two models are close.
    return torch.expm1(-difference) + difference


class KLController(Protocol):
    """Holds the coefficient of the KL, in reward or loss, and may move it after each update."""

    @property
    def coef(self) -> float: ...

    def update(self, kl_mean: float, num_episodes: int) -> None:
        """kl_mean: mean over the update's episodes of the sum over tokens of `k1`, in nats."""

    def state_dict(self) -> dict[str, str | float]: ...

    def load_state_dict(self, state: Mapping[str, str | float]) -> None: ...


@dataclass(frozen=True)
class FixedKL:
    """A coefficient that stays; 0 switches the KL off."""

    coef: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.coef < math.inf:
            raise UserError(f"the KL coefficient must be a finite number of 0 or more: {self.coef}")

    def update(self, kl_mean: float, num_episodes: int) -> None:
        """Nothing moves; a KL that is not finite raises ValueError all the same."""
        _check_update(kl_mean, num_episodes)

    def state_dict(self) -> dict[str, str | float]:
        return {"kind": "fixed", "coef": self.coef}

    def load_state_dict(self, state: Mapping[str, str | float]) -> None:
        """Checks that the stored coefficient is this one; raises UserError otherwise."""
        _check_state(state, expected=self.state_dict())


@dataclass
class AdaptiveKL:
    """A coefficient that follows a target KL (Ziegler et al. 2019, section 2.2).

    error = clip(kl_mean / target - 1, -0.2, 0.2);  coef *= 1 + error * num_episodes / horizon.

    coef: the present coefficient, the only thing that moves; above 0, or it could never grow.
    target: nats per episode. horizon: episodes.
    """

    coef: float
    _: KW_ONLY
    target: float = 6.0
    horizon: float = 10_000

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            number = getattr(self, name)
            if not 0.0 < number < math.inf:
                raise UserError(f"AdaptiveKL: {name} must be a finite number above 0, got {number}")

    def update(self, kl_mean: float, num_episodes: int) -> None:
        """Move the coefficient by one update of `num_episodes` episodes.

        Raises ValueError for a KL that is not finite, and when one update holds so many episodes (5
        horizons) that the rule would make the coefficient 0 or negative.
        """
        _check_update(kl_mean, num_episodes)
        if num_episodes >= 5 * self.horizon:
            raise UserError(
                f"AdaptiveKL: one update of {num_episodes} episodes is too many for a horizon of "
                f"{self.horizon}; give a horizon above {num_episodes / 5}"
            )
        error = min(max(kl_mean / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_episodes / self.horizon

    def state_dict(self) -> dict[str, str | float]:
        return {
            "kind": "adaptive",
            "coef": self.coef,
            "target": self.target,
            "horizon": self.horizon,
        }

    def load_state_dict(self, state: Mapping[str, str | float]) -> None:
        """Take up the stored coefficient; raises UserError unless target and horizon agree."""
        _check_state(state, expected=self.state_dict() | {"coef": state.get("coef", math.nan)})
        coef = float(state["coef"])
        if not 0.0 < coef < math.inf:
            raise UserError(f"AdaptiveKL: the stored coefficient {coef} is not above 0 and finite")
        self.coef = coef


def _check_update(kl_mean: float, num_episodes: int) -> None:
    if not math.isfinite(kl_mean):
        raise ValueError(f"the mean KL of the update is {kl_mean}; the policy has diverged")
    if num_episodes < 1:
        raise ValueError(f"an update of {num_episodes} episodes has no mean KL")


def _check_state(state: Mapping[str, str | float], *, expected: Mapping[str, str | float]) -> None:
    stored, configured = dict(state), dict(expected)
    if set(stored) != set(configured) or any(stored[k] != v for k, v in configured.items()):
        raise UserError(
            f"the stored KL controller {stored} is not the configured one {configured}; "
            "resume with the options of the run that stored it"
        )
