"""Do TRL's public SFT, reward and DPO trainers compute our losses, and do they train our model?

Question: for the same weights and texts, are TRL's loss and gradients ours in SFT, reward modelling
and DPO; and does our mixture of experts learn inside TRL's own trainers?

Published: nothing. TRL (von Werra et al. 2020, github.com/huggingface/trl) is what most papers of
the field train with, so a difference from it is either a bug or has to be named.

Arms: ours and trl, the installed version, on the CPU in float32. Eight prompts of random words with
two answers each; a tiny Llama of Hugging Face and our mixture of experts, fresh for each seed. TRL
reads texts through its own data preparation, and prompts with a spelled BOS. Both train from the
same weights on the whole batch at every step: AdamW at 3e-3, beta2 0.95, gradient norm 1, balance
off. Losses are compared at the weights where TRL's training ended, away from DPO's reference.

Statistic: |loss(ours) - loss(trl)| of the batch; the largest difference of an entry of the
gradient, over the gradient's largest entry; last less first loss of the mixture in TRL's trainers;
beside them the weights after both trainings, and the known differences: the balance loss that TRL
computes by itself, label smoothing, padding with EOS, BOS.

Cost: an estimate, about 3 minutes on 2 busy cores for 5 seeds, most of it importing.

Verdict rule, fixed before the run: REPRODUCED if in every seed, for both models and all three
stages, the losses differ by at most 1e-5 and the gradients by at most 1e-5 of their largest entry,
and the mixture's loss falls in each of TRL's three trainers; NOT REPRODUCED if one of these fails
in every seed, or a difference in the mean is above 2e-5; else INCONCLUSIVE. How far the trained
weights are from ours, and the known differences, are told beside it.

    python -m experiments.trl_parity --seeds 0 1 2 [--scale laptop|debug] [--resume RUN]
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lab.question import Options, Question, answer, command
from sft.flags import main_guard

EXPERIMENT = "trl_parity"
ASKS = (
    "Do TRL's public SFT, reward and DPO trainers compute our losses and gradients, and do they "
    "train our model?"
)
FAMILIES: Mapping[str, str] = {"llama": "a Llama", "moe": "our mixture"}
STAGES: Mapping[str, str] = {"sft": "SFT", "rm": "reward modelling", "dpo": "DPO"}
CLOSE = 1e-5  # of a loss in nats, and of a gradient's largest entry; fixed before the run
METRIC = "moe_sft_loss"
RULE = (
    f"REPRODUCED if in every seed, for both models and all three stages, losses differ by at most "
    f"{CLOSE:g} and gradients by at most {CLOSE:g} of their largest entry, and the mixture's loss "
    "falls in each of TRL's trainers; NOT REPRODUCED if one of these fails in every seed or a mean "
    f"difference is above {2 * CLOSE:g}; else INCONCLUSIVE"
)
Seeds = Sequence[Mapping[str, Any]]


def plan(options: Options, folder: Path) -> list[Any]:
    """A job for every seed. Raises UserError where TRL's trainers cannot be imported."""
    from experiments.lab.grid import Job
    from experiments.lab.trl_beside import seed_job
    from sft.trl_data import public_trainers

    public_trainers()
    return [
        Job(
            name=(name := f"s{seed}"),
            function=seed_job,
            arguments=(folder, seed, options.scale, name),
        )
        for seed in options.seeds
    ]


def gather(options: Options, folder: Path) -> dict[str, Any]:
    """What is this experiment's own in summary.json."""
    from experiments.lab.rules import claims_of, comparisons, verdict_of
    from experiments.lab.trl_beside import read_seed

    seeds = [read_seed(folder, seed) for seed in options.seeds]
    deciding = conditions(seeds)
    arms = losses(seeds)
    return {
        "trl": sorted({found["trl"] for found in seeds}),
        "arms": arms,
        "comparisons": [
            row
            for metric in arms["ours"]
            for row in comparisons(
                arms, [("ours", "trl")], metric=metric, margin=CLOSE, higher_is_better=None
            )
        ],
        "verdict": verdict_of(deciding, rule=RULE, metric=METRIC),
        "answers": [sentence(condition) for condition in deciding],
        "claims": claims_of([*deciding, *reported(seeds)]),
        "notes": notes(seeds),
    }


def cells() -> list[tuple[str, str, str]]:
    """(key of a seed's file, model and stage in words)."""
    return [
        (f"{family}_{stage}", FAMILIES[family], STAGES[stage])
        for family in FAMILIES
        for stage in STAGES
    ]


def losses(seeds: Seeds) -> dict[str, dict[str, list[float]]]:
    """Arm -> the batch's loss by model and stage, seed by seed."""
    return {
        arm: {f"{key}_loss": [found[key][arm] for found in seeds] for key, _, _ in cells()}
        for arm in ("ours", "trl")
    }


