"""What does attention over a sliding window cost, beside the ways to compute it densely?

Compared in one process, interleaved, on one thread, as ratios against SDPA with a dense mask, which
is how Hugging Face computes a window: our chunked form (`moe.windowed_attention`), the same with
left padding of several lengths, SDPA that is causal but has no window (it does more work, without a
mask), and the written-out form. The mask is made beforehand, as a model makes it once for all its
layers, so its making is no part of the dense way's time.

"GEMM limit" is one plain matrix product with as many multiplications as the window asks for: two
products for the forward, four more for the backward. The bytes kept for the backward are the
storages that autograd saves, each once, the inputs included.

The decision to know: the goals are held against the whole interval. "met" is an interval below the
goal, "missed" one above it, anything else "unresolved".

    python -m experiments.bench.attention [--quick] [--out FILE.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.bench.interleave import INTERVAL_METHOD, Ratio, check_rounds, interleaved
from moe.errors import UserError
from sft.flags import main_guard, parse
from sft.run import write_text_atomic

if TYPE_CHECKING:
    from torch import Tensor

OURS, PADDED, DENSE, CAUSAL, NAIVE, LIMIT = (
    "windowed",
    "windowed, padded",
    "SDPA, dense mask",
    "SDPA, causal, no window",
    "naive",
    "GEMM limit",
)
PASSES = ("forward", "forward+backward")
# Largest ratio of ours to the dense mask, forward+backward, by length.
GOALS = {512: 0.6, 2048: 0.2, 8192: 0.06}
PER_TOKEN_GOAL = 1.5  # a token's time at the greatest length over that at the smallest
KEPT_GOAL = 1.1  # bytes kept over those of query, key, value and output
GEMM_WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the attention benchmark."""

    out: Path | None = field(default=None, metadata={"help": "write what is printed as JSON"})
    quick: bool = field(
        default=False, metadata={"help": "tiny sizes, to see that it runs; says nothing"}
    )
    rounds: int = field(default=9, metadata={"help": "rounds of the interleaving, at least 6"})
    naive_up_to: int = field(
        default=2048,
        metadata={"help": "longest text for the written-out form; 8192 needs about 9 GB"},
    )

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix != ".json":
            raise UserError(f"--out {self.out} must end in .json: that is what is written.")
        check_rounds(self.rounds)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size: `batch` rows of `length` tokens, H query heads on G kv heads, N wide."""

    length: int
    batch: int
    window: int = 256
    heads: int = 8
    kv_heads: int = 2
    width: int = 32

    @property
    def multiplications(self) -> int:
        """Of the two products of a forward: pairs in the window, twice, for every head."""
        pairs = sum(min(i + 1, self.window) for i in range(self.length))
        return 2 * self.batch * self.heads * self.width * pairs


FULL = tuple(Case(length=n, batch=max(1, 4096 // n)) for n in (512, 2048, 8192))
QUICK = tuple(Case(length=n, batch=256 // n, window=32, width=8) for n in (64, 256))


def benchmark(
    cases: Sequence[Case], *, rounds: int, naive_up_to: int, min_seconds: float = 0.05
) -> dict[str, Any]:
    """Measure every case; the record that is printed and written.

    min_seconds: how long one measurement of a short candidate lasts.
    """
    import torch
    import transformers

    rows, skipped = [], []
    for case in cases:
        forms = _forms(case, naive=case.length <= naive_up_to)
        if case.length > naive_up_to:
            skipped.append(f"naive at {case.length} tokens: --naive-up-to is {naive_up_to}")
        kept = {name: kept_bytes(form) for name, form in forms.items()}
        for which in PASSES:
            print(f"measuring {case.length} tokens, {which}", file=sys.stderr, flush=True)
            runs = {name: _run(form, case, which=which) for name, form in forms.items()}
            runs[LIMIT] = _limit(case, products=2 if which == "forward" else 6)
            measured = interleaved(runs, against=DENSE, rounds=rounds, min_seconds=min_seconds)
            rows += [_row(case, which, ratio=r, kept=kept.get(r.name)) for r in measured.values()]
    return {
        "schema": 1,
        "benchmark": "attention",
        "sizes": [asdict(case) for case in cases],
        "rounds": rounds,
        "interval_method": INTERVAL_METHOD,
        "against": DENSE,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
        "per_token": _per_token(cases, rounds=rounds, min_seconds=min_seconds),
        "skipped": skipped,
    }


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A way to compute the attention of these inputs."""

    inputs: tuple[Tensor, ...]
    attend: Callable[[], Tensor]


