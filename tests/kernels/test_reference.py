"""The PyTorch twin against the formula in fp64: values, gradients, row blocks."""

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, make_case, measure_error, run, run_naive

from imagine_opd.kernels import reference_blocks, token_stats


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_fp64_equals_the_formula(temperature: float) -> None:
    case = make_case(7, 1003, torch.float64, torch.float64, temperature=temperature)
    (values, grad_NV), (truths, true_grad_NV) = run(case, "reference"), run_naive(case, torch.float64)
    for value, truth in zip((*values, grad_NV), (*truths, true_grad_NV), strict=True):
        assert value.dtype == torch.float64
        assert measure_error(value, truth) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("output", ["student_logprob_N", "reverse_kl_N", "entropy_N"])
def test_gradcheck_fp64(output: str) -> None:
    case = make_case(3, 7, torch.float64, torch.float64, temperature=0.7)

    def compute(student_NV: torch.Tensor) -> torch.Tensor:
        return getattr(token_stats(student_NV, case.teacher_NV, case.token_ids_N, 0.7, "reference"), output)

    assert torch.autograd.gradcheck(compute, case.student_NV.requires_grad_())


def test_fp64_teacher_lifts_fp32_student_to_fp64() -> None:
    case = make_case(7, 129, torch.float32, torch.float64)
    (values, grad_NV), (truths, true_grad_NV) = run(case, "reference"), run_naive(case, torch.float64)
    assert [value.dtype for value in values] == [torch.float64] * 4
    assert max(measure_error(*pair) for pair in zip(values, truths, strict=True)) <= TOLERANCE[torch.float64]
    assert grad_NV.dtype == torch.float32
    assert measure_error(grad_NV, true_grad_NV) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("height", [1, 3, 7])
def test_row_blocks_do_not_change_the_answer(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(7, 129, torch.bfloat16)
    values, grad_NV = run(case, "reference")
    monkeypatch.setitem(reference_blocks.BLOCK_ELEMENTS, DEVICE, height * 129)
    block_values, block_grad_NV = run(case, "reference")
    for value, block_value in zip((*values, grad_NV), (*block_values, block_grad_NV), strict=True):
        assert torch.equal(value, block_value)


def test_backward_twice_over_a_retained_graph_gives_the_same_gradient() -> None:
    case = make_case(7, 129)
    student_NV = case.student_NV.requires_grad_()
    kl_N = token_stats(student_NV, case.teacher_NV, case.token_ids_N, backend="reference").reverse_kl_N
    (first_NV,) = torch.autograd.grad(kl_N.sum(), student_NV, retain_graph=True)
    (second_NV,) = torch.autograd.grad(kl_N.sum(), student_NV)
    assert torch.equal(first_NV, second_NV)