def conditions(seeds: Seeds) -> list[Any]:
    """What decides the verdict, each from its gaps per seed."""
    from experiments.lab.rules import AtMost, Condition

    found: list[Any] = []
    for key, family, stage in cells():
        found.append(
            AtMost(
                claim=f"{stage} of {family}: the losses are the same (|ours - TRL|)",
                published="-",
                gaps=tuple(abs(seed[key]["ours"] - seed[key]["trl"]) for seed in seeds),
                threshold=CLOSE,
            )
        )
        found.append(
            AtMost(
                claim=f"{stage} of {family}: the gradients are the same (of the largest entry)",
                published="-",
                gaps=tuple(seed[key]["gradient_gap"] for seed in seeds),
                threshold=CLOSE,
            )
        )
    for stage, word in STAGES.items():
        found.append(
            Condition(
                claim=f"In TRL's trainer our mixture learns by {word} (last - first loss)",
                published="-",
                gaps=tuple(s[f"moe_{stage}"]["last"] - s[f"moe_{stage}"]["first"] for s in seeds),
                sign=-1,
            )
        )
    return found


def reported(seeds: Seeds) -> list[Any]:
    """What is told beside the verdict: weights after both trainings."""
    from experiments.lab.rules import AtMost

    return [
        AtMost(
            claim=f"{stage} of {family}: trained by us and by TRL the weights are the same",
            published="-",
            gaps=tuple(seed[key]["weight_gap"] for seed in seeds),
            threshold=CLOSE,
        )
        for key, family, stage in cells()
    ]


def sentence(condition: Any) -> str:
    """The claim, the word and the range over seeds, in digits that count for small numbers."""
    gaps = [gap for gap in condition.gaps if gap is not None]
    ends = f"{min(gaps):.1e} to {max(gaps):.1e}, seeds {len(gaps)}"
    return f"{condition.claim}: {condition.word}, {ends}."


def notes(seeds: Seeds) -> list[str]:
    """Where the two differ on purpose, and by how much here."""

    def of(name: str) -> str:
        values = [found["differences"][name] for found in seeds]
        low, high = (f"{end:.4g}" for end in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    same = sum(all(found[key]["same_rows"] for key, _, _ in cells()) for found in seeds)
    unspelled = sum(found["differences"]["same_rows_without_bos"] for found in seeds)
    return [
        "BOS: TRL writes the tokens of a text as its tokenizer does, which here begins with no "
        "BOS; our text path puts one in front. With BOS spelled in TRL's prompts its rows are ours "
        f"in {same} of {len(seeds)} seeds in all stages, without in {unspelled}. Both end every "
        "answer with EOS.",
        "Balance: TRL recomputes Mixtral's loss over all layers at once from the router's logits, "
        f"weight 1 adds {of('balance_trl')} (even: experts per token, 2); ours is a mean over "
        f"layers, {of('balance_ours')} (even: 1), and router_aux_loss_coef stays 0 in our "
        "configuration so that TRL adds none unasked. Our z-loss, selection bias and scopes of a "
        "whole step are not known to TRL, and its reward trainer balances nothing.",
        f"Label smoothing 0.1 changes TRL's sigmoid DPO loss by {of('smoothing_trl')} (it is "
        f"not used there) and ours by {of('smoothing_ours')} (cDPO).",
        "PAD as EOS: Hugging Face's classification head then reads the score one token early, "
        f"which moves TRL's reward loss of a Llama by {of('eos_pad_trl')}; ours reads the mask and "
        "does not move.",
        "Reference: given a model that was never saved, TRL's DPO asks for an explicit ref_model; "
        "it got one here.",
        "Reward head: that of Hugging Face's Llama has no bias; ours has one. Bradley-Terry does "
        "not see it, its gradient is rounding that Adam scales to steps, and after both trainings "
        f"it differs by up to {max(found['moe_rm']['bias_gap'] for found in seeds):.1e}; it is no "
        "part of the weights above. Normalising takes it away.",
        "Weights after training: where a gradient is of the size of rounding, Adam's eps of 1e-8 "
        "lets it make whole steps, so two trainings that agree in every loss can part (largest gap "
        f"{max(found[key]['weight_gap'] for found in seeds for key, _, _ in cells()):.1e}).",
    ]


QUESTION = Question(name=EXPERIMENT, asks=ASKS, rule=RULE, plan=plan, gather=gather)


def run(options: Options) -> dict[str, Any]:
    """Run or resume the experiment; returns the summary."""
    return answer(QUESTION, options)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(QUESTION, argv)


if __name__ == "__main__":
    sys.exit(main())
