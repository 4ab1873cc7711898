"""The plain PyTorch twin of the kernels, the truth and the CPU path: logits [N, V] in, row statistics [N] out.

    KL(p||q) = sum_j p_j (log p_j - log q_j)      H(p) = -sum_j p_j log p_j
    d/ds_j   = p_j (log p_j - log q_j - KL) / T   d/ds_j = -p_j (log p_j + H) / T   with p, q = softmax(s / T, t / T)

`naive_token_stats` is these lines as they stand, for tests and benches; the other functions compute the same in
row blocks that stay in cache, keep nothing of size [N, V] for backward but their inputs, and survive -inf.
"""

# N kept tokens, V vocabulary, R rows of one block

from __future__ import annotations

import torch
from torch import Tensor

from imagine_opd.kernels.autograd import Backend, RowStats, RowWeights

BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits per row block: on CPU a few fp32 blocks fit the cache, on a GPU they are large enough to fill it."""

LOWEST_LOGPROB = -1e30
"""Stands for -inf in the second pass: exp gives 0 all the same, and 0 * -1e30 is 0 where 0 * inf is NaN."""


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


def compute_stats(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, token_ids_N: Tensor, temperature: float
) -> RowStats:
    """First pass: all statistics of each row, in fp32, or fp64 when either side is."""
    blocks = [
        _compute_block_stats(student_logits_NV[rows], teacher_logits_NV[rows], token_ids_N[rows], temperature)
        for rows in _split_rows(student_logits_NV)
    ]
    if len(blocks) == 1:
        return blocks[0]  # small enough to keep its log-probs for the second pass
    return RowStats._make([*(torch.cat(parts) for parts in zip(*(block[:4] for block in blocks), strict=True)), ()])


def compute_gradient(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    token_ids_N: Tensor,
    temperature: float,
    stats: RowStats,
    weights: RowWeights,
) -> Tensor:
    """Second pass: the gradient of sum_i weights_i . stats_i in the student's logits, in their dtype."""
    if stats.state:
        student_logprobs_NV, teacher_logprobs_NV = stats.state
        grad_NV = _compute_block_gradient(
            student_logprobs_NV, teacher_logprobs_NV, token_ids_N, temperature, stats, weights
        )
        return grad_NV.to(student_logits_NV.dtype)
    grad_NV = torch.empty(student_logits_NV.shape, dtype=student_logits_NV.dtype, device=student_logits_NV.device)
    for rows in _split_rows(student_logits_NV):
        grad_NV[rows] = _compute_block_gradient(
            *_compute_logprobs(student_logits_NV[rows], teacher_logits_NV[rows], temperature),
            token_ids_N[rows],
            temperature,
            RowStats._make([*(stat_N[rows] for stat_N in stats[:4]), ()]),
            RowWeights(*(None if weight_N is None else weight_N[rows] for weight_N in weights)),
        )
    return grad_NV


BACKEND = Backend(compute_stats, compute_gradient)


