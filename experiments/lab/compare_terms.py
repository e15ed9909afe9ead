"""What a comparison of alignment methods compares, and the rule by which it is judged.

The decision to know: everything here was fixed before the reported seeds ran, and is read without
torch, so that the command's help comes at once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.lab.worlds import World

EXPERIMENT = "compare"
ARMS = ("base", "few_shot", "sft", "dpo", "ppo", "best_of_n")
METHODS = ("dpo", "ppo", "best_of_n")
STAGES = ("base", "sft", "rm", "dpo", "ppo")
QUESTION = (
    "Do DPO, PPO and best-of-n improve on SFT in gold reward when all see the same preferences, "
    "and what does it do to text, forgetting and routing?"
)
RULE = (
    "REPRODUCED if DPO, PPO and best-of-n are each BETTER than SFT in gold_reward (95 % interval "
    "of paired seed differences above 0); NOT REPRODUCED if any is WORSE; else INCONCLUSIVE"
)
# Metric -> (higher is better, half-width inside which a difference does not matter), per world.
# Fixed before the reported seeds ran; in the metric's own units.
METRICS: Mapping[str, tuple[bool, float]] = {
    "gold_reward": (True, 0.1),
    "proxy_reward": (True, 0.2),
    "kl_sequence": (False, 0.5),
    "win_rate": (True, 0.03),
    "length": (False, 1.0),
    "distinct_2": (True, 0.02),
    "reference_perplexity": (False, 0.1),
    "base_perplexity": (False, 0.2),
}
WORLD_METRICS: Mapping[str, Mapping[str, tuple[bool, float]]] = {
    "tales": METRICS,
    # VADER's compound lies between -1 and 1, with about half of tales' spread.
    "stories": {**METRICS, "gold_reward": (True, 0.05), "original_perplexity": (False, 0.5)},
}
EXTRA_METRICS = ("ended", "tokens_generated", "tokens_trained")


def arms_of(world: "World") -> tuple[str, ...]:
    """The arms that a world has, in their order."""
    return tuple(arm for arm in ARMS if arm != "few_shot" or world.scale.few_shot)
