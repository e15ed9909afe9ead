"""From the files of a run on a preference file to `summary.json`: arms, differences, claims, words.

The decision to know: seeds split one file, so their held-out sides overlap and their differences
are less independent than Student's t takes them for. Words follow the interval over seeds, as
everywhere in the lab; beside it stands the wider one of Nadeau and Bengio, and a sentence says
where the two disagree.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.lab.pairs_config import PairsConfig
from experiments.lab.runfiles import commit_of
from experiments.lab.verdict import MIN_PAIRS, compare, published_verdict, t_quantile
from sft.run import config_hash

METRIC = "accuracy"
# Shares of pairs: half of them is what a coin gets, one in a hundred is too little to matter.
MARGIN = 0.01
CHANCE = 0.5
RULES = ("longer_wins", "length_rule", "bag_of_words")
COMPARED = (
    ("rm", "chance"),
    *(("rm", rule) for rule in reversed(RULES)),
    ("dpo", "chance"),
)
QUESTION = (
    "Does a reward model, and does DPO, learn something from this preference file that holds on "
    "prompts it has not seen, more than answer length and words alone tell?"
)
RULE = (
    "REPRODUCED if the reward model is BETTER than chance, longer_wins, length_rule and "
    "bag_of_words in held-out accuracy (95 % interval of paired seed differences above 0); NOT "
    "REPRODUCED if it is WORSE than any; else INCONCLUSIVE"
)
LEAST_GAIN = 0.02  # over chance: the share of pairs at which a claim counts as reproduced
RM_PUBLISHED = (
    "0.63 to 0.69 on pairs of summaries by models of 1B to 6.9B parameters (Huang et al. 2024); "
    "none found for a model of this size on these pairs"
)


def gather(
    config: PairsConfig, folder: Path, *, seeds: Sequence[int], status: str
) -> dict[str, Any]:
    """summary.json from what the jobs of these seeds left."""
    stages = [stage for stage in ("sft", "rm", "dpo") if stage != "sft" or config.sft]
    facts = {stage: [_facts(folder, seed, stage) for seed in seeds] for stage in stages}
    splits = [_left(folder, seed, "split.json") for seed in seeds]
    rules = [_left(folder, seed, "baselines.json") for seed in seeds]
    arms = arms_of(facts, rules)
    comparisons = compare_arms(arms, splits=splits)
    sentences = [
        *_sentences(arms, splits, facts=facts),
        *overlap_sentences(comparisons),
    ]
    return {
        "schema": 1,
        "experiment": "compare",
        "question": QUESTION,
        "status": status,
        "config_hash": config_hash(config.identity()),
        "commit": commit_of(folder),
        "seeds": list(seeds),
        "arms": arms,
        "comparisons": comparisons,
        "routing": _routing(folder, seeds, stages=["base", *stages]),
        "reward_model": _reward_models(facts["rm"], splits),
        "verdict": {
            "word": verdict_word(comparisons),
            "rule": RULE,
            "threshold": 0.0,
            "metric": METRIC,
        },
        "claims": claims_of(arms),
        "world": {
            "name": "pairs",
            "data": str(config.data),
            "model": str(config.model),
            "upcycle": config.upcycle,
            "max_length": config.sizes.max_length,
            "fingerprints": splits[0]["fingerprints"],
            "num_train_pairs": [split["num_train_pairs"] for split in splits],
            "num_held_out_pairs": [split["num_held_out_pairs"] for split in splits],
            **_losses(facts),
            "sentences": sentences,
        },
        "notes": [*_notes(config), *splits[0]["notes"], *sentences],
        "timings": _timings(facts),
    }


def _facts(folder: Path, seed: int, stage: str) -> dict[str, Any]:
    return _left(folder, seed, f"{stage}/final/facts.json")


def _left(folder: Path, seed: int, name: str) -> dict[str, Any]:
    path = folder / "stages" / f"s{seed}" / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def arms_of(
    facts: Mapping[str, Sequence[Mapping[str, Any]]], rules: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    """arm -> metric -> [per seed]; the rules without a model have accuracy and its interval."""
    arms = {
        stage: {name: [seed["metrics"][name] for seed in facts[stage]] for name in first["metrics"]}
        for stage in ("rm", "dpo")
        if (first := facts[stage][0])
    }
    for rule in RULES:
        arms[rule] = {
            METRIC: [seed[rule]["accuracy"] for seed in rules],
            "wilson_low": [seed[rule]["low"] for seed in rules],
            "wilson_high": [seed[rule]["high"] for seed in rules],
        }
    arms["chance"] = {METRIC: [CHANCE] * len(rules)}
    return arms


def compare_arms(
    arms: Mapping[str, Mapping[str, list[float]]], *, splits: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The differences that were asked for, each with its word."""
    ratio = fmean(split["num_held_out_pairs"] / split["num_train_pairs"] for split in splits)
    found = []
    for arm, against in COMPARED:
        result = compare(
            arms[arm][METRIC], arms[against][METRIC], margin=MARGIN, higher_is_better=True
        )
        present = [gap for gap in result.per_seed if gap is not None]
        found.append(
            {
                "arm": arm,
                "against": against,
                "metric": METRIC,
                **asdict(result),
                "interval95_overlap": overlap_interval(present, held_out_per_train=ratio),
            }
        )
    return found


