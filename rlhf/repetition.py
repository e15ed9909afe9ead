"""How much a set of answers repeats itself, without waiting for the device.

Shapes: B answers, R response tokens.
"""

import torch
from torch import Tensor


def distinct_share(response_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Distinct bigrams over all bigrams of the answers together, 0-dim float32; 1 with none.

    Distinct-2 of Li et al. 2016 (arxiv.org/abs/1510.03055) in tokens. A bigram lies within an
    answer and its two tokens are real. It falls with the number of tokens: compare answers of like
    length and number.
    """
    ids_BR = response_BR.long()
    is_real = (mask_BR[:, :-1].bool() & mask_BR[:, 1:].bool()).flatten()
    code = (ids_BR[:, :-1] * (ids_BR.max() + 1) + ids_BR[:, 1:]).flatten()
    # Sorted, equal ones are neighbours: `unique` would have to tell the host how many there are.
    ordered = torch.where(is_real, code, -1).sort().values
    is_new = ordered[1:] != ordered[:-1]
    first_is_real = (ordered[:1] >= 0).sum()
    num_distinct = (is_new & (ordered[1:] >= 0)).sum() + first_is_real
    num_all = is_real.sum()
    return torch.where(num_all > 0, num_distinct / num_all.clamp(min=1), 1.0)
