"""What PPO is made of, as data; what cannot be, or would change nothing, is refused here.

The decision to know: GRPO, GSPO, RLOO and REINFORCE++ are PPO with another `advantage`, one that
asks no critic; an option that only a critic or a whitening has a use for is refused with them.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from moe.errors import UserError

Advantage = Literal["gae", "grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]
GROUPED = ("grpo", "rloo", "reinforce_pp_baseline")  # baselines of other answers to the prompt
WHITENED = ("gae", "reinforce_pp", "reinforce_pp_baseline")
PER_TOKEN = ("gae", "reinforce_pp")  # what is left to come from each token on, not of the answer

# The advantages that an option has an effect with, where not with all.
ADVANTAGES_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("lam", "value_clip", "value_coef", "critic_lr_scale", "critic_lam", "critic_warmup"),
            "compat",
        ),
        ("gae",),
    ),
    **dict.fromkeys(("whiten_advantages", "whitening_variance", "whitening_scope"), WHITENED),
    **dict.fromkeys(("gamma", "whiten_rewards"), PER_TOKEN),
    "scale_by_std": ("grpo",),
}


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """What PPO is made of; optimisation itself is in `TrainSettings`. See rlhf/CHECKLIST.md.

    updates: rollout phases. episodes: completions per update, over all processes.
    group_size: completions per prompt, so that an update has episodes / group_size prompts.
    advantage: `gae` from a critic; the others have none. `grpo`, `rloo`: an answer's score, less
    the KL where the reward pays it, against those of its group (`rlhf.group_advantage`).
    `reinforce_pp`: the rewards from each token on, whitened (REINFORCE++, Hu et al. 2025,
    arxiv.org/abs/2501.03262); `reinforce_pp_baseline`: the score less its group's mean, whitened.
    scale_by_std: `grpo` divides by the deviation of the group.
    ratio_level: the ratio that is clipped is a token's, or one for its whole answer (GSPO).
    loss_mean: of the policy's terms, over tokens, over answers of their tokens' means, or over
    answers of their sum / max_new_tokens (`rlhf.losses.mean`). A value loss is over tokens.
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
    replay: which experts the policy's passes take in the update phase, so that ratios compare one
    route with itself. `none`: their own. `old_policy`: those of the pass that gave the old
    log-probabilities (R2: the routing replay of Zheng et al. 2025, arxiv.org/abs/2507.18071, called
    vanilla beside R3). `rollout`: those that the sampler took, in that pass too (R3, rollout
    routing replay, Ma et al. 2025, arxiv.org/abs/2510.11370). Weights follow from live logits, so
    that routers learn on; reference, critic and texts of ptx_rows choose for themselves.
    rollout_numerics: what the policy is sampled in: its own, `bf16` weights, or `router_noise` of
    size rollout_noise on its logits (`rlhf.rollout_numerics`). Only what is drawn differs.
    mismatch_correction: weighs the policy's loss by trainer over sampler, by the `token` or for the
    whole answer (`sequence`), up to mismatch_cap (`rlhf.mismatch`).
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
    advantage: Advantage = "gae"
    group_size: int = 1
    scale_by_std: bool = True
    ratio_level: Literal["token", "sequence"] = "token"
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    replay: Literal["none", "old_policy", "rollout"] = "none"
    rollout_numerics: Literal["same", "bf16", "router_noise"] = "same"
    rollout_noise: float = 0.0
    mismatch_correction: Literal["none", "token", "sequence"] = "none"
    mismatch_cap: float = 2.0

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        self._check_pairs()
        self._check_advantage()
        self._check_rollout()
        self._check_finite()

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            value = getattr(self, name)
            if choices and all(isinstance(choice, str) for choice in choices):
                if value not in choices:
                    raise UserError(f"{name} is {value!r}: it is one of {', '.join(choices)}.")

    def _check_finite(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} is {value}: give a finite number.")

    def _check_ranges(self) -> None:
        counts = ("updates", "episodes", "epochs", "minibatches", "max_new_tokens", "group_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.episodes % self.minibatches:
            raise UserError(
                f"episodes {self.episodes} must be a multiple of minibatches {self.minibatches}."
            )
        if self.episodes % self.group_size:
            raise UserError(
                f"episodes {self.episodes} must be a multiple of group_size {self.group_size}: "
                "they are prompts x group_size."
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

    def _check_advantage(self) -> None:
        if self.advantage in GROUPED and self.group_size == 1:
            raise UserError(
                f"advantage {self.advantage} with group_size 1: an answer is measured by others to "
                "the same prompt, so give a group_size of 2 or more."
            )
        built_in = {f.name: f.default for f in fields(self)}
        for name, advantages in ADVANTAGES_OF.items():
            number = getattr(self, name)
            if self.advantage not in advantages and number != built_in[name]:
                raise UserError(
                    f"{name} {number} has no effect with advantage {self.advantage} (it belongs to "
                    f"{' and '.join(advantages)}): leave it out."
                )

    def _check_rollout(self) -> None:
        if not 0.0 <= self.rollout_noise < math.inf:
            raise UserError(f"rollout_noise is {self.rollout_noise}: give a number of 0 or more.")
        if (self.rollout_numerics == "router_noise") != (self.rollout_noise > 0):
            raise UserError(
                f"rollout_numerics {self.rollout_numerics} and rollout_noise {self.rollout_noise}: "
                "router_noise and a size above 0 go together, give both or neither."
            )
        if not 1.0 <= self.mismatch_cap < math.inf:
            raise UserError(f"mismatch_cap {self.mismatch_cap} must be at least 1 and finite.")
        if self.mismatch_correction != "none" and self.rollout_numerics == "same":
            raise UserError(
                f"mismatch_correction {self.mismatch_correction} has no effect with "
                "rollout_numerics same, where sampler and trainer differ by rounding: leave it out."
            )
        if self.mismatch_correction == "none" and self.mismatch_cap != 2.0:
            raise UserError(
                f"mismatch_cap {self.mismatch_cap} has no effect without mismatch_correction: "
                "leave it out."
            )
        if self.replay == "old_policy" and self.epochs * self.minibatches == 1:
            raise UserError(
                "replay old_policy has no effect with one step an update, whose pass is the old "
                "policy's: leave it out."
            )

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened: unless switched off, where the method knows it."""
        return self.whiten_advantages and self.advantage in WHITENED

    @property
    def num_prompts(self) -> int:
        """Of an update."""
        return self.episodes // self.group_size

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
