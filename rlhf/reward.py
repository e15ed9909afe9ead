"""Reward models: one scalar per completion, learned from preferences by Bradley-Terry.

The scalar model gives one number per token (reward at the last real token, value at every token),
so that the critic can start as a copy of the reward model. The position is read from the mask,
never from ids: a PAD that equals EOS would move it.

Shapes: B rows, S sequence.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from moe import MoEConfig, MoEForValue
from moe.errors import UserError
from moe.generation import positions
from moe.heads import last_real_position
from rlhf.losses.bradley_terry import BradleyTerryLoss
from sft.adapt import disable_dropout
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import StageTrainer


def scalar_model(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A model with the language model's backbone (copied) and a fresh scalar head, per token.

    The head starts N(0, 1/sqrt(D+1)) with bias 0 (Stiennon et al. 2020). Takes our model and every
    family with a token-classification class; raises `UserError` for the others.
    """
    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    if isinstance(config, MoEConfig):
        model: PreTrainedModel = MoEForValue(config)
    else:
        config.classifier_dropout = 0.0
        try:
            model = AutoModelForTokenClassification.from_config(config)
        except ValueError as error:
            raise UserError(
                f"models of type {config.model_type} have no token-classification class, which the "
                "scalar head needs: use another family."
            ) from error
    model.base_model.load_state_dict(causal_lm.base_model.state_dict())
    head = scalar_head(model)
    with torch.no_grad():
        nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
        nn.init.zeros_(head.bias)
    disable_dropout(model)
    return model


def scalar_head(model: nn.Module) -> nn.Linear:
    """The one linear unit on top; under adapters, the copy that is trained."""
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == 1
        and "original_module" not in name
        and "lora_" not in name
    ]
    assert len(heads) == 1, f"{len(heads)} scalar heads"
    return heads[0]


def token_scores(model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """One float32 scalar per token, (B, S)."""
    outputs = model(
        input_ids=input_ids_BS,
        attention_mask=attention_mask_BS.long(),
        position_ids=positions(attention_mask_BS),
        use_cache=False,
    )
    return outputs.logits.squeeze(-1).float()


def sequence_scores(model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """The score at each row's last real token, (B,) float32."""
    score_BS = token_scores(model, input_ids_BS, attention_mask_BS)
    return score_BS.gather(1, last_real_position(attention_mask_BS)[:, None]).squeeze(1)


class RewardSource(Protocol):
    """Scores completions: (B,) float32 for full rows and their masks, prompts included."""

    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward model as a source of rewards, run without gradients in micro-batches."""

    model: nn.Module
    batch_size: int = 64

    @torch.no_grad()
    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        scores = [
            sequence_scores(self.model, ids, mask)
            for ids, mask in zip(
                input_ids_BS.split(self.batch_size),
                attention_mask_BS.split(self.batch_size),
                strict=True,
            )
        ]
        self.model.train(was_training)
        return torch.cat(scores)


class RewardTrainer(StageTrainer):
    """Bradley-Terry on pairs; the reward model's own router is observed and balanced."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        *,
        loss: BradleyTerryLoss | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("stage", "rm")
        kwargs.setdefault("balance", BalancePolicy.of_model(model))
        self.loss = BradleyTerryLoss() if loss is None else loss
        disable_dropout(model)
        super().__init__(model, settings, **kwargs)

    def own_settings(self) -> dict[str, Any]:
        return {"loss": repr(self.loss)}

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return batch["input_ids"].shape[0] // 2

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        score_B = sequence_scores(model, batch["input_ids"], batch["attention_mask"])
        chosen_B, rejected_B = score_B.chunk(2)
        return self.loss(chosen_B, rejected_B)


@torch.no_grad()
def center_reward(model: nn.Module, score_B: Tensor) -> float:
    """Shift the head's bias so that these scores (of reference samples) have mean 0; the shift.

    Stiennon et al. 2020: the reward model is normalised after training. It lives in the bias, so
    every checkpoint and export has it.
    """
    shift = -float(score_B.double().mean())
    scalar_head(model).bias.add_(shift)
    return shift


@dataclass(frozen=True, kw_only=True)
class RewardAccuracy:
    """Pairwise accuracy (ties half) with a 95 % Wilson interval, and the mean margin."""

    accuracy: float
    low: float
    high: float
    margin: float
    num_pairs: int


@torch.no_grad()
def reward_accuracy(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> RewardAccuracy:
    """Accuracy over batches of the preference collator. Raises ValueError without pairs."""
    was_training = model.training
    model.eval()
    gaps = []
    for batch in batches:
        score_B = sequence_scores(model, batch["input_ids"], batch["attention_mask"])
        chosen_B, rejected_B = score_B.chunk(2)
        gaps.append(chosen_B - rejected_B)
    model.train(was_training)
    if not gaps:
        raise ValueError("no pairs to measure the accuracy on")
    gap = torch.cat(gaps)
    right = float((gap > 0).double().sum() + 0.5 * (gap == 0).double().sum())
    low, high = wilson_interval(right, len(gap))
    return RewardAccuracy(
        accuracy=right / len(gap),
        low=low,
        high=high,
        margin=float(gap.mean()),
        num_pairs=len(gap),
    )


def wilson_interval(successes: float, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default."""
    share = successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    scale = 1 + z * z / trials
    return (middle - spread) / scale, (middle + spread) / scale
