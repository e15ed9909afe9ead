"""Are many small experts better than few large ones, and does a shared expert help?

Question: at equal total and active expert parameters, does the held-out loss fall when each expert
is split into G narrower ones and G times as many are chosen, as the law L(G) = g / G^y + h says;
and is one expert that every token passes worth the routed ones that it replaces?

Published: 2B parameters on the Pile end at 1.808 with fine-grained and shared experts, at 1.867
with GShard's 16 large ones; without the shared expert and one more routed in its place the trained
model goes from 1.808 to 2.414 (Dai et al. 2024, DeepSeekMoE); 64 experts of which 8 are chosen are
1-2 % better than 32 of which 4 are, and a shared expert makes it slightly worse (Muennighoff et al.
2025, OLMoE); L(G) = g / G^y + h with y = 0.58 (Krajewski et al. 2024).

Arms: g1, g2, g4 and g8: 8, 16, 32 and 64 experts, 1, 2, 4 and 8 per token, of width F, F/2, F/4 and
F/8, weighed by raw probability; shared: g2 with one of its 16 experts passed by every token
(added, as in DeepSeekMoE) and one of the other 15 chosen; and, of the trained model of shared and
without training, shared_dropped, which has no shared expert, and shared_replaced, which chooses a
second routed one in its place; beside them g2_dropped, the trained g2 with its first choice alone,
because any model misses half of the experts it was trained with. Routed weights of a token add up
to 1/8 at the start in g1 to g8, to 1/15 in shared, whose shared expert weighs 1: the published
designs differ in this too. Equal in total and active expert parameters; the router grows with
the number of experts, and its share of the FLOPs is told. Balance loss 0.01, z-loss 0.001,
dropless. World, pairing and learning rates as in `moe_vs_dense`: each trained arm a family
(results/granularity_shared/tuning).

Cost: an estimate, about 6 minutes on 2 idle cores for 5 seeds (25 trainings of 400 steps).

Verdict rule, fixed before the run: REPRODUCED if g2 is below g1 in every seed, by 0.03 nats or more
in the mean, and in 95 % or more of 200 resamplings of the seeds the fit of the law has g > 0 and a
finite y > 0 and no loss rises by 0.02 nats or more with G, and shared_replaced is above shared in
every seed, by 0.1 nats or more in the mean; NOT REPRODUCED if one of these is found the other way
round (of the fits: in half or more); else INCONCLUSIVE. Whether a shared expert is better from
scratch is told beside it, because published signs disagree. Differences within +-0.02 nats do not
matter.

    python -m experiments.granularity_shared --seeds 0 1 2 [--scale laptop|debug] [--resume RUN]
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.lab.knowledge_arms import WIDTH, Design, Lab, mixture, settings_of
from experiments.lab.knowledge_tuning import TRIED
from experiments.lab.question import Options, Question, answer, command
from sft.flags import main_guard

EXPERIMENT = "granularity_shared"
ASKS = (
    "At equal total and active expert parameters, are many small experts better than few large "
    "ones, and does a shared expert help?"
)
METRIC = "held_out_loss"
MARGIN = 0.02  # nats per token; fixed before the reported seeds ran
FINER = 0.03  # nats that two halves are to be below one whole
SURGERY = 0.1  # nats that a model loses with its shared expert
SURE = 0.95  # of the resamplings
RULE = (
    f"REPRODUCED if g2 is below g1 in held_out_loss in every seed, by {FINER:g} nats or more in "
    f"the mean, {SURE:.0%} or more of the resampled fits of g / G^y + h level off (g > 0, finite "
    f"y > 0, no rise with G by {MARGIN:g}), and "
    f"shared_replaced is above shared in every seed, by {SURGERY:g} nats or more in the mean; NOT "
    "REPRODUCED if one of these is found the other way round; else INCONCLUSIVE"
)
# Chosen by `--tune` among four on seed 9001: results/granularity_shared/tuning.
RATES: Mapping[str, float] = {"g1": 3e-3, "g2": 3e-3, "g4": 6e-3, "g8": 3e-3, "shared": 3e-3}
GRANULARITY: Mapping[str, int] = {"g1": 1, "g2": 2, "g4": 4, "g8": 8}
SHARED = "shared"
# In the order of their names, as folders are read back, so that every figure colours them alike.
ARMS: Mapping[str, Design] = {
    **{
        arm: mixture(family=arm, num_experts=8 * finer, top_k=finer, width=WIDTH // finer)
        for arm, finer in GRANULARITY.items()
    },
    SHARED: mixture(
        family="shared",
        num_experts=15,
        top_k=1,
        width=WIDTH // 2,
        shared_expert_intermediate_size=WIDTH // 2,
        shared_expert_mode="added",
    ),
}
# What is made of a trained model, which is named first, without training.
SURGERIES: Mapping[str, tuple[str, Design]] = {
    "g2_dropped": ("g2", mixture(family="g2", num_experts=16, top_k=1, width=WIDTH // 2)),
    "shared_dropped": (
        SHARED,
        mixture(family="shared", num_experts=15, top_k=1, width=WIDTH // 2),
    ),
    "shared_replaced": (
        SHARED,
        mixture(family="shared", num_experts=15, top_k=2, width=WIDTH // 2),
    ),
}
CUT: Mapping[str, Design] = {arm: design for arm, (_, design) in SURGERIES.items()}
PAIRS = (
    *((arm, "g1") for arm in ("g2", "g4", "g8", SHARED)),
    (SHARED, "g2"),
    *((arm, of) for arm, (of, _) in SURGERIES.items()),
)


def labs(options: Options, folder: Path) -> list[Lab]:
    from experiments.lab.knowledge_summary import labs_of

    return labs_of(EXPERIMENT, seeds=options.seeds, scale=options.scale, folder=folder, rates=RATES)


def surgery_job(lab: Lab, job: str) -> None:
    """Trained models without one of their experts per token, on the same held-out rows."""
    from experiments.lab.grid import report
    from experiments.lab.knowledge_arms import judge_surgery

    for done, (arm, (of, design)) in enumerate(SURGERIES.items()):
        report(job, "judging", done, len(SURGERIES))
        judge_surgery(lab, arm, of=of, changed=design)


def plan(options: Options, folder: Path) -> list[Any]:
    """A job for every arm and seed, and the surgery after the training that it is done on."""
    from experiments.lab.grid import Job
    from experiments.lab.knowledge_summary import arm_jobs

    here = labs(options, folder)
    return [
        *arm_jobs(ARMS, here),
        *(
            Job(
                name=(name := f"s{lab.seed} surgery"),
                function=surgery_job,
                arguments=(lab, name),
                after=tuple(f"s{lab.seed} {of}" for of in ("g2", SHARED)),
                weight=0.1,
            )
            for lab in here
        ),
    ]


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json."""
    from experiments.lab.knowledge_summary import arm_metrics, gathered, notes, read_arms
    from experiments.lab.rules import answers_of, claims_of, comparisons, verdict_of

    judged = read_arms({**ARMS, **CUT}, labs(options, folder))
    arms = arm_metrics(judged)
    law = law_of(arms)
    deciding = conditions(arms, law)
    return {
        "arms": arms,
        "comparisons": comparisons(arms, PAIRS, metric=METRIC, margin=MARGIN),
        **gathered(judged),
        "law": law,
        "verdict": verdict_of(deciding, rule=RULE, metric=METRIC),
        "answers": answers_of(deciding),
        "claims": claims_of([*deciding, *reported(arms)]),
        "notes": [*notes(judged), *law_notes(arms, law)],
    }


