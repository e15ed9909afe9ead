"""The trainings of the experiment `upcycling`: one dense start per seed, and what begins from it.

The decision to know: every training is one warm-up and cosine with a fresh optimizer, whatever its
weights were before, and is judged on the same held-out rows before and after.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from experiments.lab.grid import report
from experiments.lab.meter import Meter, metered
from experiments.lab.specialisation import domain_use, expert_distance_L
from experiments.lab.upcycling_text import Lab, Prepared, prepare, read_text
from moe import MoEConfig, MoEForCausalLM
from moe.budget import budget
from moe.record import RoutingTrace, has_router, record_routing
from moe.stats import RouterStats
from moe.upcycle import upcycle
from sft.checkpoint import (
    live_tensors,
    load_strictly,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sft.loss import language_model_loss
from sft.rows import SupervisedCollator, SupervisedRow
from sft.run import config_hash, write_json_atomic
from sft.settings import TrainSettings
from sft.tracking import Tracker
from sft.trainer import SFTTrainer

START = "dense_start"
BACKWARD = 2  # a backward pass costs about two forward passes


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How an arm begins, and on which rows it is trained.

    family: arms of one family share a learning rate. options: of `moe.upcycle.upcycle`, for the
    upcycled. sees_all: whether it is trained on the dense start's rows too.
    """

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sees_all: bool = False


FOUR = {"num_experts": 4, "top_k": 2}
# In the order of their names, as folders are read back, so that every figure colours them alike.
ARMS: Mapping[str, Arm] = {
    "dense_continued": Arm(family="dense"),
    "moe_scratch": Arm(family="scratch", sees_all=True),
    "moe_scratch_d1": Arm(family="scratch"),
    "upcycled_copy": Arm(family="upcycled", options=FOUR),
    "upcycled_drop": Arm(family="upcycled", options={**FOUR, "variant": "drop"}),
    "upcycled_granular": Arm(
        family="upcycled",
        options={"num_experts": 8, "top_k": 2, "variant": "granular", "granularity": 2},
    ),
    "upcycled_noise": Arm(family="upcycled", options={**FOUR, "variant": "noise"}),
}
# By `python -m experiments.upcycling --tune`: the same four rates for each family, on seed 9001.
RATES: Mapping[str, float] = {"start": 6e-3, "dense": 6e-3, "upcycled": 6e-3, "scratch": 3e-3}


# --- models --------------------------------------------------------------------------------------


def dense_config(lab: Lab, text: Prepared) -> MoEConfig:
    layers = int(lab.sizes.model["num_hidden_layers"])
    fields: dict[str, Any] = {**lab.sizes.model, **text.special}
    return MoEConfig(**fields, mlp_layer_types=["dense"] * layers)


def scratch_config(lab: Lab, text: Prepared) -> MoEConfig:
    """The shape of `upcycled_copy`."""
    fields: dict[str, Any] = {**lab.sizes.model, **text.special}
    return MoEConfig(
        **fields,
        moe_intermediate_size=fields["intermediate_size"],
        num_experts=FOUR["num_experts"],
        num_experts_per_tok=FOUR["top_k"],
    )


def _new(config: MoEConfig, *, seed: int) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(config)


def beginning(lab: Lab, arm: Arm, text: Prepared) -> MoEForCausalLM:
    """The model that an arm's training begins with."""
    if arm.family == "scratch":
        return _new(scratch_config(lab, text), seed=lab.seed)
    dense = _new(dense_config(lab, text), seed=lab.seed)
    held = read_checkpoint(lab.trunk / START / "final")
    load_strictly(dense, held.tensors["model"], source=str(held.folder))
    return upcycle(dense, **arm.options, seed=lab.seed) if arm.options else dense


