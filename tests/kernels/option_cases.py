"""What the tests of `token_stats`' options share: which statistics there are, and one way to run them."""

# N kept tokens, V vocabulary

import torch
from kernel_cases import Case
from torch import Tensor

from imagine_opd.kernels import StatsOptions, TokenStats, token_stats

FIELDS = ("student_logprob_N", "reverse_kl_N", "entropy_N", "forward_kl_N", "jsd_N")
BETA = 0.3
EVERY = StatsOptions(forward_kl=True, jsd_beta=BETA)


def run(case: Case, backend: str, options: StatsOptions, use: tuple[str, ...], dtype: torch.dtype | None = None):
    """Statistics, and the gradient of sum_k (k + 1) w_N . stat_k over the fields in `use`."""
    student_NV = case.student_NV.detach().clone().to(dtype or case.student_NV.dtype).requires_grad_()
    teacher_NV = case.teacher_NV.to(dtype or case.teacher_NV.dtype)
    stats = token_stats(student_NV, teacher_NV, case.token_ids_N, case.temperature, backend, options=options)
    weigh(stats, use, case.weights_3N[0]).backward()
    return stats, student_NV.grad


def weigh(stats: TokenStats, use: tuple[str, ...], weight_N: Tensor) -> Tensor:
    values = [getattr(stats, name) for name in use]
    return torch.stack(
        [(index + 1) * (value_N @ weight_N.to(value_N.dtype)) for index, value_N in enumerate(values)]
    ).sum()
