"""From what the jobs of `experiments.routing_drift` left to its summary, words and sentences.

The decision to know: everything is computed from the files of the jobs, by the rule stated here,
which was fixed before the reported seeds ran.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.lab.plots import label
from experiments.lab.question import Options
from experiments.lab.tables import show

EXPERIMENT = "routing_drift"
ASKS = (
    "How far do SFT, reward model, DPO and PPO move the routing of the same texts, layer by layer, "
    "and is it more than another seed moves?"
)
STAGES = {"sft": "base", "rm": "sft", "dpo": "sft", "ppo": "sft"}  # stage -> its start
# What the null of a stage, its second training from the same start, draws anew.
REDRAWN = {
    "sft": "examples and order",
    "rm": "split, order, fresh head",
    "dpo": "split and order of pairs",
    "ppo": "prompts and samples",
}
METRIC = "routing_change"
MARGIN = 0.02  # a fiftieth of a token's experts is too little to matter
RULE = (
    "MOVED if the routing change of every stage from its start is above the change between its two "
    "trainings (95 % interval of paired seed differences above 0); NOT DISTINGUISHED if of none; "
    "else PARTLY"
)
MOVED, NOT_DISTINGUISHED = "MOVED", "NOT DISTINGUISHED"
MEASURED = "measured.json"


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json, from what the jobs left."""
    found = {
        stage: [
            json.loads((folder / f"{stage}-s{s}" / MEASURED).read_text(encoding="utf-8"))
            for s in options.seeds
        ]
        for stage in STAGES
    }
    arms: dict[str, dict[str, list[Any]]] = {}
    for stage, own in found.items():
        names = ("from_base", "token_kl", "kl_sequence")
        arms[stage] = {METRIC: [s["change"] for s in own]}
        arms[stage] |= {name: [s[name] for s in own] for name in names}
        arms[f"{stage}_reseeded"] = {METRIC: [s["change_between_seeds"] for s in own]}
    comparisons = compare_all(arms)
    routing = {
        stage: {name: [s["routing"][name] for s in own] for name in own[0]["routing"]}
        for stage, own in found.items()
    }
    sentences = [stage_sentence(stage, arms, comparisons) for stage in STAGES]
    return {
        "arms": arms,
        "comparisons": comparisons,
        "routing": routing,
        "verdict": {
            "word": verdict_word(comparisons),
            "rule": RULE,
            "threshold": 0.0,
            "metric": METRIC,
        },
        "claims": [],
        "answers": [*sentences, *preferred_sentences(routing)],
        "notes": [
            "Routing change is the share of a token's chosen experts that are others, mean over "
            "tokens and layers, on the same held-out texts: answers as SFT writes them, and "
            "pretraining text.",
            "Twice is the change between two trainings of a stage from one start; its row says "
            "what the second draws anew (the reward model on the same pairs, PPO under the same "
            "reward model). Each stage is held against its own: the four are no common measure of "
            "chance, so stages are not compared with each other.",
            "token_kl is KL from the stage's start per token of those texts; kl_sequence from SFT "
            "per sampled answer. A reward model has no next token, so it has neither.",
        ],
        "timings": {
            name: {stage: [s["timings"][name] for s in own] for stage, own in found.items()}
            for name in ("seconds", "peak_mib")
        },
    }


def compare_all(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[dict[str, Any]]:
    """Each stage's change against the change between its two trainings: MOVED or not."""
    from experiments.lab.verdict import compare

    rows = []
    for stage in STAGES:
        against = f"{stage}_reseeded"
        found = compare(
            arms[stage][METRIC], arms[against][METRIC], margin=MARGIN, higher_is_better=True
        )
        further = found.interval95 is not None and found.interval95[0] > 0
        rows.append(
            {
                "arm": stage,
                "against": against,
                "against_is": REDRAWN[stage],
                "metric": METRIC,
                **asdict(found),
                "word": MOVED if further else NOT_DISTINGUISHED,
            }
        )
    return rows


def verdict_word(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The rule in `RULE`, applied to the computed words."""
    moved = [row["word"] == MOVED for row in comparisons]
    if all(moved):
        return MOVED
    return "PARTLY" if any(moved) else NOT_DISTINGUISHED


def stage_sentence(
    stage: str, arms: Mapping[str, Mapping[str, Sequence[Any]]], comparisons: Sequence[Any]
) -> str:
    """What a stage did beside its own null, in one sentence."""
    row = next(row for row in comparisons if row["arm"] == stage)
    change, between = (fmean(arms[arm][METRIC]) for arm in (stage, row["against"]))
    kl = arms[stage]["token_kl"]
    spent = "" if None in kl else f", at {show(fmean(kl))} nats of KL per token"
    interval = row["interval95"]
    told = f"[{interval[0]:+.2%}, {interval[1]:+.2%}]" if interval else "no interval"
    found = "MOVED the routing" if row["word"] == MOVED else f"is {NOT_DISTINGUISHED}"
    return (
        f"{label(stage)} {found}: it replaces {change:.2%} of the chosen experts of its start "
        f"({label(STAGES[stage])}){spent}; a second training ({REDRAWN[stage]} "
        f"drawn anew) is {between:.2%} away from it (difference {change - between:+.2%} {told})."
    )


def preferred_sentences(routing: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where chosen and rejected answers use other experts than chance gives, per stage."""
    told = []
    for stage, found in routing.items():
        sure = sum(p <= 0.05 for seed in found["chosen_rejected_p"] for p in seed)
        count = sum(len(seed) for seed in found["chosen_rejected_p"])
        jsd = [value for seed in found["chosen_rejected_jsd"] for value in seed]
        chance = [value for seed in found["chosen_rejected_jsd_by_chance"] for value in seed]
        told.append(
            f"Chosen against rejected answers under {label(stage)}: divergence of expert use "
            f"{show(sum(jsd) / count)} bits, by chance {show(sum(chance) / count)}; p <= 0.05 in "
            f"{sure} of {count} layers and seeds, {show(0.05 * count)} by chance."
        )
    return told
