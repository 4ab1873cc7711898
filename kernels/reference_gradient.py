"""The second pass in PyTorch: logits, their statistics and upstream gradients in, the gradient of the logits out."""

# N kept tokens, V vocabulary, R rows of one block

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagine_opd.kernels.reference_blocks import log_mixture, read_logits, read_logprobs, split_rows
from imagine_opd.kernels.types import MISSING_LOG_RATIO, Logits, Row, StatsSpec


def compute_gradient(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    table: Tensor,
    weights_5N: Tensor,
    uses: tuple[bool, ...],
    spec: StatsSpec,
    vocabulary: int,
    out_NV: Tensor,
    first_column: int = 0,
    columns: int | None = None,
) -> Tensor:
    """Second pass: the gradient of sum_i weights_i . stats_i in the student's raw values, written to `out_NV`.

    The columns at hand begin at token `first_column`; columns of `out_NV` beyond `columns` get 0. `uses` says which
    of the five weights can differ from 0.
    """
    columns = vocabulary - first_column if columns is None else columns
    if not weights_5N.is_cuda:  # where a look at the values costs nothing, terms without weight are left out
        uses = tuple(used and bool(weight_N.any()) for used, weight_N in zip(uses, weights_5N, strict=True))
    for block in split_rows(student.values_NV):
        out_NV[block, :columns] = _compute_block_gradient(
            student, teacher, token_ids_N[block], table[:, block], weights_5N[:, block], uses, spec, vocabulary,
            block, first_column, columns,
        )  # fmt: skip
    out_NV[:, columns:] = 0.0
    return out_NV


def _compute_block_gradient(
    student: Logits,
    teacher: Logits | None,
    token_ids_R: Tensor,
    table: Tensor,
    weights_5R: Tensor,
    uses: tuple[bool, ...],
    spec: StatsSpec,
    vocabulary: int,
    block: slice,
    first_column: int,
    columns: int,
) -> Tensor:
    # g_j = p_j { a (log p_j - log q_j - KL) - c (log p_j + H) - b + f } - f q_j + b [j = y], and the JSD's term.
    b_R, a_R, c_R, f_R, jsd_R = weights_5R / spec.temperature
    uses_logprob, uses_kl, uses_entropy, uses_forward, uses_jsd = uses
    uses_teacher = uses_kl or uses_forward or uses_jsd
    logp_RV, logq_RV, missing_RV, student_missing_RV = read_logprobs(
        student, teacher if uses_teacher else None, table, spec, block, columns
    )
    grad_RV = logp_RV.exp()
    constant_R = torch.zeros_like(b_R)
    slopes_RV: list[Tensor] = []
    if uses_kl:
        slopes_RV.append(_weigh_log_ratio(a_R, logp_RV - logq_RV, missing_RV, table, spec))
    if uses_entropy:
        slopes_RV.append(logp_RV * -c_R[:, None])
        constant_R -= c_R * table[Row.ENTROPY]
    if uses_jsd:
        jsd_R = (1.0 - spec.jsd_beta) * jsd_R
        log_ratio_RV = logp_RV - log_mixture(logp_RV, logq_RV, spec.jsd_beta) - table[Row.STUDENT_MIXTURE_KL][:, None]
        slopes_RV.append(_clear_rows((jsd_R[:, None] * log_ratio_RV), jsd_R == 0))
    if uses_logprob:
        is_known_R = (token_ids_R >= 0) & (token_ids_R < vocabulary)
        b_R = b_R.masked_fill(~is_known_R & (b_R != 0), math.nan)  # a NaN log-prob in use stays loud
        constant_R -= b_R
    if uses_forward:
        constant_R += _weigh_forward_mass(f_R, table, spec)
    slope_RV = constant_R[:, None] if not slopes_RV else slopes_RV[0].add_(constant_R[:, None])
    for other_RV in slopes_RV[1:]:
        slope_RV += other_RV
    grad_RV *= slope_RV
    if uses_forward:
        grad_RV -= _weigh_forward_teacher(f_R, logq_RV, student_missing_RV, table, spec)
    if uses_logprob:
        local_R = token_ids_R - first_column
        b_R = b_R.masked_fill((local_R < 0) | (local_R >= columns), 0.0)
        grad_RV.scatter_add_(1, local_R.clamp(0, columns - 1)[:, None], b_R[:, None])
    grad_RV = _unwrap_logits(grad_RV, student, block, columns)
    # A row without any weight may hold anything, NaN included: its gradient is 0.
    return _clear_rows(grad_RV, (weights_5R == 0).all(0))


def _clear_rows(values_RV: Tensor, rows_R: Tensor) -> Tensor:
    """Zeros in some rows, whatever they hold; there are seldom any, and a masked fill costs as much as an exp."""
    if rows_R.any():
        values_RV[rows_R] = 0.0
    return values_RV


def _weigh_log_ratio(
    a_R: Tensor, log_ratio_RV: Tensor, missing_RV: Tensor | None, table: Tensor, spec: StatsSpec
) -> Tensor:
    """a (D_j - KL), with what the policy says of missing tokens; rows without weight give 0 whatever the teacher is."""
    kl_R, mass_R = table[Row.REVERSE_KL], table[Row.MISSING_MASS]
    kl_R = kl_R.masked_fill(kl_R.isinf(), math.nan)  # no gradient exists there
    missing_ratio_R = MISSING_LOG_RATIO - 1.0 - kl_R + mass_R
    if spec.missing == "drop":
        gain_R = 1.0 / (1.0 - mass_R)
        # Nothing is left to compare where the teacher excludes all that the student considers.
        a_R = torch.where(mass_R < 1.0, a_R * gain_R, 0.0 * mass_R)
        kl_R, missing_ratio_R = kl_R - gain_R.log(), torch.zeros_like(kl_R)
    elif spec.missing == "clamp":
        kl_R = kl_R - mass_R
    slope_RV = (log_ratio_RV - kl_R[:, None]).mul_(a_R[:, None])
    if missing_RV is not None:
        slope_RV = torch.where(missing_RV, (a_R * missing_ratio_R)[:, None], slope_RV)
    return _clear_rows(slope_RV, a_R == 0)


def _weigh_forward_mass(f_R: Tensor, table: Tensor, spec: StatsSpec) -> Tensor:
    mass_R = table[Row.FORWARD_MISSING_MASS]
    if spec.missing == "clamp":
        f_R = f_R * (1.0 - mass_R)
    elif spec.missing == "inf":
        f_R = torch.where((mass_R > 0) & (f_R != 0), math.nan, f_R)
    return f_R


def _weigh_forward_teacher(
    f_R: Tensor, logq_RV: Tensor, student_missing_RV: Tensor | None, table: Tensor, spec: StatsSpec
) -> Tensor:
    gain_R = 1.0 / (1.0 - table[Row.FORWARD_MISSING_MASS]) if spec.missing == "drop" else torch.ones_like(f_R)
    term_RV = logq_RV.exp().mul_((f_R * gain_R)[:, None])
    if student_missing_RV is not None:
        term_RV = term_RV.masked_fill_(student_missing_RV, 0.0)
    return _clear_rows(term_RV, f_R == 0)


def _unwrap_logits(grad_RV: Tensor, side: Logits, block: slice, columns: int) -> Tensor:
    """A gradient in the logits to one in the raw values: d softcap(z) = 1 - tanh(z / c)^2."""
    if side.softcap:
        capped_RV = read_logits(side, block, columns, grad_RV.dtype).div_(side.softcap)
        grad_RV = grad_RV * (1.0 - capped_RV * capped_RV)
    return grad_RV * side.scale if side.scale != 1.0 else grad_RV
