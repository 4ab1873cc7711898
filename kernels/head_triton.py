"""Hidden states and heads to row states in one Triton kernel: logits live in registers only, for least memory.

Each program takes a block of rows and a part of the vocabulary, makes a tile of both sides' logits by matrix products
with fp32 sums, and folds it into the running states. No atomics; parts are merged in their order.
"""
# N kept tokens, V vocabulary, D hidden. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

from imagine_opd.kernels.algebra_triton import HAS_BIAS, adjust_logits, begin_state, convert_state, update_state
from imagine_opd.kernels.merge_triton import store_state


@triton.jit
def multiply_tile(
    hidden_ptr,
    weight_ptr,
    rows,
    columns,
    row_mask,
    column_mask,
    hidden_stride,
    weight_stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of hidden @ weight.T, fp32."""
    total = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    hidden_ptr += rows[:, None] * hidden_stride
    weight_ptr += columns[None, :].to(tl.int64) * weight_stride
    for start in tl.range(0, D, BLOCK_D, num_stages=NUM_STAGES):
        inner = start + tl.arange(0, BLOCK_D)
        inner_mask = inner < D
        x = tl.load(hidden_ptr + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
        w = tl.load(weight_ptr + inner[:, None], mask=inner_mask[:, None] & column_mask[None, :], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of 16-bit numbers
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit
def head_state_kernel(
    student_ptr,
    student_weight_ptr,
    student_bias_ptr,
    teacher_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    token_ids_ptr,
    states_ptr,
    N,
    student_stride,
    student_weight_stride,
    teacher_stride,
    teacher_weight_stride,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    inv_temperature,
    teacher_inv_temperature,
    V: tl.constexpr,
    D: tl.constexpr,
    TEACHER_D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STUDENT_ADJUST: tl.constexpr,
    TEACHER_ADJUST: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Partial states [parts, 11, N] of BLOCK_N rows and TILES tiles of the vocabulary.

    Programs of one part come one after another, so that they find its weights in the second-level cache.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row_mask = rows < N
    token_ids = tl.load(token_ids_ptr + rows, mask=row_mask, other=-1)
    zero = tl.zeros([BLOCK_N], tl.float32)
    state = begin_state(zero)
    s_y = zero - float("inf")
    t_y = zero - float("inf")
    for tile in tl.range(0, TILES, num_stages=1):
        columns = (part * TILES + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
        column_mask = columns < V
        is_token = columns[None, :] == token_ids[:, None]
        s = multiply_tile(
            student_ptr,
            student_weight_ptr,
            rows,
            columns,
            row_mask,
            column_mask,
            student_stride,
            student_weight_stride,
            D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            NUM_STAGES,
            UPCAST,
        )
        bias = zero
        if HAS_BIAS & STUDENT_ADJUST:
            bias = tl.load(student_bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        s = adjust_logits(s, bias, student_scale, student_softcap, STUDENT_ADJUST)
        s = tl.where(column_mask[None, :], s, -float("inf"))
        s_y = tl.maximum(s_y, tl.max(tl.where(is_token, s, -float("inf")), 1))
        t = s
        if HAS_TEACHER:
            t = multiply_tile(
                teacher_ptr,
                teacher_weight_ptr,
                rows,
                columns,
                row_mask,
                column_mask,
                teacher_stride,
                teacher_weight_stride,
                TEACHER_D,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
                NUM_STAGES,
                UPCAST,
            )
            if HAS_BIAS & TEACHER_ADJUST:
                bias = tl.load(teacher_bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            t = adjust_logits(t, bias, teacher_scale, teacher_softcap, TEACHER_ADJUST)
            t = tl.where(column_mask[None, :], t, -float("inf"))
            t_y = tl.maximum(t_y, tl.max(tl.where(is_token, t, -float("inf")), 1))
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
    state = convert_state(state, inv_temperature, SAME_TEMPERATURE)
    stride = tl.cast(N, tl.int64)
    store_state(states_ptr + part * 11 * stride + rows, stride, row_mask, s_y, t_y, state)
