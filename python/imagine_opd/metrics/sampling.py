"""How far the engine that sampled is from the model that is trained: log-prob differences and the importance ratio."""

from __future__ import annotations

import torch

from imagine_opd.metrics.step import StepMetrics

# N kept response tokens


def note_mismatch(
    metrics: StepMetrics,
    student_logprob_N: torch.Tensor,
    sampling_logprob_N: torch.Tensor,
    ratio_bounds: tuple[float, float],
) -> None:
    """Add the figures of a micro-batch's tokens to the log, by TRL's names.

    `sampling/sampling_logp_difference/mean` and `max`: of |log p when scored - log p when sampled|, nats.
    `sampling/importance_sampling_ratio/min`, `mean` and `max`: of the ratio, before it is clipped; `clipped`: the share
    of tokens whose ratio lies outside of `ratio_bounds`.
    """
    if not len(student_logprob_N):
        return
    log_ratio_N = student_logprob_N.float() - sampling_logprob_N.float()
    ratio_N, difference_N = log_ratio_N.exp(), log_ratio_N.abs()
    count = len(ratio_N)
    low, high = ratio_bounds
    metrics.add_mean("sampling/sampling_logp_difference/mean", float(difference_N.sum()), count)
    metrics.add_max("sampling/sampling_logp_difference/max", float(difference_N.max()))
    metrics.add_min("sampling/importance_sampling_ratio/min", float(ratio_N.min()))
    metrics.add_mean("sampling/importance_sampling_ratio/mean", float(ratio_N.sum()), count)
    metrics.add_max("sampling/importance_sampling_ratio/max", float(ratio_N.max()))
    outside = float(((ratio_N < low) | (ratio_N > high)).sum())
    metrics.add_mean("sampling/importance_sampling_ratio/clipped", outside, count)
