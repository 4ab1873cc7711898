"""Logits in memory: `token_stats` against plain PyTorch and packaged kernels, by case and shape.

The cases: statistics alone; with the gradient of the mean KL in two launches, and in one; the same on fp32 logits; and
the policy gradient of sampled tokens, which reads no teacher.
"""

# N kept tokens, V vocabulary

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.cases import Case, Runner
from benches.formula import compute_policy_loss
from benches.peers import LOGITS_KL_PEERS, LOGITS_POLICY_PEERS, LOGITS_STATS_PEERS
from benches.problems import Answer, LogitsProblem, make_logits_problem, solve_logits
from benches.shapes import DTYPES, LOGITS_SHAPES, LogitsShape, choose_size, name_dtype
from benches.table import OURS, Work
from imagine_opd.kernels import BackendName, RowWeights, TokenStats, token_stats

# Peers warn as they please; ours runs under warnings as errors in tests/.
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS_MS = {("stats + gradient", 8192): 3.2, ("fused", 8192): 2.4}
"""On an H200 with V = 151,936, bf16."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", LOGITS_SHAPES[choose_size(metafunc.config)], ids=str)


def collect(stats: TokenStats, with_teacher: bool = True) -> Answer:
    answer = {"logprob": stats.student_logprob_N, "entropy": stats.entropy_N}
    return answer | {"kl": stats.reverse_kl_N} if with_teacher else answer


def compute_stats(problem: LogitsProblem, backend: BackendName = "auto") -> Answer:
    with torch.no_grad():
        return collect(token_stats(problem.student_NV, problem.teacher_NV, problem.token_ids_N, backend=backend))


def compute_gradient(problem: LogitsProblem, backend: BackendName = "auto") -> Answer:
    stats = token_stats(problem.student_NV, problem.teacher_NV, problem.token_ids_N, backend=backend)
    (grad_NV,) = torch.autograd.grad(stats.reverse_kl_N.mean(), problem.student_NV)
    return collect(stats) | {"grad": grad_NV}


def compute_fused(problem: LogitsProblem, weight_N: Tensor, backend: BackendName = "auto") -> Answer:
    stats = token_stats(
        problem.student_NV,
        problem.teacher_NV,
        problem.token_ids_N,
        weights=RowWeights(reverse_kl_N=weight_N),
        backend=backend,
    )
    assert stats.loss is not None
    (grad_NV,) = torch.autograd.grad(stats.loss, problem.student_NV)
    return collect(stats) | {"loss": stats.loss, "grad": grad_NV}


def compute_policy(problem: LogitsProblem) -> Answer:
    stats = token_stats(problem.student_NV, None, problem.token_ids_N)
    loss = compute_policy_loss(stats.student_logprob_N, problem.old_logprob_N, problem.advantage_N).mean()
    return collect(stats, with_teacher=False) | {"grad": torch.autograd.grad(loss, problem.student_NV)[0]}


def make_case(name: str, problem: LogitsProblem, shape: LogitsShape, **options: Any) -> Case:
    dtype = problem.student_NV.dtype
    passes = {"stats": 2, "log-prob + gradient": 2}.get(name, 3)  # each of student, teacher and gradient once
    is_target = dtype == torch.bfloat16
    return Case(
        kernel="token_stats",
        name=name,
        shape=f"{shape} {name_dtype(dtype)}",
        dtype=dtype,
        work=Work(bytes_moved=passes * problem.student_NV.nbytes),
        target_ms=TARGETS_MS.get((name, shape.rows)) if is_target else None,
        **options,
    )


def test_stats(benchmark: Any, runner: Runner, shape: LogitsShape, request: pytest.FixtureRequest) -> None:
    problem = make_logits_problem(*shape, DTYPES[choose_size(request.config)], runner.device)
    ours = {OURS: partial(compute_stats, problem)}
    case = make_case("stats", problem, shape, ours=ours, solve=partial(solve_logits, problem, True))
    runner.run(benchmark, case, LOGITS_STATS_PEERS, problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_dtype)
def test_stats_and_gradient(benchmark: Any, runner: Runner, shape: LogitsShape, dtype: torch.dtype) -> None:
    problem = make_logits_problem(*shape, dtype, runner.device)
    ours = {OURS: partial(compute_gradient, problem)}
    case = make_case("stats + gradient", problem, shape, ours=ours, solve=partial(solve_logits, problem, True))
    runner.run(benchmark, case, LOGITS_KL_PEERS, problem)


def test_fused(benchmark: Any, runner: Runner, shape: LogitsShape, request: pytest.FixtureRequest) -> None:
    problem = make_logits_problem(*shape, DTYPES[choose_size(request.config)], runner.device)
    weight_N = torch.full_like(problem.old_logprob_N, 1 / shape.rows)
    ours = {
        OURS: partial(compute_fused, problem, weight_N),
        "ours, two launches": partial(compute_gradient, problem),
    }
    case = make_case("fused", problem, shape, ours=ours, solve=partial(solve_logits, problem, True))
    runner.run(benchmark, case, LOGITS_KL_PEERS, problem)


def test_log_prob(benchmark: Any, runner: Runner, shape: LogitsShape, request: pytest.FixtureRequest) -> None:
    problem = make_logits_problem(*shape, DTYPES[choose_size(request.config)], runner.device)
    ours = {OURS: partial(compute_policy, problem)}
    case = make_case("log-prob + gradient", problem, shape, ours=ours, solve=partial(solve_logits, problem, False))
    runner.run(benchmark, case, LOGITS_POLICY_PEERS, problem)
