"""The first pass in PyTorch: partial states of a row's columns, merged, to a table of statistics."""

# N kept tokens, V vocabulary, R rows of one block, P parts of a vocabulary

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagine_opd.kernels.reference_blocks import (
    dot_rows,
    exp_scaled,
    find_missing,
    log_mixture,
    read_logits,
    read_logprobs,
    split_rows,
    subtract_scaled,
)
from imagine_opd.kernels.types import (
    LOWEST,
    MISSING_LOG_RATIO,
    STATE_ROWS,
    TABLE_ROWS,
    Logits,
    Partial,
    Row,
    StatsSpec,
    choose_dtype,
)


def compute_stats(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    spec: StatsSpec,
    vocabulary: int,
    mask_N: Tensor | None = None,
) -> Tensor:
    """The statistics table [13, N] in fp32, or fp64 when either side is; 0 in rows that the mask leaves out.

    Columns from `vocabulary` on do not count.
    """
    state = compute_state(student, teacher, token_ids_N, spec, 0, vocabulary)
    table = finish_state(state, token_ids_N, spec, vocabulary, teacher is not None)
    if teacher is not None and (spec.exact_kl or spec.jsd_beta):
        finish_second_look(table, look_again(student, teacher, table, spec, vocabulary), spec)
    return table if mask_N is None else table.masked_fill_(~mask_N, 0.0)


def compute_state(
    student: Logits, teacher: Logits | None, token_ids_N: Tensor, spec: StatsSpec, first_column: int, columns: int
) -> Tensor:
    """The partial state [11, N] of the columns at hand, which begin at token `first_column` of the vocabulary."""
    values_NV = student.values_NV
    dtype = choose_dtype(values_NV, None if teacher is None else teacher.values_NV)
    state = torch.zeros(STATE_ROWS, values_NV.shape[0], dtype=dtype, device=values_NV.device)
    for block in split_rows(student.values_NV):
        _fill_block_state(state[:, block], student, teacher, token_ids_N[block], spec, block, first_column, columns)
    return state


def _fill_block_state(
    state: Tensor,
    student: Logits,
    teacher: Logits | None,
    token_ids_R: Tensor,
    spec: StatsSpec,
    block: slice,
    first_column: int,
    columns: int,
) -> None:
    lowest = -torch.finfo(state.dtype).max  # finite: the difference of two maxima is then never NaN
    local_R = token_ids_R - first_column
    is_here_R = (local_R >= 0) & (local_R < columns)
    local_R1 = local_R.clamp(0, columns - 1)[:, None]

    logits_RV = read_logits(student, block, columns, state.dtype)
    student_missing_RV = find_missing(logits_RV)
    state[Partial.STUDENT_LOGIT] = logits_RV.gather(1, local_R1).squeeze(1).masked_fill_(~is_here_R, -math.inf)
    state[Partial.STUDENT_MAX] = logits_RV.amax(1).clamp_(min=lowest)
    x_RV = logits_RV - state[Partial.STUDENT_MAX][:, None]
    e_RV = exp_scaled(x_RV, spec.temperature)
    if student_missing_RV is not None:  # after the exp: products of 0 with -1e30 are 0, with -inf they would be NaN
        x_RV.clamp_(min=LOWEST)
    state[Partial.STUDENT_SUM] = e_RV.sum(1)
    state[Partial.ENERGY] = dot_rows(e_RV, x_RV).div_(spec.temperature)
    if teacher is None:
        return

    logits_RV = read_logits(teacher, block, columns, state.dtype)
    state[Partial.TEACHER_LOGIT] = logits_RV.gather(1, local_R1).squeeze(1).masked_fill_(~is_here_R, -math.inf)
    missing_RV = find_missing(logits_RV)
    if missing_RV is not None:
        logits_RV = logits_RV.masked_fill(missing_RV, -math.inf)
    state[Partial.TEACHER_MAX] = logits_RV.amax(1).clamp_(min=lowest)
    y_RV = logits_RV - state[Partial.TEACHER_MAX][:, None]
    f_RV = exp_scaled(y_RV, spec.teacher_temperature)
    if missing_RV is not None:
        y_RV.clamp_(min=LOWEST)
    state[Partial.TEACHER_SUM] = f_RV.sum(1)
    ratio_RV = subtract_scaled(x_RV, y_RV, spec)
    if missing_RV is not None:
        state[Partial.MISSING] = dot_rows(e_RV, missing_RV)
        e_RV = e_RV.masked_fill_(missing_RV, 0.0)
    state[Partial.RATIO] = dot_rows(e_RV, ratio_RV)
    if spec.forward_kl:
        if student_missing_RV is not None:
            state[Partial.FORWARD_MISSING] = dot_rows(f_RV, student_missing_RV)
            f_RV = f_RV.masked_fill_(student_missing_RV, 0.0)
        state[Partial.FORWARD_RATIO] = -dot_rows(f_RV, ratio_RV)


