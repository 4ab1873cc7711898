"""linear_token_stats under autograd: gradients made in forward for a loss on rows, or recomputed for any other.

With `row_loss` each chunk's loss is differentiated in its statistics at once, and backward only scales what stands
ready. Without it the statistics are differentiable one by one, through torch operators that torch.compile takes whole.
"""

# N kept tokens, C rows of a chunk, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imagine_opd.errors import ConfigError
from imagine_opd.kernels.autograd import attach_gradients, mask_weights, raise_on_second_derivative
from imagine_opd.kernels.linear import (
    Gradients,
    LinearPlan,
    Needs,
    Side,
    Weigh,
    allocate_gradients,
    is_same_memory,
    make_side,
    run_chunks,
)
from imagine_opd.kernels.slabs import run_slabs
from imagine_opd.kernels.types import (
    TABLE_ROWS,
    WEIGHT_ROWS,
    Row,
    RowWeights,
    StatsSpec,
    TokenStats,
    detach_stats,
    read_table,
    stack_weights,
)

RowLoss = Callable[..., Tensor]
"""(TokenStats of C rows, *row_inputs of those rows) to the loss [C] of each row."""

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]
"""Hidden states, head and bias of student and teacher, token ids, mask."""


def run_linear(
    tensors: Tensors,
    plan: LinearPlan,
    table: Tensor | None = None,
    weigh: Weigh | None = None,
    needs: Needs = Needs(False, False, False),  # noqa: B008
) -> tuple[Tensor, Gradients]:
    """The table [13, N] and the gradients asked for. Rows that the mask leaves out are not even projected.

    `weigh` and `table` speak of the rows kept, in their order.
    """
    hidden_ND, weight_VD, bias_V, teacher_hidden_ND, teacher_weight_VD, teacher_bias_V, ids_N, mask_N = tensors
    kept_N = None if mask_N is None else mask_N.nonzero().squeeze(1)

    def keep(values_N: Tensor) -> Tensor:
        return values_N if kept_N is None else values_N[kept_N]

    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        student = make_side(
            keep(hidden_ND), weight_VD, bias_V, plan.student_dtype, plan.student_scale, plan.student_softcap
        )
        teacher: Side | None = None
        if teacher_hidden_ND is not None and teacher_weight_VD is not None:
            if is_same_memory(teacher_weight_VD, weight_VD) and plan.teacher_dtype == plan.student_dtype:
                teacher_weight_VD = student.weight_VD  # converted once
            teacher = make_side(
                keep(teacher_hidden_ND),
                teacher_weight_VD,
                teacher_bias_V,
                plan.teacher_dtype,
                plan.teacher_scale,
                plan.teacher_softcap,
            )
        gradients = allocate_gradients(student, needs, hidden_ND.dtype, plan.min_memory)
        run = run_slabs if plan.min_memory else run_chunks
        known_table = table if table is None or kept_N is None else table[:, kept_N]
        kept_table = run(student, teacher, keep(ids_N), plan, known_table, weigh, gradients)
        if kept_N is None:
            return kept_table, gradients
        whole_table = kept_table.new_zeros(TABLE_ROWS, len(ids_N))
        whole_table[:, kept_N] = kept_table
        if gradients.hidden_ND is not None:
            whole_ND = gradients.hidden_ND.new_zeros(hidden_ND.shape)
            whole_ND[kept_N] = gradients.hidden_ND
            gradients = gradients._replace(hidden_ND=whole_ND)
        return whole_table, gradients


# Gradients in forward


def apply_row_loss(tensors: Tensors, plan: LinearPlan, row_loss: RowLoss, row_inputs: Sequence[Tensor]) -> TokenStats:
    """Statistics and the summed row loss, whose gradients are made on the way when any is needed."""
    if torch.compiler.is_compiling():
        # A graph cannot hold a Python function: there the gradient is recomputed, at the price of two products more.
        stats = apply_linear(tensors, plan)
        loss_N = check_row_loss(row_loss(stats, *row_inputs), len(tensors[6]))
        if tensors[7] is not None:
            loss_N = torch.where(tensors[7], loss_N, 0.0)
        return replace(detach_stats(stats), loss_N=loss_N.detach(), loss=loss_N.sum())

    hidden_ND, weight_VD, bias_V, teacher_hidden_ND, *_, ids_N, mask_N = tensors
    inputs = [hidden_ND, weight_VD, *([] if bias_V is None else [bias_V])]
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    needs = Needs(wanted[0], wanted[1], bias_V is not None and wanted[-1])
    kept_inputs = [values if mask_N is None else values[mask_N] for values in row_inputs]
    has_teacher = teacher_hidden_ND is not None
    losses: list[Tensor] = []

    def weigh(chunk: slice, table: Tensor) -> tuple[Tensor, tuple[bool, ...]]:
        loss_C, weights = differentiate_row_loss(
            table, plan.spec, has_teacher, row_loss, [values[chunk] for values in kept_inputs], any(wanted)
        )
        losses.append(loss_C)
        return stack_weights(weights, table.shape[1], table.dtype, table.device)

    table, gradients = run_linear(tensors, plan, None, weigh, needs)
    loss_N = table.new_zeros(len(ids_N))
    if losses:
        kept_loss_N = torch.cat(losses).to(table.dtype)
        loss_N = kept_loss_N if mask_N is None else loss_N.masked_scatter(mask_N, kept_loss_N)
    stats = replace(read_table(table, plan.spec, has_teacher), loss_N=loss_N, loss=loss_N.sum())
    if not any(wanted):
        return stats
    found = [gradients.hidden_ND, gradients.weight_VD, *([] if bias_V is None else [gradients.bias_V])]
    return attach_gradients(stats, plan.backend, inputs, found)


