"""The slow options in Triton, sums that need the normalisers first: the exact KL and the Jensen-Shannon divergence."""
# N kept tokens, V vocabulary. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

from imagine_opd.kernels.algebra_triton import DROP, LOG2_E, LOWEST, MISSING_LOG_RATIO, load_logits


@triton.jit
def read_logprob(x, largest, log_sum, inv_temperature):
    """log-probs of a tile, at least LOWEST, and which tokens are excluded."""
    missing = x < LOWEST
    logprob = (x - largest) * inv_temperature - log_sum
    return tl.where(missing, LOWEST, tl.maximum(logprob, LOWEST)), missing


@triton.jit
def add_logs(a, b):
    """log(e^a + e^b)."""
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp2(-tl.abs(a - b) * LOG2_E))


@triton.jit
def second_look_kernel(
    student_ptr,
    teacher_ptr,
    table_ptr,
    table_stride,
    sums_ptr,
    sums_stride,
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
    V: tl.constexpr,
    LOAD_V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    EXACT_KL: tl.constexpr,
    HAS_JSD: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Sums that need the normalisers first: exact KL, KL(q||M), KL(p||M), to a table [3, N]."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    mass = tl.load(table_ptr + 6 * table_stride + row)
    student_max = tl.load(table_ptr + 9 * table_stride + row)
    student_log_sum = tl.load(table_ptr + 10 * table_stride + row)
    teacher_max = tl.load(table_ptr + 11 * table_stride + row)
    teacher_log_sum = tl.load(table_ptr + 12 * table_stride + row)
    gain = 1.0
    if POLICY == DROP:
        gain = 1.0 / (1.0 - mass)
    kl = 0.0
    teacher_mixture_kl = 0.0
    student_mixture_kl = 0.0
    for tile in tl.range(0, TILES, num_stages=NUM_STAGES):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = columns < LOAD_V
        counts = columns < V
        s = load_logits(student_ptr, columns, mask, student_bias_ptr, student_scale, student_softcap, STUDENT_ADJUST)
        t = load_logits(teacher_ptr, columns, mask, teacher_bias_ptr, teacher_scale, teacher_softcap, TEACHER_ADJUST)
        logp, _ = read_logprob(tl.where(counts, s, -float("inf")), student_max, student_log_sum, inv_temperature)
        logq, missing = read_logprob(
            tl.where(counts, t, -float("inf")), teacher_max, teacher_log_sum, teacher_inv_temperature
        )
        p = tl.exp2(logp * LOG2_E)
        q = tl.exp2(logq * LOG2_E)
        if HAS_JSD:
            log_mixture = add_logs(logq + log_beta, logp + log_rest)
            teacher_mixture_kl += tl.sum(q * (logq - log_mixture), 0)
            student_mixture_kl += tl.sum(p * (logp - log_mixture), 0)
        if EXACT_KL:
            if POLICY == DROP:
                p = tl.where(missing, 0.0, p * gain)
                logp += tl.log(gain)
            d = tl.where(missing, MISSING_LOG_RATIO, logp - logq)
            # e^-D - 1 + D by its series: the three terms cancel to the last digit when D is small.
            series = 0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040))))
            kl += tl.sum(tl.where(tl.abs(d) < 0.25, p * (d * d * series), q - p + p * d), 0)
    tl.store(sums_ptr + row, kl)
    tl.store(sums_ptr + sums_stride + row, teacher_mixture_kl)
    tl.store(sums_ptr + 2 * sums_stride + row, student_mixture_kl)
