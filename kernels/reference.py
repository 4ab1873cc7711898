"""The plain PyTorch twin of the kernels, the truth and the CPU path: logits [N, V] in, a table of row statistics out.

    KL(p||q) = sum_j p_j (log p_j - log q_j)          H(p) = -sum_j p_j log p_j
    d/ds_j   = p_j (log p_j - log q_j - KL) / T       d/ds_j = -p_j (log p_j + H) / T    p, q = softmax(s / T, t / T)

`naive_token_stats` is these lines as they stand, for tests and benches. The rest computes the same as the kernels do,
from partial states of a row (README.md beside this file), in blocks that stay in cache, and survives -inf.
"""

# N kept tokens, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from imagine_opd.kernels.reference_gradient import compute_gradient
from imagine_opd.kernels.reference_stats import (
    compute_state,
    compute_stats,
    finish_second_look,
    finish_state,
    look_again,
    merge_states,
)
from imagine_opd.kernels.types import Logits, StatsSpec

__all__ = [
    "compute_both",
    "compute_gradient",
    "compute_state",
    "compute_stats",
    "finish_second_look",
    "finish_state",
    "look_again",
    "merge_states",
    "naive_token_stats",
    "scale",
]


def naive_token_stats(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, token_ids_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula by autograd in the dtype given, many [N, V] buffers and no care for -inf: oracle in fp64."""
    logp_NV = torch.log_softmax(student_logits_NV / temperature, dim=-1)
    logq_NV = torch.log_softmax(teacher_logits_NV.detach() / temperature, dim=-1).to(logp_NV.dtype)
    p_NV = logp_NV.exp()
    ids_N1 = token_ids_N[:, None]
    return (
        logp_NV.gather(1, ids_N1).squeeze(1),
        logq_NV.gather(1, ids_N1).squeeze(1),
        (p_NV * (logp_NV - logq_NV)).sum(-1),
        -(p_NV * logp_NV).sum(-1),
    )


def compute_both(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    weights_5N: Tensor,
    uses: tuple[bool, ...],
    spec: StatsSpec,
    vocabulary: int,
    out_NV: Tensor,
    mask_N: Tensor | None = None,
) -> Tensor:
    """Both passes for weights known in advance: the table is returned, the gradient written to `out_NV`."""
    table = compute_stats(student, teacher, token_ids_N, spec, vocabulary, mask_N)
    compute_gradient(student, teacher, token_ids_N, table, weights_5N, uses, spec, vocabulary, out_NV)
    return table


def scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient in place by a scalar tensor."""
    return gradient.mul_(factor)
