"""The one path from logits to log-probabilities, for DPO, PPO and their references alike.

One decision to know: entry s of every tensor here speaks of token s, not of the logits at s. The
logits at s - 1 predict token s, so entry 0 has no prediction and is 0. Masks then line up with ids.

The other: the two passes over the vocabulary are autograd functions of our own. They keep the
logits and one number per token, where plain operations would keep float32 copies of the logits; and
where no gradient arrives they give exactly 0, where plain operations give 0 * NaN at a padded
position whose logits are NaN.

Shapes: B batch, S sequence, T tokens (B*S), V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from moe.errors import UserError


def token_logps(logits_BSV: Tensor, ids_BS: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log p(ids[s] | ids[<s]) for every token, logp_BS; entry 0 of each row is 0.

    log p = z_y - logsumexp(z) with z = logits / temperature, float32 (float64 if the logits are).
    Every id must lie in 0..V-1, under padding too; what stands under padding is left out afterwards
    by `response_logps` or `sequence_logps`, with a mask. Old, new and reference log-probabilities
    of one update belong to the same temperature.
    Differentiable once. Raises ValueError when logits and ids disagree in shape.
    """
    _check_logits(logits_BSV, temperature=temperature)
    if logits_BSV.shape[:2] != ids_BS.shape:
        raise ValueError(
            f"logits of shape {tuple(logits_BSV.shape)} do not belong to ids of shape "
            f"{tuple(ids_BS.shape)}; give one row of logits per token"
        )
    next_id_BS = pad(ids_BS[:, 1:], (0, 1))
    logp_T = _NextTokenLogps.apply(
        logits_BSV.flatten(0, 1), next_id_BS.flatten(), float(temperature)
    )
    return _to_predicted(logp_T, ids_BS.shape)


