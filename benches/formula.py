"""The statistics and losses of the benches in plain PyTorch: what a trainer writes without a kernel, and the truth.

KL(p||q) = sum_j p_j (log p_j - log q_j)      H(p) = -sum_j p_j log p_j      p, q = softmax of student, teacher
policy gradient of a sampled token y: -advantage * p(y) / p_old(y)
"""

# N kept tokens, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def compute_kl_stats(student_NV: Tensor, teacher_NV: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(y), H(p), KL(p||q)) of each row, computed in fp32, or in fp64 where the logits are."""
    logp_NV, logq_NV = _log_softmax(student_NV), _log_softmax(teacher_NV)
    logprob_N, entropy_N = _pick(logp_NV, token_ids_N)
    # F.kl_div(input, target) is KL(target || input): the student second gives KL(student || teacher).
    kl_N = F.kl_div(logq_NV, logp_NV, reduction="none", log_target=True).sum(-1)
    return logprob_N, entropy_N, kl_N


def compute_logprob_stats(student_NV: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(y), H(p)) of each row; no gradient is asked of the entropy."""
    return _pick(_log_softmax(student_NV), token_ids_N)


def compute_policy_loss(logprob_N: Tensor, old_logprob_N: Tensor, advantage_N: Tensor) -> Tensor:
    """The loss of each row."""
    return -torch.exp(logprob_N - old_logprob_N) * advantage_N


def _log_softmax(logits_NV: Tensor) -> Tensor:
    return F.log_softmax(logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float(), dim=-1)


def _pick(logp_NV: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    detached_NV = logp_NV.detach()
    entropy_N = -(detached_NV.exp() * detached_NV).sum(-1)
    return logp_NV.gather(1, token_ids_N[:, None]).squeeze(1), entropy_N


@functools.cache
def compile_formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of one of the above. Shapes are constants of the program, and nothing falls back to eager."""
    return torch.compile(function, dynamic=False, fullgraph=True)
