"""The objective: hidden states of both sides to one scalar and its per-token statistics.

full:          L_t = D(p_S, p_T) over the vocabulary (`divergences`)
topk_tail:     the same over the student's k likeliest tokens and one cell for all others
sampled_token: PPO-clipped policy gradient with the log-ratio to the teacher as advantage (`advantages`)

Departures from the sister methods' code:
1. Between its ends the JSD is divided by alpha (1 - alpha), so that alpha is not a learning rate (`divergences`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from imagine_opd.kernels import OutputHead, TokenStats, linear_token_stats
from imagine_opd.leaks import unlikelihood
from imagine_opd.loss.advantages import clip_policy_loss
from imagine_opd.loss.config import ObjectiveConfig
from imagine_opd.loss.dense import dense_token_stats
from imagine_opd.loss.divergences import Divergence, choose_stats_options, read_divergence
from imagine_opd.loss.tilt import tilt_target, weigh_evidence
from imagine_opd.types import Scores

__all__ = ["Objective", "ObjectiveConfig", "clip_policy_loss", "objective"]

# N kept response tokens, C rows of a chunk, V vocabulary


@dataclass(frozen=True, slots=True)
class Objective:
    """The weighted sum of the per-token losses (divide by the step's sum of weights) and the statistics behind it.

    `loss_sum` carries the gradient and can be differentiated once; the rest are constants. `loss_N` is weighted, and
    `distillation_loss_N` is what the teacher alone adds to it, not weighted: without rewards and unlikelihood.
    The statistics are those of the whole vocabulary against the target, contrast included.
    """

    loss_sum: torch.Tensor
    loss_N: torch.Tensor
    distillation_loss_N: torch.Tensor
    weights_N: torch.Tensor
    stats: TokenStats


def objective(
    scores: Scores, student_head: nn.Linear | OutputHead, teacher_head: nn.Linear | OutputHead, config: ObjectiveConfig
) -> Objective:
    """Loss of the kept tokens. With no token the loss is exactly 0 and still attached to the student's graph.

    Logits exist for a chunk of rows at a time, in fp32 whatever the heads' dtype. The kernels of `kernels` do it where
    they have the divergence, else `dense`, in plain PyTorch.
    """
    has_advantages = scores.advantages_N is not None
    assert has_advantages == config.shapes_advantages, "advantages of the whole step: give them where they are shaped"
    target_ND, tilt = tilt_target(
        scores.teacher_hidden_ND, scores.neutral_hidden_ND, teacher_head, config.contrast_beta
    )
    weights_N = _make_weights(scores, teacher_head, config)
    extras_N3 = _stack_extras(scores, weights_N, config)
    advantages_N = scores.advantages_N if scores.advantages_N is not None else torch.zeros_like(weights_N)

    def compute_row_loss(
        stats: TokenStats,
        divergence_C: torch.Tensor,
        sampling_logprobs_C: torch.Tensor,
        weights_C: torch.Tensor,
        advantages_C: torch.Tensor,
        extras_C3: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if config.distillation_mode == "sampled_token":
            given_C = advantages_C if has_advantages else None
            loss_C = clip_policy_loss(stats, sampling_logprobs_C, config, given_C)
        else:
            loss_C = bound_divergence(divergence_C, stats, sampling_logprobs_C, config)
        if extras_C3 is not None:
            loss_C = extras_C3[:, 0] * loss_C + _add_extra_losses(stats, sampling_logprobs_C, extras_C3, config)
        return weights_C * loss_C

    divergence = make_divergence(config)
    row_inputs = (scores.sampling_logprobs_N, weights_N, advantages_N, *(() if extras_N3 is None else (extras_N3,)))
    sides = (scores.student_hidden_ND, student_head, target_ND, teacher_head, scores.token_ids_N)
    if divergence.is_plain and tilt is None:
        stats = linear_token_stats(
            *sides,
            lambda stats, *inputs: compute_row_loss(stats, read_divergence(stats, divergence.alpha), *inputs),
            row_inputs=row_inputs,
            temperature=config.temperature,
            backend=config.kernel_backend,
            options=choose_stats_options(divergence.alpha),
        )
    else:
        stats = dense_token_stats(
            *sides,
            compute_row_loss,
            row_inputs=row_inputs,
            divergence=divergence,
            temperature=config.temperature,
            backend=config.kernel_backend,
            tilt=tilt,
        )
    assert stats.loss is not None
    assert stats.loss_N is not None
    with torch.no_grad():
        own_N = stats.loss_N / weights_N
        if extras_N3 is not None:
            own_N = own_N - _add_extra_losses(stats, scores.sampling_logprobs_N, extras_N3, config)
        distillation_loss_N = torch.where(weights_N > 0, own_N, 0.0)
    return Objective(stats.loss, stats.loss_N, distillation_loss_N, weights_N, stats)


def make_divergence(config: ObjectiveConfig) -> Divergence:
    """The divergence that the config names; the plain reverse KL, unused but logged, for sampled tokens."""
    topk = config.distillation_topk if config.distillation_mode == "topk_tail" else None
    return Divergence(config.distillation_alpha, topk, config.distillation_kl_clip)


def bound_divergence(
    divergence_N: torch.Tensor, stats: TokenStats, sampling_logprobs_N: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """The loss of each token: its divergence, bounded, times the clipped importance ratio of the sampled token."""
    loss_N = divergence_N
    if config.loss_max_clamp is not None:
        loss_N = loss_N.clamp(-config.loss_max_clamp, config.loss_max_clamp)
    if config.distillation_is_clip is not None:
        ratio_N = torch.exp(stats.student_logprob_N.detach() - sampling_logprobs_N)
        loss_N = loss_N * ratio_N.clamp(max=config.distillation_is_clip)
    return loss_N


def _stack_extras(scores: Scores, weights_N: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor | None:
    """`[N, 3]`: the teacher's share, the reward's advantage, the unlikelihood's weight; `None` without any of them."""
    leaks_N = None if scores.leaked_N is None else config.leak_unlikelihood_weight * scores.leaked_N.to(weights_N)
    parts = (scores.distill_N, scores.reward_advantages_N, leaks_N)
    if all(part is None for part in parts):
        return None
    filled = [
        torch.full_like(weights_N, default) if part is None else part.to(weights_N)
        for part, default in zip(parts, (1.0, 0.0, 0.0), strict=True)
    ]
    return torch.stack(filled, dim=1)


def _add_extra_losses(
    stats: TokenStats, sampling_logprobs_N: torch.Tensor, extras_N3: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """What rewards and unlikelihood add to each token's loss."""
    _, rewards_N, leaks_N = extras_N3.unbind(dim=1)
    reward_loss_N = clip_policy_loss(stats, sampling_logprobs_N, config, rewards_N)
    return config.reward_weight * reward_loss_N + unlikelihood(stats.student_logprob_N, leaks_N)


def _make_weights(scores: Scores, teacher_head: nn.Linear | OutputHead, config: ObjectiveConfig) -> torch.Tensor:
    weights_N = scores.weights_N
    if weights_N is None:
        weights_N = torch.ones_like(scores.sampling_logprobs_N)
    if not config.contrast_token_weight:
        return weights_N
    assert scores.neutral_hidden_ND is not None, "contrast_token_weight needs the neutral pass"
    return weigh_evidence(
        scores.teacher_hidden_ND,
        scores.neutral_hidden_ND,
        teacher_head,
        scores.token_ids_N,
        scores.row_N,
        weights_N,
        config,
    )
