"""A judge that is a model folder: its probabilities of the labels, without drawing anything.

The decision to know: only the first token that tells the labels apart is read, after those that
they share (a SentencePiece tokenizer begins each with the same mark), and the probabilities are
renormalised over the labels. So the verdict is deterministic and never unreadable.

Shapes: B questions, S sequence, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe.errors import UserError
from moe.generation import positions
from rlhf.judge import Verdict
from rlhf.routing_guard import refuse_batch_coupling
from sft.adapt import disable_dropout
from sft.models import (
    check_fit,
    find_model,
    fingerprint_files,
    fingerprint_tokenizer,
    load_causal_lm,
    tokenizer_of,
)
from sft.text import Message, TextPath, pad_batch, pick_template


@dataclass(frozen=True, kw_only=True)
class LocalJudge:
    """`model` answers under `text_path`'s template; identity names both and the weights.

    Raises UserError for a question longer than `text_path.max_length`, and for labels that the
    tokenizer does not tell apart by a token.
    """

    model: nn.Module
    text_path: TextPath
    identity: str
    batch_size: int = 8

    def __post_init__(self) -> None:
        refuse_batch_coupling(self.model)
        disable_dropout(self.model)

    def ask(
        self, questions: Sequence[str], *, labels: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        shared, label_ids = label_tokens(labels, self.text_path)
        for start in range(0, len(questions), self.batch_size):
            rows = [
                self._ids(question) + shared
                for question in questions[start : start + self.batch_size]
            ]
            yield from enumerate(self._verdicts(rows, label_ids), start=start)

    def _ids(self, question: str) -> list[int]:
        ids = self.text_path.encode_prompt((Message("user", question),))
        if len(ids) >= self.text_path.max_length:
            raise UserError(
                f"A question to the judge has {len(ids)} tokens and there is room for "
                f"{self.text_path.max_length - 1}: shorten the answers (--max-new-tokens) or the "
                "prompts, or raise the judge's length."
            )
        return ids

    @torch.no_grad()
    def _verdicts(self, rows: Sequence[Sequence[int]], label_ids: Sequence[int]) -> list[Verdict]:
        device = next(self.model.parameters()).device
        ids_BS, mask_BS = pad_batch(rows, pad_id=self.text_path.pad_id, side="left")
        was_training = self.model.training
        self.model.eval()
        logits_BV = self.model(
            input_ids=ids_BS.to(device),
            attention_mask=mask_BS.long().to(device),
            position_ids=positions(mask_BS).to(device),
            use_cache=False,
        ).logits[:, -1]
        self.model.train(was_training)
        chance = torch.softmax(logits_BV[:, list(label_ids)].double(), dim=-1).cpu()
        return [tuple(row) for row in chance.tolist()]


def label_tokens(labels: Sequence[str], text_path: TextPath) -> tuple[list[int], list[int]]:
    """The tokens that all labels begin with, and the one of each that comes then."""
    encoded = [text_path.encode_completion(label, finished=False) for label in labels]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*encoded, strict=False))
    shared = [column[0] for column in same]
    after = [ids[len(shared) :][:1] for ids in encoded]
    if len({tuple(ids) for ids in after if ids}) < len(labels):
        raise UserError(
            f"The judge's tokenizer does not tell the labels {', '.join(labels)} apart by a token: "
            "take another judge."
        )
    return shared, [ids[0] for ids in after]


def open_local_judge(
    folder: str | Path, *, max_length: int | None = None, device: torch.device | None = None
) -> LocalJudge:
    """The judge in any folder that `sft.models.find_model` takes.

    max_length: of a question, in tokens; None takes the model's own positions, at most 4096.
    """
    found = find_model(folder)
    model = load_causal_lm(found)
    tokenizer = tokenizer_of(found, None)
    template = pick_template(tokenizer, found.template)
    own = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = min(own or 4096, 4096) if max_length is None else max_length
    text_path = TextPath(tokenizer, template, max_length=length)
    check_fit(model, text_path, named=str(folder))
    weights, words = fingerprint_files(found.files), fingerprint_tokenizer(tokenizer)
    return LocalJudge(
        model=model if device is None else model.to(device),
        text_path=text_path,
        identity=f"{weights}:{words}:{template.name}",
    )
