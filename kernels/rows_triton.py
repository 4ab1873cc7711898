"""The first pass in Triton: logits in memory to row statistics, one program for a row or a part of one.

A program walks a row's column tiles once and keeps running sums. No atomics and a fixed order: runs repeat bit by bit.
"""
# N kept tokens, V vocabulary. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

from imagine_opd.kernels.algebra_triton import (
    LOWEST,
    begin_state,
    convert_state,
    load_logits,
    store_stats,
    update_plain_state,
    update_state,
)
from imagine_opd.kernels.merge_triton import store_state


@triton.jit
def walk_row(
    student_ptr,
    teacher_ptr,
    first,
    limit,
    student_bias_ptr,
    teacher_bias_ptr,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    inv_temperature,
    teacher_inv_temperature,
    V: tl.constexpr,
    FULL: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
):
    """The state, vectors [1], of TILES tiles of one row from column `first`; energy and ratios in nats.

    Columns up to `limit` are read, those up to V count. The first FULL tiles are known to be whole, and need no masks.
    """
    state = begin_state(tl.zeros([1], tl.float32))
    if FULL > 0:  # noqa: SIM102 - known when compiled, the next when run
        if limit > 0:
            for tile in tl.range(0, FULL, num_stages=NUM_STAGES):
                columns = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
                s = load_logits(
                    student_ptr, columns, None, student_bias_ptr, student_scale, student_softcap, STUDENT_ADJUST
                )
                t = s
                smallest = s
                if HAS_TEACHER:
                    t = load_logits(
                        teacher_ptr, columns, None, teacher_bias_ptr, teacher_scale, teacher_softcap, TEACHER_ADJUST
                    )
                    smallest = tl.minimum(s, t)
                if tl.min(smallest) >= LOWEST:
                    state = update_plain_state(
                        s,
                        t,
                        state,
                        inv_temperature,
                        teacher_inv_temperature,
                        HAS_TEACHER,
                        HAS_FORWARD,
                        SAME_TEMPERATURE,
                    )
                else:
                    state = update_state(
                        s,
                        t,
                        state,
                        inv_temperature,
                        teacher_inv_temperature,
                        HAS_TEACHER,
                        HAS_FORWARD,
                        SAME_TEMPERATURE,
                    )
    for tile in tl.range(FULL, TILES, num_stages=NUM_STAGES):
        columns = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
        mask = columns < limit
        s = load_logits(student_ptr, columns, mask, student_bias_ptr, student_scale, student_softcap, STUDENT_ADJUST)
        counts = columns < V
        s = tl.where(counts, s, -float("inf"))
        t = s
        if HAS_TEACHER:
            t = load_logits(
                teacher_ptr, columns, mask, teacher_bias_ptr, teacher_scale, teacher_softcap, TEACHER_ADJUST
            )
            t = tl.where(counts, t, -float("inf"))
        state = update_state(
            s,
            t,
            state,
            inv_temperature,
            teacher_inv_temperature,
            HAS_TEACHER,
            HAS_FORWARD,
            SAME_TEMPERATURE,
        )
    return convert_state(state, inv_temperature, SAME_TEMPERATURE)


@triton.jit
def stats_kernel(
    student_ptr,
    teacher_ptr,
    token_ids_ptr,
    mask_ptr,
    out_ptr,
    out_stride,
    student_bias_ptr,
    teacher_bias_ptr,
    student_stride,
    teacher_stride,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    inv_temperature,
    teacher_inv_temperature,
    V: tl.constexpr,
    LOAD_V: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Whole rows to the statistics table, or with SPLITS > 1 parts of rows to partial states [SPLITS, 11, N].

    With SPLITS = 0 the columns at hand are all of a row but a part of the vocabulary: a partial state [11, N].
    """
    row = tl.program_id(0).to(tl.int64)  # N * V passes 2^31 at row 14,134 of a 151,936-token vocabulary
    split = tl.program_id(1)
    active = row >= 0
    if HAS_MASK:
        active = tl.load(mask_ptr + row) != 0
    # A row left out reads nothing. A branch, not a return: returning early makes large kernels spill.
    first = split * TILES * BLOCK_V
    limit = tl.where(active, LOAD_V, 0)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    state = walk_row(
        student_ptr,
        teacher_ptr,
        first,
        limit,
        student_bias_ptr,
        teacher_bias_ptr,
        student_scale,
        teacher_scale,
        student_softcap,
        teacher_softcap,
        inv_temperature,
        teacher_inv_temperature,
        V,
        V // BLOCK_V if SPLITS < 2 else 0,
        TILES,
        BLOCK_V,
        NUM_STAGES,
        STUDENT_ADJUST,
        TEACHER_ADJUST,
        HAS_TEACHER,
        HAS_FORWARD,
        SAME_TEMPERATURE,
    )
    one = tl.arange(0, 1)
    token_id = tl.load(token_ids_ptr + row) + one
    known = (token_id >= 0) & (token_id < V)
    here = known & (token_id < tl.where(split == 0, limit, 0))
    safe_id = tl.where(known, token_id, 0)
    s_y = load_logits(student_ptr, safe_id, here, student_bias_ptr, student_scale, student_softcap, STUDENT_ADJUST)
    s_y = tl.where(here, s_y, -float("inf"))
    t_y = s_y
    if HAS_TEACHER:
        t_y = load_logits(teacher_ptr, safe_id, here, teacher_bias_ptr, teacher_scale, teacher_softcap, TEACHER_ADJUST)
        t_y = tl.where(here, t_y, -float("inf"))
    rows = row + one
    if SPLITS == 1:
        store_stats(
            out_ptr,
            out_stride,
            rows,
            one >= 0,
            tl.where(active, one, -1) >= 0,
            s_y,
            t_y,
            known,
            state,
            inv_temperature,
            teacher_inv_temperature,
            HAS_TEACHER,
            HAS_FORWARD,
            POLICY,
        )
    else:
        store_state(out_ptr + split * 11 * out_stride + rows, out_stride, one >= 0, s_y, t_y, state)
