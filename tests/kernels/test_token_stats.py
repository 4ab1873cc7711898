"""Both implementations against fp64: sizes, dtypes, temperatures, single gradients, and the hard numerical cases.

Without a GPU the Triton kernels run in Triton's interpreter, with one they run compiled.
"""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, Case, assert_close_to_fp64, make_case, run, run_naive
from torch import Tensor

from imagine_opd.kernels import TokenStats, token_stats

INF, NAN = math.inf, math.nan
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def logits(*rows: list[float], dtype: torch.dtype = FP32) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def differentiate(stats_field: str, student_NV: Tensor, teacher_NV: Tensor, ids_N: Tensor, backend: str) -> Tensor:
    student_NV = student_NV.detach().requires_grad_()
    getattr(token_stats(student_NV, teacher_NV, ids_N, backend=backend), stats_field).sum().backward()
    return student_NV.grad


# Agreement with fp64


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1003, 5003])
def test_odd_vocabularies(vocabulary: int, backend: str) -> None:
    assert_close_to_fp64(make_case(7, vocabulary), backend)


def test_true_vocabulary(backend: str) -> None:
    assert_close_to_fp64(make_case(2, 151936, BF16, BF16), backend)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "use",
    [(True, False, False), (False, True, False), (False, False, True), (True, True, True)],
    ids=["logprob", "kl", "entropy", "mixed"],
)
def test_each_gradient_alone_and_mixed(use: tuple[bool, bool, bool], temperature: float, backend: str) -> None:
    assert_close_to_fp64(make_case(7, 1003, temperature=temperature, use=use), backend)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP16, BF16)],
)
def test_half_precision_and_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype, backend: str) -> None:
    assert_close_to_fp64(make_case(7, 1003, student_dtype, teacher_dtype), backend)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logits_of_magnitude_1e4(temperature: float, backend: str) -> None:
    assert_close_to_fp64(make_case(7, 1003, scale=1e4, temperature=temperature), backend)


@pytest.mark.parametrize("columns", [slice(5, 135), slice(0, 260, 2)], ids=["row_stride", "column_stride"])
def test_strided_logits_equal_contiguous_ones(columns: slice, backend: str) -> None:
    wide = make_case(7, 261)
    case = replace(
        wide,
        student_NV=wide.student_NV[:, columns],
        teacher_NV=wide.teacher_NV[:, columns],
        token_ids_N=wide.token_ids_N % 130,
    )
    dense = replace(case, student_NV=case.student_NV.contiguous(), teacher_NV=case.teacher_NV.contiguous())
    (values, grad_NV), (dense_values, dense_grad_NV) = run(case, backend), run(dense, backend)
    for value, dense_value in zip((*values, grad_NV), (*dense_values, dense_grad_NV), strict=True):
        assert torch.equal(value, dense_value)


# Meaning


def test_kl_runs_from_student_to_teacher(backend: str) -> None:
    # p = (1/2, 1/4, 1/4), q = (1/8, 1/8, 3/4), by hand:
    # KL(p||q) = 1/2 ln 4 + 1/4 ln 2 + 1/4 ln 1/3 = 0.591792; the other direction would be 0.564125
    student_NV, teacher_NV = logits([0.5, 0.25, 0.25]).log(), logits([0.125, 0.125, 0.75]).log()
    stats = token_stats(student_NV, teacher_NV, ids(2), backend=backend)
    expected = 1.25 * math.log(2) - 0.25 * math.log(3)
    assert stats.reverse_kl_N.item() == pytest.approx(expected, abs=1e-6)
    assert stats.reverse_kl_N.item() != pytest.approx(0.75 * math.log(3) - 3 / 8 * math.log(2), abs=1e-2)
    assert stats.student_logprob_N.item() == pytest.approx(math.log(0.25), abs=1e-6)
    assert stats.teacher_logprob_N.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert stats.entropy_N.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    # dKL/ds_j = p_j (ln p_j/q_j - KL)
    grad_NV = differentiate("reverse_kl_N", student_NV, teacher_NV, ids(2), backend)
    by_hand = [0.5 * (math.log(4) - expected), 0.25 * (math.log(2) - expected), 0.25 * (-math.log(3) - expected)]
    assert grad_NV[0].tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_identical_logits_give_exactly_zero(dtype: torch.dtype, temperature: float, backend: str) -> None:
    case = make_case(7, 1003, dtype, temperature=temperature, use=(False, True, False))
    values, grad_NV = run(replace(case, teacher_NV=case.student_NV.clone()), backend)
    assert torch.equal(values[2], torch.zeros_like(values[2]))
    assert torch.equal(grad_NV, torch.zeros_like(grad_NV))
    assert torch.equal(values[0], values[1])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("offset", [-1000.0, 3.0, 1000.0])
