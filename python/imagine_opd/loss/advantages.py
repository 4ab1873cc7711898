"""The policy gradient on sampled tokens: advantages from log-probs, their baselines and whitening, the clipped loss.

A_t = log p_T(y_t) - log p_old(y_t) - baseline, no gradient through it; r = p_S(y_t) / p_old(y_t);
L_t = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), at most -dual_clip A where A < 0.
"""

# N kept tokens of a micro-batch, T positions of a completion, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from imagine_opd.kernels import OutputHead, TokenStats
from imagine_opd.loss.config import ObjectiveConfig
from imagine_opd.loss.tilt import measure_target_logprobs

_TINY = 1e-8


def clip_policy_loss(
    stats: TokenStats,
    sampling_logprobs_N: torch.Tensor,
    config: ObjectiveConfig,
    advantages_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """PPO-clipped policy gradient per token; `advantages_N` where `shape_advantages` made them, else from `stats`."""
    if advantages_N is None:
        advantages_N = compute_advantages(stats.teacher_logprob_N, sampling_logprobs_N, config)
        if config.advantage_baseline == "expected":
            # E over y ~ p_S of log p_T(y) - log p_S(y) is -KL: an exact baseline, free from the same pass.
            advantages_N = advantages_N + stats.reverse_kl_N.detach()
    log_ratio_N = _clamp_log_ratio(stats.student_logprob_N - sampling_logprobs_N, config)
    ratio_N = torch.exp(log_ratio_N)
    clipped_N = ratio_N.clamp(1.0 - config.epsilon, 1.0 + config.epsilon_high)
    loss_N = torch.maximum(-ratio_N * advantages_N, -clipped_N * advantages_N)
    bounded_N = torch.minimum(loss_N, -config.dual_clip * advantages_N)
    return torch.where(advantages_N < 0, bounded_N, loss_N)


def compute_advantages(
    teacher_logprob_N: torch.Tensor, sampling_logprobs_N: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """log p_T(y) - log p_old(y), with the config's bounds; a constant for autograd."""
    teacher_logprob_N, sampling_logprobs_N = teacher_logprob_N.detach(), sampling_logprobs_N.detach()
    if config.log_prob_min_clamp is not None:
        teacher_logprob_N = teacher_logprob_N.clamp(min=config.log_prob_min_clamp)
        sampling_logprobs_N = sampling_logprobs_N.clamp(min=config.log_prob_min_clamp)
    return _clamp_log_ratio(teacher_logprob_N - sampling_logprobs_N, config)


def _clamp_log_ratio(log_ratio_N: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    bound = config.log_ratio_clamp
    return log_ratio_N if bound is None else log_ratio_N.clamp(-bound, bound)


def measure_advantages(
    teacher_hidden_ND: torch.Tensor,
    teacher_head: nn.Linear | OutputHead,
    token_ids_N: torch.Tensor,
    sampling_logprobs_N: torch.Tensor,
    config: ObjectiveConfig,
    neutral_hidden_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advantages of a micro-batch before any student is run: what `shape_advantages` takes, one tensor for each.

    They need the teacher alone, whose hidden states can be kept for the loss: one product of N x V x D more.
    """
    logprob_N = measure_target_logprobs(teacher_hidden_ND, teacher_head, token_ids_N, config, neutral_hidden_ND)
    return compute_advantages(logprob_N, sampling_logprobs_N, config)


def shape_advantages(
    advantages: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    config: ObjectiveConfig,
    max_positions: int,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """The advantages `[N]` of a step's micro-batches with baseline and whitening over all tokens of the step.

    weights, positions: of the same tokens, in the loss and in their completion; tokens of weight 0 do not count.
    max_positions: `max_completion_length`, the same on all ranks. reduce: a tensor to its sum over all ranks; called
    equally often on each, also on one without tokens.
    """
    shaped = [advantages_N.double() for advantages_N in advantages]
    wide = [weights_N.double() for weights_N in weights]
    if config.advantage_baseline == "position":
        table_2T = torch.zeros(2, max_positions, dtype=torch.float64, device=device)
        for advantages_N, weights_N, positions_N in zip(shaped, wide, positions, strict=True):
            table_2T[0].index_add_(0, positions_N, weights_N)
            table_2T[1].index_add_(0, positions_N, weights_N * advantages_N)
        table_2T = reduce(table_2T)
        shaped = [
            advantages_N - _average_others(advantages_N, weights_N, table_2T[:, positions_N])
            for advantages_N, weights_N, positions_N in zip(shaped, wide, positions, strict=True)
        ]
    if config.whiten_advantages:
        mean = _measure_mean(shaped, wide, reduce, device)
        deviations = [(advantages_N - mean).square() for advantages_N in shaped]
        variance = _measure_mean(deviations, wide, reduce, device)
        shaped = [whiten(advantages_N, mean, variance.sqrt()) for advantages_N in shaped]
    return [part_N.to(before_N.dtype) for part_N, before_N in zip(shaped, advantages, strict=True)]


def whiten(advantages_N: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1; all 0 where they do not differ."""
    return (advantages_N - mean) / (std + _TINY)


def _average_others(advantages_N: torch.Tensor, weights_N: torch.Tensor, table_2N: torch.Tensor) -> torch.Tensor:
    """Mean advantage of the step's other tokens at the same position; 0 where there is none.

    Without the token itself: a mean that holds it would shrink its own signal, to nothing where it stands alone.
    """
    others_N = table_2N[0] - weights_N
    sum_N = table_2N[1] - weights_N * advantages_N
    return torch.where(others_N > _TINY, sum_N / others_N.clamp(min=_TINY), 0.0)


def _measure_mean(
    values: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """The weighted mean over all tokens of all ranks."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for values_N, weights_N in zip(values, weights, strict=True):
        sums += torch.stack([weights_N.sum(), (weights_N * values_N).sum()])
    sums = reduce(sums)
    return sums[1] / sums[0].clamp(min=_TINY)
