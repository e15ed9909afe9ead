"""From what the jobs of a comparison left to its summary: arms, words, claims, routing, costs.

The decision to know: nothing here trains or judges; the summary can be computed again from the
files at any time, and every word in it follows from per-seed values by a rule stated here.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.lab.compare_terms import (
    EXPERIMENT,
    EXTRA_METRICS,
    METHODS,
    QUESTION,
    RULE,
    STAGES,
    WORLD_METRICS,
    arms_of,
)
from experiments.lab.degenerate import RULE as DEGENERATE_RULE
from experiments.lab.degenerate import degenerate
from experiments.lab.evaluation import win_rate
from experiments.lab.plots import label
from experiments.lab.runfiles import commit_of
from experiments.lab.specialisation import specialisation_sentence
from experiments.lab.verdict import compare, published_verdict
from experiments.lab.worlds import World
from sft.run import config_hash


def _read(folder: Path, arm: str, seed: int, name: str) -> dict[str, Any]:
    path = folder / f"{arm}-s{seed}" / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def gather(
    world: World, folder: Path, *, seeds: Sequence[int], status: str, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """summary.json from what the jobs of these seeds left; identity: what decides the result."""
    metric_names = (*WORLD_METRICS[world.name], *EXTRA_METRICS)
    arms: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms_of(world)}
    for seed in seeds:
        sft = _read(folder, "sft", seed, "judged.json")
        for arm in arms:
            judged = _read(folder, arm, seed, "judged.json")
            metrics = {**judged["metrics"], "win_rate": win_rate(judged["gold"], sft["gold"])}
            for name in metric_names:
                arms[arm].setdefault(name, []).append(metrics[name])
    comparisons = _comparisons(arms, WORLD_METRICS[world.name])
    routing = _routing(folder, seeds)
    own = _of_world(world, folder, seeds, arms=arms, routing=routing)
    return {
        "schema": 1,
        "experiment": EXPERIMENT,
        "question": QUESTION,
        "status": status,
        "config_hash": config_hash(identity),
        "commit": commit_of(folder),
        "seeds": list(seeds),
        "arms": arms,
        "comparisons": comparisons,
        "routing": routing,
        "frontier": {
            arm: [_read(folder, arm, s, "judged.json")["frontier"] for s in seeds]
            for arm in ("dpo", "ppo")
        },
        "reward_model": _reward_models(folder, seeds),
        "verdict": {"word": verdict_word(comparisons), "rule": RULE, "threshold": 0.0},
        "claims": _claims(arms),
        **own,
        "notes": [
            *_notes(world, folder, seeds, arms=arms),
            *([*own["world"]["sentences"], own["world"]["degenerate_rule"] + "."] if own else ()),
        ],
        "timings": _timings(folder, seeds, arms=arms),
    }


def _comparisons(
    arms: Mapping[str, Mapping[str, list[float]]], metrics: Mapping[str, tuple[bool, float]]
) -> list[dict[str, Any]]:
    found = []
    for arm in arms:
        if arm == "sft":
            continue
        for metric, (higher_is_better, margin) in metrics.items():
            result = compare(
                arms[arm][metric],
                arms["sft"][metric],
                margin=margin,
                higher_is_better=higher_is_better,
            )
            found.append({"arm": arm, "against": "sft", "metric": metric, **asdict(result)})
    return found


def verdict_word(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The rule in `RULE`, applied to the computed words."""
    words = [c["word"] for c in comparisons if c["metric"] == "gold_reward" and c["arm"] in METHODS]
    if words and all(word == "BETTER" for word in words):
        return "REPRODUCED"
    return "NOT REPRODUCED" if "WORSE" in words else "INCONCLUSIVE"


def _claims(arms: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    claims = []
    for arm in METHODS:
        wins = arms[arm]["win_rate"]
        claims.append(
            {
                "claim": f"{label(arm)} beats SFT: win rate on held-out prompts (at least 60 %)",
                "published": "RLHF over its baselines: 71 to 85 % (Ouyang et al. 2022)",
                "ours": wins,
                "verdict": published_verdict(
                    [w - 0.5 for w in wins], published_sign=1, threshold=0.1
                ),
            }
        )
    gaps = [
        d - p for d, p in zip(arms["dpo"]["kl_sequence"], arms["ppo"]["kl_sequence"], strict=True)
    ]
    claims.append(
        {
            "claim": "DPO moves the model further than PPO (KL per sequence, threshold 0.5 nats)",
            "published": "a handbook's statement, not a published finding; both share one optimum",
            "ours": gaps,
            "verdict": published_verdict(gaps, published_sign=1, threshold=0.5),
        }
    )
    return claims


def _routing(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, list[Any]]]:
    """stage -> metric -> [per seed] of the recorded routing; empty for a model without experts."""
    routing: dict[str, dict[str, list[Any]]] = {}
    if not _stage_facts(folder, seeds[0], "base")["routed"]:
        return routing
    for stage in STAGES:
        for seed in seeds:
            for name, value in _read(folder, stage, seed, "routing.json").items():
                routing.setdefault(stage, {}).setdefault(name, []).append(value)
    return routing


