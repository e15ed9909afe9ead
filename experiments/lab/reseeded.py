"""A stage trained once more from the same start with another seed: what chance alone moves.

The decision to know: the second training begins from copies of the first one's inputs (base model,
SFT model, pairs, reward model) in a folder of its own. What the seed draws is drawn anew: SFT's
examples and their order, the split and the order of the pairs, the reward model's fresh head, PPO's
prompts and samples.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from experiments.lab.seed import Seed

# Between a seed and its second training; seeds closer than this would share a draw.
OFFSET = 10_000
# What a stage of the pipeline reads, relative to the seed's folder.
INPUTS = {
    "sft": ("tokenizer", "base/final"),
    "rm": ("tokenizer", "base/final", "sft/final", "pairs.json"),
    "dpo": ("tokenizer", "base/final", "sft/final", "pairs.json", "rm/final"),
    "ppo": ("tokenizer", "base/final", "sft/final", "pairs.json", "rm/final"),
}


def reseeded(seed: Seed, stage: str) -> Seed:
    """The seed as the second training of this stage sees it, its inputs in place.

    Raises FileNotFoundError if the first training has not left an input yet.
    """
    folder = seed.folder / f"again-{stage}"
    for name in INPUTS[stage]:
        _lend(seed.folder / name, folder / name)
    return replace(seed, seed=seed.seed + OFFSET, folder=folder, arms=folder / "arms")


def _lend(source: Path, target: Path) -> None:
    """A whole copy or none, so that a killed run finds no half of one."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    if source.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
    else:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
