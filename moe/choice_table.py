"""Which experts each token of each sample went to, and nothing else: what is replayed and stored.

The decision to know: one flat integer tensor, sample after sample, token after token. It is what a
replay needs, 2 bytes a choice, and what an inference engine can return, which knows no logits.

Shapes: N samples, T tokens of all samples, L MoE layers, E experts, K experts per token.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.errors import UserError

HEADER, FORMAT = "switchyard", "routing choices 1"
COUNTS = ("num_layers", "num_experts", "top_k")


@dataclass(frozen=True, kw_only=True)
class ChoiceTable:
    """sample_N int64, ascending, each once; length_N int64, its tokens, at least 1.

    expert_TLK: int16 (int32 above 32768 experts), best first where the router said so; all tokens
    of the first sample, then of the second, and so on.
    """

    sample_N: Tensor
    length_N: Tensor
    expert_TLK: Tensor
    num_experts: int

    @property
    def num_layers(self) -> int:
        return self.expert_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_TLK.shape[2]

    @property
    def start_N(self) -> Tensor:
        """Where each sample's tokens begin."""
        return self.length_N.cumsum(dim=0) - self.length_N

    @classmethod
    def from_tokens(
        cls, sample_T: Tensor, token_T: Tensor, *, expert_TLK: Tensor, num_experts: int
    ) -> "ChoiceTable":
        """From tokens in any order, each with its sample's id and its number in the sample.

        Raises `UserError` where a sample's tokens are not 0, 1, 2 and so on, each once, or an
        expert is none or comes twice for a token.
        """
        order_T = torch.sort(token_T, stable=True).indices
        order_T = order_T[torch.sort(sample_T[order_T], stable=True).indices]
        sample_T, token_T, expert_TLK = sample_T[order_T], token_T[order_T], expert_TLK[order_T]
        sample_N, length_N = torch.unique_consecutive(sample_T, return_counts=True)
        start_N = length_N.cumsum(dim=0) - length_N
        expected_T = torch.arange(len(token_T), device=token_T.device)
        expected_T = expected_T - start_N.repeat_interleave(length_N)
        _refuse_gaps(sample_T, token_T, expected_T)
        _refuse_experts(sample_T, token_T, expert_TLK=expert_TLK, num_experts=num_experts)
        return cls(
            sample_N=sample_N.long(),
            length_N=length_N,
            expert_TLK=expert_TLK.to(torch.int16 if num_experts <= 2**15 else torch.int32),
            num_experts=num_experts,
        )

    @classmethod
    def from_samples(cls, choices: Mapping[int, Tensor], *, num_experts: int) -> "ChoiceTable":
        """From integers (L, tokens, K) per sample id, the first token first.

        Raises `UserError` for no samples, another kind of tensor, samples of different layers or
        K, and as `from_tokens`.
        """
        if not choices:
            raise UserError("no routing choices: give (layers, tokens, top_k) experts per sample.")
        samples = {int(name): torch.as_tensor(choice) for name, choice in choices.items()}
        first = next(iter(samples.values()))
        for name, choice in samples.items():
            if choice.dim() != 3 or choice.is_floating_point() or choice.shape[1] == 0:
                raise UserError(
                    f"the choices of sample {name} are {choice.dtype} of shape "
                    f"{tuple(choice.shape)}: give integers (layers, tokens, top_k)."
                )
            if (choice.shape[0], choice.shape[2]) != (first.shape[0], first.shape[2]):
                raise UserError(
                    f"sample {name} has {choice.shape[0]} layers and top_k {choice.shape[2]}, "
                    f"another {first.shape[0]} and {first.shape[2]}: one trace is of one model."
                )
        lengths = torch.tensor([choice.shape[1] for choice in samples.values()])
        return cls.from_tokens(
            torch.tensor(list(samples)).repeat_interleave(lengths),
            torch.cat([torch.arange(int(length)) for length in lengths]),
            expert_TLK=torch.cat([rearrange(c, "l t k -> t l k") for c in samples.values()]),
            num_experts=num_experts,
        )

    def samples(self) -> Iterator[tuple[int, Tensor]]:
        """Each sample's id and its choices, int64 (L, tokens, K)."""
        parts = self.expert_TLK.split(self.length_N.tolist())
        for name, part in zip(self.sample_N.tolist(), parts, strict=True):
            yield name, rearrange(part, "t l k -> l t k").long()

    def to(self, device: torch.device) -> "ChoiceTable":
        return ChoiceTable(
            sample_N=self.sample_N.to(device),
            length_N=self.length_N.to(device),
            expert_TLK=self.expert_TLK.to(device),
            num_experts=self.num_experts,
        )

    def save(self, path: str | Path) -> None:
        """One safetensors file; its header says format, layers, experts and top_k."""
        tensors = {"sample": self.sample_N, "length": self.length_N, "expert": self.expert_TLK}
        # One entry alone: safetensors keeps several in no order, and equal traces in equal bytes.
        header = json.dumps({"format": FORMAT} | {name: getattr(self, name) for name in COUNTS})
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            str(path),
            metadata={HEADER: header},
        )

    @classmethod
    def load(cls, path: str | Path) -> "ChoiceTable":
        """Raises `UserError` for a file that `save` did not write, or whose parts disagree."""
        said, tensors = _read(Path(path))
        sample_N, length_N, expert_TLK = (tensors[n] for n in ("sample", "length", "expert"))
        if not (
            (sample_N.dim(), length_N.dim(), expert_TLK.dim()) == (1, 1, 3)
            and len(sample_N) == len(length_N) > 0
            and bool((length_N > 0).all())
            and int(length_N.sum()) == len(expert_TLK)
            and tuple(expert_TLK.shape[1:]) == (said["num_layers"], said["top_k"])
        ):
            raise UserError(
                f"{path} says {said['num_layers']} MoE layers, {said['num_experts']} experts and "
                f"top_k {said['top_k']}, but holds experts of shape {tuple(expert_TLK.shape)} for "
                f"{len(sample_N)} samples of {int(length_N.sum())} tokens: record it again."
            )
        return cls.from_tokens(
            sample_N.repeat_interleave(length_N),
            torch.cat([torch.arange(int(length)) for length in length_N]),
            expert_TLK=expert_TLK,
            num_experts=said["num_experts"],
        )


