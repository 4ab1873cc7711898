"""Launches of the Triton kernels, under the names and signatures of `reference`: tensors in, tables out."""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
import triton
from imagine_opd.kernels.both_triton import both_kernel, scale_kernel
from imagine_opd.kernels.merge_triton import merge_kernel
from imagine_opd.kernels.second_look_triton import second_look_kernel
from torch import Tensor

from imagine_opd.kernels import reference, tuning
from imagine_opd.kernels.algebra_triton import CLAMP, DROP, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, INF
from imagine_opd.kernels.gradient_triton import gradient_kernel
from imagine_opd.kernels.head_triton import head_state_kernel
from imagine_opd.kernels.linear import LinearPlan, Side
from imagine_opd.kernels.rows_triton import stats_kernel
from imagine_opd.kernels.types import STATE_ROWS, TABLE_ROWS, Logits, StatsSpec

COMPILE_OPTIONS = {"enable_fp_fusion": True}
"""Fusion of multiply and add is asked for by name: Triton is about to change the default and warns until one does."""

POLICIES = {"clamp": CLAMP.value, "drop": DROP.value, "inf": INF.value}
MERGE_ROWS = 128

HEAD_TILE = {"BLOCK_N": 128, "BLOCK_V": 64, "BLOCK_D": 64, "NUM_STAGES": 3, "num_warps": 8}
"""Of `head_state_kernel`: with two fp32 tiles of 128 x 128 instead it would spill registers."""
HEAD_TILE_FP32 = {"BLOCK_N": 32, "BLOCK_V": 64, "BLOCK_D": 32, "NUM_STAGES": 2, "num_warps": 4}
"""For fp32 operands, whose products do not run on tensor cores."""


