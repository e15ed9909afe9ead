"""Jobs with dependencies; functions come from the standard library so that workers find them."""

import operator
import os
from pathlib import Path

import pytest

from experiments.lab.grid import Job, JobFailed, State, run_grid


def test_jobs_run_after_those_they_name_and_are_reported_when_done(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    done: list[str] = []
    jobs = [
        Job(name="inner", function=os.mkdir, arguments=(str(inner),), after=("outer",)),
        Job(name="outer", function=os.mkdir, arguments=(str(tmp_path / "a"),)),
    ]
    run_grid(jobs, processes=2, on_done=done.append, quiet=True)
    assert inner.is_dir()
    assert done == ["outer", "inner"]


def test_a_job_that_raises_is_named_with_its_reason() -> None:
    jobs = [Job(name="s0 dpo", function=operator.truediv, arguments=(1, 0))]
    with pytest.raises(JobFailed, match="s0 dpo: ZeroDivisionError: division by zero"):
        run_grid(jobs, processes=1, quiet=True)


def test_the_time_left_counts_how_far_running_jobs_are() -> None:
    trunk = Job(
        name="trunk",
        function=operator.add,
        arguments=(1, 2),
        weight=3.0,
        stages=(("pretrain", 3.0), ("sft", 1.0)),
    )
    assert trunk.share_done("pretrain", 50, 100) == 0.375
    assert trunk.share_done("sft", 0, 10) == 0.75
    assert trunk.share_done("sft", 10, 10) == 1.0
    arm = Job(name="dpo", function=operator.add, arguments=(1, 2))
    assert arm.share_done("whatever", 1, 4) == 0.25
    state = State([trunk, arm])
    state.hear("trunk", "sft", 0, 10)
    assert state.share() == 3.0 * 0.75 / 4.0
    state.done.add("trunk")
    assert state.share() == 0.75
