"""The same number of tries for every method, on a seed that is never reported.

Selection sees what a user would have: the learned reward, and whether the text is still text
(perplexity under the SFT policy at most 1.5 times SFT's own). Gold plays no part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.lab import tales
from experiments.lab.grid import Job, report, run_grid
from experiments.lab.judging import measure_arm
from experiments.lab.presets import SCALES, BestOfNArm, DPOArm, PPOArm, Scale
from experiments.lab.seed import Seed
from experiments.lab.stages import (
    collect_pairs,
    pretrain,
    supervised_finetune,
    train_dpo,
    train_ppo,
    train_reward_model,
)
from sft.run import write_json_atomic

TUNING_SEED = 9001
MAX_PERPLEXITY_RATIO = 1.5
NUM_PROMPTS = 128

# (beta, lr) and (KL coefficient, lr).
FULL_DPO = ((0.1, 1e-4), (0.1, 3e-4), (0.3, 3e-4), (0.3, 6e-4))
LORA_DPO = ((0.1, 1e-3), (0.1, 3e-3), (0.3, 1e-3), (0.3, 3e-3))
FULL_PPO = ((0.1, 2e-4), (0.2, 3e-4), (0.2, 5e-4), (0.3, 5e-4))
LORA_PPO = ((0.1, 1e-3), (0.2, 1e-3), (0.1, 2e-3), (0.2, 2e-3))

Arm = DPOArm | PPOArm | BestOfNArm


def trials(scale: Scale, *, lora: bool = False) -> dict[str, tuple[Arm, ...]]:
    """The settings that are tried; as many for each method. Adapters take more steps, higher lr."""
    dpo, ppo = scale.dpo, scale.ppo
    if lora:
        dpo = replace(dpo, epochs=3 * scale.dpo.epochs)
        tried_dpo, tried_ppo = LORA_DPO, LORA_PPO
    else:
        tried_dpo, tried_ppo = FULL_DPO, FULL_PPO
    return {
        "dpo": tuple(replace(dpo, beta=beta, lr=lr) for beta, lr in tried_dpo),
        "ppo": tuple(replace(ppo, kl_coef=coef, lr=lr) for coef, lr in tried_ppo),
        "best_of_n": tuple(BestOfNArm(n=n) for n in (4, 8, 16, 32)),
    }


def validation_prompts(scale: Scale) -> list[str]:
    """Held-out prompts that the evaluator does not use."""
    every = tales.prompts(0, scale.num_eval_prompts + NUM_PROMPTS, split="held_out")
    return every[scale.num_eval_prompts :]


def _seed(scale: str, folder: Path, lora_rank: int, job: str) -> Seed:
    return Seed(
        seed=TUNING_SEED,
        scale=SCALES[scale],
        folder=folder / "stages",
        arms=folder / "arms",
        lora_rank=lora_rank,
        experiment="compare-tuning",
        mirror=False,
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def trunk(scale: str, folder: Path, lora_rank: int) -> None:
    seed = _seed(scale, folder, lora_rank, "trunk")
    for stage, function in (("base", pretrain), ("sft", supervised_finetune)):
        if not seed.is_done(stage):
            function(seed)
    collect_pairs(seed)
    if not seed.is_done("rm"):
        train_reward_model(seed)


def trial(scale: str, folder: Path, lora_rank: int, method: str, place: int) -> None:
    """Train one setting and write what selection may see."""
    name = f"{method}-{place}"
    seed = _seed(scale, folder, lora_rank, name)
    arm = trials(seed.scale, lora=lora_rank > 0)[method][place]
    if isinstance(arm, DPOArm) and not seed.is_done(name):
        train_dpo(seed, arm, name=name)
    elif isinstance(arm, PPOArm) and not seed.is_done(name):
        train_ppo(seed, arm, name=name)
    best = arm if isinstance(arm, BestOfNArm) else None
    measured, _ = measure_arm(
        seed, "best_of_n" if best else name, validation_prompts(seed.scale), best=best
    )
    write_json_atomic(folder / f"{name}.json", {"arm": asdict(arm), **measured.metrics})


def measure_sft(scale: str, folder: Path, lora_rank: int) -> None:
    seed = _seed(scale, folder, lora_rank, "sft")
    measured, _ = measure_arm(seed, "sft", validation_prompts(seed.scale))
    write_json_atomic(folder / "sft.json", measured.metrics)


def choose(rows: Sequence[Mapping[str, Any]], *, sft_perplexity: float) -> int:
    """Place of the highest learned reward among the rows whose text stays near SFT's.

    If none does, the one whose perplexity is lowest.
    """
    limit = MAX_PERPLEXITY_RATIO * sft_perplexity
    allowed = [i for i, row in enumerate(rows) if row["reference_perplexity"] <= limit]
    if not allowed:
        return min(range(len(rows)), key=lambda i: rows[i]["reference_perplexity"])
    return max(allowed, key=lambda i: rows[i]["proxy_reward"])


def tune(*, scale: str, lora_rank: int, processes: int, folder: Path) -> dict[str, Any]:
    """Run all trials and print and write which setting of each method is chosen."""
    import json

    base = (scale, folder, lora_rank)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(name="trunk", function=trunk, arguments=base, weight=4),
        Job(name="sft", function=measure_sft, arguments=base, after=("trunk",), weight=0.1),
    ]
    settings = trials(SCALES[scale], lora=lora_rank > 0)
    for method, weight in (("ppo", 3.0), ("dpo", 1.0), ("best_of_n", 0.5)):
        jobs += [
            Job(
                name=f"{method}-{place}",
                function=trial,
                arguments=(*base, method, place),
                after=("trunk",),
                weight=weight,
            )
            for place in range(len(settings[method]))
        ]
    run_grid(jobs, processes=processes)
    sft = json.loads((folder / "sft.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "seed": TUNING_SEED,
        "rule": "highest learned reward among trials with perplexity under SFT at most "
        f"{MAX_PERPLEXITY_RATIO} times SFT's own",
        "sft": sft,
        "methods": {},
    }
    for method in settings:
        rows = [
            json.loads((folder / f"{method}-{i}.json").read_text(encoding="utf-8"))
            for i in range(len(settings[method]))
        ]
        place = choose(rows, sft_perplexity=sft["reference_perplexity"])
        found["methods"][method] = {"trials": rows, "chosen": place}
        for i, row in enumerate(rows):
            mark = "*" if i == place else " "
            print(
                f"{mark} {method} {row['arm']}  proxy {row['proxy_reward']:+.3f}  "
                f"kl {row['kl_sequence']:.2f}  perplexity {row['reference_perplexity']:.2f}  "
                f"length {row['length']:.1f}"
            )
    write_json_atomic(folder / "tuning.json", found)
    return found