def _read(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The counts of the header and the integer tensors by name."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give a routing trace that was saved.")
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}.") from error
    said = header if isinstance(header, dict) else {}
    counts = {name: said[name] for name in COUNTS if type(said.get(name)) is int}
    if (
        said.get("format") != FORMAT
        or counts.keys() != set(COUNTS)
        or tensors.keys() != {"sample", "length", "expert"}
        or any(tensor.is_floating_point() for tensor in tensors.values())
    ):
        raise UserError(f"{path} holds no routing trace: its header does not say {FORMAT!r}.")
    return counts, tensors


def _refuse_gaps(sample_T: Tensor, token_T: Tensor, expected_T: Tensor) -> None:
    wrong_T = token_T != expected_T
    if not bool(wrong_T.any()):
        return
    at = int(wrong_T.nonzero()[0])
    name, expected = int(sample_T[at]), int(expected_T[at])
    if int(token_T[at]) < expected:
        raise UserError(
            f"token {int(token_T[at])} of sample {name} was recorded twice: give forward "
            "sample_ids that name each sample once."
        )
    raise UserError(
        f"token {expected} of sample {name} was not recorded, token {int(token_T[at])} was: "
        "record each sample from its first token."
    )


def _refuse_experts(
    sample_T: Tensor, token_T: Tensor, *, expert_TLK: Tensor, num_experts: int
) -> None:
    sorted_TLK = expert_TLK.sort(dim=-1).values
    absent_TL = ((expert_TLK < 0) | (expert_TLK >= num_experts)).any(dim=-1)
    twice_TL = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any(dim=-1)
    wrong_TL = absent_TL | twice_TL
    if not bool(wrong_TL.any()):
        return
    at, layer = wrong_TL.nonzero()[0].tolist()
    raise UserError(
        f"token {int(token_T[at])} of sample {int(sample_T[at])} has experts "
        f"{expert_TLK[at, layer].tolist()} in MoE layer {layer}: each must be one of 0 to "
        f"{num_experts - 1} and come once."
    )
