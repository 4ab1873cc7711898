"""Row blocks of logits as the PyTorch twin reads them: in a wide dtype, as log-probs, with excluded tokens found."""

# N kept tokens, V vocabulary, R rows of one block

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from imagine_opd.kernels.types import LOWEST, Logits, Row, StatsSpec

BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits per row block: on CPU a few fp32 blocks fit the cache, on a GPU they are large enough to fill it."""


def read_logits(side: Logits, block: slice, columns: int, dtype: torch.dtype) -> Tensor:
    """A row block of logits in a wide dtype, softcap(scale * (value + bias)); it may be the values themselves."""
    # fp32 or wider: the exp of a bf16 difference loses the tail.
    logits_RV = side.values_NV[block, :columns].to(dtype)
    if side.bias_V is not None:
        logits_RV = logits_RV + side.bias_V[:columns]
    if side.scale != 1.0:
        logits_RV = logits_RV * side.scale
    if side.softcap:
        logits_RV = (logits_RV / side.softcap).tanh_().mul_(side.softcap)
    return logits_RV


def read_logprobs(
    student: Logits, teacher: Logits | None, table: Tensor, spec: StatsSpec, block: slice, columns: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """log p and log q of a row block, at least `LOWEST`, and which tokens the teacher and the student exclude.

    The caller owns what is returned, and may write over it.
    """

    def read(side: Logits, largest: int, log_sum: int, temperature: float) -> tuple[Tensor, Tensor | None]:
        logits_RV = read_logits(side, block, columns, table.dtype)
        missing_RV = find_missing(logits_RV)
        logprobs_RV = logits_RV - table[largest][:, None]
        if temperature != 1.0:
            logprobs_RV.div_(temperature)
        logprobs_RV.sub_(table[log_sum][:, None])
        if missing_RV is not None:
            logprobs_RV.clamp_(min=LOWEST).masked_fill_(missing_RV, LOWEST)
        return logprobs_RV, missing_RV

    logp_RV, student_missing_RV = read(student, Row.STUDENT_MAX, Row.STUDENT_LOG_SUM, spec.temperature)
    if teacher is None:
        return logp_RV, logp_RV, None, None
    logq_RV, missing_RV = read(teacher, Row.TEACHER_MAX, Row.TEACHER_LOG_SUM, spec.teacher_temperature)
    return logp_RV, logq_RV, missing_RV, student_missing_RV


def log_mixture(logp_RV: Tensor, logq_RV: Tensor, beta: float) -> Tensor:
    """log M, M = b q + (1 - b) p, in log space: the sum of probabilities would underflow first."""
    return torch.logaddexp(logq_RV + math.log(beta), logp_RV + math.log1p(-beta))


def find_missing(logits_RV: Tensor) -> Tensor | None:
    """Which tokens are excluded; `None`, at the cost of one read, when none is."""
    return logits_RV < LOWEST if logits_RV.numel() and bool(logits_RV.amin() < LOWEST) else None


def subtract_scaled(x_RV: Tensor, y_RV: Tensor, spec: StatsSpec) -> Tensor:
    """x / T_s - y / T_t, over `x_RV`: with one temperature subtract first, for the difference is nearly exact."""
    if spec.temperature == spec.teacher_temperature:
        return x_RV.sub_(y_RV).div_(spec.temperature) if spec.temperature != 1.0 else x_RV.sub_(y_RV)
    return x_RV.div_(spec.temperature).sub_(y_RV / spec.teacher_temperature)


def exp_scaled(x_RV: Tensor, temperature: float) -> Tensor:
    """exp(x / T)."""
    return x_RV.exp() if temperature == 1.0 else (x_RV / temperature).exp_()


def dot_rows(x_RV: Tensor, y_RV: Tensor) -> Tensor:
    """Row-wise inner product."""
    return (x_RV * y_RV).sum(1)


def split_rows(logits_NV: Tensor) -> Iterator[slice]:
    """Blocks of equal height but the last; none of an empty tensor."""
    rows, columns = logits_NV.shape
    height = max(1, BLOCK_ELEMENTS.get(logits_NV.device.type, 2**26) // columns)
    return (slice(start, start + height) for start in range(0, rows, height))
