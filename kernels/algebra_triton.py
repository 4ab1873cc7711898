"""What the Triton kernels share: raw values to logits, the running sums of a row, and from these to its statistics.

Helpers on tiles [R, BLOCK_V] of R rows, whose states are vectors [R]. The algebra stands in README.md beside this file.
"""
# N kept tokens, R rows of a tile, V vocabulary. No `from __future__ import annotations`: Triton reads annotations.

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # as types.LOWEST
LOWEST_FLOAT = tl.constexpr(-3.4028234663852886e38)  # finite: the difference of two running maxima is then never NaN
MISSING_LOG_RATIO = tl.constexpr(30.0)  # as types.MISSING_LOG_RATIO

# How raw values become logits, one set for each side.
HAS_BIAS = tl.constexpr(1)
HAS_SCALE = tl.constexpr(2)
HAS_SOFTCAP = tl.constexpr(4)

# What to do about tokens that one side excludes.
CLAMP = tl.constexpr(0)
DROP = tl.constexpr(1)
INF = tl.constexpr(2)


@triton.jit
def compute_tanh(x):
    """tanh to the last digits: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels."""
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * size + size
    result = tl.where(size < 0.625, near, far)
    return tl.where(x < 0, -result, result)


@triton.jit
def adjust_logits(x, bias, scale, softcap, ADJUST: tl.constexpr):
    """softcap(scale * (x + bias)); `bias` is shaped to add."""
    if HAS_BIAS & ADJUST:
        x += bias
    if HAS_SCALE & ADJUST:
        x *= scale
    if HAS_SOFTCAP & ADJUST:
        x = compute_tanh(x / softcap) * softcap
    return x


@triton.jit
def load_logits(ptr, columns, mask, bias_ptr, scale, softcap, ADJUST: tl.constexpr):
    """A tile of logits in fp32, from a row's address and column numbers of one shape; `mask` None: all are there."""
    if mask is None:
        x = tl.load(ptr + columns).to(tl.float32)
    else:
        x = tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)
    bias = x
    if HAS_BIAS & ADJUST:
        if mask is None:
            bias = tl.load(bias_ptr + columns).to(tl.float32)
        else:
            bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return adjust_logits(x, bias, scale, softcap, ADJUST)


