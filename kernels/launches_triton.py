"""Launches of the Triton kernels, under the names and signatures of `reference`: tensors in, tables out."""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

import torch
import triton
from torch import Tensor

from imagine_opd.kernels import reference, tuning
from imagine_opd.kernels.arguments_triton import (
    COMPILE_OPTIONS,
    POLICIES,
    choose_load_columns,
    list_mixture,
    list_side_arguments,
    list_temperatures,
    make_rows_dense,
    name_adjustments,
    name_flags,
    name_uses,
    on_device,
)
from imagine_opd.kernels.both_triton import both_kernel, scale_kernel
from imagine_opd.kernels.gradient_triton import gradient_kernel
from imagine_opd.kernels.merge_triton import merge_kernel
from imagine_opd.kernels.rows_triton import stats_kernel
from imagine_opd.kernels.second_look_triton import second_look_kernel
from imagine_opd.kernels.types import STATE_ROWS, TABLE_ROWS, Logits, StatsSpec

MERGE_ROWS = 128


def compute_stats(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    spec: StatsSpec,
    vocabulary: int,
    mask_N: Tensor | None = None,
) -> Tensor:
    """As `reference.compute_stats`."""
    student, teacher = make_rows_dense(student), None if teacher is None else make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    table = torch.empty(TABLE_ROWS, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return table
    load_columns = choose_load_columns(student, teacher, vocabulary)
    tile = tuning.choose_tile(tuning.get_tuning(device).stats, load_columns)
    tiles = -(-vocabulary // tile.block_v)
    splits = tuning.choose_splits(rows, vocabulary, tile, device)
    tiles_per_split = -(-tiles // splits)
    splits = -(-tiles // tiles_per_split)
    out = table if splits == 1 else torch.empty(splits, STATE_ROWS, rows, dtype=torch.float32, device=device)
    token_ids_N, mask_N = token_ids_N.contiguous(), None if mask_N is None else mask_N.contiguous()
    with on_device(device):
        stats_kernel[(rows, splits)](
            student.values_NV,
            (teacher or student).values_NV,
            token_ids_N,
            token_ids_N if mask_N is None else mask_N,
            out,
            rows,
            *list_side_arguments(student, teacher),
            *list_temperatures(spec),
            V=vocabulary,
            LOAD_V=load_columns,
            SPLITS=splits,
            TILES=tiles_per_split,
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **name_flags(student, teacher, spec),
            HAS_TEACHER=teacher is not None,
            HAS_FORWARD=spec.forward_kl and teacher is not None,
            HAS_MASK=mask_N is not None,
            POLICY=POLICIES[spec.missing],
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    if splits > 1:
        table = finish_state(out, token_ids_N, spec, vocabulary, teacher is not None, mask_N)
    if teacher is not None and (spec.exact_kl or spec.jsd_beta):
        sums = look_again(student, teacher, table, spec, vocabulary)
        reference.finish_second_look(table, sums, spec)
        if mask_N is not None:
            table.masked_fill_(~mask_N, 0.0)
    return table


def compute_state(
    student: Logits, teacher: Logits | None, token_ids_N: Tensor, spec: StatsSpec, first_column: int, columns: int
) -> Tensor:
    """As `reference.compute_state`."""
    student, teacher = make_rows_dense(student), None if teacher is None else make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    state = torch.empty(STATE_ROWS, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return state
    load_columns = choose_load_columns(student, teacher, columns)
    tile = tuning.choose_tile(tuning.get_tuning(device).stats, load_columns)
    local_ids_N = token_ids_N - first_column  # those of other parts are out of range, and nothing is read for them
    with on_device(device):
        stats_kernel[(rows, 1)](
            student.values_NV,
            (teacher or student).values_NV,
            local_ids_N,
            local_ids_N,
            state,
            rows,
            *list_side_arguments(student, teacher),
            *list_temperatures(spec),
            V=columns,
            LOAD_V=load_columns,
            SPLITS=0,
            TILES=-(-columns // tile.block_v),
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **name_flags(student, teacher, spec),
            HAS_TEACHER=teacher is not None,
            HAS_FORWARD=spec.forward_kl and teacher is not None,
            HAS_MASK=False,
            POLICY=POLICIES[spec.missing],
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return state


def finish_state(
    states: Tensor,
    token_ids_N: Tensor,
    spec: StatsSpec,
    vocabulary: int,
    has_teacher: bool = True,
    mask_N: Tensor | None = None,
) -> Tensor:
    """Partial states [P, 11, N] or whole ones [11, N] to the statistics table."""
    states = states if states.ndim == 3 else states[None]
    parts, _, rows = states.shape
    table = torch.empty(TABLE_ROWS, rows, dtype=torch.float32, device=states.device)
    if rows == 0:
        return table
    with on_device(states.device):
        merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            states.contiguous(),
            token_ids_N.contiguous(),
            token_ids_N if mask_N is None else mask_N,
            table,
            rows,
            rows,
            *list_temperatures(spec),
            V=vocabulary,
            PARTS=parts,
            BLOCK_N=MERGE_ROWS,
            HAS_TEACHER=has_teacher,
            HAS_FORWARD=spec.forward_kl and has_teacher,
            HAS_MASK=mask_N is not None,
            SAME_TEMPERATURE=spec.temperature == spec.teacher_temperature,
            POLICY=POLICIES[spec.missing],
            num_warps=4,
            **COMPILE_OPTIONS,
        )
    return table


def look_again(student: Logits, teacher: Logits, table: Tensor, spec: StatsSpec, columns: int) -> Tensor:
    """As `reference.look_again`."""
    student, teacher = make_rows_dense(student), make_rows_dense(teacher)
    rows, device = table.shape[1], table.device
    sums = torch.empty(3, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return sums
    load_columns = choose_load_columns(student, teacher, columns)
    tile = tuning.choose_tile(tuning.get_tuning(device).gradient, load_columns)
    with on_device(device):
        second_look_kernel[(rows,)](
            student.values_NV,
            teacher.values_NV,
            table,
            table.stride(0),
            sums,
            rows,
            *list_side_arguments(student, teacher),
            *list_temperatures(spec),
            *list_mixture(spec)[:2],
            V=columns,
            LOAD_V=load_columns,
            TILES=-(-columns // tile.block_v),
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **name_adjustments(student, teacher),
            EXACT_KL=spec.exact_kl,
            HAS_JSD=spec.jsd_beta > 0,
            POLICY=POLICIES[spec.missing],
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return sums


def compute_gradient(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    table: Tensor,
    weights_5N: Tensor,
    uses: tuple[bool, ...],
    spec: StatsSpec,
    vocabulary: int,
    out_NV: Tensor,
    first_column: int = 0,
    columns: int | None = None,
) -> Tensor:
    """As `reference.compute_gradient`."""
    dense_out_NV = out_NV if out_NV.stride(1) == 1 else torch.empty_like(out_NV, memory_format=torch.contiguous_format)
    student, teacher = make_rows_dense(student), None if teacher is None else make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    columns = vocabulary - first_column if columns is None else columns
    if rows == 0:
        return out_NV
    tile = tuning.choose_tile(tuning.get_tuning(device).gradient, out_NV.shape[1])
    tiles = -(-out_NV.shape[1] // tile.block_v)
    splits = tuning.choose_splits(rows, out_NV.shape[1], tile, device)
    tiles_per_split = -(-tiles // splits)
    with on_device(device):
        gradient_kernel[(rows, -(-tiles // tiles_per_split))](
            student.values_NV,
            (teacher or student).values_NV,
            token_ids_N.contiguous(),
            weights_5N,
            weights_5N.stride(0),
            table,
            table.stride(0),
            dense_out_NV,
            dense_out_NV.stride(0),
            out_NV.shape[1],
            *list_side_arguments(student, teacher),
            *list_temperatures(spec),
            *list_mixture(spec),
            first_column,
            vocabulary,
            V=columns,
            LOAD_V=choose_load_columns(student, teacher, columns),
            TILES=tiles_per_split,
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **name_flags(student, teacher, spec),
            **name_uses(uses),
            POLICY=POLICIES[spec.missing],
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return out_NV if dense_out_NV is out_NV else out_NV.copy_(dense_out_NV)


def compute_both(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    weights_5N: Tensor,
    uses: tuple[bool, ...],
    spec: StatsSpec,
    vocabulary: int,
    out_NV: Tensor,
    mask_N: Tensor | None = None,
) -> Tensor:
    """As `reference.compute_both`: one launch, or several for what needs another look or too many registers."""
    if spec.exact_kl or spec.jsd_beta or spec.forward_kl or out_NV.stride(1) != 1 or student.values_NV.stride(1) != 1:
        table = compute_stats(student, teacher, token_ids_N, spec, vocabulary, mask_N)
        compute_gradient(student, teacher, token_ids_N, table, weights_5N, uses, spec, vocabulary, out_NV)
        return table
    teacher = None if teacher is None else make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    table = torch.empty(TABLE_ROWS, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return table
    shapes = tuning.get_tuning(device)
    load_columns = choose_load_columns(student, teacher, vocabulary)
    tile = tuning.choose_tile(shapes.fused, load_columns)
    programs = min(rows, shapes.rows_in_flight or rows)
    flags = {name: used for name, used in name_uses(uses).items() if name not in ("USES_FORWARD", "USES_JSD")}
    with on_device(device):
        both_kernel[(programs,)](
            student.values_NV,
            (teacher or student).values_NV,
            token_ids_N.contiguous(),
            token_ids_N if mask_N is None else mask_N.contiguous(),
            weights_5N,
            weights_5N.stride(0),
            table,
            rows,
            out_NV,
            out_NV.stride(0),
            rows,
            *list_side_arguments(student, teacher),
            *list_temperatures(spec),
            V=vocabulary,
            LOAD_V=load_columns,
            TILES=-(-vocabulary // tile.block_v),
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **name_flags(student, teacher, spec),
            **flags,
            HAS_TEACHER=teacher is not None,
            HAS_MASK=mask_N is not None,
            POLICY=POLICIES[spec.missing],
            num_warps=tile.num_warps,
            **COMPILE_OPTIONS,
        )
    return table


def scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient in place by a scalar tensor, without waiting for its value."""
    if gradient.numel() == 0 or not gradient.is_contiguous():
        return gradient.mul_(factor)
    block = 8192
    with on_device(gradient.device):
        scale_kernel[(triton.cdiv(gradient.numel(), block),)](
            gradient, factor.contiguous(), gradient.numel(), BLOCK=block, num_warps=8, **COMPILE_OPTIONS
        )
    return gradient
