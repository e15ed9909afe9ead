"""The trainings of the experiments in the world `knowledge`: one design, one seed, one training.

The decision to know: arms of a seed share the tables, the rows and their order, and the weights
that they have in common (embedding, attention, norms) begin equal, whatever stands in place of
the FFN. The learning rate is constant, so that a loss on the way is worth as much as the last one
and steps to a loss can be compared.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import UserError

if TYPE_CHECKING:
    from experiments.lab.meter import Meter
    from moe import MoEConfig, MoEForCausalLM
    from moe.record import RoutingTrace
    from sft.rows import SupervisedRow
    from sft.settings import BalancePolicy
    from sft.tracking import Tracker

CONTEXT = 64
SCORED_FROM = 16  # by then a text has told its domain
MIXTURE_RATE = 3e-3  # of whole experts, chosen by trial: results/moe_vs_dense/tuning
WIDTH = 96  # of the dense FFN; a whole expert is as wide
BACKWARD = 2  # a backward pass costs about two forward passes
PAD_ID = 0  # rows are all of one length: nothing is padded
MODEL: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.06,
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What follows from `--scale`, in rows and steps.

    curve_steps: between two looks at the first `curve_rows` held-out rows.
    """

    steps: int
    batch: int
    held_out_rows: int
    curve_steps: int
    curve_rows: int
    save_steps: int


SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        steps=400, batch=32, held_out_rows=512, curve_steps=20, curve_rows=128, save_steps=100
    ),
    "debug": Scale(steps=4, batch=4, held_out_rows=32, curve_steps=2, curve_rows=8, save_steps=2),
}


@dataclass(frozen=True, kw_only=True)
class Design:
    """What stands in place of the FFN, and how its routers are kept even.

    family: designs of one family share a learning rate. fields: of MoEConfig, beside the world's.
    bias_update_rate: of the bias that balances without a loss; 0 is none.
    """

    family: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    bias_update_rate: float = 0.0


def dense(*, family: str, width: int = WIDTH) -> Design:
    kinds = ["dense"] * int(MODEL["num_hidden_layers"])
    return Design(family=family, fields={"mlp_layer_types": kinds, "intermediate_size": width})


def mixture(
    *,
    family: str,
    num_experts: int,
    top_k: int = 1,
    width: int = WIDTH,
    bias_update_rate: float = 0.0,
    **fields: Any,
) -> Design:
    """E experts of this width, K per token, weighed by their raw probabilities.

    Raw, because renormalised weights would be constant for K = 1, and because at the start their
    sum is then K / E for every design that splits the same parameters more finely.
    """
    own = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "norm_topk_prob": False,
        **fields,
    }
    return Design(family=family, fields=own, bias_update_rate=bias_update_rate)


def settings_of(designs: Mapping[str, Design], *, rates: Mapping[str, float]) -> dict[str, Any]:
    """What decides the results of an experiment of this world beside its options, as plain data."""
    return {
        "model": dict(MODEL),
        "designs": {arm: asdict(design) for arm, design in designs.items()},
        "sizes": {name: asdict(scale) for name, scale in SCALES.items()},
        "context": [CONTEXT, SCORED_FROM],
        "rates": dict(rates),
    }


