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
from experiments.lab.runfiles import commit_of
from sft.run import config_hash

EXPERIMENT = "routing_drift"
QUESTION = (
    "How far do SFT, reward model, DPO and PPO move the routing of the same texts, layer by layer, "
    "and is it more than another seed moves?"
)
STAGES = {"sft": "base", "rm": "sft", "dpo": "sft", "ppo": "sft"}  # stage -> its start
METRIC = "routing_change"
MARGIN = 0.02  # a fiftieth of a token's experts is too little to matter
RULE = (
    "MOVED if the routing change of every stage from its start is above the change between its two "
    "trainings (95 % interval of paired seed differences above 0); NOT DISTINGUISHED if of none; "
    "else PARTLY"
)
MEASURED = "measured.json"


def gather(folder: Path, *, seeds: Sequence[int], identity: Mapping[str, Any]) -> dict[str, Any]:
    """summary.json from what the jobs of these seeds left; identity: what decides the result."""
    found = {
        stage: [
            json.loads((folder / f"{stage}-s{s}" / MEASURED).read_text(encoding="utf-8"))
            for s in seeds
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
        "schema": 1,
        "experiment": EXPERIMENT,
        "question": QUESTION,
        "status": "done",
        "config_hash": config_hash(identity),
        "commit": commit_of(folder),
        "seeds": list(seeds),
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
            "A reseeded arm is the change between two trainings of its stage from one start. The "
            "second SFT draws its examples anew, reward model and DPO split the same pairs anew, "
            "PPO draws its prompts anew against the same reward model: the four are no common "
            "measure of chance.",
            "In comparisons BETTER means further.",
            "token_kl is KL from the stage's start per token of those texts; kl_sequence from SFT "
            "per sampled answer. A reward model has no next token, so it has neither.",
        ],
        "timings": {
            name: {stage: [s["timings"][name] for s in own] for stage, own in found.items()}
            for name in ("seconds", "peak_mib")
        },
    }


def compare_all(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[dict[str, Any]]:
    """Each stage's change against the change between its two trainings; BETTER is further."""
    from experiments.lab.verdict import compare

    return [
        {
            "arm": stage,
            "against": f"{stage}_reseeded",
            "metric": METRIC,
            **asdict(
                compare(
                    arms[stage][METRIC],
                    arms[f"{stage}_reseeded"][METRIC],
                    margin=MARGIN,
                    higher_is_better=True,
                )
            ),
        }
        for stage in STAGES
    ]


def verdict_word(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The rule in `RULE`, applied to the computed words."""
    moved = [row["word"] == "BETTER" for row in comparisons]
    if all(moved):
        return "MOVED"
    return "PARTLY" if any(moved) else "NOT DISTINGUISHED"


def stage_sentence(
    stage: str, arms: Mapping[str, Mapping[str, Sequence[Any]]], comparisons: Sequence[Any]
) -> str:
    """What a stage did, in one sentence."""
    row = next(row for row in comparisons if row["arm"] == stage)
    change, between = (fmean(arms[arm][METRIC]) for arm in (stage, f"{stage}_reseeded"))
    kl = arms[stage]["token_kl"]
    spent = "" if None in kl else f", at {fmean(kl):.3f} nats of KL per token"
    interval = row["interval95"]
    told = f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "no interval"
    word = "MOVED" if row["word"] == "BETTER" else "not distinguished from its seed"
    return (
        f"{label(stage)} replaces {change:.1%} of the chosen experts of its start "
        f"({label(STAGES[stage])}){spent}; two trainings differ by {between:.1%} (difference "
        f"{told}): {word}."
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
            f"{sum(jsd) / count:.1e} bits, by chance {sum(chance) / count:.1e}; p <= 0.05 in "
            f"{sure} of {count} layers and seeds, {0.05 * count:.0f} by chance."
        )
    return told
