"""What does the mixture-of-experts FFN cost, beside Hugging Face's, a dense FFN and bare products?

Compared in one process, interleaved, on one thread, as ratios against `MixtralSparseMoeBlock` with
`grouped_mm` experts: the same block with `eager` experts; our `SwitchFFN`, router included, with
each experts backend; one dense SwiGLU FFN on as many rows as there are assignments; and "GEMM
limit", one plain matrix product with as many multiplications. All blocks hold the same weights, and
before anything is timed their experts must agree in output and gradients.

"forward" is without gradients, "forward+backward" gives the gradients of the input and of every
parameter. The bytes kept are the storages that autograd saves between the two, each once, without
the input and the parameters. "decode" is the forward of a single token.

The decision to know: the goals are held against the whole interval. "met" is an interval below the
goal, "missed" one above it, anything else "unresolved". The geometric mean over the sizes is taken
round by round, so that it has an interval too.

    python -m experiments.bench.moe [--quick] [--out FILE.json]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from experiments.bench.interleave import (
    INTERVAL_METHOD,
    Ratio,
    check_rounds,
    interleaved,
    median_interval,
    ratio_between,
)
from moe.errors import UserError
from sft.flags import main_guard, parse
from sft.run import write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUPED, EAGER, BATCHED = "HF grouped_mm", "HF eager", "HF batched_mm"
DENSE, LIMIT = "dense FFN", "GEMM limit"
OURS = {"loop": "ours, loop", "lean": "ours, lean", "grouped_mm": "ours, grouped_mm"}
DEFAULT, LEAN = OURS["loop"], OURS["lean"]
FORWARD, BOTH, DECODE = "forward", "forward+backward", "decode"
# Largest ratios to HF grouped_mm: time at each size, its mean, bytes kept; to HF's best, decode.
EACH_GOAL, MEAN_GOAL, KEPT_GOAL, DECODE_GOAL = 1.0, 0.95, 0.40, 0.60
GEMM_WIDTH = 1024
# Float32 sums of a thousand terms, in two orders.
AGREEMENT = 1e-5


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark of the MoE layer."""

    out: Path | None = field(default=None, metadata={"help": "write what is printed as JSON"})
    quick: bool = field(
        default=False, metadata={"help": "tiny sizes, to see that it runs; says nothing"}
    )
    rounds: int = field(default=12, metadata={"help": "rounds of the interleaving, at least 6"})

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix != ".json":
            raise UserError(f"--out {self.out} must end in .json: that is what is written.")
        check_rounds(self.rounds)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One layer: `tokens` of `hidden` numbers, each to `top_k` of `experts` experts."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def name(self) -> str:
        return ",".join(str(value) for value in asdict(self).values())

    @property
    def multiplications(self) -> int:
        """Of a forward pass: three products for each assignment."""
        return 3 * self.tokens * self.top_k * self.hidden * self.intermediate


def _sizes(*rows: tuple[int, int, int, int, int]) -> tuple[Size, ...]:
    return tuple(
        Size(tokens=t, hidden=d, intermediate=f, experts=e, top_k=k) for t, d, f, e, k in rows
    )


FULL = _sizes(
    (4096, 256, 512, 8, 2),
    (4096, 256, 256, 32, 4),
    (2048, 512, 1024, 8, 1),
    (2048, 512, 1024, 8, 2),
    (8192, 128, 256, 64, 2),
)
ONE_TOKEN = _sizes((1, 256, 512, 8, 2), (1, 128, 256, 64, 2))
QUICK = _sizes((64, 16, 8, 4, 2), (32, 8, 16, 8, 1))
QUICK_ONE = _sizes((1, 16, 8, 4, 2))


def benchmark(
    sizes: Sequence[Size], one_token: Sequence[Size], *, rounds: int, min_seconds: float = 0.05
) -> dict[str, Any]:
    """Measure every size; the record that is printed and written, goals included.

    min_seconds: how long one measurement of a short candidate lasts.
    Raises RuntimeError if the blocks do not compute the same.
    """
    import torch
    import transformers

    rows: list[dict[str, Any]] = []
    training: dict[str, Mapping[str, Ratio]] = {}
    decoding: dict[str, Mapping[str, Ratio]] = {}
    for size in sizes:
        blocks = _blocks(size)
        check_agreement(blocks, size)
        kept = {name: kept_bytes(block, size) for name, block in blocks.items()}
        for which in (FORWARD, BOTH):
            _say(f"measuring {size.name}, {which}")
            runs = {name: _run(block, size, which=which) for name, block in blocks.items()}
            runs[LIMIT] = _limit(size, passes=1 if which == FORWARD else 3)
            measured = interleaved(runs, against=GROUPED, rounds=rounds, min_seconds=min_seconds)
            rows += [_row(size, which, ratio=r, kept=kept) for r in measured.values()]
        training[size.name] = measured
    for size in one_token:
        _say(f"measuring {size.name}, {DECODE}")
        blocks = _blocks(size, batched=True)
        runs = {name: _run(block, size, which=FORWARD) for name, block in blocks.items()}
        measured = interleaved(runs, against=GROUPED, rounds=rounds, min_seconds=min_seconds)
        rows += [_row(size, DECODE, ratio=r, kept={}) for r in measured.values()]
        decoding[size.name] = measured
    return {
        "schema": 1,
        "benchmark": "moe",
        "sizes": [asdict(size) for size in (*sizes, *one_token)],
        "rounds": rounds,
        "interval_method": INTERVAL_METHOD,
        "against": GROUPED,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
        "goals": [*_speed_goals(training), *_kept_goals(rows), *_decode_goals(decoding)],
    }


