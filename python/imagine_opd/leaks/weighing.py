"""The unlikelihood loss of leaked tokens (`leak_action="unlikelihood"`).

L_t = -w log max(1 - p_S(y_t), floor) at the leaked tokens, in addition to the objective (SpatialOPSD).
"""

from __future__ import annotations

import torch

# B rows, T completion tokens, N kept response tokens

PROBABILITY_FLOOR = 1e-6


def unlikelihood(
    student_logprob_N: torch.Tensor, weight_N: torch.Tensor, floor: float = PROBABILITY_FLOOR
) -> torch.Tensor:
    """`[N]` losses that push a token's probability down; `weight_N` is 0 where nothing leaked.

    At and above a probability of 1 - floor the loss is constant: its gradient would be without bound.
    """
    # Clamped before the exponential: log1p(-1) is minus infinity, and 0 times its gradient NaN.
    bound = torch.log1p(torch.tensor(-floor, dtype=torch.float64)).item()
    probability_N = student_logprob_N.clamp(max=bound).exp()
    return -weight_N * torch.log1p(-probability_N)
