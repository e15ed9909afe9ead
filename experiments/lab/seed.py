"""One seed of a run: its world, its folders, its models.

Weights are kept in our checkpoint format under `<folder>/<stage>/final`; a model is rebuilt by code
and filled strictly, so that a file of another shape is refused rather than half loaded.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.lab.meter import Meter, metered
from experiments.lab.presets import DPOArm, PPOArm, Scale
from experiments.lab.worlds import World
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import (
    scalar_model,
)
from sft.adapt import LoraSpec, add_lora, copy_adapter, merged, trainable_by_part
from sft.checkpoint import (
    live_tensors,
    load_strictly,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sft.run import config_hash
from sft.text import TextPath
from sft.tracking import Tracker

Progress = Callable[[str, int, int], None]
# A model without experts has its adapters on the dense FFN in their place.
LORA_TARGETS = (("attention", "experts"), ("attention", "ffn"))


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One seed of a run: in which world, where it works, and how it tells what it is doing.

    folder: private files (weights, pairs). arms: parent of `<arm>-s<seed>` folders.
    lora_rank: 0 for full updates; pretraining is always full.
    """

    seed: int
    world: World
    folder: Path
    arms: Path
    lora_rank: int = 0
    experiment: str = "compare"
    mirror: bool = True
    progress: Progress = lambda stage, step, total: None

    @property
    def scale(self) -> Scale:
        return self.world.scale

    def with_lora(self, model: nn.Module, *, name: str = "default") -> nn.Module:
        """The model under one fresh adapter of the run's rank."""
        targets = LORA_TARGETS["experts" not in trainable_by_part(model)]
        spec = LoraSpec(rank=self.lora_rank, alpha=2.0 * self.lora_rank, targets=targets)
        return add_lora(model, spec, name=name)

    def arm_folder(self, arm: str) -> Path:
        return self.arms / f"{arm}-s{self.seed}"

    # Settings that differ under adapters.

    @property
    def sft_lr(self) -> float:
        return self.scale.lora.sft_lr if self.lora_rank else self.scale.sft_lr

    @property
    def sft_epochs(self) -> float:
        return self.scale.lora.sft_epochs if self.lora_rank else self.scale.sft_epochs

    @property
    def rm_epochs(self) -> float:
        return self.scale.lora.rm_epochs if self.lora_rank else self.scale.rm_epochs

    @property
    def rm_lr(self) -> float:
        return self.scale.lora.rm_lr if self.lora_rank else self.scale.rm_lr

    @property
    def dpo(self) -> DPOArm:
        return self.scale.lora.dpo if self.lora_rank else self.scale.dpo

    @property
    def ppo(self) -> PPOArm:
        return self.scale.lora.ppo if self.lora_rank else self.scale.ppo

    # Text.

    def text_path(self) -> TextPath:
        return self.world.text_path(self.folder)

    def eval_prompts(self, count: int) -> list[str]:
        """Held-out prompts, the same for every seed and arm."""
        return self.world.held_out_prompts(count)

    # Models on disk.

    def save(self, stage: str, model: nn.Module, facts: dict[str, Any]) -> None:
        write_checkpoint(
            self.folder / stage / "final",
            tensors={"model": live_tensors(model)},
            documents={"facts": facts},
            facts={"stage": stage, "seed": self.seed},
        )

    def facts(self, stage: str) -> dict[str, Any]:
        path = self.folder / stage / "final" / "facts.json"
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts

    def pairs(self) -> dict[str, Any]:
        """What `stages.collect_pairs` left: the pairs, and facts about them."""
        text = (self.folder / "pairs.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def is_done(self, stage: str) -> bool:
        return (self.folder / stage / "final" / "MANIFEST.json").is_file()

    def load(self, stage: str, model: nn.Module) -> nn.Module:
        checkpoint = read_checkpoint(self.folder / stage / "final")
        load_strictly(model, checkpoint.tensors["model"], source=str(checkpoint.folder))
        return model

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

    # Running a trainer.

    @contextmanager
    def tracked(self, arm: str, job: str) -> Iterator[Tracker]:
        folder = self.arm_folder(arm)
        resume = _resume_steps(self.folder / job, job)
        with Tracker(
            folder,
            group=self.experiment,
            job_type=job,
            name=f"{arm}-s{self.seed}",
            config={"seed": self.seed, "arm": arm, "lora_rank": self.lora_rank},
            mirror="wandb" if self.mirror else "none",
            resume_step=resume,
            console=None,
        ) as tracker:
            yield tracker

    def metered(self, stage: str) -> AbstractContextManager[Meter]:
        """Seconds and memory of a stage, over all its starts."""
        return metered(self.folder / stage / "meter.json")

    def trainer_options(self, job: str, tracker: Tracker, meter: Meter) -> dict[str, Any]:
        def tell(step: int, total: int) -> None:
            meter.tick()
            self.progress(job, step, total)

        return {
            "folder": self.folder / job,
            "stage": job,
            "tracker": tracker,
            "fingerprints": {
                "scale": config_hash(asdict(self.scale)),
                "world": config_hash(self.world.facts()),
            },
            "on_progress": tell,
        }


def _resume_steps(folder: Path, stage: str) -> dict[str, int]:
    """How far this stage's metrics count: to its newest checkpoint, else not at all."""
    newest, _ = newest_checkpoint(folder)
    return {stage: int(newest.name.rpartition("-")[2]) if newest else 0}


def load_policy(seed: Seed, arm: str) -> nn.Module:
    """The trained policy of an arm, ready to sample from."""
    if arm == "base":
        return seed.base().eval()
    if arm == "sft":
        return seed.sft().eval()
    policy, _ = seed.policy_and_reference()
    return seed.load(arm, policy).eval()
