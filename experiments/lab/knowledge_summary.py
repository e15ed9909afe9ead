"""What the arms of an experiment in the world `knowledge` left, as metrics, routing and sentences.

The decision to know: routing is told per layer, and as means over layers beside an arm's loss;
where an arm has no router, or no capacity, there is no number rather than a zero.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.lab.grid import Job
from experiments.lab.knowledge_arms import BACKWARD, Design, Lab, arm_job
from experiments.lab.knowledge_world import entropy_floor

Arms = Mapping[str, Mapping[str, Sequence[float | None]]]
Judged = Mapping[str, Sequence[Mapping[str, Any]]]
ROUTING = (
    *("max_vio", "max_vio_floor", "load_entropy", "dead_experts", "dropped_share"),
    *("squared_logsumexp", "domain_jsd", "domain_jsd_by_chance"),
)


def arm_jobs(designs: Mapping[str, Design], labs: Sequence[Lab]) -> list[Job]:
    """A job for every arm and seed, the wide ones first, so that none runs alone at the end."""
    jobs = []
    for lab in labs:
        for arm, design in sorted(designs.items(), key=lambda item: -weight_of(item[1])):
            name = f"s{lab.seed} {arm}"
            jobs.append(
                Job(
                    name=name,
                    function=arm_job,
                    arguments=(lab, name, arm, design),
                    weight=weight_of(design),
                )
            )
    return jobs


def weight_of(design: Design) -> float:
    """About how long a design trains: width per token, and the number of products it is cut in."""
    fields = design.fields
    if "num_experts" not in fields:
        return 1.0 + fields["intermediate_size"] / 512
    width = fields["num_experts_per_tok"] * fields["moe_intermediate_size"]
    return 1.2 + width / 512 + fields["num_experts"] / 64


def read_arms(designs: Mapping[str, Design], labs: Sequence[Lab]) -> dict[str, list[Any]]:
    """Arm -> what its judge left, per seed."""
    return {arm: [lab.judged(arm) for lab in labs] for arm in designs}


def arm_metrics(judged: Judged) -> dict[str, dict[str, list[float | None]]]:
    """Arm -> metric -> per seed."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for arm, seeds in judged.items():
        metrics = found.setdefault(arm, {})
        for held in seeds:
            routing = held["routing"] or {}
            means = {name: fmean(routing[name]) if name in routing else None for name in ROUTING}
            for name, value in {**held["metrics"], **means}.items():
                metrics.setdefault(name, []).append(value)
    return found


def routing_by_arm(judged: Judged) -> dict[str, dict[str, list[Any]]]:
    """Arm with a router -> measure -> per seed, per layer."""
    return {
        arm: {key: [held["routing"][key] for held in seeds] for key in seeds[0]["routing"]}
        for arm, seeds in judged.items()
        if seeds[0]["routing"]
    }


def timings(judged: Judged) -> dict[str, dict[str, list[Any]]]:
    return {
        name: {arm: [held["timings"][name] for held in seeds] for arm, seeds in judged.items()}
        for name in ("seconds", "peak_mib")
    }


def rates_of(judged: Judged) -> dict[str, float]:
    return {arm: seeds[0]["learning_rate"] for arm, seeds in judged.items()}


def gathered(judged: Judged) -> dict[str, Any]:
    """The parts of a summary that the experiments of this world share."""
    return {
        "routing": routing_by_arm(judged),
        "learning_rates": rates_of(judged),
        "best_possible_loss": [held["best_possible_loss"] for held in next(iter(judged.values()))],
        "timings": timings(judged),
    }


def notes(judged: Judged) -> list[str]:
    """What a reader must know beside the tables."""
    first = {arm: seeds[0] for arm, seeds in judged.items()}
    some = next(iter(first.values()))
    rates = ", ".join(f"{arm} {held['learning_rate']:g}" for arm, held in first.items())
    best = fmean(held["best_possible_loss"] for held in next(iter(judged.values())))
    return [
        f"Every arm trains {some['steps']} steps on {some['metrics']['tokens_trained']:,} tokens, "
        "each row once; held-out rows come from the same tables.",
        f"Who knows tables and domain has {entropy_floor():.4f} nats per token; who must find the "
        f"domain out has {best:.4f} on these held-out rows (above_best counts from there).",
        f"Learning rates, constant: {rates}.",
        f"Training FLOPs are {1 + BACKWARD} times the forward FLOPs per token; attention scores "
        "are not in them. Seconds are of one CPU thread, with the looks at held-out rows.",
        "Shares and divergences of experts are of held-out rows; a capacity holds there as in "
        "training, for batches of the same size.",
    ]


def steps_to(curve: Sequence[tuple[int, float]], level: float) -> float | None:
    """The step at which a curve first reaches a level, by a line between looks; None if never."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= level:
            if before is None:
                return float(step)
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return None


def labs_of(
    experiment: str,
    *,
    seeds: Sequence[int],
    scale: str,
    folder: Path,
    rates: Mapping[str, float],
) -> list[Lab]:
    return [
        Lab(experiment=experiment, seed=seed, scale=scale, folder=folder, rates=rates)
        for seed in seeds
    ]
