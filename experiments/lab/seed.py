"""One seed of a comparison: its world, its settings, its models.

The decision to know: a model is named by its stage and rebuilt from the world and the seed, so that
every job of the grid can open what another left without being told more.
"""

import copy
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.lab.presets import LoraArms, Scale
from experiments.lab.stage_folder import StageFolder
from experiments.lab.worlds import World
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import scalar_model
from sft.adapt import LoraSpec, add_lora, copy_adapter, merged, trainable_by_part
from sft.run import config_hash
from sft.text import TextPath

# A model without experts has its adapters on the dense FFN in their place.
LORA_TARGETS = (("attention", "experts"), ("attention", "ffn"))


@dataclass(frozen=True, kw_only=True)
class Seed(StageFolder):
    """See `StageFolder`. lora_rank: 0 for full updates; pretraining is always full."""

    world: World
    lora_rank: int = 0
    experiment: str = "compare"

    @property
    def scale(self) -> Scale:
        return self.world.scale

    def with_lora(self, model: nn.Module, *, name: str = "default") -> nn.Module:
        """The model under one fresh adapter of the run's rank."""
        targets = LORA_TARGETS["experts" not in trainable_by_part(model)]
        spec = LoraSpec(rank=self.lora_rank, alpha=2.0 * self.lora_rank, targets=targets)
        return add_lora(model, spec, name=name)

    @property
    def fingerprints(self) -> dict[str, str]:
        return {
            "scale": config_hash(asdict(self.scale)),
            "world": config_hash(self.world.facts()),
        }

    @property
    def told(self) -> dict[str, Any]:
        return {"lora_rank": self.lora_rank}

    @property
    def tuned(self) -> Scale | LoraArms:
        """The settings that differ under adapters."""
        return self.scale.lora if self.lora_rank else self.scale

    # Text.

    def text_path(self) -> TextPath:
        return self.world.text_path(self.folder)

    def eval_prompts(self, count: int) -> list[str]:
        """Held-out prompts, the same for every seed and arm."""
        return self.world.held_out_prompts(count)

    # Models on disk.

    def pairs(self) -> dict[str, Any]:
        """What `stages.collect_pairs` left: the pairs, and facts about them."""
        text = (self.folder / "pairs.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def fresh_model(self) -> PreTrainedModel:
        return self.world.new_model(self.text_path(), seed=self.seed)

    def base(self) -> nn.Module:
        return self.load("base", self.fresh_model())

    def sft(self) -> nn.Module:
        """The SFT policy: the whole model, or the base with its adapter `sft`."""
        model: nn.Module = self.fresh_model()
        if self.lora_rank:
            model = self.with_lora(model, name="sft")
        return self.load("sft", model)

    def policy_and_reference(self) -> tuple[nn.Module, Reference]:
        """A trainable policy that starts as SFT, and SFT as its reference."""
        policy = self.sft()
        if self.lora_rank:
            copy_adapter(policy, "sft", name="policy")
            return policy, FrozenAdapter(policy, "sft")
        return policy, FrozenCopy(policy)

    def reward_model(self) -> nn.Module:
        """The scalar model on the SFT backbone (adapters folded in, own adapters on top)."""
        torch.manual_seed(self.seed + 1)  # the fresh head
        plain = merged(copy.deepcopy(self.sft()))
        model: nn.Module = scalar_model(plain)
        return self.with_lora(model) if self.lora_rank else model


def load_policy(seed: Seed, arm: str) -> nn.Module:
    """The trained policy of an arm, ready to sample from."""
    if arm == "base":
        return seed.base().eval()
    if arm == "sft":
        return seed.sft().eval()
    policy, _ = seed.policy_and_reference()
    return seed.load(arm, policy).eval()
