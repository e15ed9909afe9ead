"""One seed of a run on a preference file: its pairs, its models, and what they rest on.

The decision to know: the split, the copies of the experts and the fresh reward head all follow from
the seed, so a seed is a repetition of the whole question and not of the last step alone.
"""

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from experiments.lab.pairs_config import PairsConfig, PairsScale, Stage
from experiments.lab.pairs_data import PairSides, read_pairs, split_pairs
from experiments.lab.stage_folder import StageFolder
from moe.errors import UserError
from moe.interop import load, upcycle
from rlhf.reward import scalar_model
from sft.data import split_by_prompt
from sft.examples import Examples
from sft.models import (
    ModelFolder,
    check_fit,
    describe_size,
    find_model,
    fingerprint_files,
    load_causal_lm,
)
from sft.rows import preference_rows
from sft.run import config_hash
from sft.settings import BalancePolicy, TrainSettings
from sft.text import TextPath, load_tokenizer, pick_template


@dataclass(frozen=True, kw_only=True)
class PairsSeed(StageFolder):
    """See `StageFolder`; config says which pairs and which model."""

    config: PairsConfig

    @property
    def scale(self) -> PairsScale:
        return self.config.sizes

    @functools.cached_property
    def text_path(self) -> TextPath:
        return given_text(self.config)

    @functools.cached_property
    def sides(self) -> PairSides:
        examples = given_pairs(self.config, self.text_path)
        return split_pairs(examples, self.text_path, scale=self.scale, seed=self.seed)

    # Models.

    def base(self) -> PreTrainedModel:
        """The model that was given, its FFNs copied to experts where that is asked."""
        return given_model(self.config, seed=self.seed)

    def policy(self) -> PreTrainedModel:
        """What the reward model and DPO start from: SFT, or the base without one."""
        return self.load("sft", self.base()) if self.config.sft else self.base()

    def reward_model(self) -> PreTrainedModel:
        """A scalar model on the policy's backbone with a fresh head."""
        policy = self.policy()
        torch.manual_seed(self.seed + 1)  # the fresh head
        return scalar_model(policy)

    def model_of(self, stage: str) -> PreTrainedModel:
        """The model that a stage left."""
        if stage == "base":
            return self.base()
        made = {"sft": self.base, "rm": self.reward_model, "dpo": self.policy}[stage]
        return self.load(stage, made())

    def balance(self, model: PreTrainedModel) -> BalancePolicy:
        """Experts that begin equal need it; what was given with experts keeps its own."""
        if self.config.experts is None:
            return BalancePolicy.of_model(model)
        return BalancePolicy(load_balancing_coef=0.01, z_loss_coef=0.001)

    # Training.

    def settings(self, stage: Stage, *, num_rows: int) -> TrainSettings:
        return TrainSettings(
            max_steps=max(1, round(num_rows * stage.epochs / stage.batch_size)),
            batch_size=stage.batch_size,
            lr=stage.lr,
            warmup_steps=5,
            seed=self.seed,
            log_steps=5,
            save_steps=self.scale.save_steps,
            keep_checkpoints=1,
        )

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """What a resumed training must find the same."""
        return {**given_fingerprints(self.config), "scale": config_hash(asdict(self.scale))}


# What was given: the same for every seed.


def given_text(config: PairsConfig) -> TextPath:
    """The model's own tokenizer, with its chat template, else turns on lines of their own."""
    found = find_model(config.model)
    tokenizer = load_tokenizer(found.tokenizer)
    template = pick_template(tokenizer, found.template)
    return TextPath(tokenizer, template, max_length=config.sizes.max_length)


def given_pairs(config: PairsConfig, text_path: TextPath) -> Examples:
    return read_pairs(config.data, text_path, max_pairs=config.sizes.max_pairs)


def given_model(config: PairsConfig, *, seed: int) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # a bar for every stage that opens the model
    found = _whole_model(config.model)
    if config.experts is not None:
        num_experts, top_k = config.experts
        return upcycle(load(found.base), num_experts, top_k, seed=seed)
    model = load_causal_lm(found)
    assert isinstance(model, PreTrainedModel)
    return model


def given_fingerprints(config: PairsConfig) -> dict[str, str]:
    """Of the contents of both: a path says nothing about what lies there now."""
    return {
        "data": fingerprint_files([config.data]),
        "model": fingerprint_files(_whole_model(config.model).files),
    }


def check_given(config: PairsConfig) -> tuple[str, Examples]:
    """Raises UserError for what would fail later; the model in words, and the pairs.

    The notes of the pairs also say what the length limit cuts.
    """
    text_path = given_text(config)
    examples = given_pairs(config, text_path)
    split_by_prompt(examples, val_fraction=config.sizes.held_out, seed=config.seeds[0])
    cut = preference_rows(examples, text_path).notes
    model = given_model(config, seed=config.seeds[0])
    check_fit(model, text_path, named=str(config.model))
    scalar_model(model)
    return describe_size(model), replace(examples, notes=(*examples.notes, *cut))


def _whole_model(folder: Path) -> ModelFolder:
    found = find_model(folder)
    if found.adapter is not None:
        raise UserError(
            f"{folder} is an adapter on {found.base}: merge it into its base first, the world "
            "pairs starts from a whole model."
        )
    return found
