"""What the kernel tests share: random cases, one way to run them, the fp64 oracle, and the one tolerance table."""

# N kept tokens, V vocabulary

from dataclasses import dataclass

import torch
from torch import Tensor

from imagine_opd.kernels import token_stats
from imagine_opd.kernels.reference import naive_token_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Allowed beyond the naive error, relative to the largest value: statistics by the dtype they are computed in,
gradients by the dtype they are stored in (half a unit in the last place and more for the 16-bit types)."""


@dataclass(frozen=True)
class Case:
    """Logits of both sides, the tokens at hand, and the upstream gradient of each differentiable statistic."""

    student_NV: Tensor
    teacher_NV: Tensor
    token_ids_N: Tensor
    weights_3N: Tensor
    temperature: float = 1.0


def make_case(
    rows: int = 7,
    vocabulary: int = 1003,
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype = torch.float32,
    *,
    scale: float = 3.0,
    temperature: float = 1.0,
    use: tuple[bool, bool, bool] = (True, True, True),
) -> Case:
    """Random logits; `use` says which of log-prob, KL and entropy have a gradient."""
    generator = torch.Generator().manual_seed(rows * vocabulary)
    student_NV = torch.randn(rows, vocabulary, generator=generator) * scale
    teacher_NV = student_NV * 0.5 + torch.randn(rows, vocabulary, generator=generator) * scale * 0.5
    token_ids_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    weights_3N = torch.randn(3, rows, generator=generator) * torch.tensor(use)[:, None]
    return Case(
        student_NV.to(DEVICE, student_dtype),
        teacher_NV.to(DEVICE, teacher_dtype),
        token_ids_N.to(DEVICE),
        weights_3N.to(DEVICE),
        temperature,
    )


def run(case: Case, backend: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """(log-prob, teacher log-prob, KL, entropy) and the gradient of their weighted sum in the student's logits."""
    student_NV = case.student_NV.detach().requires_grad_()
    stats = token_stats(student_NV, case.teacher_NV, case.token_ids_N, case.temperature, backend)
    outputs = (stats.student_logprob_N, stats.teacher_logprob_N, stats.reverse_kl_N, stats.entropy_N)
    _weighted_sum(outputs, case.weights_3N).backward()
    return tuple(output.detach() for output in outputs), student_NV.grad


def run_naive(case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """The same by the formula under autograd, on the same logits cast to `dtype`."""
    student_NV = case.student_NV.detach().to(dtype).requires_grad_()
    outputs = naive_token_stats(student_NV, case.teacher_NV.to(dtype), case.token_ids_N, case.temperature)
    _weighted_sum(outputs, case.weights_3N.to(dtype)).backward()
    return tuple(output.detach() for output in outputs), student_NV.grad


def _weighted_sum(outputs: tuple[Tensor, ...], weights_3N: Tensor) -> Tensor:
    """Outputs without weight are left out of the loss, so that their gradient is None, not 0."""
    student_logprob_N, _, reverse_kl_N, entropy_N = outputs
    pairs = zip((student_logprob_N, reverse_kl_N, entropy_N), weights_3N, strict=True)
    return torch.stack([output_N @ w_N.to(output_N.dtype) for output_N, w_N in pairs if w_N.any()]).sum()


def measure_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest true value; values all below 1e-3 are measured against 1e-3."""
    return ((value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)).item()


def assert_close_to_fp64(case: Case, backend: str) -> None:
    """Each statistic and the gradient: error at most the naive error plus the table's tolerance."""
    (values, grad_NV), (truths, true_grad_NV) = run(case, backend), run_naive(case, torch.float64)
    naive_values, naive_grad_NV = run_naive(case, torch.float32)
    naive_grad_NV = naive_grad_NV.to(case.student_NV.dtype)
    assert grad_NV.dtype == case.student_NV.dtype
    names = ("student_logprob", "teacher_logprob", "reverse_kl", "entropy", "gradient")
    tolerances = [TOLERANCE[torch.float32]] * 4 + [TOLERANCE[case.student_NV.dtype]]
    for name, tolerance, value, naive, truth in zip(
        names,
        tolerances,
        (*values, grad_NV),
        (*naive_values, naive_grad_NV),
        (*truths, true_grad_NV),
        strict=True,
    ):
        error, allowed = measure_error(value, truth), measure_error(naive, truth) + tolerance
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