def differentiate_row_loss(
    table: Tensor,
    spec: StatsSpec,
    has_teacher: bool,
    row_loss: RowLoss,
    row_inputs: Sequence[Tensor],
    needs_gradient: bool,
) -> tuple[Tensor, RowWeights]:
    """The loss of each row of a chunk, and its derivatives in the statistics."""
    leaves = [table[row].detach().requires_grad_(needs_gradient) for row in range(WEIGHT_ROWS)]
    stats = read_table(table.detach(), spec, has_teacher)
    stats = replace(stats, student_logprob_N=leaves[Row.STUDENT_LOGPROB], entropy_N=leaves[Row.ENTROPY])
    if has_teacher:
        stats = replace(stats, reverse_kl_N=leaves[Row.REVERSE_KL])
    if spec.forward_kl:
        stats = replace(stats, forward_kl_N=leaves[Row.FORWARD_KL])
    if spec.jsd_beta:
        stats = replace(stats, jsd_N=leaves[Row.JSD])
    with torch.enable_grad():
        loss_C = check_row_loss(row_loss(stats, *row_inputs), table.shape[1])
        if not (needs_gradient and loss_C.requires_grad):
            return loss_C.detach(), RowWeights()
        found = torch.autograd.grad(loss_C.sum(), leaves, allow_unused=True)
    return loss_C.detach(), RowWeights(*found)


def check_row_loss(loss_C: Any, rows: int) -> Tensor:
    """The loss of `rows` rows. Raises `ConfigError` for anything else: a mean would depend on the size of chunks."""
    if not isinstance(loss_C, Tensor) or loss_C.shape != (rows,):
        found = list(loss_C.shape) if isinstance(loss_C, Tensor) else type(loss_C).__name__
        raise ConfigError(
            f"row_loss returned {found}; expected [{rows}], the loss of each row: rows are summed afterwards, "
            "so put weights and normalisers into it through row_inputs"
        )
    return loss_C


# Gradients recomputed


@torch.library.custom_op("imagine_opd::linear_token_stats", mutates_args=())
def _linear_op(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden_ND: Tensor | None,
    teacher_weight_VD: Tensor | None, teacher_bias_V: Tensor | None, ids_N: Tensor, mask_N: Tensor | None, plan: str,
) -> Tensor:  # fmt: skip
    tensors = (
        hidden_ND, weight_VD, bias_V, teacher_hidden_ND, teacher_weight_VD, teacher_bias_V, ids_N, mask_N,
    )  # fmt: skip
    return run_linear(tensors, LinearPlan.decode(plan))[0]


@_linear_op.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden_ND: Tensor | None,
    teacher_weight_VD: Tensor | None, teacher_bias_V: Tensor | None, ids_N: Tensor, mask_N: Tensor | None, plan: str,
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(getattr(torch, LinearPlan.decode(plan).logits_dtype), torch.float32)
    return hidden_ND.new_empty((TABLE_ROWS, hidden_ND.shape[0]), dtype=dtype)


@torch.library.custom_op("imagine_opd::linear_token_stats_gradient", mutates_args=())
def _linear_gradient_op(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden_ND: Tensor | None,
    teacher_weight_VD: Tensor | None, teacher_bias_V: Tensor | None, ids_N: Tensor, mask_N: Tensor | None,
    table: Tensor, weights_5N: Tensor, plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    decoded = LinearPlan.decode(plan)
    tensors = (
        hidden_ND, weight_VD, bias_V, teacher_hidden_ND, teacher_weight_VD, teacher_bias_V, ids_N, mask_N,
    )  # fmt: skip
    has_teacher = teacher_hidden_ND is not None
    uses = (True, has_teacher, True, decoded.spec.forward_kl, decoded.spec.jsd_beta > 0)
    kept_5N = weights_5N if mask_N is None else weights_5N[:, mask_N]
    weights_5N = kept_5N.contiguous()
    _, gradients = run_linear(tensors, decoded, table, lambda chunk, _: (weights_5N[:, chunk], uses), Needs(*needs))
    dtypes = (hidden_ND.dtype, weight_VD.dtype, hidden_ND.dtype if bias_V is None else bias_V.dtype)
    return [
        hidden_ND.new_empty(0) if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


@_linear_gradient_op.register_fake
def _(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, teacher_hidden_ND: Tensor | None,
    teacher_weight_VD: Tensor | None, teacher_bias_V: Tensor | None, ids_N: Tensor, mask_N: Tensor | None,
    table: Tensor, weights_5N: Tensor, plan: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (hidden_ND, weight_VD, bias_V)
    return [
        hidden_ND.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.plan = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx: Any, grad_table: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, table = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    weights_5N = mask_weights(grad_table[:WEIGHT_ROWS], tensors[7])
    found = _linear_gradient_op(*tensors, table, weights_5N, ctx.plan, needs)
    return *(gradient if needed else None for gradient, needed in zip(found, needs, strict=True)), *(None,) * 6


_linear_op.register_autograd(_differentiate, setup_context=_keep_for_backward)
_linear_gradient_op.register_autograd(raise_on_second_derivative)


def apply_linear(tensors: Tensors, plan: LinearPlan) -> TokenStats:
    """The statistics, differentiable one by one in the student's hidden states, head and bias."""
    hidden_ND, weight_VD, bias_V, teacher_hidden_ND, *_ = tensors
    table = _linear_op(
        hidden_ND, weight_VD, bias_V, *(None if tensor is None else tensor.detach() for tensor in tensors[3:]),
        plan.encode(),
    )  # fmt: skip
    return read_table(table, plan.spec, teacher_hidden_ND is not None)
