"""The work of `python -m sft.train`: rows, model, trainer, and what is said and kept of them.

The decision to know: losses before and after are measured on the same held-out rows by the same
function, one mean over all learned tokens, so that the two perplexities can be compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moe.errors import UserError
from sft.adapt import describe_trainable
from sft.command import in_force, refuse_idle
from sft.data import read_examples, require, split_by_prompt, use_chosen
from sft.examples import Document, Examples, Instruction
from sft.flags import Parsed
from sft.loss import language_model_loss
from sft.models import (
    NEW,
    ModelFolder,
    adapted,
    check_fit,
    describe_size,
    find_model,
    fingerprint_files,
    fingerprint_tokenizer,
    load_causal_lm,
    lora_spec,
    new_model,
    save_policy,
    tokenizer_of,
)
from sft.options import COMMAND, Config
from sft.rows import (
    IGNORED_LABEL,
    PromptRow,
    Rows,
    SupervisedCollator,
    SupervisedRow,
    document_rows,
    prompt_rows,
    supervised_rows,
)
from sft.run import config_hash
from sft.session import (
    Session,
    already_finished,
    answers,
    balance_policy,
    before_and_after,
    describe_balance,
    describe_device,
    describe_log,
    first_prompts,
    join_processes,
    latest,
    leave_processes,
    open_session,
    train_settings,
    whole_state,
)
from sft.text import TextPath, load_tokenizer, pick_template, train_bpe
from sft.trainer import SFTTrainer

OPENING_TOKENS = 32  # of a held-out text, that a pretrained model goes on from


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What the data file gave: examples on both sides of the split, and their rows."""

    train: Examples
    val: Examples
    train_rows: Rows[SupervisedRow]
    val_rows: Rows[SupervisedRow]

    @property
    def num_supervised(self) -> int:
        return sum(count_supervised(row) for row in self.train_rows)


def count_supervised(row: SupervisedRow) -> int:
    """Tokens of a row that are learned; the first is never predicted."""
    return sum(label != IGNORED_LABEL for label in row["labels"][1:])


def train(parsed: Parsed[Config]) -> int:
    """Run the command; returns its exit code."""
    config = parsed.config
    if already_finished(config):
        return 0
    state = join_processes()
    examples = _examples(config)
    found = None if config.model == NEW else find_model(config.model)
    if found is not None and found.adapter is not None:
        raise UserError(
            f"{config.model} is a LoRA run: give its base {found.base} to start again, or "
            "--resume the run to go on with it."
        )
    text_path = _text_path(config, found, examples)
    config = replace(config, template=text_path.template.name)
    corpus = _corpus(config, examples, text_path)
    model = _model(config, found, text_path)
    check_fit(model, text_path, named=config.model)
    size = describe_size(model)
    policy, idle = balance_policy(config, model)
    refuse_idle(parsed, idle)
    settings = train_settings(config, num_rows=len(corpus.train_rows), state=state)
    base_config: Any = model.config
    fingerprints = {
        "data": fingerprint_files([config.data]),
        "tokenizer": fingerprint_tokenizer(text_path.tokenizer),
        "model": config_hash(base_config.to_dict())
        if found is None
        else fingerprint_files(found.files),
    }
    if config.lora_rank:
        spec = lora_spec(
            model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets
        )
        model = adapted(model, spec, seed=config.seed)
    with open_session(
        config,
        in_force(config, config.idle() | idle),
        experiment="sft",
        stage=config.stage,
        command=COMMAND,
        state=state,
        fingerprints=fingerprints,
    ) as session:
        session.display.header(
            f"{config.stage}  {session.run.folder}",
            [
                ("model", f"{config.model}: {size}"),
                ("train", describe_trainable(model).removeprefix("trainable: ")),
                (
                    "",
                    f"{settings.max_steps} steps of {settings.batch_size} rows, lr {settings.lr:g}",
                ),
                *_data_lines(corpus),
                ("balance", describe_balance(policy, model)),
                ("device", describe_device(state)),
                ("log", describe_log(session)),
            ],
        )
        trainer = SFTTrainer(
            model,
            settings,
            rows=corpus.train_rows,
            collator=SupervisedCollator(text_path.pad_id),
            balance=policy,
            **session.trainer_options(),
        )
        _fit(config, session, trainer, corpus, text_path=text_path, found=found)
    leave_processes(state)
    return 0


def _examples(config: Config) -> Examples:
    examples = read_examples(config.data, columns=config.column_names)
    if config.stage == "pretrain":
        return require(examples, "document")
    if config.use == "chosen":
        return use_chosen(examples)
    return require(examples, "instruction")


def _text_path(config: Config, found: ModelFolder | None, examples: Examples) -> TextPath:
    """The model's tokenizer, or the one asked for, or one learned from the data."""
    if found is not None:
        tokenizer = tokenizer_of(found, config.tokenizer)
    elif config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_bpe(_texts(examples), vocab_size=config.vocab_size)
    name = config.template or (found.template if found is not None else None)
    return TextPath(
        tokenizer,
        pick_template(tokenizer, name),
        max_length=config.max_length,
        train_on_inputs=config.train_on_inputs,
    )


def _texts(examples: Examples) -> list[str]:
    texts = []
    for row in examples:
        if isinstance(row, Document):
            texts.append(row.text)
        elif isinstance(row, Instruction):
            texts.extend(message.content for message in row.conversation)
    return texts