def _split_rows(logits_NV: Tensor) -> list[slice]:
    """Blocks of equal height (but the last), at least one: an empty block keeps N = 0 out of every other line."""
    rows, vocabulary = logits_NV.shape
    height = max(1, BLOCK_ELEMENTS.get(logits_NV.device.type, 2**26) // vocabulary)
    return [slice(start, start + height) for start in range(0, max(rows, 1), height)]


def _compute_logprobs(student_RV: Tensor, teacher_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    # fp32 here: the exp of a bf16 difference loses the tail.
    dtype = torch.promote_types(torch.promote_types(student_RV.dtype, teacher_RV.dtype), torch.float32)
    student_RV, teacher_RV = student_RV.to(dtype), teacher_RV.to(dtype)
    if temperature != 1.0:
        student_RV, teacher_RV = student_RV / temperature, teacher_RV / temperature
    return torch.log_softmax(student_RV, 1), torch.log_softmax(teacher_RV, 1)


def _compute_block_stats(student_RV: Tensor, teacher_RV: Tensor, token_ids_R: Tensor, temperature: float) -> RowStats:
    logp_RV, logq_RV = _compute_logprobs(student_RV, teacher_RV, temperature)
    p_RV = logp_RV.exp()
    # nansum: 0 * inf where p = 0 counts as the 0 it tends to. Rows of NaN stay NaN: their log-probs are so in column 0.
    student_nan_R = logp_RV[:, 0].isnan()
    either_nan_R = student_nan_R | logq_RV[:, 0].isnan()
    in_range_R, ids_R1 = _clamp_ids(token_ids_R, student_RV.shape[1])
    return RowStats(
        student_logprob_N=logp_RV.gather(1, ids_R1).squeeze(1).masked_fill_(~in_range_R, torch.nan),
        teacher_logprob_N=logq_RV.gather(1, ids_R1).squeeze(1).masked_fill_(~in_range_R, torch.nan),
        reverse_kl_N=(logp_RV - logq_RV).mul_(p_RV).nansum(1).masked_fill_(either_nan_R, torch.nan),
        entropy_N=p_RV.mul_(logp_RV).nansum(1).neg_().masked_fill_(student_nan_R, torch.nan),
        state=(logp_RV, logq_RV),
    )


def _compute_block_gradient(
    logp_RV: Tensor, logq_RV: Tensor, token_ids_R: Tensor, temperature: float, stats: RowStats, weights: RowWeights
) -> Tensor:
    # g_j = p_j { a (log p_j - log q_j - KL) - c (log p_j + H) - b } + b [j = y], the three row constants in one.
    b_R, a_R, c_R = (None if weight_R is None else weight_R / temperature for weight_R in weights)
    logp_RV = logp_RV.clamp(min=LOWEST_LOGPROB)
    grad_RV = logp_RV.exp()
    constant_R = torch.zeros_like(stats.reverse_kl_N)
    slope_RV: Tensor | None = None
    if a_R is not None:
        kl_R = stats.reverse_kl_N.masked_fill(stats.reverse_kl_N.isinf(), torch.nan)  # no gradient exists there
        constant_R = constant_R - (a_R * kl_R).masked_fill_(a_R == 0, 0.0)
        # NaN of a teacher row must not reach rows whose KL has no weight; where it has some, KL itself is NaN.
        logq_RV = logq_RV.nan_to_num(nan=0.0, neginf=LOWEST_LOGPROB)
        slope_RV = torch.sub(logp_RV, logq_RV, out=logq_RV).mul_(a_R[:, None])
    if c_R is not None:
        constant_R = constant_R - c_R * stats.entropy_N
        slope_RV = logp_RV.mul_(-c_R[:, None]) if slope_RV is None else slope_RV.addcmul_(logp_RV, -c_R[:, None])
    in_range_R, ids_R1 = _clamp_ids(token_ids_R, logp_RV.shape[1])
    if b_R is not None:
        b_R = b_R.masked_fill(~in_range_R & (b_R != 0), torch.nan)  # a NaN log-prob in use stays loud
        constant_R = constant_R - b_R

    grad_RV.mul_(constant_R[:, None] if slope_RV is None else slope_RV.add_(constant_R[:, None]))
    if b_R is not None:
        grad_RV.scatter_add_(1, ids_R1, b_R[:, None])
    # A row without any weight may hold anything, NaN included: its gradient is 0.
    idle_R = torch.stack([weight_R == 0 for weight_R in (a_R, b_R, c_R) if weight_R is not None]).all(0)
    if idle_R.any():  # seldom, and a masked fill costs as much as an exp
        grad_RV[idle_R] = 0.0
    return grad_RV


def _clamp_ids(token_ids_R: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    ids_R = token_ids_R.clamp(0, vocabulary - 1)
    return ids_R == token_ids_R, ids_R[:, None]
