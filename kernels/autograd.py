"""One autograd node for every backend: two passes over the logits in, four differentiable [N] vectors out.

A backend is a pair of functions. `compute_stats` reads both logits once and returns `RowStats`;
`compute_gradient` reads them once more and writes the gradient, which is linear in `RowWeights`.
Masks, means, clipping and normalisers are ordinary torch code on the [N] vectors, outside of this package.
"""

# N kept tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """What the first pass knows of each row: the four public statistics, and what the second pass asks for besides."""

    student_logprob_N: Tensor
    teacher_logprob_N: Tensor
    reverse_kl_N: Tensor
    entropy_N: Tensor
    state: tuple[Tensor, ...] = ()


class RowWeights(NamedTuple):
    """The upstream gradient of each public statistic, `None` for one the loss does not use."""

    student_logprob_N: Tensor | None
    reverse_kl_N: Tensor | None
    entropy_N: Tensor | None


class Backend(NamedTuple):
    """The two passes of one implementation."""

    compute_stats: Callable[[Tensor, Tensor, Tensor, float], RowStats]
    compute_gradient: Callable[[Tensor, Tensor, Tensor, float, RowStats, RowWeights], Tensor]


class _TokenStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits_NV: Tensor,
        teacher_logits_NV: Tensor,
        token_ids_N: Tensor,
        temperature: float,
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        stats = backend.compute_stats(student_logits_NV, teacher_logits_NV, token_ids_N, temperature)
        ctx.save_for_backward(student_logits_NV, teacher_logits_NV, token_ids_N, *stats[:4], *stats.state)
        ctx.temperature, ctx.backend = temperature, backend
        ctx.mark_non_differentiable(stats.teacher_logprob_N)
        # None instead of zeros for unused outputs: the second pass then skips their terms, and without the KL
        # it does not read the teacher.
        ctx.set_materialize_grads(False)
        return tuple(stats[:4])

    @staticmethod
    def backward(
        ctx: Any, logprob_weight_N: Tensor | None, _: None, kl_weight_N: Tensor | None, entropy_weight_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        student_logits_NV, teacher_logits_NV, token_ids_N, *saved = ctx.saved_tensors
        weights = RowWeights(logprob_weight_N, kl_weight_N, entropy_weight_N)
        if all(weight is None for weight in weights):
            return (None,) * 5
        stats = RowStats(saved[0], saved[1], saved[2], saved[3], tuple(saved[4:]))
        with torch.no_grad():
            grad_NV = ctx.backend.compute_gradient(
                student_logits_NV, teacher_logits_NV, token_ids_N, ctx.temperature, stats, weights
            )
        if torch.is_grad_enabled():  # create_graph=True: a second derivative may follow
            grad_NV = _NoSecondDerivative.apply(grad_NV, student_logits_NV)
        return grad_NV, None, None, None, None


class _NoSecondDerivative(torch.autograd.Function):
    """Ties a gradient to the logits it depends on, so that differentiating it again raises, never gives a silent 0."""

    @staticmethod
    def forward(ctx: Any, grad_NV: Tensor, student_logits_NV: Tensor) -> Tensor:
        return grad_NV.view_as(grad_NV)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("token_stats can be differentiated once: its gradient has no derivative of its own")


def apply(
    backend: Backend, student_logits_NV: Tensor, teacher_logits_NV: Tensor, token_ids_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `backend` under autograd: (student log-prob, teacher log-prob, reverse KL, entropy), each [N].

    The teacher is detached here: it never gets a gradient. A second derivative raises `RuntimeError`.
    """
    return _TokenStatsFunction.apply(  # type: ignore[no-any-return]
        student_logits_NV, teacher_logits_NV.detach(), token_ids_N, temperature, backend
    )