def merge_states(states: Tensor, spec: StatsSpec) -> Tensor:
    """Partial states [P, 11, N] of a vocabulary's parts (tiles, slabs, ranks) to the state [11, N] of the whole."""
    merged = torch.empty_like(states[0])
    steps = {}
    for side, temperature in (("STUDENT", spec.temperature), ("TEACHER", spec.teacher_temperature)):
        largest, total, logit = (getattr(Partial, f"{side}_{name}") for name in ("MAX", "SUM", "LOGIT"))
        merged[largest] = states[:, largest].amax(0)
        step_PN = (states[:, largest] - merged[largest]).clamp_(min=LOWEST)
        steps[side] = (step_PN, exp_scaled(step_PN, temperature))
        merged[total] = (steps[side][1] * states[:, total]).sum(0)
        merged[logit] = states[:, logit].amax(0)
    (step_PN, carry_PN), (teacher_step_PN, teacher_carry_PN) = steps["STUDENT"], steps["TEACHER"]
    ratio_step_PN = subtract_scaled(step_PN.clone(), teacher_step_PN, spec)

    def shift(row: int, total_PN: Tensor, step_PN: Tensor, carry_PN: Tensor) -> Tensor:
        return (carry_PN * (states[:, row] + total_PN * step_PN)).masked_fill(carry_PN == 0, 0.0).sum(0)

    student_sum_PN, teacher_sum_PN = states[:, Partial.STUDENT_SUM], states[:, Partial.TEACHER_SUM]
    missing_PN, forward_missing_PN = states[:, Partial.MISSING], states[:, Partial.FORWARD_MISSING]
    merged[Partial.ENERGY] = shift(Partial.ENERGY, student_sum_PN, step_PN / spec.temperature, carry_PN)
    merged[Partial.MISSING] = (carry_PN * missing_PN).sum(0)
    merged[Partial.RATIO] = shift(Partial.RATIO, student_sum_PN - missing_PN, ratio_step_PN, carry_PN)
    merged[Partial.FORWARD_MISSING] = (teacher_carry_PN * forward_missing_PN).sum(0)
    merged[Partial.FORWARD_RATIO] = shift(
        Partial.FORWARD_RATIO, teacher_sum_PN - forward_missing_PN, -ratio_step_PN, teacher_carry_PN
    )
    return merged


def finish_state(
    state: Tensor, token_ids_N: Tensor, spec: StatsSpec, vocabulary: int, has_teacher: bool = True
) -> Tensor:
    """Partial states [P, 11, N] or whole ones [11, N] to the statistics table [13, N]."""
    state = merge_states(state, spec) if state.ndim == 3 else state
    table = torch.full((TABLE_ROWS, state.shape[1]), math.nan, dtype=state.dtype, device=state.device)
    is_known_N = (token_ids_N >= 0) & (token_ids_N < vocabulary)
    d_N, log_d_N = state[Partial.STUDENT_SUM], state[Partial.STUDENT_SUM].log()
    table[Row.STUDENT_MAX], table[Row.STUDENT_LOG_SUM] = state[Partial.STUDENT_MAX], log_d_N
    table[Row.ENTROPY] = log_d_N - state[Partial.ENERGY] / d_N
    logprob_N = (state[Partial.STUDENT_LOGIT] - state[Partial.STUDENT_MAX]) / spec.temperature - log_d_N
    table[Row.STUDENT_LOGPROB] = logprob_N.masked_fill_(~is_known_N, math.nan)
    if not has_teacher:
        return table
    w_N = state[Partial.TEACHER_SUM]
    table[Row.TEACHER_MAX], table[Row.TEACHER_LOG_SUM] = state[Partial.TEACHER_MAX], w_N.log()
    logprob_N = (state[Partial.TEACHER_LOGIT] - state[Partial.TEACHER_MAX]) / spec.teacher_temperature - w_N.log()
    table[Row.TEACHER_LOGPROB] = logprob_N.masked_fill_(~is_known_N, math.nan)
    table[Row.REVERSE_KL], table[Row.MISSING_MASS] = _finish_kl(
        state[Partial.RATIO], d_N, w_N, state[Partial.MISSING], spec.missing
    )
    if spec.forward_kl:
        table[Row.FORWARD_KL], table[Row.FORWARD_MISSING_MASS] = _finish_kl(
            state[Partial.FORWARD_RATIO], w_N, d_N, state[Partial.FORWARD_MISSING], spec.missing
        )
    return table


