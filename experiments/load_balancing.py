"""What does each way of keeping experts even do to their load and to the loss?

Question: with one expert of eight per token, how uneven are the experts without any balancing, with
the load-balancing loss, with the router z-loss alone, and with a selection bias that is moved after
every step, and what does each cost in held-out loss?

Published: a bias in place of the loss gives MaxVio 0.04 against 0.72 and a perplexity of 9.50
against 9.56 at 1B parameters, 0.04 against 0.52 and 7.92 against 7.97 at 3B (Wang et al. 2024,
arXiv 2408.15664, table 2, u = 0.001); a balance loss is needed, and 0.01 of it costs little (Fedus
et al. 2022; Muennighoff et al. 2024, OLMoE, with z-loss 0.001); the z-loss keeps router logits
small at no cost in quality (Zoph et al. 2022, ST-MoE, table 4).

Arms: none; aux, load-balancing loss 0.01 and z-loss 0.001; bias, no loss, the bias of the choice
moved by 0.001 * sign(mean load - load) after each step; z, z-loss 0.001 alone. All have 8 experts,
one per token by raw probability, dropless, in the world of `moe_vs_dense` (32 Markov domains, 64
tokens a row, width 64, 2 layers) and the learning rate of its mixtures. Arms of a seed share
tables, rows, their order and all initial weights.

Statistic: MaxVio (busiest expert over the mean, minus 1) of the loads on all held-out rows, mean
over layers; held-out loss; dead experts; mean squared logsumexp of the router's logits; divergence
of expert use between domains.

Cost: an estimate, about 4 minutes on 2 idle cores for 5 seeds (20 trainings of 400 steps).

Verdict rule, fixed before the run: REPRODUCED if in every seed MaxVio with the bias is below that
with the loss, that with the loss below that without balancing, by half of it or more in the mean,
and the held-out loss with the bias at most 0.02 nats above that with the loss; NOT REPRODUCED if
one of these is the other way round in every seed, or by its threshold in the mean (the cost: by
twice 0.02); else INCONCLUSIVE. Within +-0.02 nats differences do not matter.

    python -m experiments.load_balancing --seeds 0 1 2 [--scale laptop|debug] [--resume RUN]
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lab.knowledge_arms import MIXTURE_RATE, Design, Lab, mixture, settings_of
from experiments.lab.question import Options, Question, answer, command
from sft.flags import main_guard

EXPERIMENT = "load_balancing"
ASKS = (
    "How even are experts with a balance loss, a z-loss, a selection bias or nothing, and what "
    "does each cost in held-out loss?"
)
METRIC = "held_out_loss"
MARGIN = 0.02  # nats per token; fixed before the reported seeds ran
HALF = 0.5  # of MaxVio without balancing, that the loss is to take away
LOGITS = 0.3  # of it, by which the z-loss is to lower the mean squared logsumexp
BIAS_RATE = 0.001
RULE = (
    "REPRODUCED if in every seed max_vio(bias) is below max_vio(aux), max_vio(aux) below "
    f"max_vio(none), by {HALF:g} of it or more in the mean, and held_out_loss(bias) at most "
    f"{MARGIN:g} above held_out_loss(aux); NOT REPRODUCED if one of these is the other way round "
    f"in every seed, or in the mean by its threshold (the cost: by {2 * MARGIN:g}); else "
    "INCONCLUSIVE"
)
# The same model in the same world: a rate of its own would be another one's noise.
RATES: Mapping[str, float] = {"moe": MIXTURE_RATE}
OFF: Mapping[str, Any] = {"load_balancing_coef": 0.0, "z_loss_coef": 0.0}
# In the order of their names, as folders are read back, so that every figure colours them alike.
ARMS: Mapping[str, Design] = {
    "aux": mixture(family="moe", num_experts=8, load_balancing_coef=0.01, z_loss_coef=0.001),
    "bias": mixture(
        family="moe",
        num_experts=8,
        bias_update_rate=BIAS_RATE,
        router_selection_bias=True,
        **OFF,
    ),
    "none": mixture(family="moe", num_experts=8, **OFF),
    "z": mixture(family="moe", num_experts=8, load_balancing_coef=0.0, z_loss_coef=0.001),
}
PAIRS = (("aux", "none"), ("bias", "none"), ("z", "none"), ("bias", "aux"))


def labs(options: Options, folder: Path) -> list[Lab]:
    from experiments.lab.knowledge_summary import labs_of

    return labs_of(EXPERIMENT, seeds=options.seeds, scale=options.scale, folder=folder, rates=RATES)


def plan(options: Options, folder: Path) -> list[Any]:
    """A job for every arm and seed; none waits for another."""
    from experiments.lab.knowledge_summary import arm_jobs

    return arm_jobs(ARMS, labs(options, folder))


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json."""
    from experiments.lab.knowledge_summary import arm_metrics, gathered, notes, read_arms
    from experiments.lab.rules import answers_of, claims_of, comparisons, verdict_of

    judged = read_arms(ARMS, labs(options, folder))
    arms = arm_metrics(judged)
    deciding = conditions(arms)
    return {
        "arms": arms,
        "comparisons": [
            row
            for metric, margin in ((METRIC, MARGIN), ("max_vio", 0.0))
            for row in comparisons(arms, PAIRS, metric=metric, margin=margin)
        ],
        **gathered(judged),
        "verdict": verdict_of(deciding, rule=RULE, metric=METRIC),
        "answers": answers_of(deciding),
        "claims": claims_of([*deciding, *reported(arms)]),
        "notes": notes(judged),
    }


