"""What every experiment's command does alike: options, a resumable run, tuning, the end.

The decision to know: an experiment gives a plan of jobs that talk through files, and a function
that reads those files back into a summary; nothing else is its own, so that a stopped run goes on
and a finished one can be gathered again. Nothing here imports torch.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe.errors import UserError
from sft.flags import parse
from sft.run import Run, config_hash

STATE_KEYS = ("out", "resume", "overwrite", "processes", "tune", "mirror")
CHOSEN = "rates"  # the setting that a tuning is there to find

Mirror = Literal["wandb", "none"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every experiment that is a grid of arms and seeds."""

    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "seeds, paired over arms"})
    scale: Literal["laptop", "debug"] = field(
        default="laptop", metadata={"help": "laptop: minutes; debug: seconds"}
    )
    processes: int = field(default=2, metadata={"help": "jobs at a time, one thread each"})
    out: Path | None = field(default=None, metadata={"help": "folder of the run"})
    overwrite: bool = field(default=False, metadata={"help": "empty --out first"})
    resume: Path | None = field(default=None, metadata={"help": "continue this run's folder"})

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {list(self.seeds)}: give each seed once, at least one.")
        if self.processes < 1:
            raise UserError(f"--processes {self.processes} must be at least 1.")
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise UserError("--resume names the run's folder: leave out --out and --overwrite.")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {key: value for key, value in asdict(self).items() if key not in STATE_KEYS}


@dataclass(frozen=True, kw_only=True)
class TunedOptions(Options):
    """Options of an experiment that has learning rates to try."""

    tune: bool = field(
        default=False, metadata={"help": "try the learning rates on the tuning seed instead"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tune and (self.resume is not None or self.overwrite):
            raise UserError(
                "--tune takes neither --resume nor --overwrite: it continues by itself."
            )


@dataclass(frozen=True, kw_only=True)
class MirroredOptions(Options):
    """Options of an experiment whose metrics are mirrored."""

    mirror: Mirror = field(
        default="wandb", metadata={"help": "wandb: mirror the metrics (offline without a key)"}
    )


def mirror_of(options: Options) -> Mirror:
    """Where the metrics are mirrored; an experiment without a mirror has none."""
    return options.mirror if isinstance(options, MirroredOptions) else "none"


@dataclass(frozen=True, kw_only=True)
class Question:
    """An experiment: its name, what it asks, its rule, and how it answers.

    plan: the jobs of a run in a folder. gather: what is its own in summary.json (see `summarised`),
    from what the jobs left there. tune: tries the learning rates in a folder and returns what was
    chosen; None where nothing is tuned. tried: the rates that it tries.
    mirrored: whether the run takes --mirror.
    settings: what decides the result and is no option (rates, designs, sizes), as plain data. A run
    is resumed only with the settings that it was begun with, and so are a tuning's trials, apart
    from `rates`, which they are there to find.
    """

    name: str
    asks: str
    rule: str
    plan: Callable[[Options, Path], list[Any]]
    gather: Callable[[Options, Path], dict[str, Any]]
    tune: Callable[[Path, Options], dict[str, Any]] | None = None
    tried: Sequence[float] = ()
    mirrored: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mirrored and self.tune is not None:
            raise ValueError(f"{self.name}: a tuned experiment has no mirror yet")
        if self.tried and self.tune is None:
            raise ValueError(f"{self.name}: tried has no effect without tune")

    @property
    def options(self) -> type[Options]:
        """The options that have an effect here; all others are unknown to the command."""
        if self.mirrored:
            return MirroredOptions
        return Options if self.tune is None else TunedOptions

    @property
    def settings_hash(self) -> dict[str, str]:
        """The settings' hash under its name; empty without settings."""
        return {"settings_hash": config_hash(self.settings)} if self.settings else {}

    def identity(self, options: Options) -> dict[str, Any]:
        """What decides the result: options, and the experiment's own settings as their hash."""
        return {**options.identity, **self.settings_hash}

    def trials_identity(self, options: Options) -> dict[str, Any]:
        """What a tuning's trials follow from."""
        fixed = {key: value for key, value in self.settings.items() if key != CHOSEN}
        return {
            "experiment": self.name,
            "scale": options.scale,
            **({"settings_hash": config_hash(fixed)} if fixed else {}),
            **({"tried": list(self.tried)} if self.tried else {}),
        }


def summarised(question: Question, options: Options, *, folder: Path) -> dict[str, Any]:
    """summary.json from what the jobs left: what every run says, then what is the question's."""
    from experiments.lab.runfiles import commit_of

    return {
        "schema": 1,
        "experiment": question.name,
        "question": question.asks,
        "status": "done",
        "config_hash": config_hash(question.identity(options)),
        **question.settings_hash,
        "commit": commit_of(folder),
        "seeds": list(options.seeds),
        **question.gather(options, folder),
    }


def answer(question: Question, options: Options) -> dict[str, Any]:
    """Run or resume the experiment; returns the summary."""
    from experiments.lab.begun import check_settings, keep_settings
    from experiments.lab.finish import end_run
    from experiments.lab.grid import run_grid

    if options.resume is not None:
        state = Run.open(options.resume, options.identity, ignore=STATE_KEYS)
        check_settings(state.folder, question.settings)
    else:
        state = Run.create(
            Path("results"),
            question.name,
            options.identity,
            out=options.out,
            overwrite=options.overwrite,
        )
        keep_settings(state.folder, question.settings)
    folder = state.folder
    if state.finished:
        print(f"{folder} is finished; nothing to resume.")
        held: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return held
    seeds = " ".join(map(str, options.seeds))
    print(f"{question.name}  scale {options.scale}  seeds {seeds}  {folder}")
    print(f" rule  {question.rule}", flush=True)
    with state:
        try:
            run_grid(question.plan(options, folder), processes=options.processes)
        except KeyboardInterrupt:
            again = f"python -m experiments.{question.name} --resume {folder}"
            print(f"\nstopped; continue with: {again}")
            raise
        summary = summarised(question, options, folder=folder)
        state.write_json("summary.json", summary)
        end_run(folder, summary, config=question.identity(options), mirror=mirror_of(options))
    return summary


def command(question: Question, argv: Sequence[str] | None = None) -> int:
    """The command of an experiment; returns its exit code. Raises UserError."""
    prog = f"python -m experiments.{question.name}"
    parsed = parse(question.options, argv, prog=prog, description=question.asks)
    options = parsed.config
    given = {name for name, origin in parsed.origins.items() if origin != "built-in"}
    if isinstance(options, TunedOptions) and options.tune:
        if "seeds" in given:
            raise UserError("--seeds has no effect with --tune, which runs its own: leave it out.")
        print(json.dumps(_tuned(question, options), indent=1))
        return 0
    if options.resume is not None:
        from experiments.lab.finish import as_stored

        options = as_stored(options, options.resume, given=given)
    answer(question, options)
    return 0


def _tuned(question: Question, options: Options) -> dict[str, Any]:
    """Tries the learning rates in a folder that is theirs alone; returns what was chosen."""
    from experiments.lab.begun import claim_trials

    assert question.tune is not None, "its options have no --tune"
    # Trials of two scales in one folder would be taken for each other's.
    name = "tuning" if options.scale == "laptop" else f"tuning-{options.scale}"
    folder = options.out or Path("results") / question.name / name
    claim_trials(folder, question.trials_identity(options))
    return question.tune(folder, options)