def overlap_interval(
    differences: Sequence[float], *, held_out_per_train: float
) -> tuple[float, float] | None:
    """95 % interval of the mean when every difference is of another split of the same file.

    Nadeau and Bengio 2003 (Inference for the generalization error, the corrected resampled t): the
    variance of the mean is s^2 (1 / n + held-out / training pairs) in place of s^2 / n. None below
    three splits.
    """
    n = len(differences)
    if n < MIN_PAIRS:
        return None
    spread = stdev(differences) * math.sqrt(1 / n + held_out_per_train)
    half = t_quantile(0.975, n - 1) * spread
    return fmean(differences) - half, fmean(differences) + half


def verdict_word(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The rule in `RULE`, applied to the computed words."""
    words = [c["word"] for c in comparisons if c["arm"] == "rm"]
    if words and all(word == "BETTER" for word in words):
        return "REPRODUCED"
    return "NOT REPRODUCED" if "WORSE" in words else "INCONCLUSIVE"


def claims_of(arms: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Claims beside ours, each judged by its differences and a threshold fixed before the run."""

    def over(arm: str, against: str) -> list[float]:
        pairs = zip(arms[arm][METRIC], arms[against][METRIC], strict=True)
        return [ours - theirs for ours, theirs in pairs]

    rows = [
        (
            f"A reward model learns what holds on unseen prompts: over 0.5 by {LEAST_GAIN}",
            RM_PUBLISHED,
            "rm",
            "chance",
            LEAST_GAIN,
        ),
        (
            "A reward model learns more than a direction of length",
            "not published for this file",
            "rm",
            "length_rule",
            0.0,
        ),
        (
            "A reward model learns more than a bag of words",
            "not published for this file",
            "rm",
            "bag_of_words",
            0.0,
        ),
        (
            f"DPO's implicit reward holds on unseen prompts: over 0.5 by {LEAST_GAIN}",
            "no accuracy published; DPO's answers are preferred on HH (Rafailov et al. 2023)",
            "dpo",
            "chance",
            LEAST_GAIN,
        ),
    ]
    return [
        {
            "claim": claim,
            "published": published,
            "ours": arms[arm][METRIC],
            "verdict": published_verdict(over(arm, against), published_sign=1, threshold=threshold),
        }
        for claim, published, arm, against, threshold in rows
    ]


def overlap_sentences(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which words would be UNRESOLVED if the overlap of the held-out sides were counted in."""
    found = []
    for row in comparisons:
        wide = row["interval95_overlap"]
        if row["word"] in ("BETTER", "WORSE") and wide and wide[0] <= 0 <= wide[1]:
            found.append(
                f"{row['arm']} against {row['against']} is {row['word']} over seeds, but the seeds "
                f"share one file: with that counted in, the interval is [{wide[0]:.3f}, "
                f"{wide[1]:.3f}] and holds 0."
            )
    return found


def _sentences(
    arms: Mapping[str, Mapping[str, list[float]]],
    splits: Sequence[Mapping[str, Any]],
    *,
    facts: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    def listed(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    rm, dpo = arms["rm"], arms["dpo"]
    pairs = ", ".join(str(split["num_held_out_pairs"]) for split in splits)
    sentences = [
        f"Held-out accuracy on {pairs} pairs: reward model {listed(rm[METRIC])}; DPO's implicit "
        f"reward {listed(dpo[METRIC])}; longer wins {listed(arms['longer_wins'][METRIC])}; "
        f"direction of length {listed(arms['length_rule'][METRIC])}; bag of words "
        f"{listed(arms['bag_of_words'][METRIC])}.",
        f"On the training side: reward model {listed(rm['train_accuracy'])}, DPO "
        f"{listed(dpo['train_accuracy'])}.",
        f"DPO's held-out margin goes from {listed(dpo['implicit_margin_before'])} to "
        f"{listed(dpo['implicit_margin'])}.",
    ]
    if "sft" in facts:
        falls = [
            seed["held_out_loss"]["before"] - seed["held_out_loss"]["after"]
            for seed in facts["sft"]
        ]
        sentences.append(
            f"SFT's loss on held-out chosen answers falls by {listed(falls)} nats per token."
        )
    return sentences


def _notes(config: PairsConfig) -> list[str]:
    start = "SFT on the chosen answers" if config.sft else "the model as it is"
    return [
        f"Reward model and DPO start from {start}; nothing was chosen by the held-out side.",
        "Accuracy is of pairs, ties half: before training DPO's policy is its reference, every "
        "pair a tie. The intervals per seed (wilson_low, wilson_high) are Wilson's, 95 %.",
        "The rules without a model read the whole answers as text, the models what the length "
        "limit leaves; length_rule takes the direction of length that the training pairs show.",
        "Seeds split one file anew, so their held-out sides overlap and an interval over seeds is "
        "narrower than it should be; interval95_overlap in summary.json counts the overlap in.",
    ]


def _losses(facts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    return {
        f"held_out_sft_loss_{side}": [seed["held_out_loss"][side] for seed in facts["sft"]]
        for side in ("before", "after")
        if "sft" in facts
    }


def _reward_models(
    facts: Sequence[Mapping[str, Any]], splits: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """What the report's section on the reward model shows, seed by seed."""
    metrics, reports = [seed["metrics"] for seed in facts], [seed["report"] for seed in facts]
    same_tokens = [report["baselines"]["bag_of_words"] for report in reports]
    calibrations = [report["calibration"] for report in reports]
    by_length = sorted({name for report in reports for name in report["by_length"]})
    return {
        "accuracy": [m["accuracy"] for m in metrics],
        "accuracy_interval95": [[m["wilson_low"], m["wilson_high"]] for m in metrics],
        "accuracy_before": [m["accuracy_before"] for m in metrics],
        "train_accuracy": [m["train_accuracy"] for m in metrics],
        "num_held_out_pairs": [split["num_held_out_pairs"] for split in splits],
        "bag_of_the_same_tokens": [found["accuracy"]["accuracy"] for found in same_tokens],
        "calibration_error": [found["expected_error"] for found in calibrations],
        "calibration_error_by_chance": [found["chance_error"] for found in calibrations],
        **{
            f"accuracy_{name}": [
                report["by_length"][name]["accuracy"] if name in report["by_length"] else None
                for report in reports
            ]
            for name in by_length
        },
    }


def _routing(folder: Path, seeds: Sequence[int], *, stages: Sequence[str]) -> dict[str, Any]:
    """stage -> metric -> [per seed]; empty for a model without experts."""
    routing: dict[str, dict[str, list[Any]]] = {}
    for stage in stages:
        for seed in seeds:
            path = folder / f"{stage}-s{seed}" / "routing.json"
            if path.is_file():
                for name, value in json.loads(path.read_text(encoding="utf-8")).items():
                    routing.setdefault(stage, {}).setdefault(name, []).append(value)
    return routing


def _timings(facts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[Any]]]:
    return {
        name: {stage: [seed[name] for seed in found] for stage, found in facts.items()}
        for name in ("seconds", "peak_mib")
    }
