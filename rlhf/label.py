"""`python -m rlhf.label RUN_A RUN_B --prompts FILE`: which of two models answers better?

A person judges, blind, in the terminal, or a model does (--judge). The decision to know: the same
command goes on where it was left, whoever is the rater; which answer was whose is told when a rater
has judged everything, or by --report.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import UserError
from sft.command import option
from sft.flags import Parsed, main_guard, parse

if TYPE_CHECKING:
    from rlhf.judge import Judge, Referee
    from rlhf.label_answers import Drawing
    from rlhf.label_files import LabelFiles, Pair

COMMAND = "rlhf.label"
RESULTS = Path("results") / "label"
OF_A_PERSON = ("rater", "answers")
OF_ENDPOINTS = ("judge_model", "judge_key_env", "judge_timeout", "judge_retries", "judge_tokens")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of rlhf.label."""

    run_a: str = field(metadata={"positional": True, "help": "model folder or run"})
    run_b: str = field(metadata={"positional": True, "help": "another one, or the same"})
    prompts: Path = field(metadata={"help": "data file; its prompts are taken"})
    num: int = option(50, "prompts, by lot; 0: all")
    out: Path | None = option(None, "preference file, .jsonl; none: under results/label/")
    rater: str = option("me", "name in the files")
    answers: Path | None = option(None, "keys from a file, not from the terminal")
    report: bool = option(False, "what the votes say so far; asks nothing")
    seed: int = option(0, "prompts, answers, order, positions")
    max_new_tokens: int = option(128, "tokens of an answer")
    temperature: float = option(1.0, "of the answers; 0: greedy")
    max_length: int = option(512, "tokens of prompt and answer")
    columns: tuple[str, ...] = option((), "our=theirs pairs, as instruction=question")
    template: str | None = option(None, "of both models; none: each its own")
    judge: str | None = option(None, "model folder or URL that judges in your place")
    criterion: str | None = option(None, "what the judge is to look at, a sentence")
    judge_model: str | None = option(None, "URL: name of the model there")
    judge_key_env: str | None = option(None, "URL: environment variable with the key")
    judge_timeout: float = option(60.0, "URL: seconds of one try")
    judge_retries: int = option(4, "URL: further tries")
    judge_tokens: int = option(16, "URL: of a reply; 0: as many as it likes")

    def __post_init__(self) -> None:
        for name, least in (
            *(("num", 0), ("judge_retries", 0), ("judge_tokens", 0)),
            *(("max_new_tokens", 1), ("max_length", 2)),
        ):
            if getattr(self, name) < least:
                raise UserError(
                    f"{_flag(name)} is {getattr(self, name)}: it must be at least {least}."
                )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature is {self.temperature:g}: it must be 0 or more.")
        if not (math.isfinite(self.judge_timeout) and self.judge_timeout > 0):
            raise UserError(f"--judge-timeout is {self.judge_timeout:g}: it must be above 0.")
        if self.max_new_tokens >= self.max_length:
            raise UserError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt within "
                f"--max-length {self.max_length}: give fewer."
            )
        if not self.rater.isprintable() or not self.rater.strip():
            raise UserError(f"--rater {self.rater!a} is no name: give letters.")
        if self.rater.startswith("judge:"):
            raise UserError(f"--rater {self.rater}: names that begin with judge: are of judges.")
        for name in ("judge", "criterion", "judge_model", "judge_key_env"):
            given = getattr(self, name)
            if given is not None and not given.strip():
                raise UserError(f"{_flag(name)} is empty: give it a text, or leave it out.")
        if self.judge is not None and self.is_endpoint and self.judge_model is None:
            raise UserError("--judge URL needs --judge-model, the name of a model there.")

    @property
    def is_endpoint(self) -> bool:
        return self.judge is not None and self.judge.startswith(("http://", "https://"))

    @property
    def idle(self) -> dict[str, str]:
        """Options without effect here, and the reason."""
        found: dict[str, str] = {}
        if self.report:
            names = (*OF_A_PERSON, "judge", "criterion", *OF_ENDPOINTS)
            return dict.fromkeys(names, "with --report, which asks nothing")
        if self.judge is None:
            found |= dict.fromkeys(("criterion", *OF_ENDPOINTS), "without --judge")
        else:
            found |= dict.fromkeys(OF_A_PERSON, "with --judge")
            if not self.is_endpoint:
                found |= dict.fromkeys(OF_ENDPOINTS, "with a --judge that is no URL")
        return found

    @property
    def column_names(self) -> dict[str, str]:
        names = {}
        for text in self.columns:
            ours, _, theirs = text.partition("=")
            if not (ours and theirs):
                raise UserError(f"--columns {text}: write our=theirs, as in instruction=question.")
            names[ours] = theirs
        return names

    @property
    def out_file(self) -> Path:
        if self.out is not None:
            return self.out
        names = [Path(run).resolve().name for run in (self.run_a, self.run_b)]
        return RESULTS / f"{names[0]}-vs-{names[1]}.jsonl"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_idle(parsed: Parsed[Config]) -> None:
    for name, reason in parsed.config.idle.items():
        if parsed.origins.get(name, "built-in") != "built-in":
            raise UserError(f"{_flag(name)} has no effect {reason}: leave it out.")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Label; returns the exit code."""
    parsed = parse(
        Config,
        argv,
        prog=f"python -m {COMMAND}",
        description="Judge the answers of two models blind, or let a model judge. Writes "
        "preferences that rlhf.train reads, and tells the win rate, the position bias and how far "
        "raters agree. The same command goes on where it was left.",
    )
    _refuse_idle(parsed)
    return label(parsed.config)


def label(config: Config) -> int:
    """The work of the command."""
    from rlhf.label_files import LabelFiles
    from rlhf.label_screen import keys_from, print_safely

    files = LabelFiles(out=config.out_file)
    files.refuse_foreign()
    # Asked first: a missing terminal or judge should not be found out after an hour of answers.
    keys = None if config.report or config.judge is not None else keys_from(config.answers)
    if config.judge is not None and not config.report:
        _check_judge(config, config.judge)
    if config.report and not files.answers.is_file():
        raise UserError(f"There is no {files.answers} to report on: label first, without --report.")
    if note := files.mend():
        print_safely(note)
    pairs = _pairs(config, files)
    if config.report:
        _tell(config, files, pairs)
        return 0
    if keys is None:
        _judge(config, files, pairs)
        left = 0
    else:
        left = _ask(config, files, pairs, keys)
    num_rows = files.rebuild(pairs)
    if left:
        print_safely(
            f"\n{left} left to judge, nothing is lost: go on by the same command, or see what the "
            "votes say by --report."
        )
    else:
        _tell(config, files, pairs)
    if num_rows:
        print_safely(f"in {files.out}: {num_rows} preferences, for rlhf.train --data")
    else:
        print_safely("There is no preference to train on yet.")
    return 0


def _pairs(config: Config, files: "LabelFiles") -> "list[Pair]":
    from transformers.utils import logging as transformers_logging

    from rlhf.label_answers import load_pairs
    from rlhf.label_screen import print_safely

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return load_pairs(
        (config.run_a, config.run_b),
        _drawing(config),
        prompts=config.prompts,
        columns=config.column_names,
        files=files,
        say=print_safely,
    )


def _drawing(config: Config) -> "Drawing":
    from rlhf.label_answers import Drawing

    return Drawing(**{f.name: getattr(config, f.name) for f in fields(Drawing)})


def _mark_identical(files: "LabelFiles", pairs: "list[Pair]", rater: str) -> int:
    """Pairs that look the same are ties of this rater, without asking; their number."""
    from rlhf.label_files import Vote
    from rlhf.label_screen import are_identical

    same = [pair for pair in pairs if are_identical(pair)]
    done = {vote.key for vote in files.read_votes() if vote.rater == rater}
    files.append(
        *(Vote(key=p.key, rater=rater, outcome="identical") for p in same if p.key not in done)
    )
    return len(same)


def _ask(config: Config, files: "LabelFiles", pairs: "list[Pair]", keys: Any) -> int:
    from rlhf.label_order import rating_order
    from rlhf.label_screen import are_identical, ask, print_safely

    rater = config.rater
    num_same = _mark_identical(files, pairs, rater)
    if num_same:
        print_safely(f"{num_same} of {len(pairs)} pairs are identical: ties, not asked.")
    asked = [pair.key for pair in pairs if not are_identical(pair)]
    order = rating_order(asked, rater=rater, seed=config.seed)
    return ask(pairs, order, rater=rater, files=files, keys=keys)


# --- the judge -----------------------------------------------------------------------------------


def _judge(config: Config, files: "LabelFiles", pairs: "list[Pair]") -> None:
    from rlhf.judge_cache import CachedJudge
    from rlhf.label_judge import PREFIX, judge_pairs
    from rlhf.label_screen import are_identical, print_safely

    referee = _referee(config)
    cache = CachedJudge(judge=referee.judge, file=files.judgements)
    referee.judge = cache
    rater = PREFIX + judge_name(config, referee)
    num_same = _mark_identical(files, pairs, rater)
    if num_same:
        print_safely(f"{num_same} of {len(pairs)} pairs are identical: ties, not asked.")
    different = [pair for pair in pairs if not are_identical(pair)]
    judged, unreadable = judge_pairs(different, referee, rater=rater, files=files)
    print_safely(
        f"{rater}: {judged} pairs in both orders, {cache.num_new} questions asked, "
        f"{unreadable} pairs without a readable reply (skipped)"
    )


def _check_judge(config: Config, judge: str) -> None:
    """Raises UserError for a judge that cannot be opened, without loading a model or asking one."""
    if config.is_endpoint:
        _open_judge(config)
        return
    from sft.models import find_model, tokenizer_of

    tokenizer_of(find_model(judge), None)


def judge_name(config: Config, referee: "Referee") -> str:
    """With a digest, so that another criterion or other weights vote under another name."""
    digest = hashlib.sha256(f"{referee.judge.identity}\n{referee.criterion}".encode()).hexdigest()
    return f"{config.judge_model or config.judge}#{digest[:6]}"


def _referee(config: Config) -> "Referee":
    from rlhf.judge import CRITERION, Referee

    return Referee(
        judge=_open_judge(config),
        criterion=CRITERION if config.criterion is None else config.criterion,
    )


def _open_judge(config: Config) -> "Judge":
    assert config.judge is not None
    if config.is_endpoint:
        from rlhf.judge_endpoint import EndpointJudge

        assert config.judge_model is not None
        return EndpointJudge(
            base_url=config.judge,
            model=config.judge_model,
            key_env=config.judge_key_env,
            timeout=config.judge_timeout,
            retries=config.judge_retries,
            max_tokens=config.judge_tokens,
        )
    import torch

    from rlhf.judge_local import open_local_judge

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return open_local_judge(config.judge, device=device)


# --- what came out -------------------------------------------------------------------------------


def _tell(config: Config, files: "LabelFiles", pairs: "list[Pair]") -> None:
    """Print the report and write OUT.summary.json."""
    from rlhf.label_report import label_report
    from rlhf.label_screen import print_safely
    from sft.run import redact, write_json_atomic

    report = label_report(files.read_votes(), pairs, a=config.run_a, b=config.run_b)
    print_safely("\n" + "\n".join(report.lines()))
    write_json_atomic(files.summary, redact(report))
    cut = sum(not answer.ended for pair in pairs for answer in (pair.a, pair.b))
    if cut:
        print_safely(f"{cut} of {2 * len(pairs)} answers were cut at --max-new-tokens")


if __name__ == "__main__":
    sys.exit(main())
