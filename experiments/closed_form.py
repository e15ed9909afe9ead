"""How near do DPO, PPO and their kin come to the best policy, where that policy is known exactly?

Question: in a world whose answers can all be listed, how far is the policy of each method from the
optimum of the objective that they share, reward less the price of the KL, and from which n on is
the best of n answers of the reference further away than they are?

Published: the optimum is reference * exp(r / beta) / Z, and the minimiser of DPO's loss on
Bradley-Terry preferences of full support is that policy (Rafailov et al. 2023, eq. 4 and theorem
1); the best of n has a KL of log n - (n - 1) / n at most (Beirami et al. 2024); the policy gradient
of RLOO is that of the objective without a bias (Ahmadian et al. 2024), GRPO's division by the
deviation is a bias (Liu et al. 2025).

Arms: reference, an untrained mixture of experts (2 layers of width 32, 4 experts, two per token);
optimum; dpo, on a table of pairs that is Bradley-Terry without an error; dpo_drawn, on as many
answers of the reference as the others sample, a pair labelled once by a draw; ppo, with a critic;
rloo, grpo and grpo_centered (without the deviation) with groups of 4; reinforce_pp; best_of_02 to
best_of_32, computed and not sampled. Four prompts, 21 answers each of up to two letters; rewards
ln 1 to ln 8, drawn by the seed; beta 0.5, in the reward for all but DPO. On policy: 150 updates of
128 answers, 2 epochs, one step each. Each trained method had the same five learning rates tried on
a seed that is not reported (results/closed_form/tuning), falling linearly to 0.

Statistic: KL(policy || optimum) in nats, mean over prompts, by listing all answers; beta times it
is exactly what the policy lacks of the best objective. Left of it: its share of the reference's.

Cost: an estimate, about 15 minutes on 2 idle cores for 5 seeds (35 trainings).

Verdict rule, fixed before the run: REPRODUCED if in every seed dpo, ppo and rloo leave at most 5 %
of the reference's distance, and no best of n has more KL than log n - (n - 1) / n; NOT REPRODUCED
if one of these fails in every seed, or by twice its bound in the mean; else INCONCLUSIVE.

    python -m experiments.closed_form --seeds 0 1 2 [--scale laptop|debug] [--resume RUN] [--tune]
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.lab.enumerable_arms import TRIED, Lab, Method, Scale, best_name
from experiments.lab.question import Options, Question, answer, command
from sft.flags import main_guard

EXPERIMENT = "closed_form"
ASKS = (
    "Where the best policy is known exactly, how near do DPO, PPO, RLOO, GRPO, REINFORCE++ and the "
    "best of n come to it?"
)
METRIC = "kl_to_optimum"
LEFT = 0.05  # of the reference's distance
ROUNDING = 1e-9  # nats
BEST_OF = (2, 4, 8, 16, 32)
METHODS: Mapping[str, Method] = {
    "dpo": Method(pairs="exact"),
    "dpo_drawn": Method(pairs="drawn"),
    "grpo": Method(ppo={"advantage": "grpo", "group_size": 4}),
    "grpo_centered": Method(ppo={"advantage": "grpo", "group_size": 4, "scale_by_std": False}),
    "ppo": Method(ppo={"advantage": "gae"}),
    "reinforce_pp": Method(ppo={"advantage": "reinforce_pp"}),
    "rloo": Method(ppo={"advantage": "rloo", "group_size": 4}),
}
SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        longest=2, width=32, updates=150, episodes=128, pair_steps=300, pair_batch=256, looks=10
    ),
    "debug": Scale(
        longest=1, width=16, updates=2, episodes=16, pair_steps=4, pair_batch=32, looks=2
    ),
}
SOLVERS = ("dpo", "ppo", "rloo")
RULE = (
    f"REPRODUCED if in every seed {', '.join(SOLVERS)} leave at most {LEFT:.0%} of the reference's "
    "KL from the optimum, and no best of n has more KL than log n - (n - 1) / n; NOT REPRODUCED if "
    "one of these fails in every seed, or by twice its bound in the mean; else INCONCLUSIVE"
)
# Chosen by `--tune` among five on seed 9001: results/closed_form/tuning.
RATES: Mapping[str, float] = {
    "dpo": 5e-3,
    "dpo_drawn": 1.25e-3,
    "grpo": 5e-3,
    "grpo_centered": 5e-3,
    "ppo": 2.5e-3,
    "reinforce_pp": 5e-3,
    "rloo": 2.5e-3,
}
LISTED = ("reference", "optimum", *map(best_name, BEST_OF))
PAIRS = (
    *((arm, "reference") for arm in (*METHODS, *map(best_name, BEST_OF))),
    *((arm, "ppo") for arm in METHODS if arm != "ppo"),
    ("grpo", "grpo_centered"),
    ("dpo_drawn", "dpo"),
)


def labs(options: Options, folder: Path) -> list[Lab]:
    return [
        Lab(
            experiment=EXPERIMENT,
            seed=seed,
            scale=options.scale,
            folder=folder,
            rates=RATES,
            methods=METHODS,
            scales=SCALES,
        )
        for seed in options.seeds
    ]


def listed(lab: Lab, job: str) -> None:
    from experiments.lab.enumerable_arms import reference_job

    reference_job(lab, job, BEST_OF)


def train(lab: Lab, job: str, arm: str) -> None:
    from experiments.lab.enumerable_arms import train_job

    train_job(lab, job, arm)


def plan(options: Options, folder: Path) -> list[Any]:
    """A job for every method and seed, and one for what is only listed; none waits for another."""
    from experiments.lab.grid import Job

    jobs = []
    for lab in labs(options, folder):
        name = f"s{lab.seed} listed"
        jobs.append(Job(name=name, function=listed, arguments=(lab, name), weight=0.1))
        for arm, method in METHODS.items():
            name = f"s{lab.seed} {arm}"
            weight = 2.0 if method.pairs else 1.0
            jobs.append(Job(name=name, function=train, arguments=(lab, name, arm), weight=weight))
    return jobs


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json."""
    from experiments.lab.rules import answers_of, claims_of, comparisons, verdict_of

    here = labs(options, folder)
    judged = {arm: [lab.judged(arm) for lab in here] for arm in (*LISTED, *METHODS)}
    arms = {
        arm: {name: [held["metrics"][name] for held in seeds] for name in seeds[0]["metrics"]}
        for arm, seeds in judged.items()
    }
    for arm in METHODS:
        arms[arm]["left"] = left_of(arms, arm)
    deciding = conditions(arms)
    return {
        "arms": arms,
        "comparisons": comparisons(arms, PAIRS, metric=METRIC, margin=0.0),
        "learning_rates": dict(RATES),
        "verdict": verdict_of(deciding, rule=RULE, metric=METRIC),
        "answers": answers_of(deciding),
        "claims": claims_of([*deciding, *reported(arms)]),
        "notes": notes(arms),
        "timings": {
            name: {arm: [held["timings"][name] for held in seeds] for arm, seeds in judged.items()}
            for name in ("seconds", "peak_mib")
        },
    }


