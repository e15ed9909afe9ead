"""Text of several domains, and a mixture of experts that is kept at marks of its training.

The decision to know: what a mark of the training is judged by is its weights, kept there and read
back afterwards, so that every measure is of the same held-out tokens and a run can be resumed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe import MoEForCausalLM
    from moe.record import RoutingTrace
    from sft.rows import SupervisedRow

# Of tokens: code, prose, tales, lists and arithmetic. There is no more prose than for one reading.
SHARES: Mapping[str, float] = {
    "python": 0.4,
    "pydoc": 0.2,
    "tales_forest": 0.15,
    "lists": 0.15,
    "arithmetic": 0.1,
}
METER = "meter.json"  # seconds and memory of the training
MARKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # shares of the training; 0 is before it
MODEL: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "load_balancing_coef": 0.01,
    "z_loss_coef": 0.001,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What follows from `--scale`, in documents, tokens, rows and steps."""

    vocab_size: int
    num_documents: int
    num_held_out: int
    block: int
    batch: int
    steps: int
    curve_steps: int
    curve_rows: int
    save_steps: int
    permutations: int


SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        vocab_size=1024,
        num_documents=9000,
        num_held_out=700,
        block=128,
        batch=8,
        steps=600,
        curve_steps=40,
        curve_rows=40,
        save_steps=200,
        permutations=199,
    ),
    "debug": Scale(
        vocab_size=320,
        num_documents=60,
        num_held_out=40,
        block=32,
        batch=4,
        steps=10,
        curve_steps=5,
        curve_rows=8,
        save_steps=4,
        permutations=19,
    ),
}


def sizes() -> dict[str, Any]:
    """The sizes of every scale as plain data."""
    return {name: asdict(scale) for name, scale in SCALES.items()}