def loss_by_seed(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[list[float]]:
    """Per seed the losses of g1 to g8; a seed without all of them is left out."""
    rows = zip(*(arms[arm][METRIC] for arm in GRANULARITY), strict=True)
    whole = [[value for value in row if value is not None] for row in rows]
    return [row for row in whole if len(row) == len(GRANULARITY)]


def law_of(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> dict[str, Any]:
    """The law fitted to the mean over seeds, and how often its resamplings level off."""
    from statistics import fmean

    from experiments.lab.granularity_law import bootstrap, fit_law

    points, curves = list(GRANULARITY.values()), loss_by_seed(arms)
    law = fit_law(points, [fmean(at) for at in zip(*curves, strict=True)])
    again = bootstrap(points, curves)
    return {
        **asdict(law),
        "bootstraps": len(again),
        "share_that_levels_off": fmean(found.levels_off(margin=MARGIN) for found in again),
        "y_bootstrap": sorted(found.y for found in again),
    }


@dataclass(frozen=True, kw_only=True)
class LawHolds:
    """The claim that the loss levels off with G, as the share of resamplings in which it does."""

    claim: str
    published: str
    gaps: tuple[float | None, ...]
    num_seeds: int
    threshold: float = SURE
    of: str = "share of 200 fits to resampled seeds"

    @property
    def word(self) -> Any:
        from experiments.lab.verdict import MIN_PAIRS

        share = self.gaps[0]
        if share is None or self.num_seeds < MIN_PAIRS:
            return "INCONCLUSIVE"
        if share >= SURE:
            return "REPRODUCED"
        return "NOT REPRODUCED" if share <= 1 / 2 else "INCONCLUSIVE"


def conditions(
    arms: Mapping[str, Mapping[str, Sequence[float | None]]], law: Mapping[str, Any]
) -> list[Any]:
    """What decides the verdict, each from its gaps per seed. law: of `law_of`."""
    from experiments.lab.rules import Condition, gaps

    return [
        Condition(
            claim="16 experts of half the width are below 8 (nats)",
            published="1.808 for DeepSeekMoE, 1.867 for GShard, on the Pile (Dai et al. 2024)",
            gaps=gaps(arms["g2"][METRIC], arms["g1"][METRIC]),
            sign=-1,
            threshold=FINER,
        ),
        LawHolds(
            claim="The loss follows g / G^y + h at a finite y above 0 and levels off",
            published="y = 0.58 (Krajewski et al. 2024)",
            gaps=(law["share_that_levels_off"],),
            num_seeds=len(loss_by_seed(arms)),
        ),
        Condition(
            claim="One more routed expert does not replace the shared one (nats)",
            published="1.808 becomes 2.414 on the Pile (Dai et al. 2024)",
            gaps=gaps(arms["shared_replaced"][METRIC], arms[SHARED][METRIC]),
            sign=1,
            threshold=SURGERY,
        ),
    ]


def reported(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[Any]:
    """What is told beside the verdict."""
    from experiments.lab.rules import Condition, gaps

    def loss(arm: str) -> Sequence[float | None]:
        return arms[arm][METRIC]

    return [
        Condition(
            claim="Without its shared expert a model loses more than g2 without its second choice "
            "(nats)",
            published="-",
            gaps=gaps(
                gaps(loss("shared_dropped"), loss(SHARED)), gaps(loss("g2_dropped"), loss("g2"))
            ),
            sign=1,
            threshold=SURGERY,
        ),
        Condition(
            claim="From scratch a shared expert is better (shared - g2, nats)",
            published="better (DeepSeekMoE, Dai et al. 2024), slightly worse (OLMoE, Muennighoff "
            "et al. 2025)",
            gaps=gaps(loss(SHARED), loss("g2")),
            sign=-1,
            threshold=MARGIN,
        ),
    ]


def law_notes(
    arms: Mapping[str, Mapping[str, Sequence[float | None]]], law: Mapping[str, Any]
) -> list[str]:
    """The law and the router's share of the FLOPs, in words."""
    end = " (an end of the grid: no finite y fits better)" if law["at_end"] else ""
    shares = ", ".join(
        f"{arm} {arms[arm]['router_flop_share'][0]:.1%}" for arm in (*GRANULARITY, SHARED)
    )
    return [
        f"Fit to the mean over seeds: L(G) = {law['g']:.4f} / G^{law['y']:g} + {law['h']:.4f}"
        f"{end}, off by {law['residual']:.4f} nats; at a "
        f"finite y it falls and levels off in {law['share_that_levels_off']:.1%} of "
        f"{law['bootstraps']} resamplings of the seeds; y is above 0 in "
        f"{sum(y > 0 for y in law['y_bootstrap'])} of them.",
        f"Share of the router in the forward FLOPs: {shares}.",
    ]


def tune(folder: Path, options: Options) -> dict[str, Any]:
    from experiments.lab.knowledge_tuning import tune as tried

    return tried(
        folder, ARMS, experiment=EXPERIMENT, scale=options.scale, processes=options.processes
    )


QUESTION = Question(
    name=EXPERIMENT,
    asks=ASKS,
    rule=RULE,
    plan=plan,
    gather=gather,
    tune=tune,
    tried=TRIED,
    settings=settings_of({**ARMS, **CUT}, rates=RATES),
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