def entropy(logits_BSV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the distribution that predicted token s, entropy_BS; entry 0 is 0.

    H = logsumexp(z) - sum_v softmax(z)_v z_v with z = logits / temperature, float32 (float64 if the
    logits are). A logit of -inf counts as probability 0. Differentiable once.
    """
    _check_logits(logits_BSV, temperature=temperature)
    entropy_T = _NextTokenEntropy.apply(logits_BSV.flatten(0, 1), float(temperature))
    return _to_predicted(entropy_T, logits_BSV.shape[:2])


def response_logps(logp_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """The log-probabilities that the mask keeps, zero where masked, float32 or float64.

    Raises ValueError when the shapes differ.
    """
    check_same_shape(logp=logp_BS, mask=mask_BS)
    return where_real(logp_BS, mask_BS)


def sequence_logps(logp_BS: Tensor, completion_mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over each row's completion tokens and their number: (sum_B, length_B).

    sum_B is float32 (float64 if logp is), length_B int64; a row without completion gives 0 and 0.
    Raises ValueError when the mask keeps token 0, which nothing predicts.
    """
    logp_BS = response_logps(logp_BS, completion_mask_BS)
    if completion_mask_BS[:, :1].any():
        raise ValueError(
            "the completion mask keeps token 0, which no token predicts; "
            "begin every row with a prompt token, for example BOS"
        )
    return logp_BS.sum(dim=1), completion_mask_BS.bool().sum(dim=1)


def where_real(x: Tensor, mask: Tensor) -> Tensor:
    """x in float32 (float64 if it is), zero where masked.

    Selects and never multiplies: a NaN under padding reaches neither the value nor the gradient.
    """
    return torch.where(mask.bool(), x, 0.0).to(torch.promote_types(x.dtype, torch.float32))


def check_same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError, naming each one, unless all the tensors have one shape; None is left out.

    Broadcasting would turn a (B,) beside a (B, R) into numbers that look right.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1:
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be the same, but are: {listing}")


class _NextTokenLogps(torch.autograd.Function):
    """log softmax(logits / temperature)[target], row by row."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, temperature: float) -> Tensor:
        logp_T = _per_token(logits_TV)
        logsumexp_T = _per_token(logits_TV)
        for rows, z_CV in _scaled_chunks(logits_TV, temperature=temperature):
            logsumexp_T[rows] = z_CV.logsumexp(dim=-1)
            logp_T[rows] = z_CV.gather(1, target_T[rows, None])[:, 0] - logsumexp_T[rows]
        ctx.save_for_backward(logits_TV, target_T, logsumexp_T)
        ctx.temperature = temperature
        return logp_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        """d logp / d logits = (onehot - softmax) / temperature."""
        logits_TV, target_T, logsumexp_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for rows, z_CV in _scaled_chunks(logits_TV, temperature=ctx.temperature):
            weight_C1 = grad_T[rows, None] / ctx.temperature
            grad_CV = (z_CV - logsumexp_T[rows, None]).exp_().mul_(-weight_C1)
            grad_CV.scatter_add_(1, target_T[rows, None], weight_C1)
            grad_TV[rows] = grad_CV.masked_fill_(weight_C1 == 0.0, 0.0)
        return grad_TV, None, None


class _NextTokenEntropy(torch.autograd.Function):
    """Entropy of softmax(logits / temperature), row by row."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, temperature: float) -> Tensor:
        entropy_T = _per_token(logits_TV)
        logsumexp_T = _per_token(logits_TV)
        for rows, z_CV in _scaled_chunks(logits_TV, temperature=temperature):
            logsumexp_T[rows] = z_CV.logsumexp(dim=-1)
            logp_CV = z_CV - logsumexp_T[rows, None]
            entropy_T[rows] = -_times_probability(logp_CV, logp_CV).sum(dim=-1)
        ctx.save_for_backward(logits_TV, logsumexp_T, entropy_T)
        ctx.temperature = temperature
        return entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None]:
        """d H / d logits = -p (log p + H) / temperature."""
        logits_TV, logsumexp_T, entropy_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        for rows, z_CV in _scaled_chunks(logits_TV, temperature=ctx.temperature):
            logp_CV = z_CV - logsumexp_T[rows, None]
            weight_C1 = grad_T[rows, None] / ctx.temperature
            slope_CV = _times_probability(logp_CV + entropy_T[rows, None], logp_CV)
            grad_TV[rows] = slope_CV.mul_(-weight_C1).masked_fill_(weight_C1 == 0.0, 0.0)
        return grad_TV, None


def _check_logits(logits_BSV: Tensor, *, temperature: float) -> None:
    if logits_BSV.ndim != 3:
        raise ValueError(f"logits must be (B, S, V), got shape {tuple(logits_BSV.shape)}")
    if not 0.0 < temperature < float("inf"):
        raise UserError(f"temperature must be a finite number above 0, got {temperature}")


def _to_predicted(value_T: Tensor, shape_BS: torch.Size) -> Tensor:
    """What the logits at s - 1 gave, moved to the token s that they predicted."""
    return pad(value_T.view(shape_BS)[:, :-1], (1, 0))


def _per_token(logits_TV: Tensor) -> Tensor:
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return torch.empty(logits_TV.shape[0], dtype=dtype, device=logits_TV.device)


def _scaled_chunks(logits_TV: Tensor, *, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of the logits with z = logits / temperature in float32 or float64, z_CV."""
    num_tokens, num_ids = logits_TV.shape
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    # 4 MiB of float32 stay in a CPU's cache: twice as fast as 64 MiB. A GPU wants wide launches.
    num_elements = 2**20 if logits_TV.device.type == "cpu" else 2**24
    step = max(1, num_elements // max(1, num_ids))
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        z_CV = logits_TV[rows].to(dtype)
        yield rows, z_CV if temperature == 1.0 else z_CV / temperature


def _times_probability(value_CV: Tensor, logp_CV: Tensor) -> Tensor:
    """value * p, with 0 where the probability is exactly 0 and the value therefore -inf."""
    return (value_CV * logp_CV.exp()).masked_fill_(logp_CV == float("-inf"), 0.0)
