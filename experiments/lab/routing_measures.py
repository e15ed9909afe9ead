"""What is asked of a trained router: repeats, domains, vocabulary, partners, saturation.

The decision to know: the measures and their chance levels are `moe`'s; here they are put side by
side per layer, all of the same held-out tokens, and reduced to what a verdict needs.

Shapes: L MoE layers, T tokens, E experts, K experts per token, P shufflings.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.lab.grid import Job, report, run_grid
from experiments.lab.knowledge_tuning import TRIED, TUNING_SEED, best_rate, is_at_an_edge
from experiments.lab.routing_text import (
    MARKS,
    METER,
    Prepared,
    TextLab,
    at_mark,
    held_out_loss,
    prepare,
    train_job,
)
from moe.choices import token_choices
from moe.coactivation import CoActivation
from moe.record import RoutingTrace
from moe.repeats import repeats
from moe.saturation import saturation
from moe.specialisation import (
    domain_divergence,
    row_counts,
    shuffled_divergence,
    vocabulary_divergence,
)
from moe.stats import RouterStats
from sft.run import write_json_atomic

HIGH = 0.99  # of the shufflings, that a divergence is to be above
ARMS = {"initial": 0.0, "trained": 1.0}  # the mark of the training that an arm is


def judge_job(lab: TextLab, job: str) -> None:
    """Judge the router before and after its training; leaves `<arm>-s<seed>/judged.json`."""
    text = prepare(lab)
    for arm, share in ARMS.items():
        if lab.is_judged(arm):
            continue
        report(job, f"judging {arm}", 0, 1)
        (loss, tokens), trace = held_out_loss(
            at_mark(lab, text, share), text.held_out, pad_id=text.pad_id
        )
        found: dict[str, Any] = {
            "metrics": {"held_out_loss": loss},
            "held_out_tokens": tokens,
            "routing": {**use(trace), **by_domain(trace, text, lab=lab)},
            "coactivation": coactivation(trace),
            "notes": text.notes,
            "timings": {"seconds": None, "peak_mib": None},
        }
        found["routing"] |= by_neighbour(trace, lab=lab) | by_token(trace, text, lab=lab)
        found["routing"] |= partners(trace)
        if arm == "trained":
            found["saturation"] = saturations(lab, text, final=trace)
            found["timings"] = json.loads((lab.stage / METER).read_text(encoding="utf-8"))
        lab.arm_folder(arm).mkdir(parents=True, exist_ok=True)
        write_json_atomic(lab.arm_folder(arm) / "judged.json", found)


def use(trace: RoutingTrace) -> dict[str, Any]:
    """Per layer, how evenly experts are used."""
    stats = RouterStats.from_trace(trace)
    return {
        "load_entropy": stats.load_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "load_share": stats.relative_load_LE.tolist(),
    }


def by_neighbour(trace: RoutingTrace, *, lab: TextLab) -> dict[str, Any]:
    """Per layer, how often the next token is served alike: by its first choice, by its first two.

    `_shuffled`: expected of the same tokens in any other order within their row.
    """
    chosen = token_choices(trace)
    found: dict[str, Any] = {}
    for choices, name in ((1, "repeat_first"), (2, "repeat_first_two")):
        held = repeats(
            chosen.expert_LTK,
            chosen.sequence_T,
            num_experts=chosen.num_experts,
            choices=choices,  # type: ignore[arg-type]
            permutations=lab.sizes.permutations,
            seed=lab.seed,
        )
        found |= {
            name: held.rate_L.tolist(),
            f"{name}_by_usage": held.usage_null_L.tolist(),
            f"{name}_shuffled": held.shuffle_null_L.tolist(),
            f"{name}_p": list(held.p_value),
        }
    return found


def by_domain(trace: RoutingTrace, text: Prepared, *, lab: TextLab) -> dict[str, Any]:
    """Per layer, divergence of expert use between domains in bits, and of whole rows shuffled.

    domain_jsd_high: the 99th percentile of the shufflings.
    """
    domains = [row["domain"] for row in text.held_out]
    names = sorted(set(domains))
    count_NLE = torch.cat([row_counts(forward) for forward in trace.forwards])
    labels_N = torch.tensor([names.index(domain) for domain in domains])
    found_L = domain_divergence(count_NLE, labels_N, num_domains=len(names))
    shuffled_PL = shuffled_divergence(
        count_NLE,
        labels_N,
        num_domains=len(names),
        permutations=lab.sizes.permutations,
        seed=lab.seed,
    )
    return {
        "domain_jsd": found_L.tolist(),
        "domain_jsd_by_chance": shuffled_PL.mean(dim=0).tolist(),
        "domain_jsd_high": high(shuffled_PL).tolist(),
    }


def by_token(trace: RoutingTrace, text: Prepared, *, lab: TextLab) -> dict[str, Any]:
    """Per layer, what a token's identity says of its experts in bits, and of shuffled tokens."""
    chosen = token_choices(trace)
    found = vocabulary_divergence(
        torch.tensor([token for row in text.held_out for token in row["input_ids"]]),
        chosen.expert_LTK,
        sequence_T=chosen.sequence_T,
        num_experts=chosen.num_experts,
        permutations=lab.sizes.permutations,
        seed=lab.seed,
    )
    return {
        "vocabulary_jsd": found.jsd_bits_L.tolist(),
        "vocabulary_jsd_by_chance": found.shuffled_PL.mean(dim=0).tolist(),
        "vocabulary_jsd_high": high(found.shuffled_PL).tolist(),
    }


