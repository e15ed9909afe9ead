"""What does a router of a mixture of experts go by: neighbours, domains, words; and how early?

Question: in a small model trained on text of several domains, is the next token served by the same
experts more often than the same tokens in another order would be, and more so in the middle layers;
is the use of experts of the final model settled early, the first layer last; do domains use
experts differently; and which experts go together?

Published: the first choice repeats from one token to the next in 14 % of the cases in layer 0 and
in 24-28 % and 20-26 % in layers 15 and 31, where chance gives 12.5 % (Jiang et al. 2024, Mixtral,
Table 5), and domains show no obvious pattern there; up to about 60 % of the top 8 are settled after
1 % of the training, later layers earlier, layer 0 slowest, and domains and vocabulary use experts
differently (Muennighoff et al. 2024, OLMoE, section 5). From both models' published counts, the
divergence between two domains, mean over pairs, is 0.002-0.006 bits for Mixtral and 0.10-0.30 bits
for OLMoE.

Arms: initial and trained, the same model before and after: 4 layers of width 64, 8 experts of width
64, two per token renormalised, balance loss 0.01, z-loss 0.001, on rows of 128 tokens of one domain
each (Python source and language reference of the interpreter that runs, tales, lists, arithmetic;
byte-level BPE of 1,024), no row twice. The learning rate was chosen on a seed that is not reported
(results/routing_analysis/tuning). All measures are of the same held-out rows. An untrained router
already treats like tokens alike, so what is claimed of training is asked of the trained one beyond
both the shufflings and the initial one.

Statistic: share of neighbouring tokens with the same first choice, or with common ones among the
first two, less that expected of the same tokens in any other order within their row (exact) and
beside that of independent tokens of the same use; Jensen-Shannon divergence of expert use between
domains, mean over pairs, beside whole rows shuffled over the domains; between a token's identities,
beside tokens shuffled within their rows; share of a token's final experts that it has at 0, 1, 5,
10, 25, 50 and 100 % of the training (the learning rate warms up for the first 5 %), beside that of
independent tokens of the same use; P(j | i) for all pairs of a token's experts.

Cost: an estimate, about 7 minutes on 2 idle cores for 5 seeds (5 trainings of 600 steps).

Verdict rule, fixed before the run: REPRODUCED if in every seed the first choice repeats in the
middle layers more than in shuffled rows and by more than before training, by 3 points or more in
the mean, and exceeds layer 0's by more than before training; the settled share rises from mark to
mark from 1 % on, is at 10 % of the training above that of independent tokens and that before
training, by 0.2 or more in the mean, and lowest in layer 0; and the divergence between domains is
above the 99th percentile of the shufflings and above that before training; NOT REPRODUCED if one of
these is found the other way round in every seed or, by its threshold, in the mean; else
INCONCLUSIVE.

    python -m experiments.routing_analysis --seeds 0 1 2 [--scale laptop|debug] [--resume RUN]
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.lab.knowledge_tuning import TRIED
from experiments.lab.question import Options, Question, answer, command
from experiments.lab.routing_text import MARKS, MODEL, SHARES, TextLab, sizes
from sft.flags import main_guard

EXPERIMENT = "routing_analysis"
ASKS = (
    "What does a router go by - neighbours, domains, words - beyond chance, how early is it "
    "settled, and which experts go together?"
)
METRIC = "repeat_excess_middle"
DESCRIBED = (METRIC, "domain_jsd", "vocabulary_jsd", "max_vio")  # neither good nor bad
REPEATS = 0.03  # of neighbours, above shuffled rows and above the untrained router
SETTLED = 0.2  # above independent tokens and the untrained router, at EARLY of the training
EARLY = 0.1
RULE = (
    "REPRODUCED if in every seed the first choice repeats in the middle layers more than in "
    f"shuffled rows and before training, by {REPEATS * 100:g} points or more in the mean, and "
    "exceeds layer 0's by more than before training; the settled share rises from mark to mark "
    f"from 1 % on, is at {EARLY:.0%} of the training above chance and its start, by {SETTLED:g} "
    "or more in the mean, and lowest in layer 0; and the divergence between domains is above the "
    "99th percentile of the shufflings and that before training; NOT REPRODUCED if one of these is "
    "found the other way round; else INCONCLUSIVE"
)
# Chosen by `--tune` among four on seed 9001: results/routing_analysis/tuning.
RATE = 6e-3


def labs(options: Options, folder: Path) -> list[TextLab]:
    return [
        TextLab(experiment=EXPERIMENT, seed=seed, scale=options.scale, folder=folder, rate=RATE)
        for seed in options.seeds
    ]


def train(lab: TextLab, job: str) -> None:
    from experiments.lab.routing_text import train_job

    train_job(lab, job)


def judge(lab: TextLab, job: str) -> None:
    from experiments.lab.routing_measures import judge_job

    judge_job(lab, job)


def plan(options: Options, folder: Path) -> list[Any]:
    """Per seed a training, which keeps the marks, and then the judge, who reads them."""
    from experiments.lab.grid import Job

    jobs = []
    for lab in labs(options, folder):
        trained, judged = f"s{lab.seed} train", f"s{lab.seed} judge"
        jobs.append(Job(name=trained, function=train, arguments=(lab, trained), weight=5.0))
        jobs.append(Job(name=judged, function=judge, arguments=(lab, judged), after=(trained,)))
    return jobs


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json."""
    from experiments.lab.routing_measures import ARMS
    from experiments.lab.rules import answers_of, claims_of, comparisons, verdict_of

    judged = {arm: [lab.judged(arm) for lab in labs(options, folder)] for arm in ARMS}
    routing = {
        arm: {key: [held["routing"][key] for held in seeds] for key in seeds[0]["routing"]}
        for arm, seeds in judged.items()
    }
    settled = [held["saturation"] for held in judged["trained"]]
    deciding = conditions(routing, settled)
    arms = {arm: arm_metrics(seeds) for arm, seeds in judged.items()}
    return {
        "arms": arms,
        "comparisons": [
            row
            for metric in DESCRIBED
            for row in comparisons(
                arms, [("trained", "initial")], metric=metric, margin=0.0, higher_is_better=None
            )
        ],
        "routing": routing,
        "saturation": settled,
        "coactivation": {
            arm: [held["coactivation"] for held in seeds] for arm, seeds in judged.items()
        },
        "learning_rate": RATE,
        "verdict": verdict_of(deciding, rule=RULE, metric=METRIC),
        "answers": answers_of(deciding),
        "claims": claims_of([*deciding, *reported(routing)]),
        "notes": notes(judged, settled),
        "timings": {
            name: {arm: [held["timings"][name] for held in seeds] for arm, seeds in judged.items()}
            for name in ("seconds", "peak_mib")
        },
    }


