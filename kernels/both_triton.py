"""Both passes in one Triton launch, for losses whose row weights are known, and the scaling of such a gradient."""
# N kept tokens, V vocabulary. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

from imagine_opd.kernels.algebra_triton import load_logits, store_stats, weigh_row
from imagine_opd.kernels.gradient_triton import write_gradient
from imagine_opd.kernels.rows_triton import walk_row


@triton.jit
def to_scalar(vector):
    """The one value of a vector [1]."""
    return tl.sum(vector, 0)


@triton.jit
def both_kernel(
    student_ptr,
    teacher_ptr,
    token_ids_ptr,
    mask_ptr,
    weights_ptr,
    weights_stride,
    table_ptr,
    table_stride,
    out_ptr,
    out_stride,
    N,
    student_bias_ptr,
    teacher_bias_ptr,
    student_stride,
    teacher_stride,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    inv_temperature,
    teacher_inv_temperature,
    V: tl.constexpr,
    LOAD_V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    POLICY: tl.constexpr,
    USES_LOGPROB: tl.constexpr,
    USES_KL: tl.constexpr,
    USES_ENTROPY: tl.constexpr,
):
    """Statistics and, for weights known in advance, the gradient, while the row's last tiles are still in cache.

    Each program takes every so many rows: with fewer rows in flight more of each stays in the second-level cache.
    """
    one = tl.arange(0, 1)
    row = tl.program_id(0).to(tl.int64)
    while row < N:
        active = row >= 0
        if HAS_MASK:
            active = tl.load(mask_ptr + row) != 0
        limit = tl.where(active, LOAD_V, 0)
        row_student_ptr = student_ptr + row * student_stride
        row_teacher_ptr = teacher_ptr + row * teacher_stride
        state = walk_row(
            row_student_ptr,
            row_teacher_ptr,
            0,
            limit,
            student_bias_ptr,
            teacher_bias_ptr,
            student_scale,
            teacher_scale,
            student_softcap,
            teacher_softcap,
            inv_temperature,
            teacher_inv_temperature,
            V,
            V // BLOCK_V,
            TILES,
            BLOCK_V,
            NUM_STAGES,
            STUDENT_ADJUST,
            TEACHER_ADJUST,
            HAS_TEACHER,
            False,
            SAME_TEMPERATURE,
        )
        token_id = tl.load(token_ids_ptr + row)
        known = (token_id >= 0) & (token_id < V)
        token_ids = token_id + one
        here = (token_ids >= 0) & (token_ids < tl.where(active, V, 0))
        safe_id = tl.where(here, token_ids, 0)
        s_y = load_logits(
            row_student_ptr, safe_id, here, student_bias_ptr, student_scale, student_softcap, STUDENT_ADJUST
        )
        t_y = s_y
        if HAS_TEACHER:
            t_y = load_logits(
                row_teacher_ptr, safe_id, here, teacher_bias_ptr, teacher_scale, teacher_softcap, TEACHER_ADJUST
            )
        kl, entropy, mass, forward_mass, log_sum, teacher_log_sum = store_stats(
            table_ptr,
            table_stride,
            row + one,
            one >= 0,
            tl.where(active, one, -1) >= 0,
            s_y,
            t_y,
            (token_ids >= 0) & (token_ids < V),
            state,
            inv_temperature,
            teacher_inv_temperature,
            HAS_TEACHER,
            False,
            POLICY,
        )
        weight = weigh_row(
            weights_ptr,
            weights_stride,
            row,
            to_scalar(kl),
            to_scalar(entropy),
            to_scalar(mass),
            to_scalar(forward_mass),
            to_scalar(log_sum),
            to_scalar(teacher_log_sum),
            known,
            inv_temperature,
            POLICY,
            USES_LOGPROB,
            USES_KL,
            USES_ENTROPY,
            False,
            False,
        )
        needs_teacher = weight[8]
        write_gradient(
            row_student_ptr,
            row_teacher_ptr,
            out_ptr + row * out_stride,
            0,
            V,
            token_id,
            to_scalar(state[0]),
            to_scalar(log_sum),
            tl.where(needs_teacher, to_scalar(state[3]), 0.0),
            tl.where(needs_teacher, to_scalar(teacher_log_sum), 0.0),
            0.0,
            weight[0],
            weight[1],
            weight[2],
            weight[3],
            weight[4],
            weight[5],
            0.0,
            weight[7] & active,
            needs_teacher,
            student_bias_ptr,
            teacher_bias_ptr,
            student_scale,
            teacher_scale,
            student_softcap,
            teacher_softcap,
            inv_temperature,
            teacher_inv_temperature,
            0.0,
            0.0,
            0.0,
            V,
            LOAD_V,
            TILES,
            BLOCK_V,
            NUM_STAGES,
            STUDENT_ADJUST,
            TEACHER_ADJUST,
            SAME_TEMPERATURE,
            USES_LOGPROB,
            USES_KL,
            USES_ENTROPY,
            False,
            False,
        )
        row += tl.num_programs(0)


@triton.jit
def scale_kernel(gradient_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """Multiply in place by a factor that only the device knows; a factor of 1 costs no pass over memory."""
    factor = tl.load(factor_ptr).to(tl.float32)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < tl.where(factor == 1.0, 0, size)
    value = tl.load(gradient_ptr + offsets, mask=mask, other=0.0)
    tl.store(gradient_ptr + offsets, (value * factor).to(gradient_ptr.dtype.element_ty), mask=mask)
