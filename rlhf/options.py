"""The options of `python -m rlhf.train`, and which of them belong to which method.

Apart from the command and from the work, so that both can import them and a mistyped flag is
answered before torch is imported.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe.errors import UserError
from sft.command import BalanceScope, TrainingConfig, option

COMMAND = "rlhf.train"
Method = Literal["rm", "dpo", "ppo"]

# The methods that an option belongs to, where it does not belong to all.
METHODS_OF: dict[str, tuple[Method, ...]] = {
    "center": ("rm",),
    "center_coef": ("rm",),
    "beta": ("dpo",),
    "label_smoothing": ("dpo",),
    **dict.fromkeys(("epochs", "max_steps", "batch_size"), ("rm", "dpo")),
    **dict.fromkeys(("num_samples", "max_new_tokens"), ("dpo", "ppo")),
    **dict.fromkeys(
        (
            *("reward_model", "allow_weak_reward_model", "updates", "episodes", "ppo_epochs"),
            *("minibatches", "temperature", "kl_coef", "kl_target", "kl_horizon", "gamma", "lam"),
            *("clip", "value_clip", "value_coef", "entropy_coef", "critic_lr_scale"),
            *("whiten_rewards", "whiten_advantages", "missing_eos_penalty", "score_clip"),
        ),
        ("ppo",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """The options of rlhf.train."""

    method: Method = field(metadata={"help": "reward model, DPO or PPO"})
    lr: float = option(5e-5, "peak learning rate")
    log_steps: int = option(0, "steps between metrics; 0: 10, ppo each update")
    center: bool = option(True, "rm: shift its mean score to 0")
    center_coef: float = option(0.0, "rm: pull of scores towards 0")
    beta: float = option(0.1, "dpo: price of a nat")
    label_smoothing: float = option(0.0, "dpo: share of wrong labels")
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
    clip: float = option(0.2, "ppo: of the ratio")
    value_clip: float = option(0.2, "ppo: of values; 0: none")
    value_coef: float = option(0.1, "ppo: of the value loss")
    entropy_coef: float = option(0.0, "ppo: entropy bonus")
    critic_lr_scale: float = option(1.0, "ppo: critic's lr / lr")
    whiten_rewards: bool = option(False, "ppo: scale by their deviation")
    whiten_advantages: bool = option(True, "ppo: mean 0, deviation 1")
    missing_eos_penalty: float = option(0.0, "ppo: off the score")
    score_clip: float = option(0.0, "ppo: of scores; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "ppo":
            if self.reward_model is None:
                raise UserError(
                    "--method ppo needs --reward-model, a run of rlhf.train --method rm."
                )
            if self.max_new_tokens >= self.max_length:
                raise UserError(
                    f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt within "
                    f"--max-length {self.max_length}."
                )

    @property
    def scope(self) -> BalanceScope:
        """A policy is balanced only when asked: the balance pulls it away from its reference."""
        return "off" if self.balance_scope == "auto" and self.method != "rm" else super().scope

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.method == "ppo":
            idle.pop("max_new_tokens", None)  # its episodes are answers
        if self.kl_target is None:
            idle["kl_horizon"] = "without --kl-target"
        for name, methods in METHODS_OF.items():
            if self.method not in methods:
                belongs = f"it belongs to {' and '.join(methods)}"
                idle[name] = f"with --method {self.method} ({belongs})"
        return idle