# --- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def held_out_losses(
    model: MoEForCausalLM, rows: Sequence[SupervisedRow], *, pad_id: int
) -> tuple[dict[str, tuple[float, float]], RoutingTrace | None]:
    """Per domain (nats summed, tokens), and where the tokens went in a model with a router."""
    was_training = model.training
    model.eval()
    collate = SupervisedCollator(pad_id)
    sums: dict[str, tuple[float, float]] = {}
    with record_routing(model) if has_router(model) else nullcontext() as trace:
        for domain, group in groupby(rows, key=lambda row: row["domain"]):
            own = list(group)
            for start in range(0, len(own), 32):
                batch = collate(own[start : start + 32])
                logits = model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    sample_ids=batch["sample_ids"],
                    use_cache=False,
                ).logits
                output = language_model_loss(logits, batch["labels"])
                total, count = sums.get(domain, (0.0, 0.0))
                sums[domain] = (total + float(output.loss_sum), count + float(output.count))
    model.train(was_training)
    return sums, trace


def mean_loss(sums: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """(nats per token over all domains, tokens)."""
    tokens = sum(count for _, count in sums.values())
    return sum(total for total, _ in sums.values()) / tokens, tokens


def routing_of(
    model: MoEForCausalLM, trace: RoutingTrace, rows: Sequence[SupervisedRow], *, seed: int
) -> dict[str, Any]:
    """Per layer: how evenly experts are used, how far apart their weights are, and by domain."""
    stats = RouterStats.from_trace(trace)
    return {
        "load_entropy": stats.load_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "load_share": stats.relative_load_LE.tolist(),
        "expert_distance": expert_distance_L(model),
        **domain_use(trace, [row["domain"] for row in rows], seed=seed),
    }


def cost(model: MoEForCausalLM, rows: Sequence[SupervisedRow]) -> dict[str, float]:
    """Parameters, tokens and FLOPs of one training; attention scores are not in the FLOPs."""
    counted = budget(model.config)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {
        "total_parameters": counted.total,
        "active_parameters": counted.active,
        "forward_flops_per_token": counted.flops_per_token,
        "tokens_trained": tokens,
        "train_gflops": (1 + BACKWARD) * counted.flops_per_token * tokens / 1e9,
    }


# --- jobs ----------------------------------------------------------------------------------------


def text_job(lab: Lab, name: str) -> None:
    report(name, "text", 0, 1)
    prepare(lab)


def start_job(lab: Lab, name: str) -> None:
    """Train and judge the dense model that the arms of a seed begin from."""
    if (lab.arm_folder(START) / "judged.json").is_file():
        return
    text = read_text(lab)
    model = _new(dense_config(lab, text), seed=lab.seed)
    training = _Training(lab=lab, name=START, job=name, family="start", log="dense_continued")
    training.judge(model, text, rows=text.start)


def arm_job(lab: Lab, name: str, arm_name: str) -> None:
    """Train and judge an arm."""
    if (lab.arm_folder(arm_name) / "judged.json").is_file():
        return
    arm, text = ARMS[arm_name], read_text(lab)
    training = _Training(
        lab=lab,
        name=arm_name,
        job=name,
        family=arm.family,
        log=arm_name,
        offset=0 if arm.family == "scratch" else lab.sizes.start_steps,
    )
    rows = text.whole if arm.sees_all else text.more
    training.judge(beginning(lab, arm, text), text, rows=rows)


@dataclass(frozen=True, kw_only=True)
class _Training:
    """One training: what it is called, where its log goes, and the steps behind its weights.

    log: the arm whose metrics.jsonl takes the rows; the dense start's curve is the beginning of
    `dense_continued`'s. offset: steps that made the weights it begins with.
    """

    lab: Lab
    name: str
    job: str
    family: str
    log: str
    offset: int = 0

    @property
    def folder(self) -> Path:
        return self.lab.stages / self.name

    @property
    def stage(self) -> str:
        return "pretrain" if self.name == START else "train"

    def settings(self, *, steps: int) -> TrainSettings:
        sizes = self.lab.sizes
        return TrainSettings(
            max_steps=steps,
            batch_size=sizes.batch,
            lr=self.lab.rates[self.family],
            warmup_steps=sizes.warmup_steps,
            weight_decay=0.1,
            seed=self.lab.seed,
            log_steps=10,
            save_steps=sizes.save_steps,
            keep_checkpoints=1,
        )

    def judge(
        self, model: MoEForCausalLM, text: Prepared, *, rows: Sequence[SupervisedRow]
    ) -> None:
        """Measure, train, measure again; leaves `<arm>-s<seed>/judged.json`."""
        sizes = self.lab.sizes
        before, _ = held_out_losses(model, text.held_out, pad_id=text.pad_id)
        apart_L = expert_distance_L(model)
        with metered(self.folder / "meter.json") as meter:
            self._fit(model, text, rows=rows, meter=meter)
        if self.name == START:
            write_checkpoint(
                self.folder / "final",
                tensors={"model": live_tensors(model)},
                documents={},
                facts={"stage": START, "seed": self.lab.seed},
            )
        report(self.job, "judging", 0, 1)
        sums, trace = held_out_losses(model, text.held_out, pad_id=text.pad_id)
        routing = None
        if trace is not None:
            routing = routing_of(model, trace, text.held_out, seed=self.lab.seed)
            routing["expert_distance_before"] = apart_L
        found = {
            "metrics": {
                "held_out_loss": mean_loss(sums)[0],
                "loss_before": mean_loss(before)[0],
                **{f"loss_{domain}": total / count for domain, (total, count) in sums.items()},
                **cost(model, rows),
            },
            "steps_before": self.offset,
            "steps": len(rows) // sizes.batch,
            "learning_rate": self.lab.rates[self.family],
            "held_out_tokens": mean_loss(sums)[1],
            "routing": routing,
            "notes": text.notes,
            "timings": meter.facts(),
        }
        folder = self.lab.arm_folder(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / "judged.json", found)

    def _fit(
        self,
        model: MoEForCausalLM,
        text: Prepared,
        *,
        rows: Sequence[SupervisedRow],
        meter: Meter,
    ) -> None:
        settings = self.settings(steps=len(rows) // self.lab.sizes.batch)
        newest, _ = newest_checkpoint(self.folder)
        done = int(newest.name.rpartition("-")[2]) if newest else 0
        # A model that begins as another says what became of it; of new weights it says nothing.
        looks_first = newest is None and self.family == "upcycled"
        kept = {self.stage: done, "held_out": self.offset + done - looks_first}
        with Tracker(
            self.lab.arm_folder(self.log),
            group="upcycling",
            job_type=self.stage,
            name=f"{self.name}-s{self.lab.seed}",
            config={},
            mirror="none",
            resume_step=kept,
            console=None,
        ) as tracker:
            look = self._look(model, text, tracker)
            if looks_first:
                look(0)
            SFTTrainer(
                model,
                settings,
                rows=rows,
                collator=SupervisedCollator(text.pad_id),
                folder=self.folder,
                stage=self.stage,
                tracker=tracker,
                fingerprints={
                    "text": text.sha256,
                    "scale": config_hash(asdict(self.lab.sizes)),
                },
                on_progress=self._on_progress(look, meter),
            ).fit(resume=True)

    def _look(
        self, model: MoEForCausalLM, text: Prepared, tracker: Tracker
    ) -> Callable[[int], None]:
        """Logs the loss on a few held-out rows; a step counts from the first of the weights."""
        rows = text.for_curves(self.lab.sizes.curve_rows)

        def look(step: int) -> None:
            sums, _ = held_out_losses(model, rows, pad_id=text.pad_id)
            values = {"eval/loss": mean_loss(sums)}
            tracker.log(values, step=self.offset + step, stage="held_out", split="held_out")

        return look

    def _on_progress(self, look: Callable[[int], None], meter: Meter) -> Callable[[int, int], None]:
        def tell(step: int, total: int) -> None:
            meter.tick()
            report(self.job, self.name, step, total)
            if step % self.lab.sizes.curve_steps == 0 or step == total:
                look(step)

        return tell