def _forms(case: Case, *, naive: bool) -> dict[str, _Form]:
    import torch
    from torch import nn
    from transformers import AttentionInterface

    from moe.attention import naive_attention
    from moe.windowed_attention import visible, windowed_attention

    inputs = query, key, value = _inputs(case)
    layer = nn.Module()
    layer.num_key_value_groups = case.heads // case.kv_heads  # type: ignore[assignment]
    scaling = case.width**-0.5
    real_BC = _left_padded(case)
    seen = visible(
        torch.ones(1, case.length, dtype=torch.int32), num_queries=case.length, window=case.window
    ).expand(case.batch, 1, -1, -1)
    sdpa = AttentionInterface()["sdpa"]

    def ours(segment_BC: Tensor | None) -> Tensor:
        return windowed_attention(
            query, key, value=value, window=case.window, segment_BC=segment_BC
        )

    forms = {
        DENSE: lambda: sdpa(layer, query, key, value, seen, scaling=scaling)[0],
        OURS: lambda: ours(None),
        PADDED: lambda: ours(real_BC),
        CAUSAL: lambda: sdpa(layer, query, key, value, None, scaling=scaling)[0],
    }
    if naive:
        bias = torch.zeros(seen[:1].shape).masked_fill(~seen[:1], float("-inf"))
        forms[NAIVE] = lambda: naive_attention(layer, query, key, value, bias, scaling=scaling)[0]
    return {name: _Form(inputs=inputs, attend=attend) for name, attend in forms.items()}


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a model's projections leave them: tokens before heads in memory."""
    import torch

    generator = torch.Generator().manual_seed(case.length)

    def heads(count: int) -> Tensor:
        shape = (case.batch, case.length, count, case.width)
        return torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_()

    return heads(case.heads), heads(case.kv_heads), heads(case.kv_heads)


def _left_padded(case: Case) -> Tensor:
    """Real tokens: the rows lack 0, 1/2B, 2/2B ... of their length."""
    import torch

    lost_B = torch.arange(case.batch) * case.length // (2 * case.batch)
    return (torch.arange(case.length) >= lost_B[:, None]).int()


def kept_bytes(form: _Form) -> int:
    """What autograd holds between forward and backward: each storage once."""
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        form.attend()
    return sum(storages.values())


def _run(form: _Form, case: Case, *, which: str) -> Callable[[], object]:
    import torch

    if which == "forward":

        def forward() -> object:
            with torch.no_grad():
                return form.attend()

        return forward
    grad_out = torch.randn(
        (case.batch, case.length, case.heads, case.width),
        generator=torch.Generator().manual_seed(1),
    )
    return lambda: torch.autograd.grad(form.attend(), form.inputs, grad_out)


