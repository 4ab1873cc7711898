"""token_stats against plain torch, forward and backward: the same answer is asserted first, then both are timed.

Off the GPU only the ratio means anything; it is in `extra_info` of the row named `ours`.
"""

# N kept tokens, V vocabulary

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from imagine_opd.kernels import token_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(480, 59), (64, 32000)] + ([(4096, 151936)] if DEVICE == "cuda" else [])
DTYPES = [torch.float32, torch.bfloat16]
Outputs = tuple[Tensor, Tensor, Tensor]


def run_ours(student_NV: Tensor, teacher_NV: Tensor, token_ids_N: Tensor) -> Outputs:
    stats = token_stats(student_NV, teacher_NV, token_ids_N)
    return stats.student_logprob_N, stats.reverse_kl_N, stats.entropy_N


def run_torch(student_NV: Tensor, teacher_NV: Tensor, token_ids_N: Tensor) -> Outputs:
    """What a trainer writes without a kernel, in fp32 as ours is."""
    logp_NV, logq_NV = F.log_softmax(student_NV.float(), dim=-1), F.log_softmax(teacher_NV.float(), dim=-1)
    # F.kl_div(input, target) is KL(target || input): student second gives KL(student || teacher)
    kl_N = F.kl_div(logq_NV, logp_NV, reduction="none", log_target=True).sum(-1)
    return logp_NV.gather(1, token_ids_N[:, None]).squeeze(1), kl_N, -(logp_NV.exp() * logp_NV).sum(-1)


def step(run: Callable[..., Outputs], student_NV: Tensor, teacher_NV: Tensor, token_ids_N: Tensor) -> list[Tensor]:
    """Forward and backward of the full-KL loss with every statistic at hand, as a training step needs them."""
    student_NV.grad = None
    outputs = run(student_NV, teacher_NV, token_ids_N)
    outputs[1].mean().backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return [output.detach() for output in outputs] + [student_NV.grad]


def measure_ratio(arguments: tuple[Tensor, Tensor, Tensor], rounds: int) -> float:
    """Median seconds of torch over those of ours, taken in turns, so that a busy machine slows both."""
    seconds: dict[Callable[..., Outputs], list[float]] = {run_torch: [], run_ours: []}
    for _ in range(rounds):
        for run, taken in seconds.items():
            start = time.perf_counter()
            step(run, *arguments)
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[run_torch]) / statistics.median(seconds[run_ours])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
@pytest.mark.parametrize("name", ["ours", "torch"])
def test_forward_and_backward(benchmark, name: str, rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student_NV = torch.randn(rows, vocabulary, device=DEVICE).to(dtype).requires_grad_()
    teacher_NV = torch.randn(rows, vocabulary, device=DEVICE).to(dtype)
    arguments = (student_NV, teacher_NV, torch.randint(0, vocabulary, (rows,), device=DEVICE))

    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for value, expected in zip(step(run_ours, *arguments), step(run_torch, *arguments), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())

    benchmark.extra_info.update(device=DEVICE, torch=torch.__version__, threads=torch.get_num_threads())
    if name == "ours":
        rounds = 101 if rows * vocabulary < 1e5 else 9
        benchmark.extra_info["times_faster_than_torch"] = round(measure_ratio(arguments, rounds), 2)
    benchmark(step, run_ours if name == "ours" else run_torch, *arguments)
