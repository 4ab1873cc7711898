"""The objective: hidden states of both sides to one scalar and its per-token statistics.

full:          L_t = KL(p_S || p_T) over the vocabulary
sampled_token: L_t = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), dual clip for A < 0,
               r = p_S(y_t) / p_old(y_t), A = log p_T(y_t) - log p_old(y_t), no gradient through A
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from imagine_opd.kernels import BackendName, OutputHead, TokenStats, linear_token_stats
from imagine_opd.models import TokenIds
from imagine_opd.rollout.finish import find_truncated
from imagine_opd.types import Rollouts, Scores

# N kept response tokens, V vocabulary


@dataclass(frozen=True, slots=True)
class ObjectiveConfig:
    """The fields of `ImagineOPDConfig` that the objective reads, under the same names."""

    distillation_mode: str = "full"
    temperature: float = 1.0
    epsilon: float = 0.2
    epsilon_high: float = 0.3
    dual_clip: float = 3.0
    advantage_baseline: str = "none"
    kernel_backend: BackendName = "auto"


@dataclass(frozen=True, slots=True)
class Objective:
    """The sum of the per-token losses (divide by the global token count) and the statistics they came from.

    `loss_sum` carries the gradient and can be differentiated once; the rest are constants.
    """

    loss_sum: torch.Tensor
    loss_N: torch.Tensor
    stats: TokenStats


def select_active_tokens(
    rollouts: Rollouts, token_ids: TokenIds, skip: int = 0, mask_truncated: bool = False
) -> torch.Tensor:
    """`[B, T]` bool: the response tokens that enter the loss."""
    active_BT = rollouts.completion_mask_BT.clone()
    active_BT[:, :skip] = False
    if mask_truncated:
        active_BT &= ~find_truncated(rollouts, token_ids)[:, None]
    return active_BT


def objective(
    scores: Scores, student_head: nn.Linear | OutputHead, teacher_head: nn.Linear | OutputHead, config: ObjectiveConfig
) -> Objective:
    """Loss of the kept tokens. With no token the loss is exactly 0 and still attached to the student's graph.

    Logits exist for a chunk of rows at a time, in fp32 whatever the heads' dtype.
    """

    def compute_row_loss(stats: TokenStats, sampling_logprobs_C: torch.Tensor) -> torch.Tensor:
        if config.distillation_mode == "full":
            return stats.reverse_kl_N
        return clip_policy_loss(stats, sampling_logprobs_C, config)

    stats = linear_token_stats(
        scores.student_hidden_ND,
        student_head,
        scores.teacher_hidden_ND,
        teacher_head,
        scores.token_ids_N,
        compute_row_loss,
        row_inputs=(scores.sampling_logprobs_N,),
        temperature=config.temperature,
        backend=config.kernel_backend,
    )
    assert stats.loss is not None
    assert stats.loss_N is not None
    return Objective(stats.loss, stats.loss_N, stats)


def clip_policy_loss(stats: TokenStats, sampling_logprobs_N: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """PPO-clipped policy gradient per token, with the log-ratio to the teacher as advantage."""
    advantage_N = (stats.teacher_logprob_N - sampling_logprobs_N).detach()
    if config.advantage_baseline == "expected":
        # E over y ~ p_S of log p_T(y) - log p_S(y) is -KL: an exact baseline, free from the same pass.
        advantage_N = advantage_N + stats.reverse_kl_N.detach()
    ratio_N = torch.exp(stats.student_logprob_N - sampling_logprobs_N)
    clipped_N = ratio_N.clamp(1.0 - config.epsilon, 1.0 + config.epsilon_high)
    loss_N = torch.maximum(-ratio_N * advantage_N, -clipped_N * advantage_N)
    bounded_N = torch.minimum(loss_N, -config.dual_clip * advantage_N)
    return torch.where(advantage_N < 0, bounded_N, loss_N)