def compute_stats(
    student: Logits,
    teacher: Logits | None,
    token_ids_N: Tensor,
    spec: StatsSpec,
    vocabulary: int,
    mask_N: Tensor | None = None,
) -> Tensor:
    """As `reference.compute_stats`."""
    student, teacher = _make_rows_dense(student), None if teacher is None else _make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    table = torch.empty(TABLE_ROWS, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return table
    tile = tuning.choose_tile(tuning.get_tuning(device).stats, vocabulary)
    tiles = -(-vocabulary // tile.block_v)
    splits = tuning.choose_splits(rows, vocabulary, tile, device)
    tiles_per_split = -(-tiles // splits)
    splits = -(-tiles // tiles_per_split)
    out = table if splits == 1 else torch.empty(splits, STATE_ROWS, rows, dtype=torch.float32, device=device)
    token_ids_N, mask_N = token_ids_N.contiguous(), None if mask_N is None else mask_N.contiguous()
    with _on_device(device):
        stats_kernel[(rows, splits)](
            student.values_NV,
            (teacher or student).values_NV,
            token_ids_N,
            token_ids_N if mask_N is None else mask_N,
            out,
            rows,
            *_list_side_arguments(student, teacher),
            *_list_temperatures(spec),
            V=vocabulary,
            SPLITS=splits,
            TILES=tiles_per_split,
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **_name_flags(student, teacher, spec),
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
    with _on_device(states.device):
        merge_kernel[(triton.cdiv(rows, MERGE_ROWS),)](
            states.contiguous(),
            token_ids_N.contiguous(),
            token_ids_N if mask_N is None else mask_N,
            table,
            rows,
            rows,
            *_list_temperatures(spec),
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
    student, teacher = _make_rows_dense(student), _make_rows_dense(teacher)
    rows, device = table.shape[1], table.device
    sums = torch.empty(3, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return sums
    tile = tuning.choose_tile(tuning.get_tuning(device).gradient, columns)
    with _on_device(device):
        second_look_kernel[(rows,)](
            student.values_NV,
            teacher.values_NV,
            table,
            table.stride(0),
            sums,
            rows,
            *_list_side_arguments(student, teacher),
            *_list_temperatures(spec),
            *_list_mixture(spec)[:2],
            V=columns,
            TILES=-(-columns // tile.block_v),
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **_name_adjustments(student, teacher),
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
    student, teacher = _make_rows_dense(student), None if teacher is None else _make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    columns = vocabulary - first_column if columns is None else columns
    if rows == 0:
        return out_NV
    tile = tuning.choose_tile(tuning.get_tuning(device).gradient, out_NV.shape[1])
    tiles = -(-out_NV.shape[1] // tile.block_v)
    splits = tuning.choose_splits(rows, out_NV.shape[1], tile, device)
    tiles_per_split = -(-tiles // splits)
    with _on_device(device):
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
            *_list_side_arguments(student, teacher),
            *_list_temperatures(spec),
            *_list_mixture(spec),
            first_column,
            vocabulary,
            V=columns,
            TILES=tiles_per_split,
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **_name_flags(student, teacher, spec),
            **_name_uses(uses),
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
    """As `reference.compute_both`: one launch, or several where the weights ask for more than one look."""
    if spec.exact_kl or spec.jsd_beta or out_NV.stride(1) != 1 or student.values_NV.stride(1) != 1:
        table = compute_stats(student, teacher, token_ids_N, spec, vocabulary, mask_N)
        compute_gradient(student, teacher, token_ids_N, table, weights_5N, uses, spec, vocabulary, out_NV)
        return table
    teacher = None if teacher is None else _make_rows_dense(teacher)
    rows, device = len(token_ids_N), token_ids_N.device
    table = torch.empty(TABLE_ROWS, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return table
    shapes = tuning.get_tuning(device)
    tile = tuning.choose_tile(shapes.fused, vocabulary)
    programs = min(rows, shapes.rows_in_flight or rows)
    flags = _name_uses(uses)
    del flags["USES_JSD"]
    with _on_device(device):
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
            *_list_side_arguments(student, teacher),
            *_list_temperatures(spec),
            V=vocabulary,
            TILES=-(-vocabulary // tile.block_v),
            BLOCK_V=tile.block_v,
            NUM_STAGES=tile.num_stages,
            **_name_flags(student, teacher, spec),
            **flags,
            HAS_TEACHER=teacher is not None,
            HAS_FORWARD=spec.forward_kl and teacher is not None,
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
    with _on_device(gradient.device):
        scale_kernel[(triton.cdiv(gradient.numel(), block),)](
            gradient, factor.contiguous(), gradient.numel(), BLOCK=block, num_warps=8, **COMPILE_OPTIONS
        )
    return gradient


def compute_head_state(student: Side, teacher: Side | None, ids_N: Tensor, plan: LinearPlan) -> Tensor:
    """Partial states [P, 11, N] of whole rows from hidden states and heads."""
    rows, device = student.hidden_ND.shape[0], ids_N.device
    head_tile = HEAD_TILE_FP32 if student.hidden_ND.dtype == torch.float32 else HEAD_TILE
    row_blocks = triton.cdiv(rows, head_tile["BLOCK_N"])
    tiles = triton.cdiv(plan.vocabulary, head_tile["BLOCK_V"])
    processors = tuning.count_multiprocessors(device) if device.type == "cuda" else 4
    # Four waves of programs, so that the last one is a small part of the whole.
    tiles_per_part = max(1, tiles // max(1, triton.cdiv(4 * processors, max(row_blocks, 1))))
    parts = triton.cdiv(tiles, tiles_per_part)
    states = torch.empty(parts, STATE_ROWS, rows, dtype=torch.float32, device=device)
    if rows == 0:
        return states
    other = teacher or student
    spec = plan.spec
    sides = [
        side._replace(hidden_ND=side.hidden_ND.contiguous(), weight_VD=side.weight_VD.contiguous())
        for side in (student, other)
    ]
    logits = [Logits(side.hidden_ND, side.bias_V, side.scale, side.softcap) for side in sides]
    with _on_device(device):
        head_state_kernel[(row_blocks, parts)](
            *(
                tensor
                for side in sides
                for tensor in (side.hidden_ND, side.weight_VD, side.hidden_ND if side.bias_V is None else side.bias_V)
            ),
            ids_N.contiguous(),
            states,
            rows,
            *(tensor.stride(0) for side in sides for tensor in (side.hidden_ND, side.weight_VD)),
            *(side.scale for side in sides),
            *(side.softcap for side in sides),
            *_list_temperatures(spec),
            V=plan.vocabulary,
            D=student.hidden_ND.shape[1],
            TEACHER_D=other.hidden_ND.shape[1],
            TILES=tiles_per_part,
            **head_tile,
            **_name_flags(logits[0], None if teacher is None else logits[1], spec),
            HAS_TEACHER=teacher is not None,
            HAS_FORWARD=spec.forward_kl and teacher is not None,
            UPCAST=is_interpreted(),
            **COMPILE_OPTIONS,
        )
    return states


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _make_rows_dense(side: Logits) -> Logits:
    """Any row stride goes, but the columns of a row must lie side by side."""
    return side if side.values_NV.stride(1) == 1 else side._replace(values_NV=side.values_NV.contiguous())


def _list_side_arguments(student: Logits, teacher: Logits | None) -> list[Any]:
    """Biases, strides, scales and softcaps of both sides, in the kernels' order."""
    other = teacher or student
    return [
        student.values_NV if student.bias_V is None else student.bias_V,
        other.values_NV if other.bias_V is None else other.bias_V,
        student.values_NV.stride(0),
        other.values_NV.stride(0),
        student.scale,
        other.scale,
        student.softcap,
        other.softcap,
    ]


def _list_temperatures(spec: StatsSpec) -> tuple[float, float]:
    return 1.0 / spec.temperature, 1.0 / spec.teacher_temperature


def _list_mixture(spec: StatsSpec) -> tuple[float, float, float]:
    """log b, log(1 - b) and 1 - b."""
    return (math.log(spec.jsd_beta), math.log1p(-spec.jsd_beta), 1.0 - spec.jsd_beta) if spec.jsd_beta else (0.0,) * 3


def _name_flags(student: Logits, teacher: Logits | None, spec: StatsSpec) -> dict[str, Any]:
    return {
        **_name_adjustments(student, teacher),
        "SAME_TEMPERATURE": spec.temperature == spec.teacher_temperature,
    }


def _name_adjustments(student: Logits, teacher: Logits | None) -> dict[str, int]:
    def find(side: Logits | None) -> int:
        if side is None:
            return 0
        return (
            (HAS_BIAS.value if side.bias_V is not None else 0)
            | (HAS_SCALE.value if side.scale != 1.0 else 0)
            | (HAS_SOFTCAP.value if side.softcap else 0)
        )

    return {"STUDENT_ADJUST": find(student), "TEACHER_ADJUST": find(teacher)}


def _name_uses(uses: tuple[bool, ...]) -> dict[str, bool]:
    return dict(zip(("USES_LOGPROB", "USES_KL", "USES_ENTROPY", "USES_FORWARD", "USES_JSD"), uses, strict=True))


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