@dataclass(frozen=True, kw_only=True)
class Lab:
    """One seed of a run: sizes, and where it works.

    folder: parent of `stages/s<seed>` (checkpoints) and of the arms' folders. rates: learning rate
    of each family.
    """

    experiment: str
    seed: int
    scale: str
    folder: Path
    rates: Mapping[str, float]

    @property
    def sizes(self) -> Scale:
        return SCALES[self.scale]

    def stage(self, arm: str) -> Path:
        return self.folder / "stages" / f"s{self.seed}" / arm

    def arm_folder(self, arm: str) -> Path:
        return self.folder / f"{arm}-s{self.seed}"

    def is_judged(self, arm: str) -> bool:
        return (self.arm_folder(arm) / "judged.json").is_file()

    def judged(self, arm: str) -> dict[str, Any]:
        """What the judge left of an arm."""
        text = (self.arm_folder(arm) / "judged.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def curve(self, arm: str) -> list[tuple[int, float]]:
        """(step, loss on the first held-out rows) of every look, in order."""
        from sft.tracking import METRICS_FILE, read_metrics

        rows = read_metrics(self.arm_folder(arm) / METRICS_FILE)
        return [(row["step"], row["value"]) for row in rows if row["stage"] == "held_out"]


# --- rows and models -----------------------------------------------------------------------------


def rows_of(lab: Lab) -> tuple[list["SupervisedRow"], list["SupervisedRow"], float]:
    """(training rows, each of which is read once; held-out rows; best possible held-out loss)."""
    from experiments.lab.knowledge_world import bayes_loss, build_world, draw

    world, sizes = build_world(lab.seed, vocab_size=MODEL["vocab_size"]), lab.sizes
    number = sizes.steps * sizes.batch
    train = draw(world, number, length=CONTEXT, purpose="train")
    held_out = draw(world, sizes.held_out_rows, length=CONTEXT, purpose="held out")
    best = bayes_loss(world, held_out[1], scored_from=SCORED_FROM)
    return _rows(*train), _rows(*held_out), best


def _rows(domain_R: Any, token_RS: Any) -> list["SupervisedRow"]:
    unscored = [-100] * SCORED_FROM
    return [
        {
            "input_ids": ids,
            "labels": unscored + ids[SCORED_FROM:],
            "sample_id": place,
            "domain": f"{domain:02d}",
        }
        for place, (domain, ids) in enumerate(
            zip(domain_R.tolist(), token_RS.tolist(), strict=True)
        )
    ]


def config_of(design: Design) -> "MoEConfig":
    from moe import MoEConfig

    return MoEConfig(**{**MODEL, **design.fields})


def beginning(design: Design, *, seed: int) -> "MoEForCausalLM":
    """The model of a design; what it shares with the dense one of the seed begins as there."""
    import torch

    from moe import MoEForCausalLM

    torch.manual_seed(seed)
    common = MoEForCausalLM(config_of(dense(family=""))).state_dict()
    model = MoEForCausalLM(config_of(design))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in common and ".mlp." not in name:
                tensor.copy_(common[name])
    return model


def balance_of(design: Design, model: "MoEForCausalLM") -> "BalancePolicy":
    from dataclasses import replace

    from sft.settings import BalancePolicy

    policy = BalancePolicy.of_model(model)
    if design.bias_update_rate:
        policy = replace(policy, bias_update_rate=design.bias_update_rate)
    return policy


def cost(model: "MoEForCausalLM", *, tokens: int) -> dict[str, float]:
    """Parameters, tokens and FLOPs of one training; attention scores are not in the FLOPs."""
    from moe.budget import budget

    counted = budget(model.config)
    config, layers = model.config, len(model.config.sparse_layers)
    router = 2 * config.hidden_size * config.num_experts * layers
    return {
        "total_parameters": counted.total,
        "active_parameters": counted.active,
        "forward_flops_per_token": counted.flops_per_token,
        "router_flop_share": router / counted.flops_per_token,
        "tokens_trained": tokens,
        "train_gflops": (1 + BACKWARD) * counted.flops_per_token * tokens / 1e9,
    }


# --- measuring -----------------------------------------------------------------------------------


def held_out_loss(
    model: "MoEForCausalLM", rows: Sequence["SupervisedRow"], *, batch: int
) -> tuple[tuple[float, float], "RoutingTrace | None"]:
    """((nats per token, tokens), where the tokens went in a model with a router).

    Batches are of the training's size, because a capacity is of a batch.
    """
    import torch

    from moe.record import has_router, record_routing
    from sft.loss import language_model_loss
    from sft.rows import SupervisedCollator

    was_training, collate = model.training, SupervisedCollator(PAD_ID)
    model.eval()
    total = count = 0.0
    with (
        torch.no_grad(),
        record_routing(model) if has_router(model) else nullcontext() as trace,
    ):
        for start in range(0, len(rows), batch):
            held = collate(rows[start : start + batch])
            logits = model(
                input_ids=held["input_ids"], sample_ids=held["sample_ids"], use_cache=False
            ).logits
            output = language_model_loss(logits, held["labels"])
            total, count = total + float(output.loss_sum), count + float(output.count)
    model.train(was_training)
    return (total / count, count), trace


def routing_of(
    trace: "RoutingTrace", rows: Sequence["SupervisedRow"], *, seed: int
) -> dict[str, Any]:
    """Per layer: how evenly experts are used, what was dropped, logit sizes, use by domain."""
    import torch

    from experiments.lab.specialisation import domain_use
    from moe.balance import z_loss
    from moe.stats import RouterStats

    stats = RouterStats.from_trace(trace)
    z_FL = torch.tensor([[float(z_loss(r)) for r in f.routings] for f in trace.forwards])
    found = {
        "load_entropy": stats.load_entropy_L.tolist(),
        "token_entropy": stats.token_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "dropped_share": stats.dropped_share_L.tolist(),
        "squared_logsumexp": z_FL.mean(dim=0).tolist(),
        "load_share": stats.relative_load_LE.tolist(),
    }
    if trace.num_experts > 1:
        found |= domain_use(trace, [row["domain"] for row in rows], seed=seed)
    return found


# --- jobs ----------------------------------------------------------------------------------------


def arm_job(lab: Lab, job: str, arm: str, design: Design) -> None:
    """Train and judge an arm; leaves `<arm>-s<seed>/judged.json`. Done work is not done again."""
    from experiments.lab.grid import report
    from experiments.lab.meter import metered
    from sft.checkpoint import live_tensors, write_checkpoint
    from sft.run import write_json_atomic

    if lab.is_judged(arm):
        return
    train, held_out, best = rows_of(lab)
    model = beginning(design, seed=lab.seed)
    with metered(lab.stage(arm) / "meter.json") as meter:
        _fit(lab, model, job=job, arm=arm, design=design, rows=(train, held_out), meter=meter)
    report(job, "judging", 0, 1)
    (loss, tokens), trace = held_out_loss(model, held_out, batch=lab.sizes.batch)
    write_checkpoint(
        lab.stage(arm) / "final",
        tensors={"model": live_tensors(model)},
        documents={},
        facts={"stage": arm, "seed": lab.seed},
    )
    found = {
        "metrics": judged_metrics(model, loss, best=best, tokens=len(train) * CONTEXT),
        "best_possible_loss": best,
        "held_out_tokens": tokens,
        "steps": lab.sizes.steps,
        "learning_rate": rate_of(lab, design),
        "routing": None if trace is None else routing_of(trace, held_out, seed=lab.seed),
        "timings": meter.facts(),
    }
    lab.arm_folder(arm).mkdir(parents=True, exist_ok=True)
    write_json_atomic(lab.arm_folder(arm) / "judged.json", found)


def judge_surgery(lab: Lab, arm: str, *, of: str, changed: Design) -> None:
    """The trained model of arm `of`, built as `changed` says, judged as the arm `arm`.

    Weights that `changed` has no place for are left out; all of its own must be there.
    """
    from sft.checkpoint import live_tensors, load_strictly, read_checkpoint
    from sft.run import write_json_atomic

    if lab.is_judged(arm):
        return
    _, held_out, best = rows_of(lab)
    held = read_checkpoint(lab.stage(of) / "final")
    model = beginning(changed, seed=lab.seed)
    own = live_tensors(model)
    kept = {name: tensor for name, tensor in held.tensors["model"].items() if name in own}
    load_strictly(model, kept, source=str(held.folder))
    loss, trace = held_out_loss(model, held_out, batch=lab.sizes.batch)
    training = lab.judged(of)
    metrics = judged_metrics(
        model, loss[0], best=best, tokens=training["metrics"]["tokens_trained"]
    )
    metrics["train_gflops"] = training["metrics"]["train_gflops"]  # as it was trained, not cut
    found = {
        **training,
        "metrics": metrics,
        "routing": None if trace is None else routing_of(trace, held_out, seed=lab.seed),
        "timings": {"seconds": None, "peak_mib": None},
    }
    lab.arm_folder(arm).mkdir(parents=True, exist_ok=True)
    write_json_atomic(lab.arm_folder(arm) / "judged.json", found)


def judged_metrics(
    model: "MoEForCausalLM", loss: float, *, best: float, tokens: int
) -> dict[str, float]:
    return {"held_out_loss": loss, "above_best": loss - best, **cost(model, tokens=tokens)}


def rate_of(lab: Lab, design: Design) -> float:
    if design.family not in lab.rates:
        raise UserError(
            f"{lab.experiment} has no learning rate for the family {design.family!r}, only for "
            f"{', '.join(lab.rates)}."
        )
    return lab.rates[design.family]


def _fit(
    lab: Lab,
    model: "MoEForCausalLM",
    *,
    job: str,
    arm: str,
    design: Design,
    rows: tuple[list["SupervisedRow"], list["SupervisedRow"]],
    meter: "Meter",
) -> None:
    from experiments.lab.grid import report
    from sft.checkpoint import newest_checkpoint
    from sft.rows import SupervisedCollator
    from sft.run import config_hash
    from sft.settings import TrainSettings
    from sft.tracking import Tracker
    from sft.trainer import SFTTrainer

    sizes, folder = lab.sizes, lab.stage(arm)
    newest, _ = newest_checkpoint(folder)
    done = int(newest.name.rpartition("-")[2]) if newest else 0

    def tell(step: int, total: int) -> None:
        meter.tick()
        report(job, arm, step, total)
        if step % sizes.curve_steps == 0 or step == total:
            _look(lab, model, rows[1], step=step, tracker=tracker)

    with Tracker(
        lab.arm_folder(arm),
        group=lab.experiment,
        job_type="train",
        name=f"{arm}-s{lab.seed}",
        config={},
        mirror="none",
        resume_step={"train": done, "held_out": done if newest else -1},
        console=None,
    ) as tracker:
        if newest is None:
            _look(lab, model, rows[1], step=0, tracker=tracker)
        SFTTrainer(
            model,
            TrainSettings(
                max_steps=sizes.steps,
                batch_size=sizes.batch,
                lr=rate_of(lab, design),
                lr_schedule="constant",
                weight_decay=0.0,
                seed=lab.seed,
                log_steps=10,
                save_steps=sizes.save_steps,
                keep_checkpoints=1,
            ),
            rows=rows[0],
            collator=SupervisedCollator(PAD_ID),
            folder=folder,
            stage="train",
            balance=balance_of(design, model),
            tracker=tracker,
            fingerprints={
                "world": config_hash({"seed": lab.seed, **asdict(sizes)}),
                "model": config_hash(config_of(design).to_dict()),
            },
            on_progress=tell,
        ).fit(resume=True)


def _look(
    lab: Lab,
    model: "MoEForCausalLM",
    held_out: Sequence["SupervisedRow"],
    *,
    step: int,
    tracker: "Tracker",
) -> None:
    rows = held_out[: lab.sizes.curve_rows]
    value, _ = held_out_loss(model, rows, batch=lab.sizes.batch)
    tracker.log({"eval/loss": value}, step=step, stage="held_out", split="held_out")
