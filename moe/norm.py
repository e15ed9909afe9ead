"""Root-mean-square normalisation: of a layer's input, and of queries and keys."""

from torch import Tensor, nn, ones


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), the mean square in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight * normed.to(x.dtype)
