"""Is a dense model that is made sparse better than going on with it, or than starting anew?

Question: a dense model was trained on D0 tokens. Is the held-out loss of the mixture of experts
made of it, after D1 more tokens, lower than (a) that of the dense model after the same D1 tokens,
and (b) that of a mixture of experts trained from scratch?

Published: upcycled models beat the dense model that is trained on, and one from scratch catches up
only after much more compute (Komatsuzaki et al. 2022); with enough of it, it overtakes (Muennighoff
et al. 2024); drawing part of each expert anew is better than plain copies in the long run (Nakamura
et al. 2025).

Arms: dense_continued; upcycled_copy, upcycled_noise and upcycled_drop (4 experts, 2 per token),
upcycled_granular (8 of half the width, 2 per token: the one upcycled arm with the dense model's
FLOPs per token); moe_scratch_d1 and moe_scratch, of upcycled_copy's shape. What goes on from the
dense model has D0 + D1 tokens behind its weights, D1 of them its own. From scratch there is one arm
at equal additional tokens (D1, the same rows in the same order) and one at equal total tokens
(D0 + D1, the same rows). No row comes twice. Two experts per token cost more FLOPs than one dense
FFN, so equal tokens are not equal compute: the run counts both. Every training is one warm-up and
cosine with a fresh optimizer, so moe_scratch has one cosine where the others have two; each family
(start, dense, upcycled, scratch) had the same four learning rates on a seed that is not reported,
the upcycled ones tried on upcycled_copy alone and those from scratch on moe_scratch.

Cost: about 12 minutes on 2 cores for 5 seeds.

Verdict rule, fixed before the run: REPRODUCED if upcycled_copy is BETTER in held-out loss than both
dense_continued and moe_scratch_d1 (95 % interval of the paired seed differences below 0), NOT
REPRODUCED if it is WORSE than either, else INCONCLUSIVE. Differences within +-0.01 nats per token
do not matter.

    python -m experiments.upcycling --seeds 0 1 2 [--scale laptop|debug] [--resume RUN] [--tune]
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.lab.question import Options, Question, answer, command
from sft.flags import main_guard

EXPERIMENT = "upcycling"
ASKS = (
    "Is an upcycled mixture of experts better, at equal tokens, than the dense model trained on "
    "and than a mixture of experts from scratch?"
)
METRIC = "held_out_loss"
MARGIN = 0.01  # nats per token; fixed before the reported seeds ran
RULE = (
    "REPRODUCED if upcycled_copy is BETTER in held_out_loss than both dense_continued and "
    "moe_scratch_d1 (95 % interval of paired seed differences below 0); NOT REPRODUCED if WORSE "
    "than either; else INCONCLUSIVE"
)
JUDGED_AGAINST = ("dense_continued", "moe_scratch_d1")
TRIED = (1.5e-3, 3e-3, 6e-3, 1.2e-2)  # learning rates, by --tune
UPCYCLED = ("upcycled_copy", "upcycled_drop", "upcycled_granular", "upcycled_noise")
# (arm, against): the dense model first, because the tables' words are those of the commonest.
PAIRS = (
    *((arm, "dense_continued") for arm in (UPCYCLED[0], "moe_scratch", *UPCYCLED[1:])),
    ("moe_scratch_d1", "dense_continued"),
    *((arm, "moe_scratch_d1") for arm in UPCYCLED),
    *((arm, "moe_scratch") for arm in UPCYCLED),
    *((arm, "upcycled_copy") for arm in UPCYCLED[1:]),
)


def _lab(options: Options, folder: Path, seed: int) -> Any:
    from experiments.lab.upcycling_arms import RATES
    from experiments.lab.upcycling_text import Lab

    return Lab(seed=seed, scale=options.scale, folder=folder, rates=RATES)


def plan(options: Options, folder: Path) -> list[Any]:
    """The grid of a run: per seed the text, the dense start, and the arms after what they need."""
    from experiments.lab.grid import Job
    from experiments.lab.upcycling_arms import ARMS, arm_job, start_job, text_job

    jobs = []
    for seed in options.seeds:
        lab = _lab(options, folder, seed)
        text, start = f"s{seed} text", f"s{seed} start"
        jobs.append(Job(name=text, function=text_job, arguments=(lab, text), weight=0.3))
        jobs.append(Job(name=start, function=start_job, arguments=(lab, start), after=(text,)))
        # The longest first, so that it does not run alone at the end.
        for name, arm in sorted(ARMS.items(), key=lambda item: not item[1].sees_all):
            job = f"s{seed} {name}"
            after = text if arm.family == "scratch" else start
            weight = 2.5 if arm.sees_all else 1.0
            arguments = (lab, job, name)
            jobs.append(
                Job(name=job, function=arm_job, arguments=arguments, after=(after,), weight=weight)
            )
    return jobs


# From the files of the jobs to the summary.


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json."""
    from experiments.lab.upcycling_arms import ARMS, START
    from experiments.lab.upcycling_summary import arm_metrics, notes

    judged = {
        arm: [_lab(options, folder, seed).judged(arm) for seed in options.seeds]
        for arm in (*ARMS, START)
    }
    arms = {arm: arm_metrics(seeds, judged[START]) for arm, seeds in judged.items()}
    routing = {
        arm: {key: [found["routing"][key] for found in seeds] for key in seeds[0]["routing"]}
        for arm, seeds in judged.items()
        if seeds[0]["routing"]
    }
    comparisons = compare_all(arms)
    return {
        "arms": arms,
        "comparisons": comparisons,
        "routing": routing,
        "learning_rates": {arm: seeds[0]["learning_rate"] for arm, seeds in judged.items()},
        "verdict": {
            "word": verdict_word(comparisons),
            "rule": RULE,
            "threshold": MARGIN,
            "metric": METRIC,
        },
        "claims": claims(arms),
        "notes": notes(judged, routing),
        "timings": {
            name: {arm: [s["timings"][name] for s in seeds] for arm, seeds in judged.items()}
            for name in ("seconds", "peak_mib")
        },
    }


