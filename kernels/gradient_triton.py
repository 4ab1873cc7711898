"""The second pass in Triton: logits, row statistics and upstream gradients in, the gradient of the logits out.

g_j = p_j { a (log p_j - log q_j - KL) - c (log p_j + H) - b + f } - f q_j + b [j = y], and the JSD's term. Tiles are
walked backwards: those that the first pass read last, still in cache, are read first.
"""
# N kept tokens, V vocabulary. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

from imagine_opd.kernels.algebra_triton import HAS_SCALE, HAS_SOFTCAP, LOG2_E, LOWEST, load_logits, weigh_row
from imagine_opd.kernels.second_look_triton import add_logs


@triton.jit
def write_gradient(
    student_ptr,
    teacher_ptr,
    out_ptr,
    first,
    out_limit,
    token_column,
    student_max,
    log_sum,
    teacher_max,
    teacher_log_sum,
    student_mixture_kl,
    constant,
    kl_slope,
    missing_slope,
    entropy_slope,
    logprob_weight,
    teacher_weight,
    jsd_weight,
    active,
    needs_teacher,
    student_bias_ptr,
    teacher_bias_ptr,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    inv_temperature,
    teacher_inv_temperature,
    log_beta,
    log_rest,
    rest,
    V: tl.constexpr,
    LOAD_V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    USES_LOGPROB: tl.constexpr,
    USES_KL: tl.constexpr,
    USES_ENTROPY: tl.constexpr,
    USES_FORWARD: tl.constexpr,
    USES_JSD: tl.constexpr,
):
    """The gradient of one row's TILES tiles from column `first`; columns from V to `out_limit` get 0."""
    # A row without any weight reads nothing and writes zeros; one that needs no teacher does not read its.
    student_limit = tl.where(active, LOAD_V, 0)
    teacher_limit = tl.where(active & needs_teacher, LOAD_V, 0)
    token_limit = tl.where(active, V, 0)
    scale = inv_temperature * LOG2_E
    teacher_scale2 = teacher_inv_temperature * LOG2_E
    for step in tl.range(0, TILES, num_stages=NUM_STAGES):
        columns = first + (TILES - 1 - step) * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = columns < student_limit
        s = load_logits(student_ptr, columns, mask, student_bias_ptr, student_scale, student_softcap, STUDENT_ADJUST)
        student_missing = s < LOWEST
        # -1e30 stands for -inf: exp2 gives 0 all the same, and 0 * -1e30 is 0 where 0 * inf is NaN.
        x = tl.maximum(s - student_max, LOWEST)
        p = tl.exp2(x * scale - log_sum * LOG2_E)
        weight = tl.zeros_like(x) + constant
        if USES_KL or USES_FORWARD or USES_JSD:
            mask_t = columns < teacher_limit
            t = load_logits(
                teacher_ptr, columns, mask_t, teacher_bias_ptr, teacher_scale, teacher_softcap, TEACHER_ADJUST
            )
            teacher_missing = t < LOWEST
            y = tl.maximum(t - teacher_max, LOWEST)
        if USES_KL:
            if SAME_TEMPERATURE:
                difference = (x - y) * inv_temperature
            else:
                difference = x * inv_temperature - y * teacher_inv_temperature
            weight += tl.where(teacher_missing, missing_slope, kl_slope * difference)
        if USES_ENTROPY:
            weight -= entropy_slope * (x * inv_temperature)
        if USES_JSD:
            logp = tl.maximum(x * inv_temperature - log_sum, LOWEST)
            logq = tl.where(teacher_missing, LOWEST, y * teacher_inv_temperature - teacher_log_sum)
            log_mixture = add_logs(logq + log_beta, logp + log_rest)
            term = rest * jsd_weight * (logp - log_mixture - student_mixture_kl)
            weight += tl.where(jsd_weight != 0, term, 0.0)
        g = p * weight
        if USES_FORWARD:
            q = tl.exp2(y * teacher_scale2 - teacher_log_sum * LOG2_E)
            g -= tl.where(student_missing | teacher_missing, 0.0, teacher_weight * q)
        if USES_LOGPROB:
            g += tl.where(columns == token_column, logprob_weight, 0.0)
        if HAS_SOFTCAP & STUDENT_ADJUST:
            capped = s / student_softcap
            g *= 1.0 - capped * capped
        if HAS_SCALE & STUDENT_ADJUST:
            g *= student_scale
        g = tl.where(columns < token_limit, g, 0.0)
        # Written once and not read here again: it should not push out the logits that the next tile needs.
        out = g.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + columns, out, mask=columns < out_limit, eviction_policy="evict_first")


@triton.jit
def gradient_kernel(
    student_ptr,
    teacher_ptr,
    token_ids_ptr,
    weights_ptr,
    weights_stride,
    table_ptr,
    table_stride,
    out_ptr,
    out_stride,
    out_columns,
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
    log_beta,
    log_rest,
    rest,
    first_column,
    vocabulary,
    V: tl.constexpr,
    LOAD_V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    POLICY: tl.constexpr,
    USES_LOGPROB: tl.constexpr,
    USES_KL: tl.constexpr,
    USES_ENTROPY: tl.constexpr,
    USES_FORWARD: tl.constexpr,
    USES_JSD: tl.constexpr,
):
    """One program for TILES tiles of one row. The V columns at hand begin at token `first_column` of `vocabulary`."""
    row = tl.program_id(0).to(tl.int64)
    stat_ptr = table_ptr + row
    token_id = tl.load(token_ids_ptr + row)
    student_max = tl.load(stat_ptr + 9 * table_stride)
    log_sum = tl.load(stat_ptr + 10 * table_stride)
    teacher_max = tl.load(stat_ptr + 11 * table_stride)
    teacher_log_sum = tl.load(stat_ptr + 12 * table_stride)
    weight = weigh_row(
        weights_ptr,
        weights_stride,
        row,
        tl.load(stat_ptr + table_stride),
        tl.load(stat_ptr + 2 * table_stride),
        tl.load(stat_ptr + 6 * table_stride),
        tl.load(stat_ptr + 7 * table_stride),
        log_sum,
        teacher_log_sum,
        (token_id >= 0) & (token_id < vocabulary),
        inv_temperature,
        POLICY,
        USES_LOGPROB,
        USES_KL,
        USES_ENTROPY,
        USES_FORWARD,
        USES_JSD,
    )
    needs_teacher = weight[8]
    write_gradient(
        student_ptr + row * student_stride,
        teacher_ptr + row * teacher_stride,
        out_ptr + row * out_stride,
        tl.program_id(1) * TILES * BLOCK_V,
        out_columns,
        token_id - first_column,
        student_max,
        log_sum,
        tl.where(needs_teacher, teacher_max, 0.0),
        tl.where(needs_teacher, teacher_log_sum, 0.0),
        tl.load(stat_ptr + 8 * table_stride),
        weight[0],
        weight[1],
        weight[2],
        weight[3],
        weight[4],
        weight[5],
        weight[6],
        weight[7],
        needs_teacher,
        student_bias_ptr,
        teacher_bias_ptr,
        student_scale,
        teacher_scale,
        student_softcap,
        teacher_softcap,
        inv_temperature,
        teacher_inv_temperature,
        log_beta,
        log_rest,
        rest,
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
        USES_FORWARD,
        USES_JSD,
    )
