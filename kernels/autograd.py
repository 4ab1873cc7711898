"""token_stats as torch operators: two passes over the logits, autograd and torch.compile around them.

The operators load a backend by its name, so that a compiled graph holds one
opaque node for each pass. Masks, means, clipping and normalisers are ordinary torch code on the [N] rows of the table.
"""

# N kept tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imagine_opd.kernels.backends import load_backend
from imagine_opd.kernels.types import (
    TABLE_ROWS,
    WEIGHT_ROWS,
    Logits,
    RowWeights,
    StatsSpec,
    TokenStats,
    choose_dtype,
    read_table,
    stack_weights,
    sum_weighted_stats,
)


@torch.library.custom_op("imagine_opd::token_stats", mutates_args=())
def _token_stats_op(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, mask_N: Tensor | None, spec: str, backend: str
) -> Tensor:
    teacher = None if teacher_NV is None else Logits(teacher_NV)
    table: Tensor = load_backend(backend).compute_stats(
        Logits(student_NV), teacher, ids_N, StatsSpec.decode(spec), student_NV.shape[1], mask_N
    )
    return table


@_token_stats_op.register_fake
def _(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, mask_N: Tensor | None, spec: str, backend: str
) -> Tensor:
    return student_NV.new_empty((TABLE_ROWS, student_NV.shape[0]), dtype=choose_dtype(student_NV, teacher_NV))


@torch.library.custom_op("imagine_opd::token_stats_gradient", mutates_args=())
def _gradient_op(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, table: Tensor, weights_5N: Tensor, spec: str,
    backend: str,
) -> Tensor:  # fmt: skip
    out_NV = torch.empty(student_NV.shape, dtype=student_NV.dtype, device=student_NV.device)
    return _compute_gradient(student_NV, teacher_NV, ids_N, table, weights_5N, spec, backend, out_NV)


@_gradient_op.register_fake
def _(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, table: Tensor, weights_5N: Tensor, spec: str,
    backend: str,
) -> Tensor:  # fmt: skip
    return student_NV.new_empty(student_NV.shape)


@torch.library.custom_op("imagine_opd::token_stats_gradient_", mutates_args=("student_NV",))
def _gradient_op_(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, table: Tensor, weights_5N: Tensor, spec: str,
    backend: str,
) -> None:  # fmt: skip
    _compute_gradient(student_NV, teacher_NV, ids_N, table, weights_5N, spec, backend, student_NV)


def _compute_gradient(
    student_NV: Tensor, teacher_NV: Tensor | None, ids_N: Tensor, table: Tensor, weights_5N: Tensor, spec: str,
    backend: str, out_NV: Tensor,
) -> Tensor:  # fmt: skip
    decoded = StatsSpec.decode(spec)
    has_teacher = teacher_NV is not None
    uses = (True, has_teacher, True, decoded.forward_kl, decoded.jsd_beta > 0)
    gradient: Tensor = load_backend(backend).compute_gradient(
        Logits(student_NV), Logits(teacher_NV) if teacher_NV is not None else None, ids_N, table, weights_5N,
        uses, decoded, student_NV.shape[1], out_NV,
    )  # fmt: skip
    return gradient


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spec, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx: Any, grad_table: Tensor) -> tuple[Tensor | None, ...]:
    student_NV, teacher_NV, ids_N, mask_N, table = ctx.saved_tensors
    weights_5N = mask_weights(grad_table[:WEIGHT_ROWS], mask_N)
    arguments = (student_NV, teacher_NV, ids_N, table, weights_5N, ctx.spec, ctx.backend)
    return _gradient_op(*arguments), None, None, None, None, None


def raise_on_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("these statistics can be differentiated once: their gradient has no derivative of its own")


_token_stats_op.register_autograd(_differentiate, setup_context=_keep_for_backward)
_gradient_op.register_autograd(raise_on_second_derivative)


