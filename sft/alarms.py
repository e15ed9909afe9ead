"""Signs that a training goes wrong, read from the metrics that are logged anyway.

The decision to know: an alarm never looks at one row. It compares windows, the first rows and the
newest ones that together count enough episodes, tokens or pairs, and rings when its statistic has
reached the threshold in several readings one after another. So the smaller the batches, the more
rows it takes, and the noise of a few answers rings nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

OnAlarm = Literal["tell", "stop"]
Metrics = Mapping[str, float | tuple[float, float]]

PREFIX = "alarm/"
TOKENS = 256  # a window of a mean over tokens
ROWS = 4  # a window of what is logged without a count
LARGEST = 1e100  # a number beyond it is read as this, so that its square is one
MIN_JUMPS = 4  # that the noise of a metric is estimated from


@dataclass(frozen=True, kw_only=True)
class Window:
    """A metric over the first window of its training, and over the newest.

    start, now: means weighted by counts. lowest: the smallest mean of any window after the first.
    noise: standard error of now - start by the jumps from row to row, half of whose mean square is
    the variance without any trend (von Neumann 1941); infinite while there are too few.
    """

    start: float
    now: float
    lowest: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Read:
    """A metric that an alarm reads, and the count (episodes, tokens, ...) that makes a window.

    by_layer: the metric is read of every layer, and the worst layer's statistic counts.
    """

    metric: str
    units: float
    by_layer: bool = False


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One sign of trouble.

    reads: the metrics, the first of which says when there is a reading: with each of its rows once
    all have both windows. Without any, the statistic is how many metrics of the row are not finite.
    measure: the statistic, from a window of each metric in `reads`; the larger, the worse. None
    where it says nothing, which counts as no trouble.
    statistic: what it is, in words. threshold: it rings from here on, in `readings` of them one
    after another. source: where the threshold comes from. remedy: what to do.
    """

    name: str
    reads: tuple[Read, ...] = ()
    measure: Callable[[Mapping[str, Window]], float | None] | None = None
    statistic: str
    threshold: float
    readings: int = 3
    source: str
    remedy: str

    def worst(self, windows: Mapping[str, Window]) -> float | None:
        """The statistic, over all layers where it is by layer; None before all have windows."""
        assert self.measure is not None
        found = []
        for layer in self._layers(windows):
            held = {
                r.metric: windows.get(r.metric + (layer if r.by_layer else "")) for r in self.reads
            }
            known = {name: window for name, window in held.items() if window is not None}
            if len(known) == len(self.reads) and (value := self.measure(known)) is not None:
                found.append(value)
        return max(found, default=None)

    def _layers(self, windows: Mapping[str, Window]) -> list[str]:
        first = self.reads[0]
        if not first.by_layer:
            return [""]
        head = first.metric + "/layer_"
        return [key.removeprefix(first.metric) for key in windows if key.startswith(head)]


@dataclass(frozen=True, kw_only=True)
class Ring:
    """An alarm that rang, where it did first. value: of its statistic, None if infinite."""

    name: str
    step: int
    value: float | None
    threshold: float
    statistic: str
    remedy: str

    @property
    def line(self) -> str:
        """What is told: what, where, how far, what to do."""
        value = "infinite" if self.value is None else f"{self.value:.3g}"
        return (
            f"ALARM {self.name} at step {self.step}: {value}, from {self.threshold:.3g} on "
            f"({self.statistic}). {self.remedy}"
        )