def conditions(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[Any]:
    """What decides the verdict, each from its gaps per seed."""
    from experiments.lab.rules import AtMost, Condition, gaps, relative

    def of(arm: str, metric: str) -> Sequence[float | None]:
        return arms[arm][metric]

    return [
        Condition(
            claim="The balance loss lowers MaxVio (MaxVio(aux) / MaxVio(none), less 1)",
            published="needed in pretraining (OLMoE, Muennighoff et al. 2024)",
            gaps=relative(of("aux", "max_vio"), of("none", "max_vio")),
            sign=-1,
            threshold=HALF,
        ),
        Condition(
            claim="The bias keeps experts more even than the loss (MaxVio(bias) - MaxVio(aux))",
            published="0.04 against 0.72 at 1B (Wang et al. 2024)",
            gaps=gaps(of("bias", "max_vio"), of("aux", "max_vio")),
            sign=-1,
        ),
        AtMost(
            claim=f"The bias costs at most {MARGIN:g} nats over the loss (bias - aux)",
            published="perplexity 9.50 against 9.56 at 1B, that is -0.006 nats (Wang et al. 2024)",
            gaps=gaps(of("bias", METRIC), of("aux", METRIC)),
            threshold=MARGIN,
        ),
    ]


def reported(arms: Mapping[str, Mapping[str, Sequence[float | None]]]) -> list[Any]:
    """What is told beside the verdict."""
    from experiments.lab.rules import AtMost, Condition, gaps, relative

    def of(arm: str, metric: str) -> Sequence[float | None]:
        return arms[arm][metric]

    return [
        AtMost(
            claim=f"The balance loss costs at most {MARGIN:g} nats (aux - none)",
            published="small enough not to overwhelm the loss (Fedus et al. 2022, section 2.2)",
            gaps=gaps(of("aux", METRIC), of("none", METRIC)),
            threshold=MARGIN,
        ),
        Condition(
            claim="The z-loss lowers the mean squared logsumexp (z / none, less 1)",
            published="smaller logits, and stable training where it is not without (Zoph et al. "
            "2022, table 4)",
            gaps=relative(of("z", "squared_logsumexp"), of("none", "squared_logsumexp")),
            sign=-1,
            threshold=LOGITS,
        ),
        AtMost(
            claim=f"The z-loss costs at most {MARGIN:g} nats (z - none)",
            published="-1.741 with, -1.755 without (Zoph et al. 2022, table 4)",
            gaps=gaps(of("z", METRIC), of("none", METRIC)),
            threshold=MARGIN,
        ),
    ]


QUESTION = Question(
    name=EXPERIMENT,
    asks=ASKS,
    rule=RULE,
    plan=plan,
    gather=gather,
    settings=settings_of(ARMS, rates=RATES),
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