class _InPlaceTokenStats(torch.autograd.Function):
    """The same with the gradient written over the logits, which saves a third of the memory."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        table: Tensor = _token_stats_op(*inputs)
        _keep_for_backward(ctx, inputs, table)
        return table

    @staticmethod
    def backward(ctx: Any, grad_table: Tensor) -> tuple[Tensor | None, ...]:
        student_NV, teacher_NV, ids_N, mask_N, table = ctx.saved_tensors
        with torch.no_grad():
            weights_5N = mask_weights(grad_table[:WEIGHT_ROWS], mask_N)
            # As a mutation that autograd knows of: whoever still needs the logits gets an error, not a gradient.
            _gradient_op_(student_NV, teacher_NV, ids_N, table, weights_5N, ctx.spec, ctx.backend)
            gradient_NV = student_NV.detach()
        return refuse_second_derivative(gradient_NV), None, None, None, None, None


def mask_weights(weights_5N: Tensor, mask_N: Tensor | None) -> Tensor:
    """Weights as the second pass takes them: contiguous, and 0 in rows left out, whatever came from above."""
    if mask_N is not None:
        weights_5N = torch.where(mask_N, weights_5N, 0.0)
    return weights_5N.contiguous()


def apply_token_stats(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    ids_N: Tensor,
    mask_N: Tensor | None,
    spec: StatsSpec,
    backend: str,
    in_place: bool,
) -> TokenStats:
    """The statistics under autograd. The teacher is detached here; a second derivative raises `RuntimeError`."""
    teacher_NV = None if teacher_NV is None else teacher_NV.detach()
    in_place = in_place and student_NV.requires_grad and not torch.compiler.is_compiling()  # inductor plans memory
    run = _InPlaceTokenStats.apply if in_place else _token_stats_op
    table = run(student_NV, teacher_NV, ids_N, mask_N, spec.encode(), backend)
    return read_table(table, spec, teacher_NV is not None)


def apply_weighted_stats(
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    ids_N: Tensor,
    mask_N: Tensor | None,
    weights: RowWeights,
    spec: StatsSpec,
    backend: str,
    in_place: bool,
) -> TokenStats:
    """The statistics and the loss sum_i w_i . stats_i, its gradient made at once when one is needed."""
    if torch.compiler.is_compiling() or not (student_NV.requires_grad and torch.is_grad_enabled()):
        stats = apply_token_stats(student_NV, teacher_NV, ids_N, mask_N, spec, backend, False)
        return sum_weighted_stats(stats, weights, mask_N)
    implementation = load_backend(backend)
    with torch.no_grad():
        teacher = None if teacher_NV is None else Logits(teacher_NV)
        dtype = choose_dtype(student_NV, teacher_NV)
        weights_5N, uses = stack_weights(weights, student_NV.shape[0], dtype, student_NV.device)
        weights_5N = mask_weights(weights_5N, mask_N)
        out_NV = student_NV if in_place else torch.empty_like(student_NV, memory_format=torch.contiguous_format)
        table = implementation.compute_both(
            Logits(student_NV), teacher, ids_N, weights_5N, uses, spec, student_NV.shape[1], out_NV, mask_N
        )
        if in_place:
            torch.autograd.graph.increment_version(student_NV)
        stats = sum_weighted_stats(read_table(table, spec, teacher is not None), weights, mask_N)
    return attach_gradients(stats, backend, (student_NV,), (out_NV.detach(),))


class _GradientsAtHand(torch.autograd.Function):
    """Ties a scalar to gradients that exist already: backward multiplies them by the upstream gradient, once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, backend: str, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.backend, ctx.gradients = backend, gradients
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss was differentiated already and its gradients are used up; without `weights` or `row_loss` "
                "the statistics can be differentiated again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scale = load_backend(ctx.backend).scale
        with torch.no_grad():
            scaled = [
                None if gradient is None else scale(gradient, grad_loss).to(dtype)
                for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            ]
        return None, None, None, *map(refuse_second_derivative, scaled)


class _NoSecondDerivative(torch.autograd.Function):
    """Ties a gradient to an anchor, so that differentiating it again raises, never gives a silent 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise_on_second_derivative(ctx)


def refuse_second_derivative(gradient: Tensor | None) -> Tensor | None:
    """The gradient itself, or with `create_graph=True` one that raises when it is differentiated."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    tied: Tensor = _NoSecondDerivative.apply(gradient, torch.zeros((), requires_grad=True))
    return tied


def attach_gradients(
    stats: TokenStats, backend: str, inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> TokenStats:
    """The statistics with a loss whose backward gives `gradients`, which are scaled in place and not the caller's."""
    assert stats.loss is not None
    return replace(stats, loss=_GradientsAtHand.apply(stats.loss, backend, gradients, *inputs))