class _Series:
    """The windows of one metric, as sums that do not grow with the training."""

    def __init__(self, units: float) -> None:
        self.units = units
        self.first: list[list[float]] = []
        self.recent: list[list[float]] = []  # no more rows than make a window
        self.lowest = math.inf
        self.last: float | None = None
        self.jumps = 0.0  # their squares
        self.num_jumps = 0

    def add(self, value: float, count: float) -> None:
        value = max(-LARGEST, min(LARGEST, value))
        if self.last is not None:
            self.jumps += (value - self.last) ** 2
            self.num_jumps += 1
        self.last = value
        if _count(self.first) < self.units:
            self.first.append([value, count])
            return
        self.recent.append([value, count])
        while _count(self.recent[1:]) >= self.units:
            del self.recent[0]
        if _count(self.recent) >= self.units:
            self.lowest = min(self.lowest, _mean(self.recent))

    @property
    def window(self) -> Window | None:
        """None before there are two."""
        if not self.recent or _count(self.recent) < self.units:
            return None
        noise = math.inf
        if self.num_jumps >= MIN_JUMPS:
            variance = self.jumps / self.num_jumps / 2
            noise = math.sqrt(variance * (1 / len(self.first) + 1 / len(self.recent)))
        return Window(
            start=_mean(self.first), now=_mean(self.recent), lowest=self.lowest, noise=noise
        )

    def state_dict(self) -> dict[str, Any]:
        rows = {name: [list(row) for row in vars(self)[name]] for name in ("first", "recent")}
        lowest = None if math.isinf(self.lowest) else self.lowest  # JSON has no infinity
        return {**vars(self), **rows, "lowest": lowest}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "_Series":
        series = cls(state["units"])
        vars(series).update(state)
        series.lowest = math.inf if state["lowest"] is None else state["lowest"]
        return series


def _count(rows: Sequence[Sequence[float]]) -> float:
    return sum(count for _, count in rows)


def _mean(rows: Sequence[Sequence[float]]) -> float:
    return sum(value * count for value, count in rows) / _count(rows)


