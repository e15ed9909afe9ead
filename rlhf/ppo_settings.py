"""What PPO is made of, as data; what cannot be, or would change nothing, is refused here."""

import math
from dataclasses import dataclass
from typing import Literal

from moe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """What PPO is made of; optimisation itself is in `TrainSettings`. See rlhf/CHECKLIST.md.

    updates: rollout phases. episodes: completions per update, over all processes.
    epochs, minibatches: passes over an update's episodes and steps per pass.
    clip_high: upper clip of the ratio apart from the lower (0: the same).
    dual_clip: bound on the loss of a token with negative advantage, above 1 (0: none).
    whitening_variance, whitening_scope: over count - 1 or count; moments of the whole update or of
    each minibatch, always over all processes. The variance is that of rewards too, the scope is the
    advantages' alone.
    missing_eos_penalty: subtracted from the score of a completion without EOS (0: none).
    missing_eos_replace: put in the place of that score (None: not).
    score_scaling: `running` divides scores by their standard deviation since the first update.
    score_clip: scores, scaled or not, are clipped to +-this (0: not).
    critic_lam: lambda of the critic's returns apart from the advantages' (None: the same; VAPO 1).
    critic_warmup: of the updates, the first so many in which the critic learns alone.
    kl_in: where the price of the KL is paid. In the `reward` by k1, which later tokens' advantages
    carry back to earlier choices. In the `loss` by kl_estimator, token by token: no choice is
    charged for the KL that later tokens then have, so that with more than one token the optimum is
    another, and whitened advantages change the weight of reward against KL.
    kl_estimator: of kl_in `loss`. k2 has the gradient of KL(policy, reference) on policy; that of
    k3 is KL(reference, policy)'s; k1 is refused.
    target_kl: an epoch whose last minibatch has approx_kl_k3 above it is the update's last (0: no
    stop). ratio_threshold: a minibatch with a mean ratio above it makes no step (0: all make one).
    ptx_coef: weight of the language-model loss on `ptx_rows` (InstructGPT's gamma; 0: none).
    compat: `n_plus` puts the score one place after the last token, where there is one, and gives
    that place a value, as Huang et al. 2024 (N+) and TRL do; for reproductions.
    """

    updates: int
    episodes: int
    epochs: int = 4
    minibatches: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    clip_high: float = 0.0
    dual_clip: float = 0.0
    value_clip: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    whitening_variance: Literal["unbiased", "biased"] = "unbiased"
    whitening_scope: Literal["update", "minibatch"] = "update"
    missing_eos_penalty: float = 0.0
    missing_eos_replace: float | None = None
    score_scaling: Literal["none", "running"] = "none"
    score_clip: float = 0.0
    critic_lr_scale: float = 1.0
    critic_lam: float | None = None
    critic_warmup: int = 0
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    target_kl: float = 0.0
    ratio_threshold: float = 0.0
    ptx_coef: float = 0.0
    compat: Literal["none", "n_plus"] = "none"

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_pairs()

    def _check_ranges(self) -> None:
        for name in ("updates", "episodes", "epochs", "minibatches", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.episodes % self.minibatches:
            raise UserError(
                f"episodes {self.episodes} must be a multiple of minibatches {self.minibatches}."
            )
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature} must be above 0: PPO has to explore.")
        for name in ("clip_high", "missing_eos_penalty", "score_clip", "target_kl", "ptx_coef"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}: give a number of 0 or more.")
        for name in ("dual_clip", "ratio_threshold"):
            number = getattr(self, name)
            if number and not 1.0 < number < math.inf:
                raise UserError(f"{name} is {number}: it must be above 1, or 0 to leave it out.")
        if self.critic_lam is not None and not 0.0 <= self.critic_lam <= 1.0:
            raise UserError(f"critic_lam {self.critic_lam} must lie between 0 and 1.")
        if not 0 <= self.critic_warmup < self.updates:
            raise UserError(
                f"critic_warmup {self.critic_warmup} must be at least 0 and below updates "
                f"{self.updates}: the policy would never learn."
            )

    def _check_pairs(self) -> None:
        if self.missing_eos_penalty and self.missing_eos_replace is not None:
            raise UserError(
                f"missing_eos_penalty {self.missing_eos_penalty} and missing_eos_replace "
                f"{self.missing_eos_replace} are two answers to one question: give one."
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "kl_estimator k1 in the loss has a gradient of zero in expectation, noise without "
                "a pull: take k2 (or k3, whose gradient is that of the reverse KL)."
            )
        if self.kl_in == "reward" and self.kl_estimator != "k2":
            raise UserError(
                f"kl_estimator {self.kl_estimator} has no effect with kl_in reward, which takes k1."
            )
        if self.critic_warmup and not self.value_coef:
            raise UserError("critic_warmup has no effect with value_coef 0: nothing would learn.")
        if self.target_kl and self.epochs == 1:
            raise UserError("target_kl has no effect with 1 epoch: there is none left to stop.")
        if self.ratio_threshold and self.epochs * self.minibatches == 1:
            raise UserError(
                "ratio_threshold has no effect with one step an update: its ratio is always 1."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training, those that target_kl will leave out included."""
        return self.updates * self.epochs * self.minibatches

    @property
    def minibatch_size(self) -> int:
        return self.episodes // self.minibatches

    @property
    def unbiased(self) -> bool:
        return self.whitening_variance == "unbiased"