def _corpus(config: Config, examples: Examples, text_path: TextPath) -> Corpus:
    train, val = split_by_prompt(examples, val_fraction=config.val_set_size, seed=config.seed)

    def rows(side: Examples) -> Rows[SupervisedRow]:
        if not len(side):
            return Rows([])
        if config.stage == "pretrain":
            return document_rows(side, text_path, block=config.max_length)
        return supervised_rows(side, text_path, drop_long=config.drop_long)

    return Corpus(train=train, val=val, train_rows=rows(train), val_rows=rows(val))


def _data_lines(corpus: Corpus) -> list[tuple[str, str]]:
    train, val = corpus.train, corpus.val
    lines = [
        (
            "data",
            f"{train.name} ({train.format}): {len(train) + len(val):,} rows, split "
            f"{len(train):,} / {len(val):,} by prompt; {corpus.num_supervised:,} supervised "
            f"tokens in {len(corpus.train_rows):,} training rows",
        )
    ]
    notes = dict.fromkeys((*train.notes, *corpus.train_rows.notes))
    return lines + [("", note) for note in notes]


def _model(config: Config, found: ModelFolder | None, text_path: TextPath) -> nn.Module:
    if found is not None:
        return load_causal_lm(found)
    model = new_model(
        text_path,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        seed=config.seed,
    )
    model.config.pad_token_id = text_path.pad_id
    model.config.bos_token_id = text_path.bos_id
    model.config.eos_token_id = text_path.eos_id
    return model


def _fit(
    config: Config,
    session: Session,
    trainer: SFTTrainer,
    corpus: Corpus,
    *,
    text_path: TextPath,
    found: ModelFolder | None,
) -> None:
    """Measure, train, measure again, save."""
    model, device = trainer.model, session.device
    prompts, origin = _sample_prompts(config, corpus, text_path)

    def look() -> tuple[float | None, list[str]]:
        loss = None
        if corpus.val_rows:
            loss = mean_loss(
                model,
                corpus.val_rows,
                pad_id=text_path.pad_id,
                batch_size=trainer.args.per_device_train_batch_size,
                device=device,
            )
        texts = answers(
            model, prompts, text_path, max_new_tokens=config.max_new_tokens, device=device
        )
        return loss, texts

    loss_before, texts_before = look()
    seconds = session.fit(trainer, resume=config.resume is not None)
    loss_after, texts_after = look()
    train_loss = latest(trainer)["train/loss"]
    summary = {
        "stage": config.stage,
        "steps": trainer.state.global_step,
        "train_loss": train_loss,
        "val_loss_before": loss_before,
        "val_loss": loss_after,
        "val_perplexity_before": None if loss_before is None else math.exp(loss_before),
        "val_perplexity": None if loss_after is None else math.exp(loss_after),
        "num_val_rows": len(corpus.val_rows),
        "samples_from": origin if prompts else None,
    }
    where = session.run.folder
    state = whole_state(trainer)
    if session.first:
        base = None if found is None else found.base
        where = save_policy(model, text_path, where, base=base, state=state)
    lines = [f"train loss {train_loss:.4f} (perplexity {math.exp(train_loss):.2f})"]
    if loss_before is not None and loss_after is not None:
        count = sum(count_supervised(row) for row in corpus.val_rows)
        session.log({"eval/loss": (loss_after, count)}, step=trainer.state.global_step)
        lines.append(
            f"val loss {loss_before:.4f} -> {loss_after:.4f}, perplexity "
            f"{math.exp(loss_before):.2f} -> {math.exp(loss_after):.2f} "
            f"on {len(corpus.val_rows)} held-out rows"
        )
    samples = before_and_after(prompts, texts_before, texts_after)
    session.leave(summary, samples=samples, seconds=seconds)
    session.conclude(lines, where=where)


def _sample_prompts(
    config: Config, corpus: Corpus, text_path: TextPath
) -> tuple[Sequence[PromptRow], str]:
    """Prompts to answer; in pretraining the openings of texts."""
    chosen, origin = first_prompts(corpus.val, corpus.train, count=config.num_samples)
    if not len(chosen):
        return [], origin
    room = max(1, config.max_length - config.max_new_tokens)
    if config.stage == "sft":
        return prompt_rows(chosen, text_path, max_prompt_length=room), origin
    rows: list[PromptRow] = []
    for index, text in enumerate(_texts(chosen)):
        ids = text_path.encode_document(text)[: min(OPENING_TOKENS, room)]
        if ids[-1] == text_path.eos_id and len(ids) > 1:
            ids = ids[:-1]
        rows.append({"prompt_ids": ids, "prompt": text_path.decode(ids), "sample_id": index})
    return rows, origin


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    rows: Sequence[SupervisedRow],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
) -> float:
    """Cross-entropy in nats per learned token, over all rows."""
    was_training = model.training
    model.eval()
    collate = SupervisedCollator(pad_id)
    total = count = 0.0
    for start in range(0, len(rows), batch_size):
        batch: Mapping[str, torch.Tensor] = collate(rows[start : start + batch_size])
        outputs = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            use_cache=False,
        )
        output = language_model_loss(outputs.logits, batch["labels"].to(device))
        total += float(output.loss_sum)
        count += float(output.count)
    model.train(was_training)
    return total / count