class AlarmWatch:
    """Reads each row of metrics as it is logged; its state makes a resumed training ring alike.

    rings: the alarms that rang so far, each once, in order. Raises ValueError when two alarms want
    windows of different sizes of one metric.
    """

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self.alarms = tuple(alarms)
        self.rings: list[Ring] = []
        self._units: dict[str, float] = {}
        for read in (read for alarm in self.alarms for read in alarm.reads):
            if self._units.setdefault(read.metric, read.units) != read.units:
                raise ValueError(f"{read.metric} is read in windows of two sizes")
        self._series: dict[str, _Series] = {}
        self._streaks: dict[str, int] = {}  # readings one after another past the threshold

    def read(self, metrics: Metrics, *, step: int) -> tuple[dict[str, float], list[Ring]]:
        """(`alarm/<name>` to log, alarms that ring for the first time).

        An alarm is logged from its first ring on: 1 while it lasts, 0 after it.
        """
        row = {name: m if isinstance(m, tuple) else (m, 1.0) for name, m in metrics.items()}
        self._add(row)
        windows = {key: w for key, series in self._series.items() if (w := series.window)}
        fresh = []
        for alarm in self.alarms:
            if alarm.reads:
                if not row.keys() & {alarm.reads[0].metric}:
                    continue  # no reading
                value = alarm.worst(windows)
            else:
                value = float(sum(not math.isfinite(number) for number, _ in row.values()))
            is_past = value is not None and value >= alarm.threshold
            self._streaks[alarm.name] = self._streaks.get(alarm.name, 0) + 1 if is_past else 0
            if value is not None and self._is_on(alarm) and alarm.name not in self._rung:
                fresh.append(
                    Ring(
                        name=alarm.name,
                        step=step,
                        value=value if math.isfinite(value) else None,
                        threshold=alarm.threshold,
                        statistic=alarm.statistic,
                        remedy=alarm.remedy,
                    )
                )
                self.rings.append(fresh[-1])
        logged = {
            PREFIX + alarm.name: float(self._is_on(alarm))
            for alarm in self.alarms
            if alarm.name in self._rung
        }
        return logged, fresh

    def _add(self, row: Mapping[str, tuple[float, float]]) -> None:
        for key, (value, count) in row.items():
            metric, _, layer = key.partition("/layer_")
            units = self._units.get(metric)
            if units is not None and count > 0 and math.isfinite(value):
                self._series.setdefault(key, _Series(units)).add(value, count)

    @property
    def _rung(self) -> set[str]:
        return {ring.name for ring in self.rings}

    def _is_on(self, alarm: Alarm) -> bool:
        return self._streaks.get(alarm.name, 0) >= alarm.readings

    def state_dict(self) -> dict[str, Any]:
        """As JSON, which float64 survives exactly."""
        return {
            "rings": [asdict(ring) for ring in self.rings],
            "series": {key: series.state_dict() for key, series in self._series.items()},
            "streaks": dict(self._streaks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rings = [Ring(**ring) for ring in state["rings"]]
        self._series = {key: _Series.of_state(held) for key, held in state["series"].items()}
        self._streaks = dict(state["streaks"])


# What every stage watches.


def _fall(windows: Mapping[str, Window]) -> float | None:
    """Of the load entropy, where the busiest expert is busier than chance makes it."""
    vio, floor = windows["router/max_vio"], windows["router/max_vio_floor"]
    entropy = windows["router/load_entropy"]
    return entropy.start - entropy.now if vio.now > 3 * floor.now else None


def _more_dead(windows: Mapping[str, Window]) -> float | None:
    """Where tokens suffice: a floor of 1 is about ten assignments to a fair expert."""
    dead, floor = windows["router/dead_experts"], windows["router/max_vio_floor"]
    return dead.now - dead.start if floor.now < 1 else None


NOT_FINITE = Alarm(
    name="not_finite",
    statistic="the number of logged metrics that are NaN or infinite",
    threshold=1,
    readings=1,
    source="a loss or gradient that is not finite stops a training by itself; this is for the rest",
    remedy="Look at what the first such metric is made of: a reward, an empty mask, a wild ratio.",
)
ROUTER_COLLAPSE = Alarm(
    name="router_collapse",
    reads=(
        Read(metric="router/load_entropy", units=ROWS, by_layer=True),
        Read(metric="router/max_vio", units=ROWS, by_layer=True),
        Read(metric="router/max_vio_floor", units=ROWS),
    ),
    measure=_fall,
    statistic="the worst layer's fall of load entropy since the start, where its MaxVio is above 3 "
    "times what chance gives",
    threshold=0.2,
    source="0.2 is a third of the effective experts, exp(entropy), at 8 experts and half at 32",
    remedy="Turn the balance on or up (--balance-scope, --load-balancing-coef), or lower lr.",
)
DEAD_EXPERTS = Alarm(
    name="dead_experts",
    reads=(
        Read(metric="router/dead_experts", units=ROWS),
        Read(metric="router/max_vio_floor", units=ROWS),
    ),
    measure=_more_dead,
    statistic="dead experts per layer more than at the start, where chance alone gives a MaxVio "
    "below 1",
    threshold=1,
    source="a tenth of its fair share makes an expert dead (moe.stats); one more in every layer",
    remedy="Turn the balance on or up (--balance-scope, --load-balancing-coef), or lower lr.",
)
COMMON = (NOT_FINITE, ROUTER_COLLAPSE, DEAD_EXPERTS)


def _rise_over_lowest(windows: Mapping[str, Window]) -> float | None:
    loss = windows["train/loss"]
    rise = loss.now - loss.lowest
    return rise if rise >= 4 * loss.noise else None


LOSS_DIVERGENCE = Alarm(
    name="loss_divergence",
    reads=(Read(metric="train/loss", units=TOKENS),),
    measure=_rise_over_lowest,
    statistic="train/loss over its lowest window so far, in nats, where that is 4 standard errors",
    threshold=0.5,
    source="0.5 nats are a perplexity 1.6 times as high; row-to-row noise gives the standard error",
    remedy="Lower lr, lengthen the warm-up, or look for bad rows at that step.",
)
SUPERVISED = (*COMMON, LOSS_DIVERGENCE)
