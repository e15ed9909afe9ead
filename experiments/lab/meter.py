"""Seconds and peak memory of one stage; outside the identity of a run.

Seconds add up over restarts: they are kept in a file beside the stage's checkpoints, and a killed
stage loses what it did since the last step it told of. Memory is the resident set of the process,
and its high-water mark is taken back to the present at the start of a stage, so that a small stage
does not inherit the peak of a large one before it.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.run import write_json_atomic

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SECONDS_BETWEEN_WRITES = 2.0


class Meter:
    """What a stage has cost, over all its starts; it stands still once the stage has ended."""

    def __init__(self, path: Path, *, seconds: float = 0.0, peak: float | None = None) -> None:
        self._path = path
        self._before = seconds, peak
        self._start = self._written = time.perf_counter()
        self._final: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """seconds, and peak_mib (None where the system cannot say it for a stage alone)."""
        if self._final is not None:
            return self._final
        seconds, peak = self._before
        peaks = [x for x in (peak, peak_mib()) if x is not None]
        return {
            "seconds": seconds + time.perf_counter() - self._start,
            "peak_mib": max(peaks, default=None),
        }

    def tick(self) -> None:
        """Note the present cost, at most every two seconds."""
        now = time.perf_counter()
        if now - self._written > _SECONDS_BETWEEN_WRITES:
            self._written = now
            write_json_atomic(self._path, self.facts())

    def stop(self) -> None:
        self._final = self.facts()
        write_json_atomic(self._path, self._final)


@contextmanager
def metered(path: Path) -> Iterator[Meter]:
    """Meter the block, going on from what `path` holds of an interrupted one."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reset_peak()
    path.parent.mkdir(parents=True, exist_ok=True)
    meter = Meter(path, seconds=before.get("seconds", 0.0), peak=before.get("peak_mib"))
    yield meter
    meter.stop()


def reset_peak() -> bool:
    """Take the high-water mark back to the present size; whether the system let us."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_mib() -> float | None:
    """Peak resident memory in MiB since `reset_peak`; None where that cannot be known."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    kib = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(kib[0]) / 1024 if kib else None
