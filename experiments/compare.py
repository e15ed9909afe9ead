"""Do DPO, PPO and best-of-n improve on supervised fine-tuning, when all see the same preferences?

Question: starting from one SFT policy, one set of preference pairs and one reward model learned
from them, how much gold reward does each method gain, what does it cost in KL, in text quality and
in forgetting, and what does it do to the routing of the mixture of experts?

Published: RLHF policies are preferred over their SFT baselines (Ouyang et al. 2022: a win rate of
85 +- 3 % over GPT-3, 71 +- 4 % over few-shot GPT-3); DPO matches PPO on controlled sentiment
(Rafailov et al. 2023, figure 2). A popular handbook adds that DPO moves the model far and PPO
little.

Arms: base, few_shot, sft, dpo, ppo, best_of_n. DPO sees the pairs; PPO and best-of-n see the reward
model learned from them; gold belongs to the evaluator and, as the simulated annotators, to the
labels. Each method had the same number of tuning trials on a seed that is not reported, judged by
learned reward alone. Worlds (--world): `tales`, our own grammar and a model pretrained on it, gold
known exactly; `stories`, a given language model (--model DIR) made a mixture of experts
(--upcycle), continuations of story openings, gold VADER's sentiment of the continuation. Stories
has no few-shot arm: a continuation has no form that worked examples could show. The world `pairs`
asks another question of a given model, what a reward model and DPO learn from a file of preferences
(--data FILE), and is told in experiments.lab.pairs_world.

Cost: about 8 minutes on 2 cores for 3 seeds in tales, about 6 in stories on a model of 260,000
weights.

Verdict rule, fixed before the run: REPRODUCED if DPO, PPO and best-of-n are each BETTER than SFT in
gold reward (95 % interval of the paired seed differences above 0), NOT REPRODUCED if any is WORSE,
else INCONCLUSIVE; the same in both worlds. In stories a method whose gain comes with broken text is
called DEGENERATE beside its word (experiments.lab.degenerate). That DPO's reward at equal KL is at
least PPO's (Rafailov et al. 2023, figure 2) is not judged here: their frontier is 22 trainings at
several betas, and the points along one training of ours are no frontier.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from sft.flags import main_guard, parse
from sft.run import Run, config_hash, write_json_atomic

EXPERIMENT = "compare"
ARMS = ("base", "few_shot", "sft", "dpo", "ppo", "best_of_n")
METHODS = ("dpo", "ppo", "best_of_n")
STAGES = ("base", "sft", "rm", "dpo", "ppo")
QUESTION = (
    "Do DPO, PPO and best-of-n improve on SFT in gold reward when all see the same preferences, "
    "and what does it do to text, forgetting and routing?"
)
RULE = (
    "REPRODUCED if DPO, PPO and best-of-n are each BETTER than SFT in gold_reward (95 % interval "
    "of paired seed differences above 0); NOT REPRODUCED if any is WORSE; else INCONCLUSIVE"
)
# Metric -> (higher is better, half-width inside which a difference does not matter), per world.
# Fixed before the reported seeds ran; in the metric's own units.
METRICS: Mapping[str, tuple[bool, float]] = {
    "gold_reward": (True, 0.1),
    "proxy_reward": (True, 0.2),
    "kl_sequence": (False, 0.5),
    "win_rate": (True, 0.03),
    "length": (False, 1.0),
    "distinct_2": (True, 0.02),
    "reference_perplexity": (False, 0.1),
    "base_perplexity": (False, 0.2),
}
WORLD_METRICS: Mapping[str, Mapping[str, tuple[bool, float]]] = {
    "tales": METRICS,
    # VADER's compound lies between -1 and 1, with about half of tales' spread.
    "stories": {**METRICS, "gold_reward": (True, 0.05), "original_perplexity": (False, 0.5)},
}
EXTRA_METRICS = ("ended", "tokens_generated", "tokens_trained")
STATE_KEYS = ("out", "resume", "overwrite", "processes", "mirror", "tune")
STORIES_KEYS = ("model", "upcycle", "target", "sft_data")
# The options that a world has of its own; those of the others have no effect in it.
WORLD_KEYS: Mapping[str, tuple[str, ...]] = {
    "tales": (),
    "stories": STORIES_KEYS,
    "pairs": ("data", "model", "upcycle", "sft", "max_length"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the comparison."""

    world: Literal["tales", "stories", "pairs"] = field(
        default="tales",
        metadata={
            "help": "tales: our own grammar; stories: a given model's story continuations; pairs: "
            "a file of preferences"
        },
    )
    model: Path | None = field(
        default=None, metadata={"help": "stories, pairs: folder of a causal language model"}
    )
    upcycle: str = field(
        default="8x2",
        metadata={
            "help": "stories, pairs: experts x experts per token, or none to leave the model as is"
        },
    )
    target: Literal["positive", "negative"] = field(
        default="positive", metadata={"help": "stories: the sentiment that gold rewards"}
    )
    sft_data: Path | None = field(
        default=None, metadata={"help": "stories: what SFT learns; default our own tales"}
    )
    data: Path | None = field(default=None, metadata={"help": "pairs: file of preferences"})
    sft: bool = field(
        default=True, metadata={"help": "pairs: learn the chosen answers before all else"}
    )
    max_length: int = field(
        default=0, metadata={"help": "pairs: tokens of prompt and answer; 0 for the scale's own"}
    )
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "seeds, paired over arms"})
    scale: Literal["laptop", "debug"] = field(
        default="laptop", metadata={"help": "laptop: minutes; debug: seconds"}
    )
    peft: Literal["full", "lora"] = field(
        default="full", metadata={"help": "what SFT, reward model, DPO and PPO train"}
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of the adapters, with --peft lora"})
    processes: int = field(default=2, metadata={"help": "jobs at a time, one thread each"})
    mirror: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "wandb: mirror the metrics (offline without a key)"}
    )
    out: Path | None = field(default=None, metadata={"help": "folder of the run"})
    overwrite: bool = field(default=False, metadata={"help": "empty --out first"})
    resume: Path | None = field(default=None, metadata={"help": "continue this run's folder"})
    tune: bool = field(
        default=False, metadata={"help": "try each method's settings on the tuning seed instead"}
    )

    def __post_init__(self) -> None:
        from moe.errors import UserError

        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {list(self.seeds)}: give each seed once, at least one.")
        if (self.peft == "lora") != (self.lora_rank > 0):
            raise UserError(
                f"--peft {self.peft} with --lora-rank {self.lora_rank}: adapters need --peft lora "
                "and a rank of at least 1, such as --lora-rank 8; a full update takes neither."
            )
        if self.tune and (self.resume is not None or self.overwrite):
            raise UserError(
                "--tune takes neither --resume nor --overwrite: it continues by itself."
            )
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise UserError("--resume names the run's folder: leave out --out and --overwrite.")
        if self.processes < 1:
            raise UserError(f"--processes {self.processes} must be at least 1.")
        if self.resume is not None:  # the run's own world takes the place of this one
            return
        if self.world == "stories":
            _check_stories(self)
        if self.world == "pairs":
            pairs_config(self)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        _refuse_options_of_other_worlds(self.world, changed)


