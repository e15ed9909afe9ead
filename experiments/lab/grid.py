"""Jobs with dependencies over a few processes, with progress; one torch thread each.

Jobs talk to each other through files alone, so a killed grid continues from what is on disk. The
order in which they finish has no influence on any result.
"""

import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

LINE_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A module-level function and its arguments; `after` names the jobs that must be done before.

    weight: its share of the whole work, for the estimate of the time left. stages: the stages it
    reports, in order, with their shares of the job; without them whatever it reports is all of it.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()
    weight: float = 1.0
    stages: tuple[tuple[str, float], ...] = ()

    def share_done(self, stage: str, step: int, total: int) -> float:
        """How much of the job is done when `stage` is at step / total."""
        part = step / total if total else 0.0
        names = [name for name, _ in self.stages]
        if stage not in names:
            return part
        weights = [weight for _, weight in self.stages]
        place = names.index(stage)
        return (sum(weights[:place]) + weights[place] * part) / sum(weights)


class JobFailed(RuntimeError):
    """A job raised; the message names it and its reason."""


_reports: Any = None


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The lab's models are small and its results must not depend on a card: the CPU, everywhere.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)  # two contended threads come out many times slower


def _end_with_parent() -> None:
    """A killed parent must not leave workers behind that go on writing into its run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def report(job: str, stage: str, step: int, total: int) -> None:
    """Called by a job: how far one of its stages is. Outside a grid it does nothing."""
    if _reports is not None:
        _reports.put((job, stage, step, total))


def _run_job(function: Callable[..., None], arguments: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


@dataclass
class State:
    """What is known while the grid runs."""

    jobs: Sequence[Job]
    start: float = field(default_factory=time.monotonic)
    done: set[str] = field(default_factory=set)
    stages: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def hear(self, job: str, stage: str, step: int, total: int) -> None:
        self.stages[job] = (stage, step, total)

    def share(self) -> float:
        """Weighted share of the work that is done."""
        whole = sum(job.weight for job in self.jobs)
        made = sum(job.weight for job in self.jobs if job.name in self.done)
        running = sum(
            job.weight * job.share_done(*self.stages[job.name])
            for job in self.jobs
            if job.name in self.stages and job.name not in self.done
        )
        return (made + running) / whole

    def left(self) -> str:
        share, spent = self.share(), time.monotonic() - self.start
        if share < 0.05 or spent < 5:
            return ""
        seconds = int(spent * (1 - share) / share)
        return f"about {seconds // 60}:{seconds % 60:02d} left"

    def line(self) -> str:
        running = [
            f"{name} {stage} {step}/{total}"
            for name, (stage, step, total) in self.stages.items()
            if name not in self.done
        ]
        parts = [f"{len(self.done)}/{len(self.jobs)} jobs", *running, self.left()]
        return "  ".join(part for part in parts if part)


def run_grid(
    jobs: Sequence[Job],
    *,
    processes: int,
    on_done: Callable[[str], None] = lambda name: None,
    quiet: bool = False,
) -> None:
    """Run all jobs, each after those it names; at most `processes` at a time.

    on_done: called in this process with the name of each job that ends.
    Raises `JobFailed` naming the first job that raised; jobs under way are waited for.
    """
    context = multiprocessing.get_context("spawn")
    state = State(jobs)
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(
            max_workers=processes,
            mp_context=context,
            initializer=_start_worker,
            initargs=(reports := manager.Queue(),),
        ) as pool,
        _display(state, quiet) as show,
    ):
        waiting = list(jobs)
        running: dict[Future[float], Job] = {}
        while waiting or running:
            for job in [j for j in waiting if set(j.after) <= state.done]:
                if len(running) == processes:
                    break
                waiting.remove(job)
                running[pool.submit(_run_job, job.function, job.arguments)] = job
                state.hear(job.name, "starts", 0, 1)
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            _hear_all(reports, state)
            show()
            for future in finished:
                job = running.pop(future)
                error = future.exception()
                if error is not None:
                    for other in running:
                        other.cancel()
                    raise JobFailed(f"{job.name}: {type(error).__name__}: {error}") from error
                state.done.add(job.name)
                on_done(job.name)


def _hear_all(reports: Any, state: State) -> None:
    while True:
        try:
            state.hear(*reports.get_nowait())
        except queue.Empty:
            return


@contextmanager
def _display(state: State, quiet: bool) -> Iterator[Callable[[], None]]:
    """A live bar on a terminal, a plain line now and then where output is piped."""
    if quiet:
        yield lambda: None
        return
    if sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TextColumn

        with Progress(
            BarColumn(bar_width=24), TextColumn("{task.description}"), transient=True
        ) as progress:
            bar = progress.add_task("", total=1.0)
            yield lambda: progress.update(bar, completed=state.share(), description=state.line())
        return
    last = [time.monotonic()]

    def plain() -> None:
        if time.monotonic() - last[0] >= LINE_SECONDS:
            last[0] = time.monotonic()
            print(state.line(), flush=True)

    yield plain