def test_constant_offset_is_no_divergence(offset: float, backend: str) -> None:
    case = make_case(7, 1003)
    student_NV = (case.student_NV * 16).round() / 16  # multiples of 1/16 stay exact under the offset
    values, _ = run(replace(case, student_NV=student_NV, teacher_NV=student_NV + offset), backend)
    assert values[2].abs().max() <= 1e-6


@pytest.mark.usefixtures("small_tiles")
def test_kl_is_not_negative_beyond_rounding(backend: str) -> None:
    case = make_case(7, 1003)
    for step in (1e-1, 1e-2, 1e-3, 1e-4):
        stats = token_stats(
            case.student_NV, case.student_NV + step * case.teacher_NV, case.token_ids_N, backend=backend
        )
        assert stats.reverse_kl_N.min() >= -1e-6


@pytest.mark.parametrize("use", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradient_of_a_row_sums_to_zero(use: tuple[bool, bool, bool], backend: str) -> None:
    _, grad_NV = run(make_case(7, 1003, use=use), backend)
    assert grad_NV.double().sum(1).abs().max() <= 1e-6


def test_kl_gradient_is_the_expected_policy_gradient(backend: str) -> None:
    # E_{y~p}[(log p(y) - log q(y)) d log p(y)] = d KL(p||q): one row for each token, weighted by its probability
    vocabulary = 11
    row = make_case(1, vocabulary)
    student_VV, teacher_VV = row.student_NV.repeat(vocabulary, 1), row.teacher_NV.repeat(vocabulary, 1)
    every_id = torch.arange(vocabulary, device=DEVICE)
    leaf_VV = student_VV.clone().requires_grad_()
    stats = token_stats(leaf_VV, teacher_VV, every_id, backend=backend)
    logp_V = stats.student_logprob_N.detach()
    (logp_V.exp() * (logp_V - stats.teacher_logprob_N) * stats.student_logprob_N).sum().backward()
    kl_grad_NV = differentiate("reverse_kl_N", row.student_NV, row.teacher_NV, row.token_ids_N, backend)
    torch.testing.assert_close(leaf_VV.grad.sum(0), kl_grad_NV[0], atol=1e-6, rtol=1e-5)


def test_teacher_never_gets_a_gradient(backend: str) -> None:
    case = make_case(7, 129)
    student_NV, teacher_NV = case.student_NV.requires_grad_(), case.teacher_NV.requires_grad_()
    stats = token_stats(student_NV, teacher_NV, case.token_ids_N, backend=backend)
    assert not stats.teacher_logprob_N.requires_grad
    (stats.reverse_kl_N + stats.student_logprob_N + stats.entropy_N + stats.teacher_logprob_N).sum().backward()
    assert teacher_NV.grad is None
    assert student_NV.grad is not None


# Infinities and NaN


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dead", [slice(3, 4), slice(0, 128), slice(100, 290)], ids=["one", "first_tile", "two_tiles"])
def test_columns_dead_on_both_sides_count_for_nothing(dead: slice, backend: str) -> None:
    case = make_case(7, 300)
    case = replace(case, token_ids_N=torch.full_like(case.token_ids_N, 299))
    keep = torch.ones(300, dtype=torch.bool, device=DEVICE)
    keep[dead] = False
    short = replace(
        case,
        student_NV=case.student_NV[:, keep],
        teacher_NV=case.teacher_NV[:, keep],
        token_ids_N=torch.full_like(case.token_ids_N, int(keep.sum()) - 1),
    )
    masked = replace(
        case,
        student_NV=case.student_NV.masked_fill(~keep, -INF),
        teacher_NV=case.teacher_NV.masked_fill(~keep, -INF),
    )
    values, grad_NV = run(masked, backend)
    truths, true_grad_NV = run_naive(short, torch.float64)
    for value, truth in zip(values, truths, strict=True):
        torch.testing.assert_close(value.double(), truth, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(grad_NV[:, keep].double(), true_grad_NV, atol=1e-6, rtol=1e-5)
    assert torch.equal(grad_NV[:, ~keep], torch.zeros_like(grad_NV[:, ~keep]))


@pytest.mark.usefixtures("small_tiles")
def test_columns_dead_for_the_student_count_for_nothing(backend: str) -> None:
    case = make_case(7, 300)
    student_NV = case.student_NV.clone()
    student_NV[:, 5:260] = -INF
    case = replace(case, student_NV=student_NV, token_ids_N=torch.full_like(case.token_ids_N, 299))
    # -1e4 stands for -inf in the oracle: its p is 0 in fp64 all the same
    truths, true_grad_NV = run_naive(replace(case, student_NV=student_NV.clamp(min=-1e4)), torch.float64)
    values, grad_NV = run(case, backend)
    for value, truth in zip(values, truths, strict=True):
        torch.testing.assert_close(value.double(), truth, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(grad_NV.double(), true_grad_NV, atol=1e-5, rtol=1e-5)


def test_dead_row_is_nan_alone(backend: str) -> None:
    case = make_case(7, 129)
    values, grad_NV = run(case, backend)
    dead_NV = case.student_NV.clone()
    dead_NV[2] = -INF
    dead_values, dead_grad_NV = run(replace(case, student_NV=dead_NV), backend)
    others = [0, 1, 3, 4, 5, 6]
    for value, dead_value in zip((*values, grad_NV), (*dead_values, dead_grad_NV), strict=True):
        assert torch.equal(value[others], dead_value[others])
    assert all(dead_values[index][2].isnan() for index in (0, 2, 3))
    assert dead_values[1][2] == values[1][2]
    assert dead_grad_NV[2].isnan().all()


def test_dead_teacher_row_spares_student_statistics(backend: str) -> None:
    case = make_case(3, 129, use=(True, False, True))
    values, grad_NV = run(case, backend)
    dead_NV = case.teacher_NV.clone()
    dead_NV[1] = -INF
    dead_values, dead_grad_NV = run(replace(case, teacher_NV=dead_NV), backend)
    assert dead_values[1][1].isnan()
    assert dead_values[2][1].isnan()
    assert torch.equal(dead_values[0], values[0])
    assert torch.equal(dead_values[3], values[3])
    assert torch.equal(dead_grad_NV, grad_NV)


@pytest.mark.parametrize("side", ["student_NV", "teacher_NV"])
def test_nan_logit_shows_in_its_row_only(side: str, backend: str) -> None:
    case = make_case(3, 129)
    values, _ = run(case, backend)
    poisoned_NV = getattr(case, side).clone()
    poisoned_NV[1, 7] = NAN
    poisoned_values, _ = run(replace(case, **{side: poisoned_NV}), backend)
    assert poisoned_values[2][1].isnan()
    assert torch.equal(poisoned_values[2][[0, 2]], values[2][[0, 2]])


def test_largest_floats_do_not_become_nan(backend: str) -> None:
    student_NV = logits([3e38, -3e38, 0.0])
    stats = token_stats(student_NV, student_NV.clone(), ids(0), backend=backend)
    assert [stats.student_logprob_N.item(), stats.reverse_kl_N.item(), stats.entropy_N.item()] == [0.0, 0.0, 0.0]
    for field in ("student_logprob_N", "reverse_kl_N", "entropy_N"):
        assert not differentiate(field, student_NV, student_NV.clone(), ids(0), backend).any()


@pytest.mark.parametrize("peak", [100.0, INF], ids=["one_hot_100", "one_hot_inf"])
def test_equal_one_hot_rows(peak: float, backend: str) -> None:
    student_NV = logits([-peak, 100.0, -peak, -peak])
    stats = token_stats(student_NV, student_NV.clone(), ids(1), backend=backend)
    assert [stats.student_logprob_N.item(), stats.reverse_kl_N.item(), stats.entropy_N.item()] == [0.0, 0.0, 0.0]


# Rows that are left out


@pytest.mark.parametrize("bad_id", [-100, -1, 129, 2**31, -(2**40)])
def test_id_out_of_range_is_nan_in_its_row(bad_id: int, backend: str) -> None:
    case = make_case(3, 129, use=(False, True, True))
    values, grad_NV = run(case, backend)
    bad_ids_N = case.token_ids_N.clone()
    bad_ids_N[1] = bad_id
    bad_values, bad_grad_NV = run(replace(case, token_ids_N=bad_ids_N), backend)
    assert bad_values[0].isnan().tolist() == [False, True, False]
    assert bad_values[1].isnan().tolist() == [False, True, False]
    assert torch.equal(bad_values[2], values[2])
    assert torch.equal(bad_values[3], values[3])
    assert torch.equal(bad_grad_NV, grad_NV)  # the other statistics do not use the id
    used_grad_NV = differentiate("student_logprob_N", case.student_NV, case.teacher_NV, bad_ids_N, backend)
    assert used_grad_NV.isnan().any(1).tolist() == [False, True, False]


def test_masked_row_may_hold_anything(backend: str) -> None:
    case = make_case(3, 129)
    student_NV, teacher_NV, ids_N = case.student_NV.clone(), case.teacher_NV.clone(), case.token_ids_N.clone()
    student_NV[1], teacher_NV[1], ids_N[1] = NAN, INF, -100
    leaf_NV = student_NV.requires_grad_()
    stats = token_stats(leaf_NV, teacher_NV, ids_N, backend=backend)
    keep_N = torch.tensor([True, False, True], device=DEVICE)
    torch.where(keep_N, stats.reverse_kl_N - stats.student_logprob_N - stats.entropy_N, 0.0).sum().backward()
    assert not leaf_NV.grad[1].any()
    assert leaf_NV.grad[[0, 2]].isfinite().all()


def test_kl_masked_alone_does_not_read_the_teacher_row(backend: str) -> None:
    case = make_case(3, 129)
    case.teacher_NV[1] = NAN
    case.weights_3N[1, 1] = 0.0
    _, grad_NV = run(case, backend)
    without_kl = replace(case, weights_3N=case.weights_3N * torch.tensor([[1.0], [0.0], [1.0]], device=DEVICE))
    _, expected_NV = run(without_kl, backend)
    torch.testing.assert_close(grad_NV[1], expected_NV[1], atol=1e-7, rtol=1e-6)


def test_no_rows_give_an_empty_differentiable_answer(backend: str) -> None:
    student_NV = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    stats = token_stats(student_NV, torch.zeros(0, 5, device=DEVICE), ids().long(), backend=backend)
    assert stats.reverse_kl_N.shape == (0,)
    (stats.reverse_kl_N.sum() + stats.student_logprob_N.sum()).backward()
    assert student_NV.grad.shape == (0, 5)


# Repeatability and wiring


@pytest.mark.usefixtures("small_tiles")
def test_runs_repeat_bit_by_bit(backend: str) -> None:
    case = make_case(7, 1003, BF16)
    values, grad_NV = run(case, backend)
    for _ in range(4):
        again, grad_again_NV = run(case, backend)
        assert all(map(torch.equal, (*values, grad_NV), (*again, grad_again_NV)))


@pytest.mark.usefixtures("small_tiles")
def test_permuted_rows_give_permuted_answers_bit_by_bit(backend: str) -> None:
    case = make_case(7, 1003)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3], device=DEVICE)
    permuted = Case(case.student_NV[order], case.teacher_NV[order], case.token_ids_N[order], case.weights_3N[:, order])
    (values, grad_NV), (permuted_values, permuted_grad_NV) = run(case, backend), run(permuted, backend)
    for value, permuted_value in zip((*values, grad_NV), (*permuted_values, permuted_grad_NV), strict=True):
        assert torch.equal(value[order], permuted_value)


def test_every_output_element_is_written(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(7, 1003, BF16)
    values, grad_NV = run(case, backend)
    allocate, allocated = torch.empty, []

    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        allocated.append(allocate(*args, **kwargs).fill_(NAN))
        return allocated[-1]

    if backend == "reference":  # its blocks: the one allocation is the gradient of several
        from imagine_opd.kernels import reference_blocks

        monkeypatch.setitem(reference_blocks.BLOCK_ELEMENTS, DEVICE, 3 * 1003)
    monkeypatch.setattr(torch, "empty", allocate_poisoned)
    poisoned_values, poisoned_grad_NV = run(case, backend)
    assert len(allocated) >= (2 if backend == "triton" else 1)
    for value, poisoned in zip((*values, grad_NV), (*poisoned_values, poisoned_grad_NV), strict=True):
        assert torch.equal(value, poisoned)


def test_inputs_are_left_as_they_were(backend: str) -> None:
    case = make_case(7, 129)
    before = (case.student_NV.clone(), case.teacher_NV.clone(), case.token_ids_N.clone())
    run(case, backend)
    assert all(map(torch.equal, before, (case.student_NV, case.teacher_NV, case.token_ids_N)))


@pytest.mark.parametrize("power", [1, 2])  # with 1 the upstream gradient itself needs no gradient
def test_second_derivative_raises(power: int, backend: str) -> None:
    case = make_case(3, 129)
    student_NV = case.student_NV.requires_grad_()
    kl_N = token_stats(student_NV, case.teacher_NV, case.token_ids_N, backend=backend).reverse_kl_N
    (grad_NV,) = torch.autograd.grad((kl_N**power).sum(), student_NV, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (grad_NV.sum() + student_NV.sum()).backward()


def test_answer_needs_no_gradient(backend: str) -> None:
    case = make_case(3, 129)
    stats = token_stats(case.student_NV, case.teacher_NV, case.token_ids_N, backend=backend)
    assert isinstance(stats, TokenStats)
    assert not stats.reverse_kl_N.requires_grad