@triton.jit
def update_state(
    s,
    t,
    state,
    inv_temperature,
    teacher_inv_temperature,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
):
    """The state after one more tile; what does not count is -inf in `s` and `t`.

    A state is (student_max, student_sum, energy, teacher_max, teacher_sum, ratio, missing, forward_ratio,
    forward_missing). `energy` and the ratios are sums of differences in raw logits, but for two temperatures the
    ratios are in nats: `convert_state` makes nats of all.
    """
    student_max, student_sum, energy, teacher_max, teacher_sum, ratio, missing, forward_ratio, forward_missing = state
    scale = inv_temperature * LOG2_E
    new_max = tl.maximum(student_max, tl.max(s, 1))
    step = tl.maximum(student_max - new_max, LOWEST)
    carry = tl.exp2(step * scale)
    student_missing = s < LOWEST
    x = s - new_max[:, None]
    e = tl.exp2(x * scale)
    # After the exp, which must see a NaN: products of 0 with -1e30 are 0, with -inf they would be NaN.
    x = tl.maximum(x, LOWEST)
    energy = carry * (energy + student_sum * step) + tl.sum(e * x, 1)
    if HAS_TEACHER:
        teacher_missing = t < LOWEST
        t = tl.where(teacher_missing, -float("inf"), t)
        teacher_scale = teacher_inv_temperature * LOG2_E
        new_teacher_max = tl.maximum(teacher_max, tl.max(t, 1))
        teacher_step = tl.maximum(teacher_max - new_teacher_max, LOWEST)
        teacher_carry = tl.exp2(teacher_step * teacher_scale)
        y = t - new_teacher_max[:, None]
        f = tl.exp2(y * teacher_scale)
        y = tl.maximum(y, LOWEST)
        if SAME_TEMPERATURE:
            # x - y before any product: equal logits give exactly 0 however the compiler contracts multiply and add.
            difference = x - y
            step_difference = step - teacher_step
        else:
            difference = x * inv_temperature - y * teacher_inv_temperature
            step_difference = step * inv_temperature - teacher_step * teacher_inv_temperature
        ratio = carry * (ratio + (student_sum - missing) * step_difference)
        ratio += tl.sum(tl.where(teacher_missing, 0.0, e * difference), 1)
        missing = carry * missing + tl.sum(tl.where(teacher_missing, e, 0.0), 1)
        if HAS_FORWARD:
            forward_ratio = teacher_carry * (forward_ratio - (teacher_sum - forward_missing) * step_difference)
            forward_ratio -= tl.sum(tl.where(student_missing, 0.0, f * difference), 1)
            forward_missing = teacher_carry * forward_missing + tl.sum(tl.where(student_missing, f, 0.0), 1)
        teacher_sum = teacher_carry * teacher_sum + tl.sum(f, 1)
        teacher_max = new_teacher_max
    student_sum = carry * student_sum + tl.sum(e, 1)
    student_max = new_max
    return (
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


@triton.jit
def update_plain_state(
    s,
    t,
    state,
    inv_temperature,
    teacher_inv_temperature,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr,
):
    """As `update_state` for a tile without a logit below `LOWEST`, in little more than half the instructions."""
    student_max, student_sum, energy, teacher_max, teacher_sum, ratio, missing, forward_ratio, forward_missing = state
    scale = inv_temperature * LOG2_E
    new_max = tl.maximum(student_max, tl.max(s, 1))
    step = tl.maximum(student_max - new_max, LOWEST)
    carry = tl.exp2(step * scale)
    x = s - new_max[:, None]
    e = tl.exp2(x * scale)
    energy = carry * (energy + student_sum * step) + tl.sum(e * x, 1)
    if HAS_TEACHER:
        teacher_scale = teacher_inv_temperature * LOG2_E
        new_teacher_max = tl.maximum(teacher_max, tl.max(t, 1))
        teacher_step = tl.maximum(teacher_max - new_teacher_max, LOWEST)
        teacher_carry = tl.exp2(teacher_step * teacher_scale)
        y = t - new_teacher_max[:, None]
        f = tl.exp2(y * teacher_scale)
        if SAME_TEMPERATURE:
            difference = x - y
            step_difference = step - teacher_step
        else:
            difference = x * inv_temperature - y * teacher_inv_temperature
            step_difference = step * inv_temperature - teacher_step * teacher_inv_temperature
        ratio = carry * (ratio + (student_sum - missing) * step_difference) + tl.sum(e * difference, 1)
        missing = carry * missing
        if HAS_FORWARD:
            forward_ratio = teacher_carry * (forward_ratio - (teacher_sum - forward_missing) * step_difference)
            forward_ratio -= tl.sum(f * difference, 1)
            forward_missing = teacher_carry * forward_missing
        teacher_sum = teacher_carry * teacher_sum + tl.sum(f, 1)
        teacher_max = new_teacher_max
    student_sum = carry * student_sum + tl.sum(e, 1)
    student_max = new_max
    return (
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


@triton.jit
def begin_state(zero):
    """The state of no columns, in the shape of `zero`."""
    lowest = zero + LOWEST_FLOAT
    return (lowest, zero, zero, lowest, zero, zero, zero, zero, zero)


@triton.jit
def convert_state(state, inv_temperature, SAME_TEMPERATURE: tl.constexpr):
    """The state with energy and ratios in nats, as it is stored and merged."""
    energy = state[2] * inv_temperature
    ratio = state[5]
    forward_ratio = state[7]
    if SAME_TEMPERATURE:
        ratio *= inv_temperature
        forward_ratio *= inv_temperature
    return (state[0], state[1], energy, state[3], state[4], ratio, state[6], forward_ratio, state[8])


@triton.jit
def finish_kl(ratio, total, other_total, missing, POLICY: tl.constexpr):
    """A KL from its running sums (ratio in nats), and the probability of what the other side excludes."""
    mass = missing / total
    if POLICY == DROP:
        kept = total - missing
        kl = ratio / kept - tl.log(tl.div_rn(kept, other_total))
        kl = tl.where((kept <= 0) & (other_total > 0), 0.0, kl)  # nothing is left to compare
    else:
        # div_rn: the approximate division need not give 1 for x / x.
        kl = ratio / total - (1.0 - mass) * tl.log(tl.div_rn(total, other_total))
        if POLICY == CLAMP:
            kl += MISSING_LOG_RATIO * mass
        else:
            kl = tl.where(mass > 0, float("inf"), kl)
    kl = tl.where(other_total == 0, float("nan"), kl)  # the other side excludes everything
    return tl.where(kl < 0, 0.0, kl), mass


@triton.jit
def store_stats(
    table_ptr,
    table_stride,
    rows,
    row_mask,
    active,
    student_logit,
    teacher_logit,
    known,
    state,
    inv_temperature,
    teacher_inv_temperature,
    HAS_TEACHER: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    POLICY: tl.constexpr,
):
    """States (energy and ratios in nats) to the rows of the statistics table, in the order of `types.Row`.

    Rows that are not `active` get 0. Returns what the second pass needs of a row: KL, entropy, both missing masses,
    and the logarithms of both sums.
    """
    student_max, student_sum, energy, teacher_max, teacher_sum, ratio, missing, forward_ratio, forward_missing = state
    nan = float("nan")
    log_sum = tl.log(student_sum)
    entropy = log_sum - energy / student_sum
    logprob = tl.where(known, (student_logit - student_max) * inv_temperature - log_sum, nan)
    kl = tl.full(student_sum.shape, nan, tl.float32)
    teacher_logprob = kl
    mass = kl
    forward_kl = kl
    forward_mass = kl
    teacher_log_sum = kl
    largest = kl
    if HAS_TEACHER:
        teacher_log_sum = tl.log(teacher_sum)
        largest = teacher_max
        teacher_logprob = (teacher_logit - teacher_max) * teacher_inv_temperature - teacher_log_sum
        teacher_logprob = tl.where(known, teacher_logprob, nan)
        kl, mass = finish_kl(ratio, student_sum, teacher_sum, missing, POLICY)
        if HAS_FORWARD:
            forward_kl, forward_mass = finish_kl(forward_ratio, teacher_sum, student_sum, forward_missing, POLICY)
    row_ptr = table_ptr + rows
    tl.store(row_ptr, tl.where(active, logprob, 0.0), mask=row_mask)
    tl.store(row_ptr + table_stride, tl.where(active, kl, 0.0), mask=row_mask)
    tl.store(row_ptr + 2 * table_stride, tl.where(active, entropy, 0.0), mask=row_mask)
    tl.store(row_ptr + 3 * table_stride, tl.where(active, forward_kl, 0.0), mask=row_mask)
    tl.store(row_ptr + 4 * table_stride, tl.where(active, nan, 0.0), mask=row_mask)  # JSD: a second look fills it in
    tl.store(row_ptr + 5 * table_stride, tl.where(active, teacher_logprob, 0.0), mask=row_mask)
    tl.store(row_ptr + 6 * table_stride, tl.where(active, mass, 0.0), mask=row_mask)
    tl.store(row_ptr + 7 * table_stride, tl.where(active, forward_mass, 0.0), mask=row_mask)
    tl.store(row_ptr + 8 * table_stride, tl.where(active, nan, 0.0), mask=row_mask)
    tl.store(row_ptr + 9 * table_stride, tl.where(active, student_max, 0.0), mask=row_mask)
    tl.store(row_ptr + 10 * table_stride, tl.where(active, log_sum, 0.0), mask=row_mask)
    tl.store(row_ptr + 11 * table_stride, tl.where(active, largest, 0.0), mask=row_mask)
    tl.store(row_ptr + 12 * table_stride, tl.where(active, teacher_log_sum, 0.0), mask=row_mask)
    return kl, entropy, mass, forward_mass, log_sum, teacher_log_sum


@triton.jit
def weigh_row(
    weights_ptr,
    weights_stride,
    row,
    kl,
    entropy,
    mass,
    forward_mass,
    log_sum,
    teacher_log_sum,
    known,
    inv_temperature,
    POLICY: tl.constexpr,
    USES_LOGPROB: tl.constexpr,
    USES_KL: tl.constexpr,
    USES_ENTROPY: tl.constexpr,
    USES_FORWARD: tl.constexpr,
    USES_JSD: tl.constexpr,
):
    """What a row's upstream gradients come to: p_j (constant + kl_slope D_j - entropy_slope l_j) and so on.

    Returns (constant, kl_slope, missing_slope, entropy_slope, logprob_weight, teacher_weight, jsd_weight, active,
    needs_teacher). `missing_slope` takes the place of `kl_slope * D_j` for tokens that the teacher excludes.
    """
    constant = tl.where(log_sum == 0, 0.0, 0.0)  # 0 in the shape of a row, whatever the row holds
    kl_slope = constant
    missing_slope = constant
    entropy_slope = constant
    logprob_weight = constant
    teacher_weight = constant
    jsd_weight = constant
    size = constant
    teacher_size = constant
    if USES_KL:
        a = tl.load(weights_ptr + weights_stride + row).to(tl.float32) * inv_temperature
        size += tl.abs(a)
        teacher_size += tl.abs(a)
        used = a != 0
        kl = tl.where(tl.abs(kl) == float("inf"), float("nan"), kl)  # no gradient exists there
        offset = teacher_log_sum - log_sum  # D_j = x_j / T - y_j / T + offset
        if POLICY == DROP:
            gain = 1.0 / (1.0 - mass)
            # Nothing is left to compare where the teacher excludes all that the student considers.
            a = tl.where(mass < 1.0, a * gain, 0.0 * mass)
            kl_constant = a * (offset + tl.log(gain) - kl)
            kl_constant = tl.where(mass < 1.0, kl_constant, 0.0 * mass)
            missing_term = -kl_constant
        else:
            if POLICY == CLAMP:
                kl -= mass
            kl_constant = a * (offset - kl)
            missing_term = a * (MISSING_LOG_RATIO - 1.0 - offset)
        kl_slope = tl.where(used, a, 0.0)
        constant += tl.where(used, kl_constant, 0.0)
        missing_slope = tl.where(used, missing_term, 0.0)
    if USES_ENTROPY:
        c = tl.load(weights_ptr + 2 * weights_stride + row).to(tl.float32) * inv_temperature
        size += tl.abs(c)
        constant += tl.where(c != 0, c * (log_sum - entropy), 0.0)
        entropy_slope = c
    if USES_LOGPROB:
        b = tl.load(weights_ptr + row).to(tl.float32) * inv_temperature
        size += tl.abs(b)
        b = tl.where(known | (b == 0), b, float("nan"))  # a NaN log-prob in use stays loud
        constant -= b
        logprob_weight = b
    if USES_FORWARD:
        f = tl.load(weights_ptr + 3 * weights_stride + row).to(tl.float32) * inv_temperature
        size += tl.abs(f)
        teacher_size += tl.abs(f)
        used = f != 0
        if POLICY == DROP:
            constant += f
            teacher_weight = tl.where(used, f / (1.0 - forward_mass), 0.0)
        elif POLICY == CLAMP:
            constant += tl.where(used, f * (1.0 - forward_mass), 0.0)
            teacher_weight = f
        else:
            constant += tl.where(used & (forward_mass > 0), float("nan"), f)
            teacher_weight = f
    if USES_JSD:
        jsd_weight = tl.load(weights_ptr + 4 * weights_stride + row).to(tl.float32) * inv_temperature
        size += tl.abs(jsd_weight)
        teacher_size += tl.abs(jsd_weight)
    return (
        constant,
        kl_slope,
        missing_slope,
        entropy_slope,
        logprob_weight,
        teacher_weight,
        jsd_weight,
        size != 0,
        teacher_size != 0,
    )
