"""Partial states in Triton: stored by the kernels that see a part of a row, merged in their order to statistics."""
# N kept tokens, V vocabulary. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

from imagine_opd.kernels.algebra_triton import LOG2_E, LOWEST, begin_state, store_stats


@triton.jit
def store_state(ptr, stride, mask, student_logit, teacher_logit, state):
    """A partial state, in the order of `types.Partial`."""
    tl.store(ptr, state[0], mask=mask)
    tl.store(ptr + stride, state[1], mask=mask)
    tl.store(ptr + 2 * stride, state[2], mask=mask)
    tl.store(ptr + 3 * stride, student_logit, mask=mask)
    tl.store(ptr + 4 * stride, state[3], mask=mask)
    tl.store(ptr + 5 * stride, state[4], mask=mask)
    tl.store(ptr + 6 * stride, teacher_logit, mask=mask)
    tl.store(ptr + 7 * stride, state[5], mask=mask)
    tl.store(ptr + 8 * stride, state[6], mask=mask)
    tl.store(ptr + 9 * stride, state[7], mask=mask)
    tl.store(ptr + 10 * stride, state[8], mask=mask)


@triton.jit
def merge_kernel(
    states_ptr,
    token_ids_ptr,
    mask_ptr,
    table_ptr,
    table_stride,
    N,
    inv_temperature,
    teacher_inv_temperature,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Partial states [PARTS, 11, N], merged in their order, to the statistics table."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < N
    stride = tl.cast(N, tl.int64)  # not N.to: a launch with N = 1 makes it a constant
    zero = tl.zeros([BLOCK_N], tl.float32)
    s_y = zero - float("inf")
    t_y = zero - float("inf")
    state = begin_state(zero)
    student_max, student_sum, energy, teacher_max, teacher_sum, ratio, missing, forward_ratio, forward_missing = state
    for part in tl.range(0, PARTS):
        ptr = states_ptr + tl.cast(part, tl.int64) * 11 * stride + rows
        part_max = tl.load(ptr, mask=row_mask, other=0.0)
        part_sum = tl.load(ptr + stride, mask=row_mask, other=1.0)
        part_energy = tl.load(ptr + 2 * stride, mask=row_mask, other=0.0)
        s_y = tl.maximum(s_y, tl.load(ptr + 3 * stride, mask=row_mask, other=0.0))
        new_max = tl.maximum(student_max, part_max)
        step = tl.maximum(student_max - new_max, LOWEST)
        part_step = tl.maximum(part_max - new_max, LOWEST)
        carry = tl.exp2(step * (inv_temperature * LOG2_E))
        part_carry = tl.exp2(part_step * (inv_temperature * LOG2_E))
        energy = carry * (energy + student_sum * (step * inv_temperature))
        energy += part_carry * (part_energy + part_sum * (part_step * inv_temperature))
        if HAS_TEACHER:
            part_teacher_max = tl.load(ptr + 4 * stride, mask=row_mask, other=0.0)
            part_teacher_sum = tl.load(ptr + 5 * stride, mask=row_mask, other=1.0)
            t_y = tl.maximum(t_y, tl.load(ptr + 6 * stride, mask=row_mask, other=0.0))
            part_ratio = tl.load(ptr + 7 * stride, mask=row_mask, other=0.0)
            part_missing = tl.load(ptr + 8 * stride, mask=row_mask, other=0.0)
            new_teacher_max = tl.maximum(teacher_max, part_teacher_max)
            teacher_step = tl.maximum(teacher_max - new_teacher_max, LOWEST)
            part_teacher_step = tl.maximum(part_teacher_max - new_teacher_max, LOWEST)
            teacher_carry = tl.exp2(teacher_step * (teacher_inv_temperature * LOG2_E))
            part_teacher_carry = tl.exp2(part_teacher_step * (teacher_inv_temperature * LOG2_E))
            if SAME_TEMPERATURE:
                difference = (step - teacher_step) * inv_temperature
                part_difference = (part_step - part_teacher_step) * inv_temperature
            else:
                difference = step * inv_temperature - teacher_step * teacher_inv_temperature
                part_difference = part_step * inv_temperature - part_teacher_step * teacher_inv_temperature
            ratio = carry * (ratio + (student_sum - missing) * difference)
            ratio += part_carry * (part_ratio + (part_sum - part_missing) * part_difference)
            missing = carry * missing + part_carry * part_missing
            if HAS_FORWARD:
                part_forward = tl.load(ptr + 9 * stride, mask=row_mask, other=0.0)
                part_forward_missing = tl.load(ptr + 10 * stride, mask=row_mask, other=0.0)
                forward_ratio = teacher_carry * (forward_ratio - (teacher_sum - forward_missing) * difference)
                part_kept = part_teacher_sum - part_forward_missing
                forward_ratio += part_teacher_carry * (part_forward - part_kept * part_difference)
                forward_missing = teacher_carry * forward_missing + part_teacher_carry * part_forward_missing
            teacher_sum = teacher_carry * teacher_sum + part_teacher_carry * part_teacher_sum
            teacher_max = new_teacher_max
        student_sum = carry * student_sum + part_carry * part_sum
        student_max = new_max
    state = (
        student_max,
        student_sum,
        energy,
        teacher_max,
        teacher_sum,
        ratio,
        missing,
        forward_ratio,
        forward_missing,
    )
    token_id = tl.load(token_ids_ptr + rows, mask=row_mask, other=0)
    active = row_mask
    if HAS_MASK:
        active = tl.load(mask_ptr + rows, mask=row_mask, other=0) != 0
    store_stats(
        table_ptr,
        table_stride,
        rows,
        row_mask,
        active,
        s_y,
        t_y,
        (token_id >= 0) & (token_id < V),
        state,
        inv_temperature,
        teacher_inv_temperature,
        HAS_TEACHER,
        HAS_FORWARD,
        POLICY,
    )
