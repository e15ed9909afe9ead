"""One SwiGLU FFN: of a layer without experts, and the expert that every token passes."""

from torch import Tensor, nn


class DenseFFN(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), each with a bias or none."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
