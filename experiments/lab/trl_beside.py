"""One seed of `trl_parity`: the same weights and texts through our losses and TRL's trainers.

The decision to know: TRL is given texts, as its users give them, and its trainers are asked for the
loss of one batch by `compute_loss`, which they override in public; nothing inside them is called.
The prompts that it gets begin with a spelled BOS, which it would not write by itself.
"""

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
)

from experiments.lab.grid import report
from moe import MoEConfig, MoEForCausalLM, MoEForReward
from rlhf.dpo import DPOTrainer, pair_logps
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.losses.dpo import DPOLoss
from rlhf.reference import FrozenCopy
from rlhf.reward import RewardTrainer, scalar_model, sequence_scores
from sft.examples import Instruction, Preference
from sft.loss import language_model_loss
from sft.rows import PreferenceCollator, SupervisedCollator, preference_rows, supervised_rows
from sft.run import write_json_atomic
from sft.settings import BalancePolicy, TrainSettings
from sft.text import CONTINUATION, Message, TextPath, train_bpe
from sft.trainer import SFTTrainer
from sft.trl_data import no_progress_bars, public_trainers

FAMILIES = ("llama", "moe")
STAGES = ("sft", "rm", "dpo")
STEPS = {"laptop": 30, "debug": 3}
ROWS = 8
RATE = 3e-3
BETA = 0.1
SMOOTHING = 0.1
WORDS = (
    *("a", "the", "red", "old", "small", "king", "bird", "river", "stone", "house"),
    *("sees", "finds", "takes", "leaves", "tree", "sun", "moon", "song", "far", "near"),
)
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Side:
    """What one side says of a batch: its loss and the gradient of every weight by name."""

    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A seed: eight prompts with two answers each, and tiny models of two families."""

    seed: int

    @cached_property
    def texts(self) -> list[tuple[str, str, str]]:
        """(prompt, chosen, rejected); an answer's words each begin with a space."""
        draw = random.Random(self.seed)

        def words(least: int, most: int) -> str:
            return "".join(f" {draw.choice(WORDS)}" for _ in range(draw.randint(least, most)))

        return [(words(3, 8).strip(), words(2, 5), words(6, 9)) for _ in range(ROWS)]

    @cached_property
    def text_path(self) -> TextPath:
        tokenizer = train_bpe([" ".join(WORDS)] * 3, vocab_size=320)
        return TextPath(tokenizer, CONTINUATION, max_length=64)

    # Ours.

    @cached_property
    def pairs(self) -> list[Any]:
        examples = [
            Preference(prompt=(Message("user", prompt),), chosen=chosen, rejected=rejected)
            for prompt, chosen, rejected in self.texts
        ]
        return preference_rows(examples, self.text_path)

    @cached_property
    def answers(self) -> list[Any]:
        examples = [
            Instruction(conversation=(Message("user", prompt), Message("assistant", chosen)))
            for prompt, chosen, _ in self.texts
        ]
        return supervised_rows(examples, self.text_path)

    def language_model(self, family: str, *, salt: int = 0) -> Any:
        torch.manual_seed(1000 * self.seed + salt)
        vocab_size = len(self.text_path.tokenizer)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": self.text_path.eos_id}
        if family == "llama":
            return LlamaForCausalLM(
                LlamaConfig(vocab_size=vocab_size, intermediate_size=24, **SIZE, **ids)
            )
        return MoEForCausalLM(
            MoEConfig(vocab_size=vocab_size, moe_intermediate_size=12, num_experts=4, **SIZE, **ids)
        )

    def value_model(self, family: str) -> Any:
        torch.manual_seed(1000 * self.seed + 7)
        return scalar_model(self.language_model(family))

    def ours(self, stage: str, family: str, *, weights: Mapping[str, Tensor] | None = None) -> Side:
        """Our loss of the whole batch, and its gradients, at these weights or at the first."""
        model = self.value_model(family) if stage == "rm" else self.language_model(family)
        if weights is not None:
            missing, unknown = model.load_state_dict(dict(weights), strict=False)
            assert not unknown and set(missing) <= {"score.bias"}, (missing, unknown)
        if stage == "sft":
            batch = SupervisedCollator(self.text_path.pad_id)(self.answers)
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            output = language_model_loss(outputs.logits, batch["labels"])
            return _backward(output.loss, model)
        batch = PreferenceCollator(self.text_path.pad_id)(self.pairs)
        if stage == "rm":
            score_B = sequence_scores(model, batch["input_ids"], batch["attention_mask"])
            return _backward(BradleyTerryLoss()(*score_B.chunk(2)).loss, model)
        with torch.no_grad():
            reference = pair_logps(self.language_model(family), batch)
        return _backward(DPOLoss(beta=BETA)(pair_logps(model, batch), reference).loss, model)

    def smoothed(self, family: str, smoothing: float) -> float:
        """Our DPO loss under label smoothing, measured from another model."""
        batch = PreferenceCollator(self.text_path.pad_id)(self.pairs)
        with torch.no_grad():
            policy = pair_logps(self.language_model(family), batch)
            reference = pair_logps(self.language_model(family, salt=1), batch)
            return float(DPOLoss(beta=BETA, label_smoothing=smoothing)(policy, reference).loss)

    def trained(self, stage: str, family: str, *, steps: int, folder: Path) -> nn.Module:
        """Our trainer on the whole batch at every step."""
        model = self.value_model(family) if stage == "rm" else self.language_model(family)
        settings = TrainSettings(
            max_steps=steps, batch_size=ROWS, lr=RATE, lr_schedule="constant", log_steps=1
        )
        rows = self.answers if stage == "sft" else self.pairs
        collator: Any = SupervisedCollator if stage == "sft" else PreferenceCollator
        kinds: dict[str, Any] = {"sft": SFTTrainer, "rm": RewardTrainer, "dpo": DPOTrainer}
        more: dict[str, Any] = {}
        if stage == "dpo":
            more = {"reference": FrozenCopy(model), "loss": DPOLoss(beta=BETA)}
        trainer = kinds[stage](
            model,
            settings,
            rows=rows,
            collator=collator(self.text_path.pad_id),
            balance=BalancePolicy(scope="off"),
            folder=folder,
            **more,
        )
        trainer.fit()
        return model

    # TRL's.

    def trainer(
        self,
        stage: str,
        family: str,
        *,
        folder: Path,
        steps: int = 1,
        spelled_bos: bool = True,
        reference: int = 0,
        **options: Any,
    ) -> Any:
        """TRL's public trainer on the same texts and weights. reference: the salt of DPO's.

        Raises UserError where TRL cannot be imported.
        """
        from datasets import Dataset

        public = public_trainers()
        settings = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": ROWS,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "adam_beta2": 0.95,
            "activation_checkpointing": False,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        }
        bos = self.text_path.tokenizer.bos_token if spelled_bos else ""
        if stage == "sft":
            columns = [{"prompt": bos + p, "completion": c} for p, c, _ in self.texts]
        else:
            columns = [{"prompt": bos + p, "chosen": c, "rejected": r} for p, c, r in self.texts]
        kind = {"sft": public.sft, "rm": public.reward, "dpo": public.dpo}[stage]
        config = {"sft": public.sft_config, "rm": public.reward_config, "dpo": public.dpo_config}
        own: dict[str, Any] = {}
        if stage == "dpo":
            own = {"ref_model": self.language_model(family, salt=reference)}
            options = {"beta": BETA, **options}
        with no_progress_bars():
            trainer = kind(
                self.reward_model(family) if stage == "rm" else self.language_model(family),
                args=config[stage](**settings, **options),
                train_dataset=Dataset.from_list(columns),
                processing_class=train_bpe([" ".join(WORDS)] * 3, vocab_size=320),
                **own,
            )
        trainer.remove_callback(PrinterCallback)  # the grid has a display of its own
        return trainer

    def reward_model(self, family: str) -> Any:
        """Our scalar model's weights in the family's sequence-classification class."""
        ours = self.value_model(family)
        kinds: dict[str, Any] = {"llama": LlamaForSequenceClassification, "moe": MoEForReward}
        model = kinds[family](ours.config)
        held = set(model.state_dict())
        model.load_state_dict({k: v for k, v in ours.state_dict().items() if k in held})
        return model

    def is_ours(self, stage: str, made: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the rows that TRL made of the texts are ours, id by id."""
        if stage == "sft":
            ours = [(row["input_ids"], row["labels"]) for row in self.answers]
            return ours == [(row["input_ids"], row["labels"]) for row in made]
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [tuple(row[key] for key in keys) for row in self.pairs]
        if stage == "dpo":
            return rows == [tuple(row[key] for key in keys) for row in made]
        whole = [(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in rows]
        return whole == [(row["chosen_ids"], row["rejected_ids"]) for row in made]


def loss_of(trainer: Any) -> Side:
    """TRL's loss of the whole batch at the trainer's weights, and its gradients."""
    trainer.model.zero_grad()
    batch = trainer.data_collator(list(trainer.train_dataset))
    return _backward(trainer.compute_loss(trainer.model, batch), trainer.model)


def _backward(loss: Tensor, model: nn.Module) -> Side:
    loss.backward()
    gradients = {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }
    return Side(float(loss.detach()), gradients)


def gradient_gap(ours: Side, theirs: Side) -> float:
    """Largest difference of a gradient's entry, over the largest entry.

    Of the weights that both have: a Llama classifier of Hugging Face has no bias in its head.
    """
    shared = set(ours.gradients) & set(theirs.gradients)
    only = (set(ours.gradients) ^ set(theirs.gradients)) - {"score.bias"}
    assert shared and not only, f"one side alone has {sorted(only)}"
    largest = max(float(ours.gradients[name].abs().max()) for name in shared)
    gap = max(float((ours.gradients[n] - theirs.gradients[n]).abs().max()) for n in shared)
    return gap / largest


def weight_gap(ours: nn.Module, theirs: nn.Module, *, of_bias: bool = False) -> float:
    """Largest difference of a weight after training; of_bias: of the reward head's bias alone.

    A difference of two scores does not see that bias: its gradient is rounding, which Adam scales
    to whole steps, so that it wanders and says nothing. 0 where a side has none.
    """
    held = dict(theirs.named_parameters())
    return max(
        (
            float((p.detach() - held[name].detach()).abs().max())
            for name, p in ours.named_parameters()
            if name in held and (name == "score.bias") == of_bias
        ),
        default=0.0,
    )


def our_balance(beside: Beside) -> float:
    """Our load-balancing loss of the same rows at a weight of 1."""
    model = beside.language_model("moe")
    model.config.load_balancing_coef, model.config.z_loss_coef = 1.0, 0.0
    model.config.output_router_logits = True
    batch = SupervisedCollator(beside.text_path.pad_id)(beside.answers)
    held = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    return float(model(**held).aux_loss.detach())


def seed_file(folder: Path, seed: int) -> Path:
    return folder / "seeds" / f"{seed}.json"


def read_seed(folder: Path, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(seed_file(folder, seed).read_text(encoding="utf-8"))
    return found


def seed_job(folder: Path, seed: int, scale: str, job: str) -> None:
    """Measures a seed and writes its file; a file that is there already is kept."""
    target = seed_file(folder, seed)
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_json_atomic(target, measured(seed, scale, job, scratch=Path(scratch)))


def measured(seed: int, scale: str, job: str, *, scratch: Path) -> dict[str, Any]:
    """Everything that a seed is asked: losses, gradients, training, and where the sides differ."""
    beside = Beside(seed=seed)
    found: dict[str, Any] = {"trl": public_trainers().version}
    for place, family in enumerate(FAMILIES):
        for stage in STAGES:
            report(job, f"{family} {stage}", place, len(FAMILIES) + 1)
            found[f"{family}_{stage}"] = _one(beside, stage, family, scale=scale, scratch=scratch)
    report(job, "differences", len(FAMILIES), len(FAMILIES) + 1)
    return found | {"differences": _differences(beside, scratch=scratch)}


def _one(beside: Beside, stage: str, family: str, *, scale: str, scratch: Path) -> dict[str, Any]:
    """A model trained by both from the same weights; losses are compared where TRL's ended."""
    trainer = beside.trainer(stage, family, folder=scratch / "trl", steps=STEPS[scale])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    theirs = loss_of(trainer)
    ours = beside.ours(stage, family, weights=trainer.model.state_dict())
    own = beside.trained(stage, family, steps=STEPS[scale], folder=scratch / f"{family}-{stage}")
    return {
        "ours": ours.loss,
        "trl": theirs.loss,
        "gradient_gap": gradient_gap(ours, theirs),
        "first": losses[0],
        "last": losses[-1],
        "weight_gap": weight_gap(own, trainer.model),
        "bias_gap": weight_gap(own, trainer.model, of_bias=True),
        "same_rows": beside.is_ours(stage, list(trainer.train_dataset)),
    }


def _differences(beside: Beside, *, scratch: Path) -> dict[str, Any]:
    """What one option changes in TRL's loss at the first weights, and in ours."""

    def trl(stage: str, family: str, **options: Any) -> Any:
        return beside.trainer(stage, family, folder=scratch / "trl", **options)

    eos = beside.text_path.tokenizer.eos_token
    plain = beside.smoothed("moe", 0.0)
    smoothed = loss_of(trl("dpo", "moe", reference=1, label_smoothing=SMOOTHING))
    balanced = loss_of(trl("sft", "moe", router_aux_loss_coef=1.0))
    padded = loss_of(trl("rm", "llama", pad_token=eos))
    unspelled = trl("sft", "moe", spelled_bos=False)
    return {
        "balance_ours": our_balance(beside),
        "balance_trl": balanced.loss - beside.ours("sft", "moe").loss,
        "smoothing_ours": beside.smoothed("moe", SMOOTHING) - plain,
        "smoothing_trl": smoothed.loss - plain,
        "eos_pad_trl": padded.loss - beside.ours("rm", "llama").loss,
        "same_rows_without_bos": beside.is_ours("sft", list(unspelled.train_dataset)),
    }
