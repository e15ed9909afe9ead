"""Dense models made sparse: every FFN becomes experts that start as its copies.

    sparse = upcycle(load("Llama-3.2-1B"), num_experts=8, top_k=2)
    write_receipt("run", receipt_of(sparse))

The decision to know: the router's weights are renormalised over the chosen experts, so that equal
experts sum to the dense FFN whatever a random router says (Komatsuzaki et al. 2023,
https://arxiv.org/abs/2212.05055, normalise for the same reason). What was made of what, with a
hash of each source, is kept as a receipt.

Shapes: E experts, F expert width, D width, M width of the dense FFN, G granularity.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from numpy.random import Generator
from torch import Tensor

from moe.config import MoEConfig
from moe.counters import stream
from moe.errors import UserError
from moe.model import MoEForCausalLM, assembled

Variant = Literal["copy", "granular", "noise", "drop"]
RECEIPT = "upcycle.json"


@dataclass(frozen=True, kw_only=True)
class TensorOrigin:
    """Where one tensor of the sparse model comes from.

    sources: the dense tensors it is made of, none for a router. sha256: of each source's bytes.
    how: what was done with them, in words. expert_rows: the rows of the intermediate dimension,
    [first, last), that each expert got. redrawn_sha256: per expert, of the sorted numbers (int64)
    of the rows that "drop" drew anew.
    """

    name: str
    sources: tuple[str, ...]
    sha256: tuple[str, ...]
    how: str
    expert_rows: tuple[tuple[int, int], ...] = ()
    redrawn_sha256: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UpcycleReceipt:
    """What was made of what. preserving: whether the function was kept, up to rounding."""

    source: str
    variant: str
    num_experts: int
    top_k: int
    granularity: int
    noise: float | None
    drop_ratio: float | None
    router_std: float
    seed: int
    preserving: bool
    tensors: tuple[TensorOrigin, ...]


def upcycle(
    dense: MoEForCausalLM,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    variant: Variant = "copy",
    granularity: int | None = None,
    noise: float | None = None,
    drop_ratio: float | None = None,
    router_std: float | None = None,
    seed: int = 0,
) -> MoEForCausalLM:
    """A sparse model that starts from a dense one; the dense one stays as it is.

    num_experts, top_k: of the model that comes out; top_k >= 2. router_std: of the random router
    that breaks the ties between equal experts, default the model's `initializer_range`.

    variant:
    - "copy": each expert is the dense FFN. The function is kept.
    - "granular": each copy is cut along its width into `granularity` slices, each an expert of
      width M / G (He et al. 2024, https://arxiv.org/abs/2410.07524). Both num_experts and top_k are
      multiples of G. The slices of one copy share their row of the router, so they are chosen
      together, each with 1 / G of their copy's weight; the down projections are multiplied by G to
      make up for it. The function is kept: for every token but one whose last chosen and first
      left-out copies tie to the last bit, where slices of both could mix.
    - "noise": copies, plus Gaussian noise of `noise` (default 0.01) times the standard deviation of
      each source tensor. The function is not kept.
    - "drop": copies in which `drop_ratio` (default 0.5) of the intermediate dimensions are drawn
      anew for each expert, from N(mean, std) of what they replace (Drop-Upcycling, Nakamura et al.
      2025, https://arxiv.org/abs/2502.19261, section 3). The function is not kept.

    Kept means up to float32 rounding, about what changing the attention kernel changes. Random
    numbers come from (seed, purpose, layer, expert). `receipt_of` gives the receipt.
    Raises UserError for a model that is not dense, for top_k 1, for sizes that do not divide, and
    for an option without effect in the variant.
    """
    _check_options(variant, granularity=granularity, noise=noise, drop_ratio=drop_ratio)
    _check_top_k(top_k)
    _check_dense(dense)
    config = dense.config
    plan = _Plan(
        num_experts=num_experts,
        width=config.intermediate_size,
        granularity=1 if variant != "granular" else (granularity or 2),
        noise=None if variant != "noise" else (0.01 if noise is None else noise),
        drop_ratio=None if variant != "drop" else (0.5 if drop_ratio is None else drop_ratio),
        router_std=config.initializer_range if router_std is None else router_std,
        seed=seed,
    )
    plan.check(top_k)
    tensors, origins = _sparse_tensors(dense, plan)
    sparse = assembled(_sparse_config(config, plan, top_k=top_k), tensors)
    sparse.generation_config = copy.deepcopy(dense.generation_config)
    receipt = UpcycleReceipt(
        source=config.name_or_path or type(dense).__name__,
        variant=variant,
        num_experts=num_experts,
        top_k=top_k,
        granularity=plan.granularity,
        noise=plan.noise,
        drop_ratio=plan.drop_ratio,
        router_std=plan.router_std,
        seed=seed,
        preserving=variant in ("copy", "granular"),
        tensors=tuple(origins),
    )
    sparse.__dict__["upcycle_receipt"] = receipt
    return sparse


def receipt_of(model: MoEForCausalLM) -> UpcycleReceipt:
    """The receipt of a model that `upcycle` made; it is not saved with the model."""
    receipt = model.__dict__.get("upcycle_receipt")
    if receipt is None:
        raise UserError("this model was not made by upcycle in this process: it has no receipt.")
    found: UpcycleReceipt = receipt
    return found


def write_receipt(folder: str | Path, receipt: UpcycleReceipt) -> Path:
    """Write the receipt as `upcycle.json` into the folder, beside the model."""
    path = Path(folder) / RECEIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(receipt), indent=2) + "\n", encoding="utf-8")
    return path


# --- what is asked for ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Sizes and randomness of one upcycling; None where the variant does not have it."""

    num_experts: int
    width: int
    granularity: int
    noise: float | None
    drop_ratio: float | None
    router_std: float
    seed: int

    @property
    def expert_width(self) -> int:
        return self.width // self.granularity

    def rows(self, expert: int) -> tuple[int, int]:
        first = (expert % self.granularity) * self.expert_width
        return first, first + self.expert_width

    def check(self, top_k: int) -> None:
        for name, value in (
            ("num_experts", self.num_experts),
            ("top_k", top_k),
            ("intermediate_size", self.width),
        ):
            if value % self.granularity:
                raise UserError(
                    f"{name} {value} is not a multiple of granularity {self.granularity}: whole "
                    "copies are cut, and chosen, slice by slice."
                )
        if self.noise is not None and self.noise <= 0:
            raise UserError(f"noise {self.noise} must be above 0: variant copy is without noise.")
        if self.drop_ratio is not None and not 0 < self.drop_ratio <= 1:
            raise UserError(
                f"drop_ratio {self.drop_ratio} must be above 0 and at most 1: it is the share of "
                "the intermediate dimensions that each expert draws anew."
            )
        if self.router_std <= 0:
            raise UserError(
                f"router_std {self.router_std} must be above 0: with equal router rows every token "
                "would choose the same experts, and they would stay equal."
            )


def _check_options(
    variant: str, *, granularity: int | None, noise: float | None, drop_ratio: float | None
) -> None:
    of_variant = {"copy": "", "granular": "granularity", "noise": "noise", "drop": "drop_ratio"}
    if variant not in of_variant:
        raise UserError(f"variant {variant!r} is unknown: give one of {', '.join(of_variant)}.")
    given = {"granularity": granularity, "noise": noise, "drop_ratio": drop_ratio}
    for name, value in given.items():
        if value is not None and name != of_variant[variant]:
            raise UserError(f"{name} {value} has no effect in variant {variant!r}: leave it out.")
    if granularity is not None and granularity < 2:
        raise UserError(f"granularity {granularity} must be at least 2: with 1 it is variant copy.")


def _check_top_k(top_k: int) -> None:
    if top_k == 1:
        raise UserError(
            "top_k 1 cannot be upcycled: renormalised, the only weight is 1 and the router gets no "
            "gradient; raw, the gate scales the FFN's output and the dense function is lost. "
            "Give top_k 2 or more."
        )


def _check_dense(dense: MoEForCausalLM) -> None:
    if not isinstance(dense, MoEForCausalLM):
        raise UserError(
            f"upcycle takes a MoEForCausalLM, not a {type(dense).__name__}: open other families "
            "with moe.interop.load, and merge an adapter first."
        )
    config = dense.config
    if config.sparse_layers:
        raise UserError(
            f"layers {list(config.sparse_layers)} of this model have experts already: only a dense "
            "model is upcycled."
        )
    if config.mlp_bias:
        raise UserError("mlp_bias True: experts have no biases, so this model cannot be upcycled.")
    if any(".lora_" in name or ".base_layer." in name for name, _ in dense.named_parameters()):
        raise UserError("the model carries an adapter: merge it before upcycling.")


def _sparse_config(dense: MoEConfig, plan: _Plan, *, top_k: int) -> MoEConfig:
    changes = {
        "mlp_layer_types": ["sparse"] * dense.num_hidden_layers,
        "moe_intermediate_size": plan.expert_width,
        "num_experts": plan.num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "capacity_factor": None,  # a dropped token would lose its FFN
    }
    config: MoEConfig = MoEConfig.from_dict({**dense.to_dict(), **changes})
    return config


# --- tensors -------------------------------------------------------------------------------------


def _sparse_tensors(
    dense: MoEForCausalLM, plan: _Plan
) -> tuple[dict[str, Tensor], list[TensorOrigin]]:
    sources = {name: tensor.detach() for name, tensor in dense.named_parameters()}
    tensors: dict[str, Tensor] = {}
    origins: list[TensorOrigin] = []
    for name, tensor in sources.items():
        if ".mlp." in name:
            continue
        tensors[name] = tensor.clone()
        digest = (_sha256(tensor),)
        origins.append(TensorOrigin(name=name, sources=(name,), sha256=digest, how="copied"))
    for layer in range(dense.config.num_hidden_layers):
        place = f"model.layers.{layer}.mlp"
        made, of = _sparse_ffn(sources, plan, layer=layer, place=place)
        tensors |= made
        origins += of
    return tensors, origins


def _sparse_ffn(
    sources: Mapping[str, Tensor], plan: _Plan, *, layer: int, place: str
) -> tuple[dict[str, Tensor], list[TensorOrigin]]:
    """Router and experts of one layer from its dense FFN."""
    names = [f"{place}.{word}.weight" for word in ("gate_proj", "up_proj", "down_proj")]
    gate_MD, up_MD, down_DM = (sources[name] for name in names)
    digests = [_sha256(sources[name]) for name in names]
    experts = [
        _expert(gate_MD, up_MD, down_DM, plan=plan, layer=layer, expert=e)
        for e in range(plan.num_experts)
    ]
    tensors = {
        f"{place}.gate.weight": _router(plan, layer=layer, like=gate_MD),
        f"{place}.experts.gate_up_proj": torch.stack([gate_up for gate_up, _, _ in experts]),
        f"{place}.experts.down_proj": torch.stack([down for _, down, _ in experts]),
    }
    rows = tuple(plan.rows(e) for e in range(plan.num_experts))
    redrawn = tuple(numbers for _, _, numbers in experts if numbers)
    origins = [
        TensorOrigin(
            name=f"{place}.gate.weight", sources=(), sha256=(), how=_router_in_words(plan)
        ),
        TensorOrigin(
            name=f"{place}.experts.gate_up_proj",
            sources=tuple(names[:2]),
            sha256=tuple(digests[:2]),
            how=_experts_in_words(plan, scaled=False),
            expert_rows=rows,
            redrawn_sha256=redrawn,
        ),
        TensorOrigin(
            name=f"{place}.experts.down_proj",
            sources=(names[2],),
            sha256=(digests[2],),
            how=_experts_in_words(plan, scaled=True),
            expert_rows=rows,
            redrawn_sha256=redrawn,
        ),
    ]
    return tensors, origins


def _expert(
    gate_MD: Tensor, up_MD: Tensor, down_DM: Tensor, *, plan: _Plan, layer: int, expert: int
) -> tuple[Tensor, Tensor, str]:
    """(2F, D), (D, F) of one expert, and the hash of the dimensions that were drawn anew."""
    first, last = plan.rows(expert)
    parts = [gate_MD[first:last], up_MD[first:last], down_DM[:, first:last].T]
    parts[2] = parts[2] * plan.granularity
    redrawn = ""
    if plan.noise is not None:
        random = stream(plan.seed, "upcycle noise", layer, expert)
        parts = [part + plan.noise * part.float().std() * _normal(random, part) for part in parts]
    if plan.drop_ratio is not None:
        random = stream(plan.seed, "upcycle drop", layer, expert)
        count = int(plan.drop_ratio * plan.width)
        chosen = torch.from_numpy(random.permutation(plan.width)[:count]).sort().values
        redrawn = _sha256(chosen)
        for part in (parts := [part.clone() for part in parts]):
            old = part[chosen].float()
            part[chosen] = (old.mean() + old.std() * _normal(random, old)).to(part.dtype)
    gate_FD, up_FD, down_FD = (part.to(gate_MD.dtype) for part in parts)
    return torch.cat([gate_FD, up_FD]), down_FD.T.contiguous(), redrawn


def _router(plan: _Plan, *, layer: int, like: Tensor) -> Tensor:
    """(E, D): N(0, router_std); the slices of one copy share a row."""
    random = stream(plan.seed, "upcycle router", layer)
    rows = torch.empty(plan.num_experts // plan.granularity, like.shape[1])
    rows = plan.router_std * _normal(random, rows)
    return rows.repeat_interleave(plan.granularity, dim=0).to(like)


def _normal(random: Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(random.standard_normal(tuple(like.shape))).float().to(like.device)


def _sha256(tensor: Tensor) -> str:
    whole = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(whole.numpy().tobytes()).hexdigest()


def _router_in_words(plan: _Plan) -> str:
    shared = f", one row for {plan.granularity} experts" if plan.granularity > 1 else ""
    return f"drawn from N(0, {plan.router_std:g}^2){shared}"


def _experts_in_words(plan: _Plan, *, scaled: bool) -> str:
    if plan.granularity > 1:
        factor = f", times {plan.granularity}" if scaled else ""
        return f"slices of {plan.expert_width} of the {plan.width} dimensions{factor}"
    if plan.noise is not None:
        return f"copied, plus Gaussian noise of {plan.noise:g} times the source's deviation"
    if plan.drop_ratio is not None:
        count = int(plan.drop_ratio * plan.width)
        return f"copied; {count} of {plan.width} dimensions drawn anew from N(mean, std) of the old"
    return "copied"