def _check_stories(config: Config) -> None:
    from experiments.lab.worlds import parse_upcycle
    from moe.errors import UserError

    if config.model is None:
        raise UserError(
            "--world stories needs a language model: give --model DIR, a folder with config.json, "
            "weights and a tokenizer."
        )
    parse_upcycle(config.upcycle)


def _foreign_keys(world: str) -> tuple[str, ...]:
    """The options that other worlds have and this one has not."""
    every = dict.fromkeys(name for keys in WORLD_KEYS.values() for name in keys)
    return tuple(name for name in every if name not in WORLD_KEYS[world])


def _refuse_options_of_other_worlds(world: str, given: Collection[str]) -> None:
    from moe.errors import UserError

    for name in _foreign_keys(world):
        if name in given:
            flag = name.replace("_", "-")
            takers = " or ".join(f"--world {w}" for w, keys in WORLD_KEYS.items() if name in keys)
            why = ", which makes its own model and text" if world == "tales" else ""
            raise UserError(
                f"--{flag} has no effect in the world {world}{why}: leave it out, or give {takers}."
            )


def pairs_config(config: Config) -> Any:
    """The options as the world `pairs` takes them."""
    from experiments.lab.pairs_config import PairsConfig
    from moe.errors import UserError

    if config.data is None or config.model is None:
        raise UserError(
            "--world pairs needs preferences and a language model: give --data FILE and "
            "--model DIR."
        )
    if config.tune or config.peft == "lora":
        raise UserError(
            f"--{'tune' if config.tune else 'peft lora'} has no effect in the world pairs, which "
            "trains all weights with fixed settings: leave it out."
        )
    names = (*WORLD_KEYS["pairs"], "seeds", "scale", "processes", "mirror")
    folder = {name: getattr(config, name) for name in ("out", "overwrite", "resume")}
    return PairsConfig(**{name: getattr(config, name) for name in names}, **folder)


