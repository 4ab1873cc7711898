"""The contrast in the loss: a target that leads towards what the evidence changed, and tokens weighted by it.

Target: q ~ p+ (p+ / p0)^beta, p+ the teacher with its evidence, p0 the same with the evidence neutralised
(OPD-Aha). Its logits are (1 + beta) z+ - beta z0, and a head without softcap is linear: they are the head of the
hidden states (1 + beta) h+ - beta h0, bias unchanged, at no cost.
Weight: v_t = max(log p+(y_t) - log p0(y_t), 0) (VA-OPD, arXiv 2605.21924), mean 1 over each completion.
"""

# N kept tokens, D hidden

from __future__ import annotations

import torch
from torch import nn

from imagine_opd.kernels import OutputHead, TokenStats, linear_token_stats
from imagine_opd.loss.config import ObjectiveConfig
from imagine_opd.loss.dense import Tilt, dense_token_stats
from imagine_opd.loss.divergences import Divergence

_EVIDENCE_FLOOR_NATS = 0.01
"""Added to each token's gain: where evidence changes nothing, tokens weigh alike instead of by rounding."""


def tilt_target(
    teacher_hidden_ND: torch.Tensor,
    neutral_hidden_ND: torch.Tensor | None,
    teacher_head: nn.Linear | OutputHead,
    beta: float,
) -> tuple[torch.Tensor, Tilt | None]:
    """Hidden states whose logits are the target's; or, where a softcap bends the logits, what `dense` tilts with."""
    if neutral_hidden_ND is None or beta == 0.0:
        return teacher_hidden_ND, None
    if isinstance(teacher_head, OutputHead) and teacher_head.softcap:
        return teacher_hidden_ND, Tilt(neutral_hidden_ND, beta)
    # fp32 here: the difference of two nearly equal bf16 states would keep one digit.
    wide = torch.promote_types(teacher_hidden_ND.dtype, torch.float32)
    teacher_ND, neutral_ND = teacher_hidden_ND.to(wide), neutral_hidden_ND.to(wide)
    return (teacher_ND + beta * (teacher_ND - neutral_ND)).to(teacher_hidden_ND.dtype), None


@torch.no_grad()
def measure_target_logprobs(
    teacher_hidden_ND: torch.Tensor,
    teacher_head: nn.Linear | OutputHead,
    token_ids_N: torch.Tensor,
    config: ObjectiveConfig,
    neutral_hidden_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """log q(y) `[N]` of the teacher, tilted where neutral hidden states are given; one product of N x V x D."""
    target_ND, tilt = tilt_target(teacher_hidden_ND, neutral_hidden_ND, teacher_head, config.contrast_beta)
    if tilt is None:
        return _measure_logprobs(target_ND, teacher_head, token_ids_N, config)
    stats = dense_token_stats(
        target_ND, teacher_head, target_ND, teacher_head, token_ids_N, _lose_nothing,
        divergence=Divergence(), temperature=config.temperature, backend=config.kernel_backend, tilt=tilt,
    )  # fmt: skip
    return stats.teacher_logprob_N


def _lose_nothing(stats: TokenStats, divergence_C: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(divergence_C)


def _measure_logprobs(
    hidden_ND: torch.Tensor, head: nn.Linear | OutputHead, token_ids_N: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    stats = linear_token_stats(
        hidden_ND, head, None, None, token_ids_N, temperature=config.temperature, backend=config.kernel_backend
    )
    return stats.student_logprob_N


@torch.no_grad()
def weigh_evidence(
    teacher_hidden_ND: torch.Tensor,
    neutral_hidden_ND: torch.Tensor,
    teacher_head: nn.Linear | OutputHead,
    token_ids_N: torch.Tensor,
    row_N: torch.Tensor,
    weights_N: torch.Tensor,
    config: ObjectiveConfig,
) -> torch.Tensor:
    """`weights_N` times what the evidence added to each token's log-prob, the sum of each completion (row) unchanged.

    Within a completion and not over a batch: the weights then depend on nothing that is batched with it. Two products
    of N x V x D.
    """
    with_evidence_N = _measure_logprobs(teacher_hidden_ND, teacher_head, token_ids_N, config)
    without_N = _measure_logprobs(neutral_hidden_ND, teacher_head, token_ids_N, config)
    gain_N = (with_evidence_N - without_N).clamp(min=0.0) + _EVIDENCE_FLOOR_NATS
    rows, row_N = torch.unique(row_N, return_inverse=True)
    weights_N = weights_N.to(gain_N.dtype)
    total_R = gain_N.new_zeros(len(rows)).index_add_(0, row_N, weights_N)
    gained_R = torch.zeros_like(total_R).index_add_(0, row_N, weights_N * gain_N)
    # A completion without weight has no mean; its weights are 0 whatever stands here.
    mean_R = torch.where(total_R > 0, gained_R / total_R.clamp(min=1e-30), 1.0)
    return weights_N * gain_N / mean_R[row_N]
