"""The world `tales`: our own grammar, a model pretrained from nothing, gold known exactly.

Nothing is fetched and nothing is given: tokenizer, language model, prompts and reward all come from
`tales`, `corpus` and `gold`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.lab import tales
from experiments.lab.corpus import Corpus, pretraining_documents
from experiments.lab.gold import GoldReward
from experiments.lab.presets import SCALES, Pretraining, Scale, Trials, grid
from moe import MoEConfig, MoEForCausalLM
from sft.examples import Document, Instruction
from sft.rows import SupervisedRow, document_rows, supervised_rows
from sft.settings import BalancePolicy
from sft.text import Message, TextPath, load_tokenizer, pick_template, train_bpe


@dataclass(frozen=True, kw_only=True)
class TalesWorld:
    """See `experiments.lab.worlds.World`."""

    scale: Scale
    name: str = "tales"
    notes: tuple[str, ...] = ()
    experts_begin_equal: bool = False

    @property
    def pretraining(self) -> Pretraining:
        assert self.scale.pretraining is not None
        return self.scale.pretraining

    def facts(self) -> dict[str, Any]:
        return {}

    def check(self) -> None:
        """Nothing is given, so nothing can be absent."""

    def describe(self) -> str:
        model = self.pretraining.model
        return (
            f"{model['num_hidden_layers']} layers, width {model['hidden_size']}, "
            f"{model['num_experts']} experts top-{model['num_experts_per_tok']}, "
            f"{model['num_attention_heads']} heads / {model['num_key_value_heads']} kv, "
            f"window {model['sliding_window']} ({model['window_pattern']})"
        )

    def trials(self, *, lora: bool) -> Trials:
        """Adapters take more steps and higher learning rates."""
        dpo, ppo = self.scale.dpo, self.scale.ppo
        if lora:
            dpo = replace(dpo, epochs=3 * dpo.epochs)
        return grid(dpo, ppo, lora=lora, best_of_n=(4, 8, 16, 32))

    def sentences(
        self, *, before: Sequence[float], after: Sequence[float], ended: Sequence[float]
    ) -> list[str]:
        return []

    # Text and models.

    def prepare(self, seed: int, folder: Path) -> list[str]:
        """Train the tokenizer on the pretraining documents; the corpus's notes."""
        target = folder / "tokenizer"
        corpus = self._corpus(seed, self.pretraining.num_documents)
        if not (target / "tokenizer.json").is_file():
            texts = [document.text for document in corpus.documents]
            vocab_size = self.pretraining.vocab_size
            train_bpe(texts, vocab_size=vocab_size).save_pretrained(target)
        return list(corpus.notes)

    def text_path(self, folder: Path) -> TextPath:
        tokenizer = load_tokenizer(folder / "tokenizer")
        template = pick_template(tokenizer, "plain")
        return TextPath(tokenizer, template, max_length=self.scale.max_length)

    def new_model(self, text_path: TextPath, *, seed: int) -> MoEForCausalLM:
        config = MoEConfig(
            vocab_size=len(text_path.tokenizer),
            pad_token_id=text_path.pad_id,
            bos_token_id=text_path.bos_id,
            eos_token_id=text_path.eos_id,
            **self.pretraining.model,
        )
        torch.manual_seed(seed)
        return MoEForCausalLM(config)

    def pretraining_rows(self, seed: int, text_path: TextPath) -> Sequence[SupervisedRow]:
        corpus = self._corpus(seed, self.pretraining.num_documents)
        return self._document_rows(corpus, text_path)

    def original(self) -> None:
        """There is none: the model is made here."""
        return None

    def balance(self, model: torch.nn.Module) -> BalancePolicy:
        return BalancePolicy.of_model(model)

    def _corpus(self, seed: int, count: int, *, split: tales.Split = "train") -> Corpus:
        return pretraining_documents(seed, count, split=split)

    def _document_rows(self, corpus: Corpus, text_path: TextPath) -> Sequence[SupervisedRow]:
        documents = [Document(text=d.text, domain=d.domain) for d in corpus.documents]
        return document_rows(documents, text_path, block=self.pretraining.block)

    # What the stages see.

    def sft_examples(self, seed: int) -> list[Instruction]:
        return _instructions(tales.sft_examples(seed, self.scale.num_sft))

    def sft_held_out(self, seed: int) -> None:
        """Not told: SFT starts from a model that has seen the answers' form."""
        return None

    def training_prompts(self, seed: int, count: int) -> list[str]:
        return tales.prompts(seed, count, split="train")

    def held_out_prompts(self, count: int) -> list[str]:
        return tales.prompts(0, count, split="held_out")

    def validation_prompts(self, count: int) -> list[str]:
        """The held-out prompts behind those that the evaluator uses."""
        used = self.scale.num_eval_prompts
        return self.held_out_prompts(used + count)[used:]

    def few_shot_prompts(self, prompts: Sequence[str], *, seed: int) -> list[str]:
        rng = tales.seeded(seed, "few-shot")
        return [tales.few_shot_prompt(p, self.scale.few_shot, rng=rng) for p in prompts]

    def missing_eos_penalty(self, ended_share: float) -> float:
        """Always 1: gold prices an unfinished tale too."""
        return 1.0

    # What arms are judged by.

    def gold(self) -> GoldReward:
        return GoldReward()

    def routing_rows(self, seed: int, folder: Path) -> list[SupervisedRow]:
        """Held-out tales as SFT writes them, then pretraining text."""
        text_path = self.text_path(folder)
        examples = tales.sft_examples(0, self.scale.num_routing_texts, split="held_out")
        rows = list(supervised_rows(_instructions(examples), text_path))
        count = max(40, self.pretraining.num_documents // 60)
        return [*rows, *self._held_out_rows(seed, count, text_path)]

    def forgetting_rows(self, seed: int, folder: Path) -> Sequence[SupervisedRow]:
        count = max(40, self.pretraining.num_documents // 30)
        return self._held_out_rows(seed, count, self.text_path(folder))

    def _held_out_rows(self, seed: int, count: int, text_path: TextPath) -> Sequence[SupervisedRow]:
        return self._document_rows(self._corpus(seed, count, split="held_out"), text_path)


def tales_world(scale: str) -> TalesWorld:
    return TalesWorld(scale=SCALES[scale])


def _instructions(examples: Sequence[tales.Example]) -> list[Instruction]:
    return [
        Instruction(conversation=(Message("user", e.prompt), Message("assistant", e.answer)))
        for e in examples
    ]
