"""The compiled kernels on a GPU against fp64, at the vocabularies of real models."""

import os
from dataclasses import replace

import pytest
import torch
from kernel_cases import assert_close_to_fp64, make_case, run

from imagine_opd.kernels import RowWeights, token_stats, tuning

pytestmark = pytest.mark.gpu

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _compiled() -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "unset TRITON_INTERPRET: this must run compiled"


@pytest.mark.parametrize("vocabulary", [32000, 128256, 151669, 151936, 262144])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_true_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    assert_close_to_fp64(make_case(17, vocabulary, dtype, dtype), "triton")


@pytest.mark.parametrize("rows", [1, 131, 132, 133, 2048])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_row_counts_around_the_number_of_multiprocessors(rows: int, temperature: float) -> None:
    assert_close_to_fp64(make_case(rows, 5003, BF16, FP32, temperature=temperature), "triton")


def test_identical_logits_give_exactly_zero() -> None:
    case = make_case(17, 151936, BF16, use=(False, True, False))
    values, grad_NV = run(replace(case, teacher_NV=case.student_NV.clone()), "triton")
    assert not values[2].any()
    assert not grad_NV.any()


def test_twenty_runs_repeat_bit_by_bit() -> None:
    case = make_case(133, 151936, BF16, BF16)
    values, grad_NV = run(case, "triton")
    for _ in range(20):
        again, grad_again_NV = run(case, "triton")
        assert all(map(torch.equal, (*values, grad_NV), (*again, grad_again_NV)))


def test_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 14_200, 151_936  # the last rows begin past element 2^31
    tail = make_case(8, vocabulary, BF16, BF16)
    student_NV = torch.zeros(rows, vocabulary, dtype=BF16, device="cuda")
    student_NV[-8:] = tail.student_NV
    teacher_NV = torch.zeros_like(student_NV)
    teacher_NV[-8:] = tail.teacher_NV
    ids_N = torch.zeros(rows, dtype=torch.int64, device="cuda")
    ids_N[-8:] = tail.token_ids_N
    weights_3N = torch.zeros(3, rows, device="cuda")
    weights_3N[:, -8:] = tail.weights_3N
    monkeypatch.setattr(tuning, "choose_splits", lambda *_: 1)  # as many rows as these are not split, eight would be
    whole = replace(tail, student_NV=student_NV, teacher_NV=teacher_NV, token_ids_N=ids_N, weights_3N=weights_3N)
    (values, grad_NV), (tail_values, tail_grad_NV) = run(whole, "triton"), run(tail, "triton")
    assert all(torch.equal(value[-8:], tail_value) for value, tail_value in zip(values, tail_values, strict=True))
    assert torch.equal(grad_NV[-8:], tail_grad_NV)
    assert not grad_NV[:-8].any()


def test_auto_takes_the_kernels_on_cuda() -> None:
    case = make_case(3, 129)
    automatic = token_stats(case.student_NV, case.teacher_NV, case.token_ids_N)
    chosen = token_stats(case.student_NV, case.teacher_NV, case.token_ids_N, backend="triton")
    assert torch.equal(automatic.reverse_kl_N, chosen.reverse_kl_N)
    doubled = token_stats(case.student_NV.double(), case.teacher_NV, case.token_ids_N)
    assert doubled.reverse_kl_N.dtype == torch.float64


@pytest.mark.parametrize("vocabulary", [151669, 151936])
def test_one_row_alone(vocabulary: int) -> None:
    assert_close_to_fp64(make_case(1, vocabulary, BF16, BF16), "triton")


def test_masked_rows_are_zero_and_leak_nothing() -> None:
    case = make_case(300, 32000, BF16, BF16)
    mask_N = torch.arange(300, device="cuda") % 3 > 0
    student_NV = case.student_NV.masked_fill(~mask_N[:, None], float("nan")).requires_grad_()
    stats = token_stats(student_NV, case.teacher_NV, case.token_ids_N, mask_N=mask_N)
    stats.reverse_kl_N.sum().backward()
    alone = token_stats(case.student_NV[mask_N], case.teacher_NV[mask_N], case.token_ids_N[mask_N])
    assert not stats.reverse_kl_N[~mask_N].any()
    torch.testing.assert_close(stats.reverse_kl_N[mask_N], alone.reverse_kl_N, atol=1e-6, rtol=1e-6)
    assert not student_NV.grad[~mask_N].any()
    assert student_NV.grad[mask_N].isfinite().all()


def test_few_rows_are_split_over_programs_and_agree_with_one_program_each(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(3, 151936, BF16, BF16)
    assert tuning.choose_splits(3, 151936, tuning.get_tuning(case.student_NV.device).stats, case.student_NV.device) > 1
    values, grad_NV = run(case, "triton")
    monkeypatch.setattr(tuning, "choose_splits", lambda *_: 1)
    whole_values, whole_grad_NV = run(case, "triton")
    for value, whole in zip(values, whole_values, strict=True):
        torch.testing.assert_close(value, whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad_NV, whole_grad_NV, atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("rows_in_flight", [0, 64, 132])
@pytest.mark.parametrize("in_place", [False, True])
def test_one_launch_equals_two_passes(rows_in_flight: int, in_place: bool) -> None:
    case = make_case(300, 151936, BF16, BF16, use=(False, True, False))
    _, grad_NV = run(case, "triton")
    with tuning.override(replace(tuning.get_tuning(case.student_NV.device), rows_in_flight=rows_in_flight)):
        leaf_NV = case.student_NV.clone().requires_grad_()
        logits_NV = leaf_NV + 0.0
        weights = RowWeights(reverse_kl_N=case.weights_3N[1].contiguous())
        token_stats(logits_NV, case.teacher_NV, case.token_ids_N, weights=weights, in_place=in_place).loss.backward()
    torch.testing.assert_close(leaf_NV.grad, grad_NV, atol=1e-6, rtol=2**-7)


def test_passes_can_be_captured_in_a_cuda_graph() -> None:
    case = make_case(64, 32000, BF16, BF16)
    leaf_NV = case.student_NV.clone().requires_grad_()

    def step() -> torch.Tensor:
        stats = token_stats(leaf_NV, case.teacher_NV, case.token_ids_N)
        (grad_NV,) = torch.autograd.grad(stats.reverse_kl_N.sum(), leaf_NV)
        return grad_NV

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected_NV = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad_NV = step()
    grad_NV.fill_(float("nan"))
    graph.replay()
    assert torch.equal(grad_NV, expected_NV)
