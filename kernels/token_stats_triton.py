"""The Triton kernels for logits in memory: one program per row, logits [N, V] in, statistics [N] or gradient out.

Two launches. `_stats_kernel` walks a row's column tiles once and keeps six running scalars; `_gradient_kernel`
walks them backwards, so that the tiles read last, still in cache, are read first. No atomics: runs repeat bit by bit.
The algebra stands in README.md beside this file, the plain twin in `reference.py`.
"""
# N kept tokens, V vocabulary. No `from __future__ import annotations`: Triton reads the annotations of its kernels.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imagine_opd.kernels.autograd import Backend, RowStats, RowWeights


class TileConfig(NamedTuple):
    """How one row is walked: columns per tile, warps per program, tiles in flight."""

    block_v: int
    num_warps: int
    num_stages: int


def choose_tile(vocabulary: int) -> TileConfig:
    """The one table of launch shapes: 16 columns per thread at most, which compiles without register spills."""
    block_v = min(4096, triton.next_power_of_2(vocabulary))
    return TileConfig(block_v, num_warps=max(1, min(8, block_v // 256)), num_stages=3)


@triton.jit
def _stats_kernel(
    student_ptr,
    teacher_ptr,
    token_ids_ptr,
    student_logprob_ptr,
    teacher_logprob_ptr,
    reverse_kl_ptr,
    entropy_ptr,
    student_max_ptr,
    student_log_sum_ptr,
    teacher_max_ptr,
    teacher_log_sum_ptr,
    student_stride,
    teacher_stride,
    inv_temperature,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at row 14,134 of a 151,936-token vocabulary
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    scale = inv_temperature * 1.4426950408889634  # exp(x / T) = exp2(x * scale)

    # Finite lowest value, not -inf: the difference of two running maxima is then never NaN.
    student_max = -3.4028234663852886e38
    teacher_max = -3.4028234663852886e38
    student_sum = 0.0
    teacher_sum = 0.0
    ratio_sum = 0.0  # sum e^{(s - max_s) / T} [(s - max_s) - (t - max_t)]
    energy_sum = 0.0  # sum e^{(s - max_s) / T} (s - max_s)
    for start in tl.range(0, V, BLOCK_V, num_stages=NUM_STAGES):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < V
        s = tl.load(student_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)
        t = tl.load(teacher_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32)

        new_student_max = tl.maximum(student_max, tl.max(s, 0))
        new_teacher_max = tl.maximum(teacher_max, tl.max(t, 0))
        student_step = student_max - new_student_max
        teacher_step = teacher_max - new_teacher_max
        carry = tl.exp2(student_step * scale)
        carried_sum = carry * student_sum
        # Nothing carried means exactly 0, also where a step is infinite.
        ratio_sum = tl.where(carried_sum > 0, carry * ratio_sum + carried_sum * (student_step - teacher_step), 0.0)
        energy_sum = tl.where(carried_sum > 0, carry * energy_sum + carried_sum * student_step, 0.0)
        teacher_sum *= tl.exp2(teacher_step * scale)
        student_max = new_student_max
        teacher_max = new_teacher_max

        s -= student_max
        t -= teacher_max
        e = tl.exp2(s * scale)
        student_sum = carried_sum + tl.sum(e, 0)
        teacher_sum += tl.sum(tl.exp2(t * scale), 0)
        # The guards ask e > 0, not s > -inf: s - max may overflow to -inf by itself, and 0 * inf is NaN.
        # s - t before the scale: equal logits give exactly 0 however the compiler contracts multiply and add.
        ratio_sum += tl.sum(tl.where(e > 0, e * (s - t), 0.0), 0)
        energy_sum += tl.sum(tl.where(e > 0, e * s, 0.0), 0)

    student_log_sum = tl.log(student_sum)
    teacher_log_sum = tl.log(teacher_sum)
    ratio = ratio_sum * inv_temperature / student_sum
    # div_rn: the approximate division need not give 1 for x / x.
    tl.store(reverse_kl_ptr + row, ratio - tl.log(tl.div_rn(student_sum, teacher_sum)))
    tl.store(entropy_ptr + row, student_log_sum - energy_sum * inv_temperature / student_sum)
    tl.store(student_max_ptr + row, student_max)
    tl.store(student_log_sum_ptr + row, student_log_sum)
    tl.store(teacher_max_ptr + row, teacher_max)
    tl.store(teacher_log_sum_ptr + row, teacher_log_sum)

    token_id = tl.load(token_ids_ptr + row)
    in_range = (token_id >= 0) & (token_id < V)
    s_y = tl.load(student_ptr + token_id, mask=in_range, other=float("nan")).to(tl.float32)
    t_y = tl.load(teacher_ptr + token_id, mask=in_range, other=float("nan")).to(tl.float32)
    tl.store(student_logprob_ptr + row, (s_y - student_max) * inv_temperature - student_log_sum)
    tl.store(teacher_logprob_ptr + row, (t_y - teacher_max) * inv_temperature - teacher_log_sum)


@triton.jit
def _gradient_kernel(
    student_ptr,
    teacher_ptr,
    token_ids_ptr,
    logprob_weight_ptr,
    kl_weight_ptr,
    entropy_weight_ptr,
    reverse_kl_ptr,
    entropy_ptr,
    student_max_ptr,
    student_log_sum_ptr,
    teacher_max_ptr,
    teacher_log_sum_ptr,
    grad_ptr,
    student_stride,
    teacher_stride,
    inv_temperature,
    HAS_LOGPROB: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    grad_ptr += row * V
    student_max = tl.load(student_max_ptr + row)
    student_log_sum = tl.load(student_log_sum_ptr + row)

    # g_j = p_j { a (log p_j - log q_j - KL) - c (log p_j + H) - b } + b [j = y]: three slopes and one constant a row.
    constant = 0.0
    size = 0.0  # |a| + |b| + |c|: a row without any weight is left alone
    if HAS_KL:
        a = tl.load(kl_weight_ptr + row).to(tl.float32) * inv_temperature
        has_kl = a != 0
        size += tl.abs(a)
        # A row whose KL has no weight does not read the teacher: it may hold NaN.
        teacher_columns = tl.where(has_kl, V, 0)
        teacher_max = tl.load(teacher_max_ptr + row, mask=has_kl, other=0.0)
        teacher_log_sum = tl.load(teacher_log_sum_ptr + row, mask=has_kl, other=0.0)
        kl = tl.load(reverse_kl_ptr + row)
        kl = tl.where(tl.abs(kl) == float("inf"), float("nan"), kl)  # no gradient exists there
        constant -= tl.where(has_kl, a * (student_log_sum - teacher_log_sum + kl), 0.0)
        a *= inv_temperature
    if HAS_ENTROPY:
        c = tl.load(entropy_weight_ptr + row).to(tl.float32) * inv_temperature
        size += tl.abs(c)
        constant += c * (student_log_sum - tl.load(entropy_ptr + row))
        c *= inv_temperature
    if HAS_LOGPROB:
        b = tl.load(logprob_weight_ptr + row).to(tl.float32) * inv_temperature
        size += tl.abs(b)
        token_id = tl.load(token_ids_ptr + row)
        in_range = (token_id >= 0) & (token_id < V)
        b = tl.where(in_range | (b == 0), b, float("nan"))  # a NaN log-prob in use stays loud
        constant -= b

    active = size != 0
    # A row without any weight reads nothing and writes zeros.
    student_columns = tl.where(active, V, 0)

    scale = inv_temperature * 1.4426950408889634
    log2_sum = student_log_sum * 1.4426950408889634
    num_tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    for step in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        columns = (num_tiles - 1 - step) * BLOCK_V + tl.arange(0, BLOCK_V)
        s = tl.load(student_ptr + columns, mask=columns < student_columns, other=0.0).to(tl.float32)
        # -1e30 stands for -inf: exp2 gives 0 all the same, and 0 * -1e30 is 0 where 0 * inf is NaN.
        s = tl.maximum(s - student_max, -1e30)
        p = tl.exp2(s * scale - log2_sum)
        weight = tl.zeros_like(s) + constant
        if HAS_KL:
            t = tl.load(teacher_ptr + columns, mask=columns < teacher_columns, other=0.0).to(tl.float32)
            weight += a * (s - tl.maximum(t - teacher_max, -1e30))
        if HAS_ENTROPY:
            weight -= c * s
        g = p * weight
        if HAS_LOGPROB:
            g += tl.where(columns == token_id, b, 0.0)
        g = tl.where(active, g, 0.0)
        tl.store(grad_ptr + columns, g.to(grad_ptr.dtype.element_ty), mask=columns < V)


# Fusion of multiply and add is asked for by name: Triton is about to change the default and warns until one does.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def compute_stats(
    student_logits_NV: Tensor, teacher_logits_NV: Tensor, token_ids_N: Tensor, temperature: float
) -> RowStats:
    """First pass: all statistics of each row, in fp32."""
    student_logits_NV, teacher_logits_NV = _make_rows_dense(student_logits_NV), _make_rows_dense(teacher_logits_NV)
    rows, vocabulary = student_logits_NV.shape
    device = student_logits_NV.device
    # The state: log p_j = (s_j - max) / temperature - log_sum for student, then teacher. max and log_sum are kept
    # apart: their sum would round away log_sum's digits when logits are large.
    outputs = [torch.empty(rows, dtype=torch.float32, device=device) for _ in range(8)]
    stats = RowStats(*outputs[:4], state=tuple(outputs[4:]))
    if rows == 0:
        return stats
    tile = choose_tile(vocabulary)
    with torch.cuda.device_of(student_logits_NV):
        _stats_kernel[(rows,)](
            student_logits_NV,
            teacher_logits_NV,
            token_ids_N.contiguous(),
            *outputs,
            student_logits_NV.stride(0),
            teacher_logits_NV.stride(0),
            1.0 / temperature,
            V=vocabulary,
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return stats


def compute_gradient(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    token_ids_N: Tensor,
    temperature: float,
    stats: RowStats,
    weights: RowWeights,
) -> Tensor:
    """Second pass: the gradient of sum_i weights_i . stats_i in the student's logits, in their dtype."""
    student_logits_NV, teacher_logits_NV = _make_rows_dense(student_logits_NV), _make_rows_dense(teacher_logits_NV)
    rows, vocabulary = student_logits_NV.shape
    grad_NV = torch.empty((rows, vocabulary), dtype=student_logits_NV.dtype, device=student_logits_NV.device)
    if rows == 0:
        return grad_NV
    tile = choose_tile(vocabulary)
    # An absent weight passes some [N] tensor that its flag keeps from being read.
    b_N, a_N, c_N = (stats.entropy_N if weight_N is None else weight_N.contiguous() for weight_N in weights)
    with torch.cuda.device_of(student_logits_NV):
        _gradient_kernel[(rows,)](
            student_logits_NV,
            teacher_logits_NV,
            token_ids_N.contiguous(),
            b_N,
            a_N,
            c_N,
            stats.reverse_kl_N,
            stats.entropy_N,
            *stats.state,
            grad_NV,
            student_logits_NV.stride(0),
            teacher_logits_NV.stride(0),
            1.0 / temperature,
            HAS_LOGPROB=weights.student_logprob_N is not None,
            HAS_KL=weights.reverse_kl_N is not None,
            HAS_ENTROPY=weights.entropy_N is not None,
            V=vocabulary,
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return grad_NV


BACKEND = Backend(compute_stats, compute_gradient)


def _make_rows_dense(logits_NV: Tensor) -> Tensor:
    """Any row stride goes, but the columns of a row must lie side by side."""
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