def _reward_models(folder: Path, seeds: Sequence[int]) -> dict[str, list[Any]]:
    facts = [_stage_facts(folder, s, "rm") for s in seeds]
    pairs = [_pairs(folder, s) for s in seeds]
    return {
        "accuracy": [f["accuracy"] for f in facts],
        "accuracy_interval95": [f["accuracy_interval95"] for f in facts],
        "num_val_pairs": [f["num_val_pairs"] for f in facts],
        "label_accuracy": [p["label_accuracy"] for p in pairs],
    }


def _stage_facts(folder: Path, seed: int, stage: str) -> dict[str, Any]:
    path = folder / "stages" / f"s{seed}" / stage / "final" / "facts.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def _pairs(folder: Path, seed: int) -> dict[str, Any]:
    path = folder / "stages" / f"s{seed}" / "pairs.json"
    pairs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return pairs


def _of_world(
    world: World,
    folder: Path,
    seeds: Sequence[int],
    *,
    arms: Mapping[str, Mapping[str, list[float]]],
    routing: dict[str, Any],
) -> dict[str, Any]:
    """What a world with a given model tells beside the rest; nothing in a world without one."""
    given = world.facts()
    if not given:
        return {}
    losses = [_stage_facts(folder, seed, "sft")["held_out_loss"] for seed in seeds]
    shares = [_pairs(folder, seed)["ended_share"] for seed in seeds]
    before, after = ([loss[side] for loss in losses] for side in ("before", "after"))
    penalties = [world.missing_eos_penalty(share) for share in shares]
    sentences = [
        *world.sentences(before=before, after=after, ended=shares),
        *filter(None, [specialisation_sentence(routing, stage="sft", name="SFT")]),
    ]
    if not routing:
        sentences.append("The model has no experts, so there is no routing to tell.")
    return {
        "degenerate": degenerate(arms, METHODS, seeds=seeds),
        "world": {
            **given,
            "held_out_sft_loss_before": before,
            "held_out_sft_loss_after": after,
            "sft_ended_share": shares,
            "missing_eos_penalty": penalties,
            "degenerate_rule": DEGENERATE_RULE,
            "sentences": sentences,
        },
    }


def _timings(
    folder: Path, seeds: Sequence[int], *, arms: Collection[str]
) -> dict[str, dict[str, list[Any]]]:
    """Seconds and peak memory per stage and seed; `judge` is the evaluation of trained arms."""
    timings: dict[str, dict[str, list[Any]]] = {"seconds": {}, "peak_mib": {}}
    for seed in seeds:
        costs: dict[str, Mapping[str, Any]] = {}
        for stage, name in (("pairs", "pairs.json"), ("rm", "rm/final/facts.json")):
            path = folder / "stages" / f"s{seed}" / name
            costs[stage] = json.loads(path.read_text(encoding="utf-8"))
        judges = []
        for arm in arms:
            costs[arm] = _read(folder, arm, seed, "judged.json")["timings"]
            if arm in STAGES:
                judges.append(costs[arm]["judge"])
        peaks = [judge["peak_mib"] for judge in judges if judge["peak_mib"] is not None]
        costs["judge"] = {
            "seconds": sum(judge["seconds"] for judge in judges),
            "peak_mib": max(peaks, default=None),
        }
        for stage, cost in costs.items():
            for name, table in timings.items():
                table.setdefault(stage, []).append(cost[name])
    return timings


def _notes(
    world: World,
    folder: Path,
    seeds: Sequence[int],
    *,
    arms: Mapping[str, Mapping[str, list[float]]],
) -> list[str]:
    notes = [
        "Peak memory is the resident set of the worker process during the stage, with the about "
        "500 MiB that its libraries take; seconds are those of all starts of a stage.",
        "The KL of best-of-n is the bound ln n - (n - 1) / n, not a sample.",
    ]
    if "few_shot" in arms:
        notes.append(
            "Few-shot is the base model with worked examples in its prompt; its proxy reward and "
            "KL read the same answer behind the plain prompt."
        )
    notes += world.notes
    for seed in seeds:
        notes += _stage_facts(folder, seed, "base")["notes"]
    sft_perplexity = arms["sft"]["reference_perplexity"]
    for arm in METHODS:
        ratios = [
            a / b for a, b in zip(arms[arm]["reference_perplexity"], sft_perplexity, strict=True)
        ]
        if max(ratios) > 1.5:
            notes.append(
                f"{arm}: perplexity under the SFT policy rises to {max(ratios):.2f} times SFT's "
                "own in the worst seed: its text has left the reference's."
            )
    notes.append(f"Best-of-n draws n = {world.scale.best_of_n.n} completions per prompt.")
    return sorted(set(notes), key=notes.index)


def write_samples(world: World, folder: Path, seeds: Sequence[int], *, count: int = 12) -> None:
    """The same held-out prompts before (SFT) and after, per arm and seed."""
    for seed in seeds:
        sft = _read(folder, "sft", seed, "judged.json")
        for arm in arms_of(world):
            judged = _read(folder, arm, seed, "judged.json")
            prompts = world.held_out_prompts(len(judged["texts"]))
            rows = [
                {
                    "prompt": prompts[i],
                    "before": sft["texts"][i],
                    "after": judged["texts"][i],
                    "gold_before": sft["gold"][i],
                    "gold_after": judged["gold"][i],
                }
                for i in range(min(count, len(prompts)))
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path = folder / f"{arm}-s{seed}" / "samples.jsonl"
            path.write_text(text, encoding="utf-8")
