"""The way of least memory: a slab of the vocabulary at a time, for a block of rows, and nothing of size [C, V].

Statistics come from partial states of the slabs, merged; the gradient makes each slab's logits once more. Five or six
matrix products instead of three or four.
"""

# N kept tokens, R rows of a block, S columns of a slab, V vocabulary

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imagine_opd.kernels import reference
from imagine_opd.kernels.backends import load_backend
from imagine_opd.kernels.linear import (
    Gradients,
    LinearPlan,
    Side,
    Weigh,
    add_gradients,
    scale_weights,
    split_chunks,
)
from imagine_opd.kernels.matmul import project
from imagine_opd.kernels.types import STATE_ROWS, Logits

SLAB_COLUMNS = 4096
BLOCK_ROWS = 2048
"""Two fp32 buffers of 32 MiB."""


def run_slabs(
    student: Side,
    teacher: Side | None,
    ids_N: Tensor,
    plan: LinearPlan,
    table: Tensor | None = None,
    weigh: Weigh | None = None,
    gradients: Gradients | None = None,
) -> Tensor:
    """As `linear.run_chunks`; the loss is asked once, for all rows."""
    backend = load_backend(plan.backend)
    if table is None:
        states = compute_states(student, teacher, ids_N, plan)
        table = backend.finish_state(states, ids_N, plan.spec, plan.vocabulary, teacher is not None)
        if teacher is not None and (plan.spec.exact_kl or plan.spec.jsd_beta):
            sums = torch.zeros(3, len(ids_N), dtype=table.dtype, device=table.device)
            for rows, _, student_logits, teacher_logits in project_slabs(student, teacher, plan):
                columns = student_logits.values_NV.shape[1]
                sums[:, rows] += backend.look_again(student_logits, teacher_logits, table[:, rows], plan.spec, columns)
            reference.finish_second_look(table, sums, plan.spec)
    if weigh is None or gradients is None or not len(ids_N):
        return table
    weights_5N, uses = weigh(slice(0, len(ids_N)), table)
    if not any(uses):
        return table
    weights_5N, factor = scale_weights(weights_5N, student.hidden_ND.dtype)
    used_N = (weights_5N != 0).any(0)
    gradient = torch.empty(BLOCK_ROWS * SLAB_COLUMNS, dtype=student.hidden_ND.dtype, device=ids_N.device)
    for rows, slab, student_logits, teacher_logits in project_slabs(student, teacher, plan):
        height, columns = student_logits.values_NV.shape
        grad_RS = backend.compute_gradient(
            student_logits,
            teacher_logits,
            ids_N[rows],
            table[:, rows],
            weights_5N[:, rows],
            uses,
            plan.spec,
            plan.vocabulary,
            gradient[: height * columns].view(height, columns),
            slab.start,
            columns,
        )
        add_gradients(gradients, rows, student, grad_RS, factor, slab, used_N[rows], first_part=slab.start == 0)
    return table


def project_slabs(
    student: Side, teacher: Side | None, plan: LinearPlan
) -> Iterator[tuple[slice, slice, Logits, Logits | None]]:
    """(rows, columns, student's logits, teacher's logits) of each block, in buffers that the next block uses again."""
    dtype = getattr(torch, plan.logits_dtype)
    device = student.hidden_ND.device
    buffers = [torch.empty(BLOCK_ROWS * SLAB_COLUMNS, dtype=dtype, device=device) for _ in range(2)]

    def project_block(side: Side, buffer: Tensor, rows: slice, slab: slice) -> Logits:
        shape = (rows.stop - rows.start, slab.stop - slab.start)
        block_RS = buffer[: shape[0] * shape[1]].view(shape)
        project(side.hidden_ND[rows], side.weight_VD[slab], block_RS)
        bias_S = None if side.bias_V is None else side.bias_V[slab]
        return Logits(block_RS, bias_S, side.scale, side.softcap)

    for slab in split_chunks(plan.vocabulary, SLAB_COLUMNS):
        for rows in split_chunks(len(student.hidden_ND), BLOCK_ROWS):
            student_logits = project_block(student, buffers[0], rows, slab)
            teacher_logits = None if teacher is None else project_block(teacher, buffers[1], rows, slab)
            yield rows, slab, student_logits, teacher_logits


def compute_states(student: Side, teacher: Side | None, ids_N: Tensor, plan: LinearPlan) -> Tensor:
    """Partial states [P, 11, N] of whole rows, one for each slab."""
    backend = load_backend(plan.backend)
    dtype = torch.promote_types(getattr(torch, plan.logits_dtype), torch.float32)
    parts = -(-plan.vocabulary // SLAB_COLUMNS)
    states = torch.empty(parts, STATE_ROWS, len(ids_N), dtype=dtype, device=ids_N.device)
    for rows, slab, student_logits, teacher_logits in project_slabs(student, teacher, plan):
        columns = student_logits.values_NV.shape[1]
        states[slab.start // SLAB_COLUMNS, :, rows] = backend.compute_state(
            student_logits, teacher_logits, ids_N[rows], plan.spec, slab.start, columns
        )
    return states