@dataclass(frozen=True, kw_only=True)
class TextLab:
    """One seed of a run: sizes, learning rate, and where it works."""

    experiment: str
    seed: int
    scale: str
    folder: Path
    rate: float

    @property
    def sizes(self) -> Scale:
        return SCALES[self.scale]

    @property
    def stage(self) -> Path:
        return self.folder / "stages" / f"s{self.seed}"

    def mark(self, share: float) -> Path:
        """Where the weights of a mark are kept."""
        return self.stage / "marks" / f"{self.step_of(share):05d}"

    def step_of(self, share: float) -> int:
        return round(share * self.sizes.steps)

    def arm_folder(self, arm: str) -> Path:
        return self.folder / f"{arm}-s{self.seed}"

    def is_judged(self, arm: str) -> bool:
        return (self.arm_folder(arm) / "judged.json").is_file()

    def judged(self, arm: str) -> dict[str, Any]:
        """What the judge left of an arm."""
        text = (self.arm_folder(arm) / "judged.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A seed's text as ids: rows of one domain each; held_out: domain by domain.

    special: fields of MoEConfig. sha256: of the whole.
    """

    train: list["SupervisedRow"]
    held_out: list["SupervisedRow"]
    special: dict[str, int]
    notes: list[str]
    sha256: str

    @property
    def pad_id(self) -> int:
        return self.special["pad_token_id"]

    def for_curves(self, count: int) -> list["SupervisedRow"]:
        """So many held-out rows, evenly spaced, because rows stand domain by domain."""
        total = len(self.held_out)
        return [self.held_out[i * total // count] for i in range(min(count, total))]


def prepare(lab: TextLab) -> Prepared:
    """The text of the seed; written once, read back by whoever comes later."""
    from sft.run import write_text_atomic

    path = lab.stage / "text.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(_document(lab)) + "\n")
    whole = path.read_text(encoding="utf-8")
    found = json.loads(whole)
    return Prepared(
        train=_rows(found["train"]),
        held_out=_rows(found["held_out"]),
        special=found["special"],
        notes=found["notes"],
        sha256=hashlib.sha256(whole.encode("utf-8")).hexdigest(),
    )


def _rows(held: Sequence[tuple[str, list[int]]]) -> list["SupervisedRow"]:
    return [
        {"input_ids": ids, "labels": ids, "sample_id": place, "domain": domain}
        for place, (domain, ids) in enumerate(held)
    ]


def _document(lab: TextLab) -> dict[str, Any]:
    from experiments.lab.corpus import pretraining_documents
    from moe.counters import permutation
    from moe.errors import UserError
    from sft.examples import Document
    from sft.rows import document_rows
    from sft.text import TextPath, pick_template, train_bpe

    sizes = lab.sizes
    train = pretraining_documents(lab.seed, sizes.num_documents, shares=SHARES)
    held_out = pretraining_documents(lab.seed, sizes.num_held_out, split="held_out", shares=SHARES)
    tokenizer = train_bpe((d.text for d in train.documents), vocab_size=sizes.vocab_size)
    path = TextPath(tokenizer, pick_template(tokenizer, "plain"), max_length=sizes.block)

    def rows(corpus: Any) -> list[tuple[str, list[int]]]:
        documents = [Document(text=d.text, domain=d.domain) for d in corpus.documents]
        found = document_rows(documents, path, block=sizes.block)
        return [(row["domain"], row["input_ids"]) for row in found]

    made, wanted = rows(train), sizes.batch * sizes.steps
    if len(made) < wanted:
        raise UserError(
            f"{sizes.num_documents} documents make {len(made)} rows, and {wanted} are trained on: "
            "no row may come twice, so raise num_documents."
        )
    chosen = permutation(lab.seed, "routing rows", 0, length=len(made))[:wanted]
    return {
        "train": [made[i] for i in chosen],
        "held_out": rows(held_out),
        "special": {
            "vocab_size": len(tokenizer),
            "pad_token_id": path.pad_id,
            "bos_token_id": path.bos_id,
            "eos_token_id": path.eos_id,
        },
        "notes": list(train.notes),
    }


# --- training ------------------------------------------------------------------------------------


def new_model(lab: TextLab, text: Prepared) -> "MoEForCausalLM":
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(lab.seed)
    return MoEForCausalLM(MoEConfig(**MODEL, **text.special))


def at_mark(lab: TextLab, text: Prepared, share: float) -> "MoEForCausalLM":
    """The model as it was after this share of the training, in eval mode."""
    from sft.checkpoint import load_strictly, read_checkpoint

    model, held = new_model(lab, text), read_checkpoint(lab.mark(share))
    load_strictly(model, held.tensors["model"], source=str(held.folder))
    return model.eval()


def held_out_loss(
    model: "MoEForCausalLM", rows: Sequence["SupervisedRow"], *, pad_id: int
) -> tuple[tuple[float, float], "RoutingTrace"]:
    """((nats per token, tokens), where the tokens went)."""
    import torch

    from moe.record import record_routing
    from sft.loss import language_model_loss
    from sft.rows import SupervisedCollator

    was_training, collate = model.training, SupervisedCollator(pad_id)
    model.eval()
    total = count = 0.0
    with torch.no_grad(), record_routing(model) as trace:
        for start in range(0, len(rows), 32):
            batch = collate(rows[start : start + 32])
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                sample_ids=batch["sample_ids"],
                use_cache=False,
            ).logits
            output = language_model_loss(logits, batch["labels"])
            total, count = total + float(output.loss_sum), count + float(output.count)
    model.train(was_training)
    return (total / count, count), trace


def train_job(lab: TextLab, job: str) -> None:
    """Train the model of a seed, and keep it at every mark."""
    from experiments.lab.grid import report
    from experiments.lab.meter import metered
    from sft.checkpoint import live_tensors, newest_checkpoint, write_checkpoint
    from sft.rows import SupervisedCollator
    from sft.run import config_hash
    from sft.settings import TrainSettings
    from sft.tracking import Tracker
    from sft.trainer import SFTTrainer

    if (lab.mark(1.0) / "MANIFEST.json").is_file():
        return
    report(job, "text", 0, 1)
    text, sizes = prepare(lab), lab.sizes
    model, shown = new_model(lab, text), text.for_curves(sizes.curve_rows)
    marks = {lab.step_of(share): lab.mark(share) for share in MARKS}
    newest, _ = newest_checkpoint(lab.stage / "training")
    done = int(newest.name.rpartition("-")[2]) if newest else 0

    def keep(step: int) -> None:
        if step in marks and not (marks[step] / "MANIFEST.json").is_file():
            facts = {"stage": "mark", "step": step, "seed": lab.seed}
            tensors = {"model": live_tensors(model)}
            write_checkpoint(marks[step], tensors=tensors, documents={}, facts=facts)

    def look(step: int) -> None:
        value, _ = held_out_loss(model, shown, pad_id=text.pad_id)
        tracker.log({"eval/loss": value}, step=step, stage="held_out", split="held_out")

    def tell(step: int, total: int) -> None:
        meter.tick()
        report(job, "train", step, total)
        keep(step)
        if step % sizes.curve_steps == 0 or step == total:
            look(step)

    with (
        metered(lab.stage / METER) as meter,
        Tracker(
            lab.arm_folder("trained"),
            group=lab.experiment,
            job_type="train",
            name=f"trained-s{lab.seed}",
            config={},
            mirror="none",
            resume_step={"train": done, "held_out": done if newest else -1},
            console=None,
        ) as tracker,
    ):
        if newest is None:
            keep(0)
            look(0)
        SFTTrainer(
            model,
            TrainSettings(
                max_steps=sizes.steps,
                batch_size=sizes.batch,
                lr=lab.rate,
                lr_schedule="cosine",
                warmup_steps=max(1, sizes.steps // 20),
                weight_decay=0.1,
                seed=lab.seed,
                log_steps=10,
                save_steps=sizes.save_steps,
                keep_checkpoints=1,
            ),
            rows=text.train,
            collator=SupervisedCollator(text.pad_id),
            folder=lab.stage / "training",
            stage="train",
            tracker=tracker,
            fingerprints={"text": text.sha256, "scale": config_hash(asdict(sizes))},
            on_progress=tell,
        ).fit(resume=True)