def _finish_kl(
    ratio_N: Tensor, sum_N: Tensor, other_sum_N: Tensor, missing_N: Tensor, policy: str
) -> tuple[Tensor, Tensor]:
    """A KL from its running sums, and the probability of the tokens that the other side excludes."""
    mass_N = missing_N / sum_N
    if policy == "drop":
        kept_N = sum_N - missing_N
        kl_N = ratio_N / kept_N - (kept_N / other_sum_N).log()
        kl_N = kl_N.masked_fill((kept_N <= 0) & (other_sum_N > 0), 0.0)  # nothing is left to compare
    else:
        kl_N = ratio_N / sum_N - (1.0 - mass_N) * (sum_N / other_sum_N).log()
        kl_N = kl_N + MISSING_LOG_RATIO * mass_N if policy == "clamp" else kl_N.masked_fill(mass_N > 0, math.inf)
    kl_N = kl_N.masked_fill(other_sum_N == 0, math.nan)  # the other side excludes everything
    return kl_N.masked_fill(kl_N < 0, 0.0), mass_N  # below 0 by rounding only


def look_again(student: Logits, teacher: Logits, table: Tensor, spec: StatsSpec, columns: int) -> Tensor:
    """Sums [3, N] that need the normalisers first: exact KL, KL(q||M), KL(p||M). Sums over parts of a row add up."""
    sums = torch.zeros(3, table.shape[1], dtype=table.dtype, device=table.device)
    for block in split_rows(student.values_NV):
        logp_RV, logq_RV, missing_RV, _ = read_logprobs(student, teacher, table[:, block], spec, block, columns)
        p_RV, q_RV = logp_RV.exp(), logq_RV.exp()
        if spec.jsd_beta:
            log_mixture_RV = log_mixture(logp_RV, logq_RV, spec.jsd_beta)
            sums[1, block] = dot_rows(q_RV, logq_RV - log_mixture_RV)
            sums[2, block] = dot_rows(p_RV, logp_RV - log_mixture_RV)
        if spec.exact_kl:
            if spec.missing == "drop":
                log_gain_R1 = -torch.log1p(-table[Row.MISSING_MASS, block])[:, None]
                logp_RV, p_RV = logp_RV + log_gain_R1, p_RV * log_gain_R1.exp()
            sums[0, block] = _sum_exact_kl(logp_RV - logq_RV, p_RV, q_RV, missing_RV, spec.missing == "drop")
    return sums


def _sum_exact_kl(log_ratio_RV: Tensor, p_RV: Tensor, q_RV: Tensor, missing_RV: Tensor | None, drop: bool) -> Tensor:
    """sum of q - p + p D with D = log p/q: no term is below 0, and near p = q the linear error cancels."""
    if missing_RV is not None:
        log_ratio_RV = log_ratio_RV.masked_fill(missing_RV, MISSING_LOG_RATIO)
        p_RV = p_RV.masked_fill(missing_RV, 0.0) if drop else p_RV
    d = log_ratio_RV
    # e^-D - 1 + D by its series: the three terms cancel to the last digit when D is small.
    series = d * d * (0.5 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040)))))
    near = 0.25 if d.dtype == torch.float32 else 0.02
    return torch.where(d.abs() < near, p_RV * series, q_RV - p_RV + p_RV * d).sum(1)


def finish_second_look(table: Tensor, sums: Tensor, spec: StatsSpec) -> None:
    """Put the sums of `look_again` over whole rows into the table."""
    if spec.exact_kl:
        usual_N = table[Row.REVERSE_KL]
        # Where no sum is right (NaN rows, an infinite KL, nothing left to compare) the usual form has said so.
        is_sum_N = usual_N.isfinite() & sums[0].isfinite()
        table[Row.REVERSE_KL] = torch.where(is_sum_N, sums[0], usual_N)
    if spec.jsd_beta:
        jsd_N = spec.jsd_beta * sums[1] + (1.0 - spec.jsd_beta) * sums[2]
        table[Row.JSD], table[Row.STUDENT_MIXTURE_KL] = jsd_N.masked_fill(jsd_N < 0, 0.0), sums[2]