# --- What is compared -----------------------------------------------------------------------------


def _blocks(size: Size, *, batched: bool = False) -> dict[str, nn.Module]:
    """The layers by name, the mixtures with the same weights."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from moe.dense_ffn import DenseFFN
    from moe.experts import set_experts_backend
    from moe.routing import RouterSpec
    from moe.switch_ffn import SwitchFFN

    # Renormalised top-1 weights are refused by our router; the work is the same with raw ones.
    spec = RouterSpec(num_experts=size.experts, top_k=size.top_k, normalize_weights=size.top_k > 1)
    blocks: dict[str, nn.Module] = {}
    for name in (GROUPED, EAGER, *([BATCHED] if batched else [])):
        config = MixtralConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_local_experts=size.experts,
            num_experts_per_tok=size.top_k,
        )
        config._experts_implementation = name.removeprefix("HF ")
        blocks[name] = MixtralSparseMoeBlock(config)
    for backend, name in OURS.items():
        blocks[name] = SwitchFFN(spec, hidden_size=size.hidden, intermediate_size=size.intermediate)
        set_experts_backend(blocks[name], backend)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(size.tokens)
    for parameter in blocks[GROUPED].parameters():
        torch.nn.init.normal_(parameter, std=size.hidden**-0.5, generator=generator)
    for block in blocks.values():
        block.load_state_dict(blocks[GROUPED].state_dict())
    blocks[DENSE] = DenseFFN(size.hidden, size.intermediate)
    return blocks


def _inputs(block: nn.Module, size: Size) -> tuple[Tensor, Tensor]:
    """The input (1, T, D) of a mixture, (T*K, D) of the dense FFN; a gradient of the same shape."""
    import torch

    from moe.dense_ffn import DenseFFN

    generator = torch.Generator().manual_seed(1)
    dense = isinstance(block, DenseFFN)
    rows = (size.tokens * size.top_k,) if dense else (1, size.tokens)
    x = torch.randn(*rows, size.hidden, generator=generator).requires_grad_()
    return x, torch.randn(x.shape, generator=generator)


def _output(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


def check_agreement(blocks: Mapping[str, nn.Module], size: Size) -> None:
    """Raises RuntimeError if, on one routing, the experts differ in output or a gradient."""
    import torch

    from moe.switch_ffn import SwitchFFN

    x_TD, gradient_TD = (tensor[0] for tensor in _inputs(blocks[GROUPED], size))
    with torch.no_grad():
        ours = blocks[DEFAULT]
        assert isinstance(ours, SwitchFFN)
        routing = ours(x_TD[None])[1]
    results = {}
    for name, block in blocks.items():
        if name == DENSE:
            continue
        experts: Any = block.experts
        x = x_TD.detach().requires_grad_()
        if isinstance(block, SwitchFFN):
            y = experts(x, routing)
        else:
            y = experts(x, routing.expert_TK, routing.weight_TK)
        results[name] = [y, *torch.autograd.grad(y, [x, *experts.parameters()], gradient_TD)]
    for name, tensors in results.items():
        for mine, theirs in zip(tensors, results[EAGER], strict=True):
            apart = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            if not apart <= AGREEMENT:
                raise RuntimeError(
                    f"{name} and {EAGER} differ by {apart:.1e} of the largest value at "
                    f"{size.name}: their times cannot be compared."
                )


def kept_bytes(block: nn.Module, size: Size) -> int:
    """What autograd holds between forward and backward, beside the input and the parameters."""
    import torch

    x, _ = _inputs(block, size)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *block.parameters())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Bound, so that no storage is freed and its address given to the next one.
        y = _output(block, x)
    assert y.requires_grad
    return sum(storages.values())


def _run(block: nn.Module, size: Size, *, which: str) -> Callable[[], object]:
    import torch

    x, gradient = _inputs(block, size)
    leaves = [x, *block.parameters()]

    def forward() -> object:
        with torch.no_grad():
            return block(x)

    def both() -> object:
        # The router of a renormalised top-1 has no gradient.
        return torch.autograd.grad(_output(block, x), leaves, gradient, allow_unused=True)

    return forward if which == FORWARD else both


def _limit(size: Size, *, passes: int) -> Callable[[], object]:
    import torch

    rows = max(1, size.multiplications * passes // GEMM_WIDTH**2)
    left, right = torch.ones(rows, GEMM_WIDTH), torch.ones(GEMM_WIDTH, GEMM_WIDTH)
    return lambda: left @ right


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- What is reported -----------------------------------------------------------------------------


def _row(size: Size, which: str, *, ratio: Ratio, kept: Mapping[str, int]) -> dict[str, Any]:
    return {
        "size": size.name,
        "pass": which,
        "form": ratio.name,
        "cpu_ms": round(1e3 * ratio.median_seconds, 4),
        "ratio": round(ratio.ratio, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
        "wall_ratio": round(ratio.wall_ratio, 4),
        "kept_bytes": kept.get(ratio.name),
        "kept_ratio": round(kept[ratio.name] / kept[GROUPED], 4) if ratio.name in kept else None,
    }


def _speed_goals(training: Mapping[str, Mapping[str, Ratio]]) -> list[dict[str, Any]]:
    found = []
    for form in (DEFAULT, LEAN):
        for size, measured in training.items():
            name = f"{form}: {BOTH} at {size}, over {GROUPED}"
            found.append(_goal(name, EACH_GOAL, ratio_between(measured, form, against=GROUPED)))
        means = _geometric_means(training.values(), form)
        name = f"{form}: {BOTH}, geometric mean over the sizes, over {GROUPED}"
        found.append(_goal(name, MEAN_GOAL, (median(means), *median_interval(means))))
    return found


def _geometric_means(sizes: Any, form: str) -> list[float]:
    """One for each round: of the ratios that the sizes gave in it."""
    logs = [
        [
            math.log(ours / theirs)
            for ours, theirs in zip(
                measured[form].cpu_seconds, measured[GROUPED].cpu_seconds, strict=True
            )
        ]
        for measured in sizes
    ]
    return [math.exp(sum(round_) / len(round_)) for round_ in zip(*logs, strict=True)]


def _kept_goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        _goal(
            f"{LEAN}: bytes kept at {row['size']}, over {GROUPED}",
            KEPT_GOAL,
            (row["kept_ratio"],) * 3,
        )
        for row in rows
        if row["form"] == LEAN and row["pass"] == BOTH
    ]


def _decode_goals(decoding: Mapping[str, Mapping[str, Ratio]]) -> list[dict[str, Any]]:
    found = []
    for size, measured in decoding.items():
        best = min((GROUPED, EAGER, BATCHED), key=lambda name: measured[name].median_seconds)
        name = f"{DEFAULT}: {DECODE} at {size}, over {best}, Hugging Face's best"
        found.append(_goal(name, DECODE_GOAL, ratio_between(measured, DEFAULT, against=best)))
    return found


def _goal(name: str, goal: float, measured: tuple[float, float, float]) -> dict[str, Any]:
    ratio, low, high = (round(value, 4) for value in measured)
    word = "met" if high <= goal else "missed" if low > goal else "unresolved"
    return {
        **{"goal": name, "at_most": goal},
        **{"ratio": ratio, "low": low, "high": high, "word": word},
    }


def text(record: Mapping[str, Any]) -> str:
    """The record as tables."""
    lines = []
    for size, which in dict.fromkeys((row["size"], row["pass"]) for row in record["rows"]):
        lines.append(f"tokens, hidden, intermediate, experts, top_k = {size}: {which}")
        keeps = which == BOTH
        lines.append(
            f"  {'':18} {'CPU ms':>9} {'ratio':>7}  {'95 % interval':>17} {'by wall':>8}"
            + (f" {'kept MiB':>9}" if keeps else "")
        )
        lines += [
            _line(row, keeps=keeps)
            for row in record["rows"]
            if (row["size"], row["pass"]) == (size, which)
        ]
        lines.append("")
    lines += [
        f"{goal['word']}: {goal['goal']}: {goal['ratio']:.3f} "
        f"[{goal['low']:.3f}, {goal['high']:.3f}], goal {goal['at_most']}"
        for goal in record["goals"]
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any], *, keeps: bool) -> str:
    """keeps: whether the pass keeps anything for a backward, and the table has a column for it."""
    kept = "" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 2**20:.2f}"
    interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
    return (
        f"  {row['form']:18} {row['cpu_ms']:9.3f} {row['ratio']:7.3f}  {interval:>17} "
        f"{row['wall_ratio']:8.3f}" + (f" {kept:>9}" if keeps else "")
    )


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    config = parse(
        Config, argv, prog="python -m experiments.bench.moe", description=__doc__ or ""
    ).config
    record = benchmark(
        QUICK if config.quick else FULL,
        QUICK_ONE if config.quick else ONE_TOKEN,
        rounds=config.rounds,
        min_seconds=0.0 if config.quick else 0.05,
    )
    print(text(record))
    if config.quick:
        print("--quick: the sizes are too small for the goals to mean anything.")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(config.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
