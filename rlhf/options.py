"""The options of `python -m rlhf.train`, and which of them belong to which method.

Apart from the command and from the work, so that both can import them and a mistyped flag is
answered before torch is imported.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from moe.errors import UserError
from rlhf.ppo_settings import ADVANTAGES_OF, PPOSettings
from sft.command import BalanceScope, TrainingConfig, option

COMMAND = "rlhf.train"
Method = Literal[
    "rm", "dpo", "kto", "ppo", "grpo", "gspo", "rloo", "reinforce_pp", "reinforce_pp_baseline"
]

# PPO, and the methods that are PPO without a critic: what each stands for where no option says
# otherwise. GSPO clips an answer's ratio, which moves far less than a token's; its paper's upper
# bound is 4e-4.
PRESETS: dict[Method, dict[str, Any]] = {
    "ppo": {"advantage": "gae"},
    "grpo": {"advantage": "grpo", "group_size": 8, "loss_mean": "sequence"},
    "gspo": {
        **{"advantage": "grpo", "group_size": 8, "loss_mean": "sequence"},
        **{"ratio_level": "sequence", "clip": 3e-4},
    },
    "rloo": {"advantage": "rloo", "group_size": 4},
    "reinforce_pp": {"advantage": "reinforce_pp"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "group_size": 8},
}
POLICY_GRADIENT: tuple[Method, ...] = tuple(PRESETS)

# Losses of pairs, by name as in `rlhf.losses.table`, and those that an option belongs to.
PairLoss = Literal["dpo", "ipo", "hinge", "simpo", "orpo"]
LOSSES_OF: dict[str, tuple[PairLoss, ...]] = {
    "beta": ("dpo", "ipo", "hinge", "simpo"),
    "label_smoothing": ("dpo",),
    "normalisation": ("dpo", "ipo", "hinge"),
    "target_margin": ("simpo",),
    "odds_coef": ("orpo",),
}

# The methods that an option belongs to, where it does not belong to all.
METHODS_OF: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(("center_coef", "normalize", "normalize_data"), ("rm",)),
    "beta": ("dpo", "kto"),
    **dict.fromkeys(
        ("loss", "label_smoothing", "normalisation", "target_margin", "odds_coef"), ("dpo",)
    ),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto",)),
    **dict.fromkeys(("epochs", "max_steps", "batch_size"), ("rm", "dpo", "kto")),
    **dict.fromkeys(
        ("num_samples", "max_new_tokens", "allow_batch_dependent_routing"),
        ("dpo", "kto", *POLICY_GRADIENT),
    ),
    **dict.fromkeys(
        (
            *("reward_model", "allow_weak_reward_model", "updates", "episodes", "ppo_epochs"),
            *("minibatches", "temperature", "kl_coef", "kl_target", "kl_horizon", "clip"),
            *("entropy_coef", "missing_eos_penalty", "score_clip", "kl_in", "kl_estimator"),
            *("clip_high", "dual_clip", "missing_eos_replace", "score_scaling", "target_kl"),
            *("ratio_threshold", "ptx_data", "ptx_coef", "group_size", "loss_mean", "replay"),
            *("rollout_numerics", "rollout_noise", "mismatch_correction", "mismatch_cap"),
        ),
        POLICY_GRADIENT,
    ),
    "critic": ("ppo",),
    **{
        name: tuple(m for m in POLICY_GRADIENT if PRESETS[m]["advantage"] in advantages)
        for name, advantages in ADVANTAGES_OF.items()
    },
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """The options of rlhf.train."""

    method: Method = field(metadata={"help": "reward model, DPO, PPO or, without a critic, others"})
    lr: float = option(5e-5, "peak learning rate")
    log_steps: int = option(0, "steps between metrics; 0: 10, ppo each update")
    center_coef: float = option(0.0, "rm: pull of scores towards 0")
    normalize: Literal["none", "mean", "std"] = option("mean", "rm: to mean 0, or also std 1")
    normalize_data: Path | None = option(None, "rm: over these answers, not the pairs")
    loss: PairLoss = option("dpo", "dpo: of pairs")
    beta: float | None = option(None, "dpo, kto: price of a nat; none: 0.1, simpo 2")
    label_smoothing: float = option(0.0, "dpo: share of wrong labels")
    normalisation: Literal["sum", "mean"] = option("sum", "dpo: of log-ratios over tokens")
    target_margin: float = option(1.0, "dpo, simpo: gamma, to be ahead by")
    odds_coef: float = option(0.1, "dpo, orpo: lambda, beside the likelihood")
    desirable_weight: float = option(1.0, "kto: of good answers")
    undesirable_weight: float = option(1.0, "kto: of bad answers")
    allow_batch_dependent_routing: bool = option(False, "dpo, kto, ppo: also under capacity, noise")
    freeze_router: bool = option(False, "of policy or reward model: not trained")
    reward_model: Path | None = option(None, "ppo: a run of --method rm")
    allow_weak_reward_model: bool = option(False, "ppo: also one near chance")
    updates: int = option(50, "ppo: rollout phases")
    episodes: int = option(64, "ppo: answers per update")
    ppo_epochs: int = option(4, "ppo: passes over them")
    minibatches: int = option(1, "ppo: steps per pass")
    temperature: float = option(1.0, "ppo: of its answers")
    kl_coef: float = option(0.05, "ppo: price of a nat")
    kl_target: float | None = option(None, "ppo: nats, adapts kl-coef")
    kl_horizon: float = option(10_000, "ppo: episodes, of kl-target")
    gamma: float = option(1.0, "ppo: discount")
    lam: float = option(0.95, "ppo: GAE's lambda")
    clip: float | None = option(None, "ppo: of the ratio; none: 0.2, gspo 3e-4")
    value_clip: float = option(0.2, "ppo: of values; 0: none")
    value_coef: float = option(0.1, "ppo: of the value loss")
    entropy_coef: float = option(0.0, "ppo: entropy bonus")
    critic_lr_scale: float = option(1.0, "ppo: critic's lr / lr")
    whiten_rewards: bool = option(False, "ppo: scale by their deviation")
    whiten_advantages: bool = option(True, "ppo: mean 0, deviation 1")
    missing_eos_penalty: float = option(0.0, "ppo: off the score")
    score_clip: float = option(0.0, "ppo: of scores; 0: none")
    critic: Literal["separate", "shared"] = option(
        "separate", "ppo: from the reward model, or a head on the policy"
    )
    critic_lam: float | None = option(None, "ppo: lambda of its returns; none: lam")
    critic_warmup: int = option(0, "ppo: first updates, it learns alone")
    kl_in: Literal["reward", "loss"] = option("reward", "ppo: where a nat is paid")
    kl_estimator: Literal["k1", "k2", "k3"] = option("k2", "ppo: of kl-in loss")
    clip_high: float = option(0.0, "ppo: upper clip of the ratio; 0: clip")
    dual_clip: float = option(0.0, "ppo: bound where advantage < 0; 0: none")
    whitening_variance: Literal["unbiased", "biased"] = option("unbiased", "ppo: n-1 or n")
    whitening_scope: Literal["update", "minibatch"] = option("update", "ppo: of advantages")
    missing_eos_replace: float | None = option(None, "ppo: score without EOS")
    score_scaling: Literal["none", "running"] = option("none", "ppo: by their deviation so far")
    target_kl: float = option(0.0, "ppo: k3 that ends an update; 0: none")
    ratio_threshold: float = option(0.0, "ppo: mean ratio that skips a step; 0: none")
    ptx_data: Path | None = option(None, "ppo: texts to go on modelling")
    ptx_coef: float = option(0.0, "ppo: of their loss")
    compat: Literal["none", "n_plus"] = option("none", "ppo: n_plus: score after the last token")
    group_size: int | None = option(None, "ppo, grpo, ...: answers per prompt; none: 1, 4 or 8")
    scale_by_std: bool = option(True, "grpo, gspo: over the group's deviation")
    loss_mean: Literal["token", "sequence", "constant"] | None = option(
        None, "ppo, grpo, ...: over what; none: token, grpo and gspo sequence"
    )
    replay: Literal["none", "old_policy", "rollout"] = option(
        "none", "ppo: experts of the old policy's pass (R2), or the sampler's (R3)"
    )
    rollout_numerics: Literal["same", "bf16", "router_noise"] = option(
        "same", "ppo: of the sampler alone, to study a mismatch"
    )
    rollout_noise: float = option(0.0, "ppo: of router-noise, on a logit")
    mismatch_correction: Literal["none", "token", "sequence"] = option(
        "none", "ppo: weigh the loss by trainer over sampler"
    )
    mismatch_cap: float = option(2.0, "ppo: on that weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method in POLICY_GRADIENT:
            if self.reward_model is None:
                raise UserError(
                    f"--method {self.method} needs --reward-model, a run of rlhf.train --method rm."
                )
            if self.max_new_tokens >= self.max_length:
                raise UserError(
                    f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt within "
                    f"--max-length {self.max_length}."
                )
            if (self.ptx_data is None) != (self.ptx_coef == 0):
                raise UserError("--ptx-data and --ptx-coef go together: give both or neither.")
            self.ppo_settings()

    def ppo_settings(self) -> PPOSettings:
        """Raises UserError for options of PPO that cannot be, or change nothing, together."""
        own = {f.name for f in fields(PPOSettings)} - {"epochs"}
        given = {
            f.name: value
            for f in fields(self)
            if f.name in own
            and self.method in METHODS_OF[f.name]
            and (value := getattr(self, f.name)) is not None
        }
        return PPOSettings(**{**PRESETS[self.method], **given, "epochs": self.ppo_epochs})

    @property
    def scope(self) -> BalanceScope:
        """A policy is balanced only when asked: the balance pulls it away from its reference."""
        return "off" if self.balance_scope == "auto" and self.method != "rm" else super().scope

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.method in POLICY_GRADIENT:
            idle.pop("max_new_tokens", None)  # its episodes are answers
        if self.normalize == "none":
            idle["normalize_data"] = "with --normalize none"
        idle |= self._idle_ppo()
        for name, methods in METHODS_OF.items():
            if self.method not in methods:
                belongs = f"it belongs to {' and '.join(methods)}"
                idle[name] = f"with --method {self.method} ({belongs})"
        if self.method == "dpo":
            for name, losses in LOSSES_OF.items():
                if self.loss not in losses:
                    belongs = f"it belongs to {' and '.join(losses)}"
                    idle[name] = f"with --loss {self.loss} ({belongs})"
        return idle

    def _idle_ppo(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if self.kl_target is None:
            idle["kl_horizon"] = "without --kl-target"
        if self.kl_in == "reward":
            idle["kl_estimator"] = "with --kl-in reward, which takes k1"
        if self.ppo_epochs * self.minibatches == 1:
            reason = "with one step an update, whose ratio is always 1"
            idle |= dict.fromkeys(("clip", "clip_high", "dual_clip", "ratio_threshold"), reason)
            idle["value_clip"] = "with one step an update, whose values have not moved"
        if self.method in POLICY_GRADIENT and self.clip_high == self.ppo_settings().clip:
            idle["clip_high"] = "where it equals --clip"
        if self.ppo_epochs == 1:
            idle["target_kl"] = "with --ppo-epochs 1"
        if not self.whiten_advantages:
            idle["whitening_scope"] = "with --no-whiten-advantages"
            if not self.whiten_rewards:
                idle["whitening_variance"] = "without a whitening"
        elif self.minibatches == 1:
            idle["whitening_scope"] = "with --minibatches 1"
        if self.critic_lam == self.lam:
            idle["critic_lam"] = "where it equals --lam"
        if self.mismatch_correction == "none":
            idle["mismatch_cap"] = "with --mismatch-correction none"
        if self.rollout_numerics != "router_noise":
            idle["rollout_noise"] = "without --rollout-numerics router_noise"
        return idle