def middle(values: Sequence[float]) -> float:
    """The mean over the layers that are neither first nor last."""
    return fmean(values[1:-1])


def excess(routing: Mapping[str, Any], name: str, *, seed: int) -> list[float]:
    """Per layer, a rate less that expected of shuffled rows."""
    pairs = zip(routing[name][seed], routing[f"{name}_shuffled"][seed], strict=True)
    return [rate - shuffled for rate, shuffled in pairs]


def arm_metrics(seeds: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Metric -> per seed, of one arm."""
    found: dict[str, list[float]] = {}
    for held in seeds:
        routing = {key: [value] for key, value in held["routing"].items()}
        first = excess(routing, "repeat_first", seed=0)
        values = {
            METRIC: middle(first),
            "repeat_excess_layer_0": first[0],
            "repeat_excess_first_two": middle(excess(routing, "repeat_first_two", seed=0)),
            "repeat_first": fmean(held["routing"]["repeat_first"]),
            "domain_jsd": fmean(held["routing"]["domain_jsd"]),
            "domain_jsd_by_chance": fmean(held["routing"]["domain_jsd_by_chance"]),
            "vocabulary_jsd": fmean(held["routing"]["vocabulary_jsd"]),
            "vocabulary_jsd_by_chance": fmean(held["routing"]["vocabulary_jsd_by_chance"]),
            "strongest_partner": fmean(held["routing"]["strongest_partner"]),
            "max_vio": fmean(held["routing"]["max_vio"]),
            "dead_experts": fmean(held["routing"]["dead_experts"]),
            **held["metrics"],
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def conditions(
    routing: Mapping[str, Mapping[str, Any]], settled: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """What decides the verdict, each from its gaps per seed. routing: arm -> measures."""
    from experiments.lab.rules import Condition

    before, after = excesses(routing["initial"]), excesses(routing["trained"])
    early = [held["share"][MARKS.index(EARLY)] for held in settled]
    mixtral = "24-28 % in layer 15, 14 % in layer 0, 12.5 % by chance (Jiang et al. 2024, Table 5)"
    olmoe = "up to 60 % at 1 % of the training, layer 0 slowest (Muennighoff et al. 2024)"
    return [
        Condition(
            claim="First choices repeat in the middle layers, over shuffled rows and over the "
            "untrained router (share, the smaller)",
            published=mixtral,
            gaps=beyond_start([middle(found) for found in after], [middle(f) for f in before]),
            sign=1,
            threshold=REPEATS,
        ),
        Condition(
            claim="They repeat more in the middle layers than in layer 0, over shuffled rows and "
            "over the untrained router (share, the smaller)",
            published=mixtral,
            gaps=beyond_start(
                [middle(found) - found[0] for found in after],
                [middle(found) - found[0] for found in before],
            ),
            sign=1,
        ),
        Condition(
            claim="The settled share rises from mark to mark from 1 % on (the smallest rise)",
            published=olmoe,
            gaps=tuple(smallest_rise(held["share"]) for held in settled),
            sign=1,
        ),
        Condition(
            claim=f"At {EARLY:.0%} of the training it is above independent tokens and above the "
            "untrained router (share, the smaller)",
            published=olmoe,
            gaps=tuple(above_chance(held) for held in settled),
            sign=1,
            threshold=SETTLED,
        ),
        Condition(
            claim="At that mark it is lowest in layer 0 (next lowest less that of layer 0)",
            published=olmoe,
            gaps=tuple(min(layers[1:]) - layers[0] for layers in early),
            sign=1,
        ),
        Condition(
            claim="Domains use experts differently (bits over the 99th percentile of shufflings "
            "and over the untrained router, the smaller)",
            published="0.002-0.006 bits for Mixtral, 0.10-0.30 for OLMoE, from their counts",
            gaps=tuple(
                min(over, over_start)
                for over, over_start in zip(
                    beyond(routing["trained"], "domain_jsd"),
                    risen(routing, "domain_jsd"),
                    strict=True,
                )
            ),
            sign=1,
        ),
    ]


def excesses(routing: Mapping[str, Any]) -> list[list[float]]:
    """Per seed and layer, repeats of the first choice over those of shuffled rows."""
    seeds = range(len(routing["repeat_first"]))
    return [excess(routing, "repeat_first", seed=seed) for seed in seeds]


def beyond_start(after: Sequence[float], before: Sequence[float]) -> tuple[float, ...]:
    """Per seed, what is above 0 and above the untrained router: the smaller of the two."""
    return tuple(min(found, found - start) for found, start in zip(after, before, strict=True))


def above_chance(held: Mapping[str, Any]) -> float:
    """The settled share at EARLY over that by use alone, or that at the start if it is higher."""
    place = MARKS.index(EARLY)
    chance = max(fmean(held["by_usage"][place]), fmean(held["share"][MARKS.index(0.0)]))
    return fmean(held["share"][place]) - chance


def risen(routing: Mapping[str, Mapping[str, Any]], name: str) -> list[float]:
    """Per seed, the mean over layers after training less that before."""
    pairs = zip(routing["trained"][name], routing["initial"][name], strict=True)
    return [fmean(after) - fmean(before) for after, before in pairs]


def smallest_rise(share: Sequence[Sequence[float]]) -> float:
    """Of the mean over layers, from the mark at 1 % to that at 100 %."""
    means = [fmean(layers) for layers in share[1:]]
    return min(after - before for before, after in zip(means, means[1:], strict=False))


def beyond(routing: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Per seed, the mean over layers of a divergence less the high end of its shufflings."""
    pairs = zip(routing[name], routing[f"{name}_high"], strict=True)
    return tuple(fmean(found) - fmean(top) for found, top in pairs)


def reported(routing: Mapping[str, Any]) -> list[Any]:
    """What is told beside the verdict."""
    from experiments.lab.rules import Condition, gaps

    def mean(arm: str, name: str) -> list[float | None]:
        return [fmean(layers) for layers in routing[arm][name]]

    trained = excesses(routing["trained"])
    return [
        Condition(
            claim="First choices repeat in the middle layers over shuffled rows alone (share)",
            published="24-28 % against 12.5 % by chance (Jiang et al. 2024, Table 5)",
            gaps=tuple(middle(found) for found in trained),
            sign=1,
            threshold=REPEATS,
        ),
        Condition(
            claim="They do by more than in layer 0, over shuffled rows alone (share)",
            published="24-28 % in layer 15, 14 % in layer 0 (Jiang et al. 2024, Table 5)",
            gaps=tuple(middle(found) - found[0] for found in trained),
            sign=1,
        ),
        Condition(
            claim="Words use experts differently (bits over the 99th percentile of shufflings)",
            published="strong in OLMoE, weaker in Mixtral (Muennighoff et al. 2024, section 5.4)",
            gaps=beyond(routing["trained"], "vocabulary_jsd"),
            sign=1,
        ),
        Condition(
            claim="Training makes domains differ (divergence after less before, bits)",
            published="-",
            gaps=tuple(risen(routing, "domain_jsd")),
            sign=1,
        ),
        Condition(
            claim="The strongest pair of experts is beyond their use (P(j | i) less by use)",
            published="few strong pairs (Muennighoff et al. 2024, section 5.2)",
            gaps=gaps(
                mean("trained", "strongest_partner"), mean("trained", "strongest_partner_by_usage")
            ),
            sign=1,
        ),
    ]


def notes(
    judged: Mapping[str, Sequence[Mapping[str, Any]]], settled: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a reader must know beside the tables."""
    held = judged["trained"]
    by_mark = [
        f"{mark:.0%} {fmean(fmean(found['share'][place]) for found in settled):.2f}"
        for place, mark in enumerate(MARKS)
    ]
    by_layer = [
        f"layer {layer} {fmean(found['share'][MARKS.index(EARLY)][layer] for found in settled):.2f}"
        for layer in range(len(settled[0]["share"][0]))
    ]
    told = [
        f"Held-out tokens (first seed): {held[0]['held_out_tokens']:,.0f}. A row is of one domain; "
        "its texts follow each other, so neighbours and shufflings are those of a row.",
        f"Settled share, mean over layers and seeds: {', '.join(by_mark)}; K / E is "
        f"{settled[0]['uniform']:.2f}. At {EARLY:.0%}: {', '.join(by_layer)}.",
        "The strongest partner is picked among all pairs, so some excess over use is selection.",
    ]
    for seeds in judged.values():
        for found in seeds:
            told += found["notes"]
    return list(dict.fromkeys(told))


def tune(folder: Path, options: Options) -> dict[str, Any]:
    from experiments.lab.routing_measures import tune as tried

    return tried(folder, experiment=EXPERIMENT, scale=options.scale, processes=options.processes)


QUESTION = Question(
    name=EXPERIMENT,
    asks=ASKS,
    rule=RULE,
    plan=plan,
    gather=gather,
    tune=tune,
    tried=TRIED,
    settings={"model": MODEL, "sizes": sizes(), "shares": SHARES, "marks": MARKS, "rates": RATE},
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