Arms = Mapping[str, Mapping[str, Sequence[float]]]


def left_of(arms: Arms, arm: str) -> list[float]:
    """Per seed, the share of the reference's distance from the optimum that is left."""
    pairs = zip(arms[arm][METRIC], arms["reference"][METRIC], strict=True)
    return [found / start for found, start in pairs]


def conditions(arms: Arms) -> list[Any]:
    """What decides the verdict, each from its values per seed."""
    from experiments.lab.rules import AtMost

    optimum = "the minimiser is the optimum (Rafailov et al. 2023, theorem 1)"
    published = {"dpo": optimum, "rloo": "no bias (Ahmadian et al. 2024)"}
    return [
        *(
            AtMost(
                claim=f"{arm} leaves at most {LEFT:.0%} of the distance from the optimum (share)",
                published=published.get(arm, "-"),
                gaps=tuple(left_of(arms, arm)),
                threshold=LEFT,
            )
            for arm in SOLVERS
        ),
        AtMost(
            claim="The best of n has at most log n - (n - 1) / n of KL (the largest excess, nats)",
            published="an upper bound (Beirami et al. 2024)",
            gaps=tuple(largest_excess(arms)),
            threshold=ROUNDING,
        ),
    ]


def largest_excess(arms: Arms) -> list[float]:
    """Per seed, KL of the best of n over its bound, at the n where it is largest."""
    from math import log

    rows = [[kl - (log(n) - (n - 1) / n) for kl in arms[best_name(n)]["exact_kl"]] for n in BEST_OF]
    return [max(excesses) for excesses in zip(*rows, strict=True)]


def reported(arms: Arms) -> list[Any]:
    """What is told beside the verdict."""
    from experiments.lab.rules import AtMost, Condition, gaps

    others = [arm for arm in METHODS if arm not in SOLVERS]
    by_n = [arms[best_name(n)][METRIC] for n in BEST_OF]
    nearest = [min(seed) for seed in zip(*by_n, strict=True)]
    return [
        *(
            AtMost(
                claim=f"{arm} leaves at most {LEFT:.0%} of the distance from the optimum (share)",
                published="-",
                gaps=tuple(left_of(arms, arm)),
                threshold=LEFT,
            )
            for arm in others
        ),
        Condition(
            claim="Dividing by a group's deviation ends further away (grpo - grpo_centered, nats)",
            published="a bias (Liu et al. 2025)",
            gaps=gaps(arms["grpo"][METRIC], arms["grpo_centered"][METRIC]),
            sign=1,
        ),
        Condition(
            claim="PPO ends nearer than the best of n at its best n (ppo - best, nats)",
            published="-",
            gaps=gaps(arms["ppo"][METRIC], nearest),
            sign=-1,
        ),
    ]


def notes(arms: Arms) -> list[str]:
    """What a reader must know beside the tables."""
    from statistics import fmean

    ranked = sorted((fmean(arms[arm][METRIC]), arm) for arm in (*METHODS, *map(best_name, BEST_OF)))
    order = ", ".join(f"{arm} {distance:.4f}" for distance, arm in ranked)
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in RATES.items())
    return [
        f"Nearest first (mean nats from the optimum): {order}.",
        "objective is exact_reward less beta times exact_kl; the optimum's less an arm's is beta "
        "times kl_to_optimum. With the KL in the reward, what is left of every answer's reward is "
        "the same at the optimum for one prompt, so that for rloo and grpo_centered the noise of "
        "sampling vanishes there; where a deviation is divided by (grpo, whitening) or no prompt "
        "has a baseline of its own (reinforce_pp) it does not.",
        f"Learning rates at the start: {rates}; linear to 0.",
    ]


def tune(folder: Path, options: Options) -> dict[str, Any]:
    from experiments.lab.enumerable_arms import tune as tried

    return tried(
        folder,
        METHODS,
        experiment=EXPERIMENT,
        scale=options.scale,
        scales=SCALES,
        processes=options.processes,
    )


QUESTION = Question(
    name=EXPERIMENT,
    asks=ASKS,
    rule=RULE,
    plan=plan,
    gather=gather,
    tune=tune,
    tried=TRIED,
    settings={
        "methods": {arm: asdict(method) for arm, method in METHODS.items()},
        "sizes": {name: asdict(scale) for name, scale in SCALES.items()},
        "best_of": list(BEST_OF),
        "rates": dict(RATES),
    },
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
