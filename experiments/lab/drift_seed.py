"""The trained stages of one seed, held against their starts and against their second trainings."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from experiments.lab.drift_measures import answer_use, change_L, preferred_use, token_kl
from experiments.lab.judging import measure_arm, record_texts
from experiments.lab.reseeded import reseeded
from experiments.lab.seed import Seed, load_policy
from experiments.lab.stages import pair_rows
from moe.record import RoutingTrace
from moe.stats import RouterStats, drift

KL_PROMPTS = 64


def measure_seed(seed: Seed, stages: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stage, what it did) for every stage of {stage: its start}."""
    traces: dict[str, RoutingTrace] = {}

    def trace_of(stage: str) -> RoutingTrace:
        if stage not in traces:
            traces[stage] = record_texts(seed, _model(seed, stage))
        return traces[stage]

    for place, (stage, start) in enumerate(stages.items()):
        seed.progress(f"measure {stage}", place, len(stages))
        second = record_texts(seed, _model(reseeded(seed, stage), stage))
        changed_L = change_L(trace_of(start), trace_of(stage))
        between_L = change_L(trace_of(stage), second)
        found = {
            "change": _mean(changed_L),
            "change_between_seeds": _mean(between_L),
            "from_base": _mean(change_L(trace_of("base"), trace_of(stage))),
            **_kl(seed, stage, start),
            "routing": {
                "change_from_start": changed_L,
                "change_between_seeds": between_L,
                "jsd_from_start": drift(trace_of(start), trace_of(stage)).jsd_bits_L.tolist(),
                **_expert_use(trace_of(stage)),
                **_preferred(seed, _model(seed, stage)),
            },
            "timings": {name: seed.facts(stage)[name] for name in ("seconds", "peak_mib")},
        }
        yield stage, found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _model(seed: Seed, stage: str) -> nn.Module:
    return seed.load("rm", seed.reward_model()) if stage == "rm" else load_policy(seed, stage)


def _kl(seed: Seed, stage: str, start: str) -> dict[str, float | None]:
    """KL per token of the fixed texts from the start, and per sampled answer from SFT."""
    if stage == "rm":
        return {"token_kl": None, "kl_sequence": None}
    rows = seed.world.routing_rows(seed.seed, seed.folder)
    pad_id = seed.text_path().pad_id
    models = load_policy(seed, stage), load_policy(seed, start)
    kl_sequence = None
    if stage != "sft":
        measured, _ = measure_arm(seed, stage, seed.eval_prompts(KL_PROMPTS))
        kl_sequence = measured.metrics["kl_sequence"]
    return {"token_kl": token_kl(*models, rows, pad_id=pad_id), "kl_sequence": kl_sequence}


def _expert_use(trace: RoutingTrace) -> dict[str, Any]:
    stats = RouterStats.from_trace(trace)
    return {
        "load_entropy": stats.load_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "load_share": stats.relative_load_LE.tolist(),
    }


def _preferred(seed: Seed, model: nn.Module) -> dict[str, Any]:
    """Expert use on the held-out pairs' chosen answers against the rejected ones."""
    _, pairs = pair_rows(seed)
    pad_id = seed.text_path().pad_id
    chosen, rejected = (
        answer_use(model, pairs, side, pad_id=pad_id) for side in ("chosen", "rejected")
    )
    return preferred_use(chosen, rejected, seed=seed.seed)
