"""The divergence of student p and teacher q: which kernel statistic it is, and its value and gradient in closed form.

alpha = 1: KL(p || q)    alpha = 0: KL(q || p)    between: JSD / (alpha (1 - alpha)),
JSD = alpha KL(q || M) + (1 - alpha) KL(p || M) with M = alpha q + (1 - alpha) p.

The JSD alone tends to 0 at both ends, where it would jump to the KLs. Divided it tends to them, and where both sides
nearly agree it is the same for every alpha, half the sum of (p - q)^2 / p: alpha is no hidden learning rate.
"""

# C rows, V vocabulary, K cells (the student's likeliest tokens, and one for all others)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from imagine_opd.kernels import StatsOptions, TokenStats
from imagine_opd.kernels.types import LOWEST, MISSING_LOG_RATIO


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence. topk: over the student's k likeliest tokens and the tail. kl_clip: most that an entry adds."""

    alpha: float = 1.0
    topk: int | None = None
    kl_clip: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the kernels have it."""
        return self.topk is None and self.kl_clip is None


class DivergenceParts(NamedTuple):
    """The value [C] and its gradient [C, V] in the student's logits over temperature.

    student_mass_C, teacher_mass_C: what each side gives to the student's k likeliest tokens, with `topk` only.
    """

    value_C: torch.Tensor
    gradient_CV: torch.Tensor
    student_mass_C: torch.Tensor | None = None
    teacher_mass_C: torch.Tensor | None = None


def choose_stats_options(alpha: float) -> StatsOptions:
    """What the kernels must compute for this alpha."""
    if alpha == 1.0:
        return StatsOptions()
    return StatsOptions(forward_kl=True) if alpha == 0.0 else StatsOptions(jsd_beta=alpha)


def read_divergence(stats: TokenStats, alpha: float) -> torch.Tensor:
    """The divergence of each row, from statistics made with `choose_stats_options`."""
    if alpha == 1.0:
        return stats.reverse_kl_N
    if alpha == 0.0:
        assert stats.forward_kl_N is not None
        return stats.forward_kl_N
    assert stats.jsd_N is not None
    return stats.jsd_N / (alpha * (1.0 - alpha))


def compute_divergence(logp_CV: torch.Tensor, logq_CV: torch.Tensor, divergence: Divergence) -> DivergenceParts:
    """The divergence of each row.

    With entries l_c and slopes h_c = dl_c / dlog p_c of the cells c: the gradient is h_i - p_i sum_c h_c for a token
    that is a cell of its own, and p_i (h_tail / p_tail - sum_c h_c) in the tail. Log-probs are at least `LOWEST`.
    """
    if divergence.topk is None or divergence.topk >= logp_CV.shape[1]:
        value_C, slope_CV = _sum_entries(logp_CV, logq_CV, divergence)
        all_C = None if divergence.topk is None else torch.ones_like(value_C)
        return DivergenceParts(value_C, slope_CV - logp_CV.exp() * slope_CV.sum(1, keepdim=True), all_C, all_C)
    logp_CK, token_CK = logp_CV.topk(divergence.topk, dim=1, sorted=False)
    logq_CK = logq_CV.gather(1, token_CK)
    tail_logp_CV = logp_CV.scatter(1, token_CK, LOWEST)
    tail_logp_C1 = tail_logp_CV.logsumexp(1, keepdim=True).clamp_(min=LOWEST)
    tail_logq_C1 = logq_CV.scatter(1, token_CK, LOWEST).logsumexp(1, keepdim=True).clamp_(min=LOWEST)
    value_C, slope_CK = _sum_entries(
        torch.cat([logp_CK, tail_logp_C1], 1), torch.cat([logq_CK, tail_logq_C1], 1), divergence
    )
    total_C1 = slope_CK.sum(1, keepdim=True)
    # p_i / p_tail as a softmax within the tail: the quotient of two underflows would be NaN.
    grad_CV = (tail_logp_CV - tail_logp_C1).exp_().mul_(slope_CK[:, -1:]).sub_(logp_CV.exp() * total_C1)
    grad_CV = grad_CV.scatter_(1, token_CK, slope_CK[:, :-1] - logp_CK.exp() * total_C1)
    return DivergenceParts(value_C, grad_CV, logp_CK.exp().sum(1), logq_CK.exp().sum(1))


def _sum_entries(
    logp_CK: torch.Tensor, logq_CK: torch.Tensor, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the entries of each row, and the slope of each entry in its own log p; both 0 in a clipped entry."""
    value_CK, slope_CK = _compute_entries(logp_CK, logq_CK, divergence.alpha)
    if divergence.kl_clip is None:
        # Below 0 by rounding only.
        return value_CK.sum(1).clamp_(min=0.0), slope_CK
    is_free_CK = value_CK < divergence.kl_clip
    return value_CK.clamp_(max=divergence.kl_clip).sum(1), torch.where(is_free_CK, slope_CK, 0.0)


def _compute_entries(logp_CK: torch.Tensor, logq_CK: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What each entry adds to the divergence, and its derivative in log p of the same entry."""
    p_CK = logp_CK.exp()
    if 0.0 < alpha < 1.0:
        log_mixture_CK = torch.logaddexp(logq_CK + math.log(alpha), logp_CK + math.log1p(-alpha))
        student_CK = p_CK * (logp_CK - log_mixture_CK) / alpha
        return student_CK + logq_CK.exp() * (logq_CK - log_mixture_CK) / (1.0 - alpha), student_CK
    # A token that one side alone excludes: its log-ratio counts as 30 nats and has no slope, as in the kernels.
    student_excludes_CK, teacher_excludes_CK = logp_CK <= LOWEST, logq_CK <= LOWEST
    ratio_CK = torch.where(student_excludes_CK, -MISSING_LOG_RATIO, logp_CK - logq_CK)
    ratio_CK = torch.where(teacher_excludes_CK, MISSING_LOG_RATIO, ratio_CK)
    if alpha == 1.0:
        value_CK = p_CK * ratio_CK
        return value_CK, torch.where(teacher_excludes_CK, value_CK, value_CK + p_CK)
    q_CK = logq_CK.exp()
    return -q_CK * ratio_CK, torch.where(student_excludes_CK, 0.0, -q_CK)