def compare_all(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[dict[str, Any]]:
    """Every pair of `PAIRS` in held-out loss."""
    from experiments.lab.verdict import compare

    return [
        {
            "arm": arm,
            "against": against,
            "metric": METRIC,
            **asdict(
                compare(
                    arms[arm][METRIC],
                    arms[against][METRIC],
                    margin=MARGIN,
                    higher_is_better=False,
                )
            ),
        }
        for arm, against in PAIRS
    ]


def verdict_word(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The rule in `RULE`, applied to the computed words."""
    words = [
        row["word"]
        for row in comparisons
        if row["arm"] == "upcycled_copy" and row["against"] in JUDGED_AGAINST
    ]
    if len(words) == len(JUDGED_AGAINST) and all(word == "BETTER" for word in words):
        return "REPRODUCED"
    return "NOT REPRODUCED" if "WORSE" in words else "INCONCLUSIVE"


CLAIMS = (
    (
        "upcycled_copy",
        "dense_continued",
        "Upcycled is below the dense model trained on, at equal additional tokens",
        "lower (Komatsuzaki et al. 2022)",
    ),
    (
        "upcycled_copy",
        "moe_scratch_d1",
        "Upcycled is below from scratch at equal additional tokens",
        "lower: from scratch needs much more to catch up (Komatsuzaki et al. 2022)",
    ),
    (
        "moe_scratch",
        "upcycled_copy",
        "From scratch is below upcycled at equal total tokens",
        "lower, with far more tokens than here (Muennighoff et al. 2024)",
    ),
    (
        "upcycled_drop",
        "upcycled_copy",
        "Drop-upcycling is below plain copies",
        "lower in the long run (Nakamura et al. 2025)",
    ),
)


def claims(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[dict[str, Any]]:
    """What was published beside our differences per seed, judged with MARGIN as the threshold."""
    from experiments.lab.verdict import difference, published_verdict

    found = []
    for arm, against, claim, published in CLAIMS:
        pairs = zip(arms[arm][METRIC], arms[against][METRIC], strict=True)
        gaps = [difference(value, other) for value, other in pairs]
        found.append(
            {
                "claim": f"{claim} (held-out loss, threshold {MARGIN:g} nats)",
                "published": published,
                "ours": gaps,
                "verdict": published_verdict(gaps, published_sign=-1, threshold=MARGIN),
            }
        )
    return found


# The command.


def tune(folder: Path, options: Options) -> dict[str, Any]:
    from experiments.lab.upcycling_tuning import tune as tried

    return tried(folder, TRIED, scale=options.scale, processes=options.processes)


QUESTION = Question(
    name=EXPERIMENT, asks=ASKS, rule=RULE, plan=plan, gather=gather, tune=tune, tried=TRIED
)


def run(options: Options) -> dict[str, Any]:
    """Run or resume the experiment; returns the summary."""
    return answer(QUESTION, options)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(QUESTION, argv)


if __name__ == "__main__":
    sys.exit(main())
