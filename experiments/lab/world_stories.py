"""The world `stories`: a given language model goes on from openings, gold is sentiment.

The controlled-sentiment task of Rafailov et al. 2023 (section 6.1) at a CPU's size: any Hugging
Face causal language model in a folder, prompts of our own grammar, VADER in place of their
classifier. With `experts` the model is made a mixture of experts by copying its FFNs, and SFT on
text that it has not seen is what makes the copies differ.

Decisions to know, for any folder: an answer goes on where the prompt stops (the template
`continuation`, whatever chat template the folder has). Sampling stops at the tokenizer's EOS and at
its BOS, by which some models end a story; SFT's answers end with the one of them that the given
model finds likelier over its own stories, because a token that its training never saw may share its
row with other unseen tokens, which adapters cannot undo. PAD is a token that ends nothing
(`sft.text.TextPath`), behind explicit masks. PPO's price for not ending is on only if SFT's own
answers end by themselves more than half of the time: a model that never ends would otherwise be
trained on the price alone.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from experiments.lab import tales
from experiments.lab.evaluation import completion_ids, draw_completions
from experiments.lab.openings import openings
from experiments.lab.presets import STORIES_SCALES, Scale, Trials, grid
from experiments.lab.sentiment import SentimentGold, Target, require_vader
from moe.errors import UserError
from moe.generation import Rollout
from moe.interop import load, upcycle
from rlhf.ppo import response_logits
from sft.data import read_examples, split_by_prompt
from sft.examples import Document, Examples, Instruction
from sft.models import ModelFolder, check_fit, find_model, fingerprint_files, load_causal_lm
from sft.rows import IGNORED_LABEL, SupervisedRow, supervised_rows
from sft.run import write_json_atomic
from sft.settings import BalancePolicy
from sft.text import CONTINUATION, Message, TextPath, load_tokenizer

# Nats by which the held-out SFT loss should fall, so that experts have a reason to come apart.
SFT_FALL = 0.1
ENDS_BY_ITSELF = 0.5
VAL_FRACTION = 0.1
OWN_TEXT_TOKENS = 96
OWN_TEXTS = "own_texts.json"
WORD_START = "\u2581"  # what SentencePiece writes in front of a word


@dataclass(frozen=True, kw_only=True)
class StoriesWorld:
    """See `experiments.lab.worlds.World`. experts: (how many, how many per token); None: dense."""

    scale: Scale
    model: Path
    experts: tuple[int, int] | None
    target: Target
    sft_data: Path | None
    name: str = "stories"

    @property
    def experts_begin_equal(self) -> bool:
        return self.experts is not None

    @property
    def notes(self) -> tuple[str, ...]:
        return (
            f"Gold is VADER's compound score of the completion alone, {self.target} is rewarded: "
            "a word list with rules, not a reader.",
            "Original perplexity is that of the completion's tokens, but for the one that ends it, "
            "under the given model as it came.",
            "Base perplexity is that of stories which the given model wrote itself: how much of "
            "its own distribution is kept.",
        )

    def facts(self) -> dict[str, Any]:
        upcycled = "none" if self.experts is None else "x".join(map(str, self.experts))
        sft_data = self.sft_data
        return {
            "name": self.name,
            "model": str(self.model),
            "model_fingerprint": _fingerprint(tuple(self._found().files)),
            "upcycle": upcycled,
            "target": self.target,
            "sft_data": "tales" if sft_data is None else str(sft_data),
            "sft_data_fingerprint": None if sft_data is None else _fingerprint((sft_data,)),
        }

    def check(self) -> None:
        require_vader()
        text_path = self.text_path(Path())
        check_fit(self.new_model(text_path, seed=0), text_path, named=str(self.model))
        supervised_rows(self.sft_examples(0), text_path)

    def describe(self) -> str:
        made = "as it is" if self.experts is None else "upcycled to {} experts top-{}"
        return f"{self.model}, {made.format(*(self.experts or ()))}, target {self.target}"

    def trials(self, *, lora: bool) -> Trials:
        arms = self.scale.lora if lora else self.scale
        return grid(arms.dpo, arms.ppo, lora=lora, best_of_n=(2, 4, 8, 16))

    # Text and models.

    def prepare(self, seed: int, folder: Path) -> list[str]:
        """Let the given model write stories: what it keeps of them and how it ends is measured."""
        path = folder / OWN_TEXTS
        if not path.is_file():
            write_json_atomic(path, self._own_texts(seed, folder))
        held = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = self.text_path(folder).tokenizer
        chances = ", ".join(
            f"{tokenizer.convert_ids_to_tokens(int(token))} {chance:.1e}"
            for token, chance in held["end_chances"].items()
        )
        end = tokenizer.convert_ids_to_tokens(held["end_id"])
        told = f"SFT's answers end with {end}; chance per token of the given model's own stories: "
        notes = [] if self.sft_data is None else list(self._sft_sides()[0].notes)
        return [f"{told}{chances}.", *notes]

    def text_path(self, folder: Path) -> TextPath:
        """Before `prepare`, answers end with the tokenizer's EOS."""
        tokenizer = load_tokenizer(self._found().tokenizer)
        text_path = TextPath(tokenizer, CONTINUATION, max_length=self.scale.max_length)
        path = folder / OWN_TEXTS
        if path.is_file():
            text_path.eos_id = json.loads(path.read_text(encoding="utf-8"))["end_id"]
        return text_path

    def new_model(self, text_path: TextPath, *, seed: int) -> PreTrainedModel:
        if self.experts is None:
            return self._as_given()
        num_experts, top_k = self.experts
        return upcycle(load(self._found().base), num_experts, top_k, seed=seed)

    def pretraining_rows(self, seed: int, text_path: TextPath) -> None:
        return None

    def original(self) -> nn.Module:
        return self._as_given().eval()

    def balance(self, model: nn.Module) -> BalancePolicy:
        """Experts that begin equal need it; what was given with experts keeps its own."""
        if self.experts is None:
            return BalancePolicy.of_model(model)
        return BalancePolicy(load_balancing_coef=0.01, z_loss_coef=0.001)

    def _found(self) -> ModelFolder:
        found = find_model(self.model)
        if found.adapter is not None:
            raise UserError(
                f"{self.model} is an adapter on {found.base}: merge it into its base first, the "
                "world stories starts from a whole model."
            )
        return found

    def _as_given(self) -> PreTrainedModel:
        transformers_logging.disable_progress_bar()  # a bar for every stage that opens the model
        model = load_causal_lm(self._found())
        assert isinstance(model, PreTrainedModel)
        return model

    def _own_texts(self, seed: int, folder: Path) -> dict[str, Any]:
        text_path = self.text_path(folder)
        prompts = self.held_out_prompts(self.scale.num_routing_texts)
        original = self.original()
        rollouts = draw_completions(
            original,
            prompts,
            text_path,
            max_new_tokens=OWN_TEXT_TOKENS,
            seed=seed,
            purpose="own-texts",
        )
        chances = token_chances(original, rollouts, text_path.stop_ids)
        return {
            "prompts": prompts,
            "completion_ids": completion_ids(rollouts),
            "end_chances": chances,
            # The first of equals is the tokenizer's EOS.
            "end_id": max(chances, key=lambda token: chances[token]),
        }

    # What the stages see.

    def sft_examples(self, seed: int) -> list[Instruction]:
        """Our own tales cut behind their first sentence, or the file's examples."""
        count = self.scale.num_sft
        if self.sft_data is None:
            return self._cut_tales(seed, count, split="train")
        rows = _conversations(self._sft_sides()[0])
        tales.seeded(seed, "sft-data").shuffle(rows)
        return self._joined(rows[:count])

    def sft_held_out(self, seed: int) -> list[Instruction]:
        count = max(8, self.scale.num_sft // 8)
        if self.sft_data is None:
            return self._cut_tales(0, count, split="held_out")
        return self._joined(_conversations(self._sft_sides()[1])[:count])

    def training_prompts(self, seed: int, count: int) -> list[str]:
        return openings(seed, count, side="train")

    def held_out_prompts(self, count: int) -> list[str]:
        return openings(0, count, side="held_out")

    def validation_prompts(self, count: int) -> list[str]:
        return openings(0, count, side="validation")

    def few_shot_prompts(self, prompts: Sequence[str], *, seed: int) -> None:
        """None: a continuation has no form that worked examples could show."""
        return None

    def missing_eos_penalty(self, ended_share: float) -> float:
        return 1.0 if ended_share > ENDS_BY_ITSELF else 0.0

    def _sft_sides(self) -> tuple[Examples, Examples]:
        """(training, held-out) examples of the file, split by prompt the same way for all seeds."""
        assert self.sft_data is not None
        return split_by_prompt(read_examples(self.sft_data), val_fraction=VAL_FRACTION, seed=0)

    def _cut_tales(self, seed: int, count: int, *, split: tales.Split) -> list[Instruction]:
        rng = tales.seeded(seed, "stories-sft", split)
        heroes = [c for domain in tales.ENGLISH_DOMAINS for c in tales.combos(split, domain)]
        cut = [tales.plain_tale(rng.choice(heroes), rng).split(". ", 1) for _ in range(count)]
        return self._joined(
            [
                Instruction(conversation=(Message("user", f"{a}."), Message("assistant", b)))
                for a, b in cut
            ]
        )

    def _joined(self, examples: Sequence[Instruction]) -> list[Instruction]:
        """With the space between prompt and answer, where the tokenizer puts none itself."""
        if starts_words_itself(load_tokenizer(self._found().tokenizer)):
            return list(examples)
        return [_with_space(example) for example in examples]

    # What arms are judged by.

    def gold(self) -> SentimentGold:
        return SentimentGold(self.target)

    def routing_rows(self, seed: int, folder: Path) -> list[SupervisedRow]:
        """Held-out tales, and stories of the given model: two domains."""
        count = self.scale.num_routing_texts
        examples = self._cut_tales(1, count, split="held_out")
        rows = supervised_rows(examples, self.text_path(folder))
        own = self.forgetting_rows(seed, folder)
        for domain, of_domain in (("tales", rows), ("stories", own)):
            for row in of_domain:
                row["domain"] = domain
        return [*rows, *own]

    def forgetting_rows(self, seed: int, folder: Path) -> list[SupervisedRow]:
        held = json.loads((folder / OWN_TEXTS).read_text(encoding="utf-8"))
        text_path = self.text_path(folder)
        rows: list[SupervisedRow] = []
        for prompt, ids in zip(held["prompts"], held["completion_ids"], strict=True):
            asked = text_path.encode_prompt((Message("user", prompt),))
            labels = [IGNORED_LABEL] * len(asked) + ids
            rows.append({"input_ids": asked + ids, "labels": labels, "sample_id": len(rows)})
        return rows

    def sentences(
        self, *, before: Sequence[float], after: Sequence[float], ended: Sequence[float]
    ) -> list[str]:
        """What SFT did to its loss and to the ends of answers, seed by seed."""
        falls = [a - b for a, b in zip(before, after, strict=True)]
        told = ", ".join(f"{fall:.2f}" for fall in falls)
        sentences = [f"SFT's loss on held-out examples falls by {told} nats per token."]
        if min(falls) < SFT_FALL:
            sentences.append(
                f"That is under {SFT_FALL} in some seed: SFT hardly taught anything, so the rest "
                "says little."
            )
        shares = ", ".join(f"{share:.0%}" for share in ended)
        prices = ", ".join(f"{self.missing_eos_penalty(share):g}" for share in ended)
        sentences.append(
            f"SFT's answers end by themselves in {shares} of cases; PPO pays {prices} for one that "
            "does not."
        )
        return sentences


def stories_world(
    scale: str,
    *,
    model: Path,
    experts: tuple[int, int] | None,
    target: Target,
    sft_data: Path | None,
) -> StoriesWorld:
    return StoriesWorld(
        scale=STORIES_SCALES[scale, target],
        model=model,
        experts=experts,
        target=target,
        sft_data=sft_data,
    )


@torch.no_grad()
def token_chances(
    model: nn.Module, rollouts: Sequence[Rollout], tokens: Sequence[int]
) -> dict[int, float]:
    """Mean probability of each of these tokens at the places of the completions' tokens."""
    sums, count = torch.zeros(len(tokens), dtype=torch.float64), 0
    for rollout in rollouts:
        ids = torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1)
        mask = torch.cat([rollout.prompt_mask_BP, rollout.mask_BR], dim=1)
        logits = response_logits(model, ids, mask, rollout.response_BR.shape[1])[:, :-1]
        chance_TV = logits[rollout.mask_BR].float().softmax(dim=-1)
        sums += chance_TV[:, list(tokens)].double().sum(dim=0)
        count += len(chance_TV)
    return dict(zip(tokens, (sums / count).tolist(), strict=True))


def starts_words_itself(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a text's first word gets the mark of a word's start without a space in front.

    SentencePiece does so; byte-level BPE does not, and there an answer begins with its space.
    """
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[0]).startswith(WORD_START)


def _with_space(example: Instruction) -> Instruction:
    *asked, answer = example.conversation
    if not asked or answer.content[:1].isspace():
        return example
    return Instruction(conversation=(*asked, replace(answer, content=f" {answer.content}")))


def _conversations(examples: Examples) -> list[Instruction]:
    """Instructions as they are; a document is an answer to nothing."""
    found = []
    for row in examples:
        if isinstance(row, Document):
            found.append(Instruction(conversation=(Message("assistant", row.text),)))
        elif isinstance(row, Instruction):
            found.append(row)
        else:
            raise UserError(
                f"{examples.name} holds preferences: --sft-data takes instructions or plain text."
            )
    return found


@functools.lru_cache(maxsize=8)
def _fingerprint(paths: tuple[Path, ...]) -> str:
    return fingerprint_files(paths)