def _limit(case: Case, *, products: int) -> Callable[[], object]:
    import torch

    rows = max(1, case.multiplications * products // 2 // GEMM_WIDTH**2)
    left, right = torch.ones(rows, GEMM_WIDTH), torch.ones(GEMM_WIDTH, GEMM_WIDTH)
    return lambda: left @ right


def _row(case: Case, which: str, *, ratio: Ratio, kept: int | None) -> dict[str, Any]:
    least = 4 * case.batch * case.length * case.width * 2 * (case.heads + case.kv_heads)
    return {
        "length": case.length,
        "batch": case.batch,
        "pass": which,
        "form": ratio.name,
        "cpu_ms": round(1e3 * ratio.median_seconds, 3),
        "ratio": round(ratio.ratio, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
        "wall_ratio": round(ratio.wall_ratio, 4),
        "kept_bytes": kept,
        "kept_over_least": None if kept is None else round(kept / least, 4),
    }


def _per_token(cases: Sequence[Case], *, rounds: int, min_seconds: float) -> list[dict[str, Any]]:
    """Our time for a token of each length over that of the first, forward+backward."""
    runs = {
        str(case.length): _run(_forms(case, naive=False)[OURS], case, which=PASSES[1])
        for case in cases
    }
    first = cases[0]
    measured = interleaved(runs, against=str(first.length), rounds=rounds, min_seconds=min_seconds)
    rows = []
    for case in cases:
        share = (first.batch * first.length) / (case.batch * case.length)
        ratio = measured[str(case.length)]
        row = {name: getattr(ratio, name) * share for name in ("ratio", "low", "high")}
        rows.append({"length": case.length, **{name: round(x, 4) for name, x in row.items()}})
    return rows


def goals(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal beside what was measured; empty for other sizes than the goals are for."""
    if {size["length"] for size in record["sizes"]} != set(GOALS):
        return []
    found = []
    for row in record["rows"]:
        if row["form"] == OURS and row["pass"] == PASSES[1]:
            found.append(
                _goal(
                    f"forward+backward at {row['length']}, over {DENSE}", GOALS[row["length"]], row
                )
            )
            kept = dict.fromkeys(("ratio", "low", "high"), row["kept_over_least"])
            name = f"bytes kept at {row['length']}, over query, key, value and output"
            found.append(_goal(name, KEPT_GOAL, kept))
    last = record["per_token"][-1]
    name = f"a token's time at {last['length']}, over {record['per_token'][0]['length']}"
    return [*found, _goal(name, PER_TOKEN_GOAL, last)]


def _goal(name: str, goal: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    word = "unresolved"
    if measured["high"] <= goal:
        word = "met"
    elif measured["low"] > goal:
        word = "missed"
    figures = {key: measured[key] for key in ("ratio", "low", "high")}
    return {"goal": name, "at_most": goal, **figures, "word": word}


def text(record: Mapping[str, Any]) -> str:
    """The record as tables."""
    lines = []
    for size in record["sizes"]:
        for which in PASSES:
            lines.append(
                f"{size['batch']} x {size['length']} tokens, window {size['window']}, "
                f"{size['heads']} query and {size['kv_heads']} kv heads of {size['width']}: {which}"
            )
            keeps = which == PASSES[1]
            lines.append(
                f"  {'':24} {'CPU ms':>9} {'ratio':>8}  {'95 % interval':>17} {'by wall':>8}"
                + (f" {'kept MiB':>9}" if keeps else "")
            )
            lines += [
                _line(row, keeps=keeps)
                for row in record["rows"]
                if row["length"] == size["length"] and row["pass"] == which
            ]
            lines.append("")
    lines += [f"Not measured: {what}." for what in record["skipped"]]
    lines.append("A token's time, forward+backward, over that at the smallest length:")
    lines += [
        f"  {row['length']:>6} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for row in record["per_token"]
    ]
    lines += [
        f"{goal['word']}: {goal['goal']}: {goal['ratio']:.3f} "
        f"[{goal['low']:.3f}, {goal['high']:.3f}], goal {goal['at_most']}"
        for goal in record["goals"]
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any], *, keeps: bool) -> str:
    """keeps: whether the pass keeps anything for a backward, and the table has a column for it."""
    kept = "" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 2**20:.1f}"
    interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
    return (
        f"  {row['form']:24} {row['cpu_ms']:9.2f} {row['ratio']:8.3f}  {interval:>17} "
        f"{row['wall_ratio']:8.3f}" + (f" {kept:>9}" if keeps else "")
    )


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        Config, argv, prog="python -m experiments.bench.attention", description=__doc__ or ""
    ).config
    cases = QUICK if config.quick else FULL
    record = benchmark(
        cases,
        rounds=config.rounds,
        naive_up_to=config.naive_up_to,
        min_seconds=0.0 if config.quick else 0.05,
    )
    record["goals"] = goals(record)
    print(text(record))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(config.out, json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