def world_options(config: Config) -> Any:
    """What the worker processes open the world by."""
    from experiments.lab.worlds import WorldOptions

    assert config.world != "pairs", "pairs has a grid of its own"
    own = {name: getattr(config, name) for name in STORIES_KEYS}
    return WorldOptions(name=config.world, scale=config.scale, **own)


def _world(config: Config) -> Any:
    from experiments.lab.worlds import open_world

    return open_world(world_options(config))


def arms_of(world: Any) -> tuple[str, ...]:
    """The arms that a world has, in their order."""
    return tuple(arm for arm in ARMS if arm != "few_shot" or world.scale.few_shot)


# Jobs: each runs in a worker process and leaves its result on disk.


def _seed(config: Config, folder: Path, seed: int, job: str) -> Any:
    from experiments.lab.grid import report
    from experiments.lab.seed import Seed

    return Seed(
        seed=seed,
        world=_world(config),
        folder=folder / "stages" / f"s{seed}",
        arms=folder,
        lora_rank=config.lora_rank,
        experiment=EXPERIMENT,
        mirror=config.mirror == "wandb",
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def trunk_job(config: Config, folder: Path, seed_number: int) -> None:
    """Base model, SFT, pairs, reward model: what all arms of a seed share."""
    from experiments.lab import stages

    seed = _seed(config, folder, seed_number, f"s{seed_number} trunk")
    for stage, run_stage in (("base", stages.make_base), ("sft", stages.supervised_finetune)):
        if not seed.is_done(stage):
            run_stage(seed)
    stages.collect_pairs(seed)
    if not seed.is_done("rm"):
        stages.train_reward_model(seed)


def arm_job(config: Config, folder: Path, seed_number: int, arm: str) -> None:
    """Train an arm and judge it."""
    from experiments.lab import stages

    seed = _seed(config, folder, seed_number, f"s{seed_number} {arm}")
    if arm == "dpo" and not seed.is_done(arm):
        stages.train_dpo(seed, seed.tuned.dpo)
    if arm == "ppo" and not seed.is_done(arm):
        stages.train_ppo(seed, seed.tuned.ppo)
    _judge(seed, arm)


def judge_job(config: Config, folder: Path, seed_number: int) -> None:
    """Judge what is not trained here, and record the routing of the trunk's stages."""
    seed = _seed(config, folder, seed_number, f"s{seed_number} judge")
    arms = [arm for arm in arms_of(seed.world) if arm not in ("dpo", "ppo")]
    for place, arm in enumerate(arms):
        seed.progress(f"judge {arm}", place, len(arms))
        _judge(seed, arm)
    _record_routing(seed, "rm")


def _judge(seed: Any, arm: str) -> None:
    """Leaves `<arm>-s<seed>/judged.json`; does nothing if it is there."""
    from experiments.lab.judging import judge_arm, judge_frontier

    path = seed.arm_folder(arm) / "judged.json"
    if path.is_file():
        return
    with seed.metered(f"judge-{arm}") as meter:
        found = judge_arm(seed, arm, best=seed.scale.best_of_n)
        if arm in STAGES:
            _record_routing(seed, arm)
    # What is not trained costs what its answers cost.
    facts = meter.facts() if arm in ("few_shot", "best_of_n") else seed.facts(arm)
    result = {
        "metrics": {
            **found["metrics"],
            "tokens_generated": facts.get("tokens_generated", found["drawn"]),
            "tokens_trained": facts.get("tokens_trained", 0),
        },
        "texts": found["texts"],
        "gold": found["gold"],
        "frontier": judge_frontier(seed, arm),
        "timings": {
            "seconds": facts["seconds"],
            "peak_mib": facts["peak_mib"],
            "judge": meter.facts(),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, result)


def _record_routing(seed: Any, stage: str) -> None:
    from experiments.lab.judging import routing_of

    path = seed.arm_folder(stage) / "routing.json"
    if not path.is_file():
        found = routing_of(seed, stage)
        if found is not None:
            write_json_atomic(path, found)


def plan(config: Config, folder: Path) -> list[Any]:
    """The grid of a run, in the order in which it should start."""
    from experiments.lab.grid import Job

    jobs = []
    for seed in config.seeds:
        trunk = f"s{seed} trunk"
        jobs.append(
            Job(
                name=trunk,
                function=trunk_job,
                arguments=(config, folder, seed),
                weight=0.55,
                stages=(("pretrain", 0.5), ("sft", 0.2), ("pairs", 0.1), ("rm", 0.2)),
            )
        )
        for arm, weight in (("ppo", 0.25), ("dpo", 0.12)):
            jobs.append(
                Job(
                    name=f"s{seed} {arm}",
                    function=arm_job,
                    arguments=(config, folder, seed, arm),
                    after=(trunk,),
                    weight=weight,
                )
            )
        jobs.append(
            Job(
                name=f"s{seed} judge",
                function=judge_job,
                arguments=(config, folder, seed),
                after=(trunk,),
                weight=0.08,
            )
        )
    return jobs


# From the files of the jobs to the summary.


def _read(folder: Path, arm: str, seed: int, name: str) -> dict[str, Any]:
    path = folder / f"{arm}-s{seed}" / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def gather(config: Config, folder: Path, *, seeds: Sequence[int], status: str) -> dict[str, Any]:
    """summary.json from what the jobs of these seeds left."""
    from experiments.lab.evaluation import win_rate

    world, metric_names = _world(config), (*WORLD_METRICS[config.world], *EXTRA_METRICS)
    arms: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms_of(world)}
    for seed in seeds:
        sft = _read(folder, "sft", seed, "judged.json")
        for arm in arms:
            judged = _read(folder, arm, seed, "judged.json")
            metrics = {**judged["metrics"], "win_rate": win_rate(judged["gold"], sft["gold"])}
            for name in metric_names:
                arms[arm].setdefault(name, []).append(metrics[name])
    comparisons = _comparisons(arms, WORLD_METRICS[config.world])
    routing = _routing(folder, seeds)
    own = _of_world(world, folder, seeds, arms=arms, routing=routing)
    return {
        "schema": 1,
        "experiment": EXPERIMENT,
        "question": QUESTION,
        "status": status,
        "config_hash": config_hash(identity(config)),
        "commit": _commit(folder),
        "seeds": list(seeds),
        "arms": arms,
        "comparisons": comparisons,
        "routing": routing,
        "frontier": {
            arm: [_read(folder, arm, s, "judged.json")["frontier"] for s in seeds]
            for arm in ("dpo", "ppo")
        },
        "reward_model": _reward_models(folder, seeds),
        "verdict": {"word": verdict_word(comparisons), "rule": RULE, "threshold": 0.0},
        "claims": _claims(arms),
        **own,
        "notes": [
            *_notes(world, folder, seeds, arms=arms),
            *([*own["world"]["sentences"], own["world"]["degenerate_rule"] + "."] if own else ()),
        ],
        "timings": _timings(folder, seeds, arms=arms),
    }


def identity(config: Config) -> dict[str, Any]:
    """What decides the result: the configuration without where, how many processes, and logging.

    Options of another world have no effect, so they are no part of it.
    """
    idle = _foreign_keys(config.world)
    return {k: v for k, v in asdict(config).items() if k not in (*STATE_KEYS, *idle)}


def _commit(folder: Path) -> str | None:
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return environment.get("commit")


def _comparisons(
    arms: Mapping[str, Mapping[str, list[float]]], metrics: Mapping[str, tuple[bool, float]]
) -> list[dict[str, Any]]:
    from experiments.lab.verdict import compare

    found = []
    for arm in arms:
        if arm == "sft":
            continue
        for metric, (higher_is_better, margin) in metrics.items():
            result = compare(
                arms[arm][metric],
                arms["sft"][metric],
                margin=margin,
                higher_is_better=higher_is_better,
            )
            found.append({"arm": arm, "against": "sft", "metric": metric, **asdict(result)})
    return found


def verdict_word(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The rule in `RULE`, applied to the computed words."""
    words = [c["word"] for c in comparisons if c["metric"] == "gold_reward" and c["arm"] in METHODS]
    if words and all(word == "BETTER" for word in words):
        return "REPRODUCED"
    return "NOT REPRODUCED" if "WORSE" in words else "INCONCLUSIVE"


def _claims(arms: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    from experiments.lab.plots import label
    from experiments.lab.verdict import published_verdict

    claims = []
    for arm in METHODS:
        wins = arms[arm]["win_rate"]
        claims.append(
            {
                "claim": f"{label(arm)} beats SFT: win rate on held-out prompts (at least 60 %)",
                "published": "RLHF over its baselines: 71 to 85 % (Ouyang et al. 2022)",
                "ours": wins,
                "verdict": published_verdict(
                    [w - 0.5 for w in wins], published_sign=1, threshold=0.1
                ),
            }
        )
    gaps = [
        d - p for d, p in zip(arms["dpo"]["kl_sequence"], arms["ppo"]["kl_sequence"], strict=True)
    ]
    claims.append(
        {
            "claim": "DPO moves the model further than PPO (KL per sequence, threshold 0.5 nats)",
            "published": "a handbook's statement, not a published finding; both share one optimum",
            "ours": gaps,
            "verdict": published_verdict(gaps, published_sign=1, threshold=0.5),
        }
    )
    return claims


def _routing(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, list[Any]]]:
    """stage -> metric -> [per seed] of the recorded routing; empty for a model without experts."""
    routing: dict[str, dict[str, list[Any]]] = {}
    if not _stage_facts(folder, seeds[0], "base")["routed"]:
        return routing
    for stage in STAGES:
        for seed in seeds:
            for name, value in _read(folder, stage, seed, "routing.json").items():
                routing.setdefault(stage, {}).setdefault(name, []).append(value)
    return routing


def _reward_models(folder: Path, seeds: Sequence[int]) -> dict[str, list[Any]]:
    facts = [_stage_facts(folder, s, "rm") for s in seeds]
    pairs = [_pairs(folder, s) for s in seeds]
    return {
        "accuracy": [f["accuracy"] for f in facts],
        "accuracy_interval95": [f["accuracy_interval95"] for f in facts],
        "num_val_pairs": [f["num_val_pairs"] for f in facts],
        "label_accuracy": [p["label_accuracy"] for p in pairs],
    }


def _stage_facts(folder: Path, seed: int, stage: str) -> dict[str, Any]:
    path = folder / "stages" / f"s{seed}" / stage / "final" / "facts.json"
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def _pairs(folder: Path, seed: int) -> dict[str, Any]:
    path = folder / "stages" / f"s{seed}" / "pairs.json"
    pairs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return pairs


def _of_world(
    world: Any,
    folder: Path,
    seeds: Sequence[int],
    *,
    arms: Mapping[str, Mapping[str, list[float]]],
    routing: dict[str, Any],
) -> dict[str, Any]:
    """What a world with a given model tells beside the rest; nothing in a world without one."""
    from experiments.lab.degenerate import RULE as DEGENERATE_RULE
    from experiments.lab.degenerate import degenerate
    from experiments.lab.specialisation import specialisation_sentence

    given = world.facts()
    if not given:
        return {}
    losses = [_stage_facts(folder, seed, "sft")["held_out_loss"] for seed in seeds]
    shares = [_pairs(folder, seed)["ended_share"] for seed in seeds]
    before, after = ([loss[side] for loss in losses] for side in ("before", "after"))
    penalties = [world.missing_eos_penalty(share) for share in shares]
    sentences = [
        *world.sentences(before=before, after=after, ended=shares),
        *filter(None, [specialisation_sentence(routing, stage="sft", name="SFT")]),
    ]
    if not routing:
        sentences.append("The model has no experts, so there is no routing to tell.")
    return {
        "degenerate": degenerate(arms, METHODS, seeds=seeds),
        "world": {
            **given,
            "held_out_sft_loss_before": before,
            "held_out_sft_loss_after": after,
            "sft_ended_share": shares,
            "missing_eos_penalty": penalties,
            "degenerate_rule": DEGENERATE_RULE,
            "sentences": sentences,
        },
    }


def _timings(
    folder: Path, seeds: Sequence[int], *, arms: Collection[str]
) -> dict[str, dict[str, list[Any]]]:
    """Seconds and peak memory per stage and seed; `judge` is the evaluation of trained arms."""
    timings: dict[str, dict[str, list[Any]]] = {"seconds": {}, "peak_mib": {}}
    for seed in seeds:
        costs: dict[str, Mapping[str, Any]] = {}
        for stage, name in (("pairs", "pairs.json"), ("rm", "rm/final/facts.json")):
            path = folder / "stages" / f"s{seed}" / name
            costs[stage] = json.loads(path.read_text(encoding="utf-8"))
        judges = []
        for arm in arms:
            costs[arm] = _read(folder, arm, seed, "judged.json")["timings"]
            if arm in STAGES:
                judges.append(costs[arm]["judge"])
        peaks = [judge["peak_mib"] for judge in judges if judge["peak_mib"] is not None]
        costs["judge"] = {
            "seconds": sum(judge["seconds"] for judge in judges),
            "peak_mib": max(peaks, default=None),
        }
        for stage, cost in costs.items():
            for name, table in timings.items():
                table.setdefault(stage, []).append(cost[name])
    return timings


def _notes(
    world: Any,
    folder: Path,
    seeds: Sequence[int],
    *,
    arms: Mapping[str, Mapping[str, list[float]]],
) -> list[str]:
    notes = [
        "Peak memory is the resident set of the worker process during the stage, with the about "
        "500 MiB that its libraries take; seconds are those of all starts of a stage.",
        "The KL of best-of-n is the bound ln n - (n - 1) / n, not a sample.",
    ]
    if "few_shot" in arms:
        notes.append(
            "Few-shot is the base model with worked examples in its prompt; its proxy reward and "
            "KL read the same answer behind the plain prompt."
        )
    notes += world.notes
    for seed in seeds:
        notes += _stage_facts(folder, seed, "base")["notes"]
    sft_perplexity = arms["sft"]["reference_perplexity"]
    for arm in METHODS:
        ratios = [
            a / b for a, b in zip(arms[arm]["reference_perplexity"], sft_perplexity, strict=True)
        ]
        if max(ratios) > 1.5:
            notes.append(
                f"{arm}: perplexity under the SFT policy rises to {max(ratios):.2f} times SFT's "
                "own in the worst seed: its text has left the reference's."
            )
    notes.append(f"Best-of-n draws n = {world.scale.best_of_n.n} completions per prompt.")
    return sorted(set(notes), key=notes.index)


def write_samples(config: Config, folder: Path, *, count: int = 12) -> None:
    """The same held-out prompts before (SFT) and after, per arm and seed."""
    world = _world(config)
    for seed in config.seeds:
        sft = _read(folder, "sft", seed, "judged.json")
        for arm in arms_of(world):
            judged = _read(folder, arm, seed, "judged.json")
            prompts = world.held_out_prompts(len(judged["texts"]))
            rows = [
                {
                    "prompt": prompts[i],
                    "before": sft["texts"][i],
                    "after": judged["texts"][i],
                    "gold_before": sft["gold"][i],
                    "gold_after": judged["gold"][i],
                }
                for i in range(min(count, len(prompts)))
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path = folder / f"{arm}-s{seed}" / "samples.jsonl"
            path.write_text(text, encoding="utf-8")


# The command.


def run(config: Config) -> dict[str, Any]:
    """Run or resume the comparison; returns the summary."""
    from experiments.lab.grid import run_grid

    if config.world == "pairs":
        from experiments.lab.pairs_world import run_pairs

        return run_pairs(pairs_config(config))
    if config.resume is None:  # before a folder is made
        _world(config).check()
    state = _open_run(config)
    folder = state.folder
    if state.finished:
        print(f"{folder} is finished; nothing to resume.")
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary
    if config.resume is not None:
        _world(config).check()
    _print_header(config, folder)
    jobs = plan(config, folder)
    done: set[str] = set()

    def on_done(name: str) -> None:
        done.add(name)
        seed = name.split()[0]
        own = {job.name for job in jobs if job.name.split()[0] == seed}
        if own <= done and not any(s for s in shown):
            shown.append(seed)
            number = int(seed.removeprefix("s"))
            _show(gather(config, folder, seeds=(number,), status="running"))

    shown: list[str] = []
    with state:
        try:
            run_grid(jobs, processes=config.processes, on_done=on_done)
        except KeyboardInterrupt:
            print(f"\nstopped; continue with: python -m experiments.compare --resume {folder}")
            raise
        summary = gather(config, folder, seeds=config.seeds, status="done")
        write_samples(config, folder)
        state.write_json("summary.json", summary)
        finish(config, folder, summary)
    return summary


def _open_run(config: Config) -> Run:
    if config.resume is not None:
        return Run.open(config.resume, identity(config), ignore=STATE_KEYS)
    return Run.create(
        Path("results"), EXPERIMENT, identity(config), out=config.out, overwrite=config.overwrite
    )


def finish(config: Config, folder: Path, summary: Mapping[str, Any]) -> None:
    """Table, figures, report; the verdict to the mirror; the last lines on the console."""
    from experiments.lab.report import write_all
    from sft.tracking import Tracker

    with Tracker(
        folder / "report",
        group=EXPERIMENT,
        job_type="report",
        name="verdict",
        config=identity(config),
        mirror=config.mirror,
        console=None,
    ) as tracker:
        tracker.summary({"verdict": summary["verdict"]["word"], "rule": summary["verdict"]["rule"]})
        sync = tracker.sync_command
    path = write_all(folder)[0]
    _show(summary)
    print(f"\nreport  {path}")
    if sync:
        print(f"W&B     {sync.rsplit('/report/', 1)[0]}/*/wandb/offline-run-*   (offline copy)")


def _print_header(config: Config, folder: Path) -> None:
    world = _world(config)
    trained = f"lora rank {config.lora_rank}" if config.lora_rank else "full update"
    print(
        f"compare  world {config.world}, scale {config.scale}, {trained}   {folder}\n"
        f" model   {world.describe()}\n"
        f" seeds   {' '.join(map(str, config.seeds))}   {config.processes} processes, one thread "
        f"each\n arms    {', '.join(arms_of(world))}\n"
        f" rule    {RULE}",
        flush=True,
    )


def _show(summary: Mapping[str, Any]) -> None:
    from rich.console import Console

    from experiments.lab.tables import console_table, sentences

    console = Console(width=None if sys.stdout.isatty() else 140)
    seeds = summary["seeds"]
    if summary["status"] != "done":
        console.print(f"\nfirst table, seed {seeds[0]} alone")
    console.print(console_table(summary))
    if summary["status"] == "done":
        for sentence in sentences(summary):
            console.print(sentence)
        for sentence in summary.get("world", {}).get("sentences", ()):
            console.print(sentence)
        console.print(f"verdict: {summary['verdict']['word']}")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = parse(Config, arguments, prog="python -m experiments.compare", description=QUESTION)
    config = parsed.config
    given = {k for k, v in parsed.origins.items() if v != "built-in"}
    if config.resume is not None:
        config = _as_stored(config, given=given)
    _refuse_options_of_other_worlds(config.world, given)
    if config.tune:
        _refuse_idle_with_tune(given)
        from experiments.lab.tuning import tune

        own = f"-stories-{config.target}" if config.world == "stories" else ""
        folder = config.out or Path("results") / EXPERIMENT / f"tuning{own}-{config.peft}"
        tune(
            world_options(config),
            folder,
            lora_rank=config.lora_rank,
            processes=config.processes,
        )
    else:
        run(config)
    return 0


def _refuse_idle_with_tune(given: Collection[str]) -> None:
    from moe.errors import UserError

    for name in ("seeds", "mirror"):
        if name in given:
            raise UserError(
                f"--{name} has no effect with --tune, which runs its own seed and mirrors nothing: "
                "leave it out."
            )


def _as_stored(config: Config, *, given: Collection[str]) -> Config:
    """`--resume RUN` takes the run's own options; what is given beside it must agree with them."""
    assert config.resume is not None
    stored = Run.open(config.resume).config
    own: dict[str, Any] = {
        k: v for k, v in stored.items() if k not in STATE_KEYS and k not in given
    }
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    for name in ("model", "sft_data", "data"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    return replace(config, **values)


if __name__ == "__main__":
    sys.exit(main())