def high(shuffled_PL: Tensor) -> Tensor:
    """The 99th percentile of the shufflings of each layer; between two of them the higher."""
    return torch.quantile(shuffled_PL.double(), HIGH, dim=0, interpolation="higher")


def coactivation(trace: RoutingTrace) -> dict[str, Any]:
    """P(j | i) of every pair, per layer, and what the loads alone give: (L, E, E) lists."""
    pairs = CoActivation.from_trace(trace)
    return {
        "conditional": pairs.conditional_LEE.tolist(),
        "by_usage": pairs.usage_null_LEE.tolist(),
        "uniform": pairs.uniform_null,
    }


def partners(trace: RoutingTrace) -> dict[str, Any]:
    """Per layer, the strongest P(j | i) of two experts, and what the loads alone give that pair."""
    pairs = CoActivation.from_trace(trace)
    experts = trace.num_experts
    off_EE = ~torch.eye(experts, dtype=torch.bool)
    strongest, by_usage = [], []
    for found_EE, null_EE in zip(pairs.conditional_LEE, pairs.usage_null_LEE, strict=True):
        place = int(found_EE[off_EE].argmax())
        strongest.append(float(found_EE[off_EE][place]))
        by_usage.append(float(null_EE[off_EE][place]))
    return {"strongest_partner": strongest, "strongest_partner_by_usage": by_usage}


def saturations(lab: TextLab, text: Prepared, *, final: RoutingTrace) -> dict[str, Any]:
    """At every mark, per layer: the share of a token's final experts that it has, and by usage."""
    shares, nulls = [], []
    for share in MARKS:
        model = at_mark(lab, text, share)
        _, trace = held_out_loss(model, text.held_out, pad_id=text.pad_id)
        found = saturation(trace, final)
        shares.append(found.share_L.tolist())
        nulls.append(found.usage_null_L.tolist())
    return {
        "marks": list(MARKS),
        "share": shares,
        "by_usage": nulls,
        "uniform": found.uniform_null,
    }


# --- the learning rate ---------------------------------------------------------------------------


def tune(folder: Path, *, experiment: str, scale: str, processes: int) -> dict[str, Any]:
    """Try the model at every rate by its held-out loss; leaves and returns `tuning.json`."""
    labs = {
        rate: TextLab(
            experiment=experiment,
            seed=TUNING_SEED,
            scale=scale,
            folder=folder / f"rate-{rate:g}",
            rate=rate,
        )
        for rate in TRIED
    }
    jobs = [
        Job(name=(name := f"rate {rate:g}"), function=train_job, arguments=(lab, name))
        for rate, lab in labs.items()
    ]
    run_grid(jobs, processes=processes)
    losses = {f"{rate:g}": _final_loss(lab) for rate, lab in labs.items()}
    found = {
        "seed": TUNING_SEED,
        "scale": scale,
        "held_out_loss": losses,
        "chosen": best_rate(losses),
        "at_an_edge": is_at_an_edge(losses),
    }
    write_json_atomic(folder / "tuning.json", found)
    return found


def _final_loss(lab: TextLab) -> float:
    text = prepare(lab)
    (loss, _), _ = held_out_loss(at_mark(lab, text, 1.0), text.held_out, pad_id=text.pad_id)
    return loss
