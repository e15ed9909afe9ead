"""Reward models: one scalar per completion, learned from preferences by Bradley-Terry.

The scalar model gives one number per token (reward at the last real token, value at every token),
so that the critic can start as a copy of the reward model. The position is read from the mask,
never from ids: a PAD that equals EOS would move it.

Shapes: B rows, S sequence.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from moe import MoEConfig, MoEForValue
from moe.errors import UserError
from moe.generation import positions
from moe.heads import init_scalar_head, last_real_position
from rlhf.intervals import wilson_interval as wilson_interval
from rlhf.losses.bradley_terry import BradleyTerryLoss
from sft.adapt import base_of, disable_dropout
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import StageTrainer


def scalar_model(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A model with the language model's backbone (copied) and a fresh scalar head, per token.

    The head starts as `moe.heads.init_scalar_head` says. Takes our model and every family with a
    token-classification class; raises `UserError` for the others.
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
    init_scalar_head(scalar_head(model))
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
    """Bradley-Terry on pairs; the reward model's own router is observed and balanced.

    A batch may hold `margin` (B,): how much the chosen one is asked to be ahead.
    """

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
        return self.loss(chosen_B, rejected_B, margin_B=batch.get("margin"))


@torch.no_grad()
def batch_scores(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """The scores of each batch's rows, (rows,) float32, without dropout or gradients."""
    was_training = model.training
    model.eval()
    scores = [
        sequence_scores(model, batch["input_ids"], batch["attention_mask"]) for batch in batches
    ]
    model.train(was_training)
    return scores


def pair_gaps(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """chosen - rejected of every pair, (B,) float32, over batches of the preference collator.

    Raises ValueError without pairs.
    """
    sides = [score_B.chunk(2) for score_B in batch_scores(model, batches)]
    if not sides:
        raise ValueError("no pairs to measure the accuracy on")
    return torch.cat([chosen_B - rejected_B for chosen_B, rejected_B in sides])


# After training: where the scores lie.

NormalizeMode = Literal["mean", "std"]


@dataclass(frozen=True, kw_only=True)
class RewardNormalization:
    """What was done to a trained reward model: score = gain * score as trained + shift.

    Bradley-Terry probabilities are of the scores as trained: sigma(difference / gain).
    num_scores, source: of the reference samples.
    """

    mode: NormalizeMode
    gain: float
    shift: float
    num_scores: int
    source: str


@torch.no_grad()
def normalize_reward(
    model: nn.Module, score_N: Tensor, *, mode: NormalizeMode, source: str = "reference samples"
) -> RewardNormalization:
    """Change the head so that these scores (of reference samples) get mean 0 and, by "std", std 1.

    "mean": Stiennon et al. 2020; Huang et al. 2024 take SFT demonstrations. "std": the gain and
    bias of Ziegler et al. 2019, here after training only. It is done to the head's weight and bias,
    so every checkpoint and export has it; the model's configuration says what was done
    (`reward_normalization`). Raises UserError when the scores are not finite or, for "std", equal.
    """
    num_finite = int(torch.isfinite(score_N).sum())
    if num_finite == 0 or num_finite < score_N.numel():
        raise UserError(
            f"normalising needs finite scores: {num_finite} of the {score_N.numel()} of {source} "
            "are finite. Give reference samples, or look at the training (a lower --lr?)."
        )
    mean, std = float(score_N.double().mean()), float(score_N.double().std(correction=0))
    if mode == "std" and std <= 1e-6 * abs(mean):
        raise UserError(
            f"all {score_N.numel()} scores of {source} are {mean:g}: there is no deviation to "
            "scale to 1. Normalise the mean only (--normalize mean)."
        )
    gain = 1.0 / std if mode == "std" else 1.0
    done = RewardNormalization(
        mode=mode, gain=gain, shift=-gain * mean, num_scores=score_N.numel(), source=source
    )
    head = scalar_head(model)
    head.weight.mul_(done.gain)
    head.bias.mul_(done.gain).add_(done.shift)
    config: Any = getattr(base_of(model), "config", None)
    if config is not None:
        config.reward_normalization = asdict(done)
    return done


def center_reward(model: nn.Module, score_B: Tensor) -> float:
    """Shift the head's bias so that these scores (of reference samples) have mean 0; the shift."""
    return normalize_reward(model, score_B, mode="mean").shift


# How often it is right.


@dataclass(frozen=True, kw_only=True)
class RewardAccuracy:
    """Pairwise accuracy (ties half) with a 95 % Wilson interval, and the mean margin."""

    accuracy: float
    low: float
    high: float
    margin: float
    num_pairs: int


def accuracy_of(gap_B: Tensor) -> RewardAccuracy:
    """The accuracy of any score: gap_B (B,), B > 0, is chosen - rejected."""
    right = float((gap_B > 0).double().sum() + 0.5 * (gap_B == 0).double().sum())
    low, high = wilson_interval(right, len(gap_B))
    return RewardAccuracy(
        accuracy=right / len(gap_B),
        low=low,
        high=high,
        margin=float(gap_B.mean()),
        num_pairs=len(gap_B),
    )


def reward_accuracy(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> RewardAccuracy:
    """Accuracy over batches of the preference collator. Raises ValueError without pairs."""
    return accuracy_of(pair_gaps(model, batches))
