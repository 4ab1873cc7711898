"""Hidden states and heads: `linear_token_stats` against plain PyTorch and packaged fused losses, by case and shape.

The cases: the mean KL with a frozen head, with a trained one, and with the least memory; and the policy gradient of
sampled tokens whose teacher's log-probs are known already, which projects no teacher.
"""

# N kept tokens, C rows of a chunk, V vocabulary, D hidden

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.cases import Case, Runner
from benches.formula import compute_policy_loss
from benches.peers import LINEAR_KL_PEERS, LINEAR_POLICY_PEERS, LINEAR_RECOMPUTE_PEERS, Peer
from benches.problems import Answer, LinearProblem, make_linear_problem, solve_linear
from benches.shapes import DTYPES, LINEAR_SHAPES, LinearShape, choose_size, name_dtype
from benches.table import OURS, Work
from imagine_opd.kernels import TokenStats, linear_token_stats

# Peers warn as they please; ours runs under warnings as errors in tests/.
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS_MS = {
    ("KL, frozen head", 8192, 2560): 32.0,
    ("KL, frozen head", 8192, 4096): 48.0,
    ("KL, trained head", 8192, 4096): 63.0,
    ("policy gradient, frozen head", 8192, 2560): 20.0,
    ("policy gradient, frozen head", 8192, 4096): 30.0,
}
"""On an H200 with V = 151,936, bf16."""

MATRIX_PRODUCTS = {"KL, trained head": 4, "policy gradient, frozen head": 2}
"""Student's logits, teacher's logits, gradient of the hidden states, gradient of the head; three where not listed."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("shape", LINEAR_SHAPES[choose_size(metafunc.config)], ids=str)


def compute_kl(problem: LinearProblem, min_memory: bool = False, chunk_rows: int | None = None) -> Answer:
    rows = len(problem.hidden_ND)

    def mean_kl(stats: TokenStats) -> Tensor:
        return stats.reverse_kl_N / rows

    stats = linear_token_stats(
        problem.hidden_ND,
        problem.weight_VD,
        problem.teacher_hidden_ND,
        problem.teacher_weight_VD,
        problem.token_ids_N,
        row_loss=mean_kl,
        min_memory=min_memory,
        chunk_rows=chunk_rows,
    )
    return collect(problem, stats) | {"kl": stats.reverse_kl_N}


def compute_policy(problem: LinearProblem) -> Answer:
    rows = len(problem.hidden_ND)

    def policy_loss(stats: TokenStats, old_logprob_C: Tensor, advantage_C: Tensor) -> Tensor:
        return compute_policy_loss(stats.student_logprob_N, old_logprob_C, advantage_C) / rows

    stats = linear_token_stats(
        problem.hidden_ND,
        problem.weight_VD,
        None,
        None,
        problem.token_ids_N,
        row_loss=policy_loss,
        row_inputs=(problem.old_logprob_N, problem.advantage_N),
        logits_dtype=torch.bfloat16 if problem.hidden_ND.dtype == torch.bfloat16 else None,
    )
    return collect(problem, stats)


def collect(problem: LinearProblem, stats: TokenStats) -> Answer:
    assert stats.loss is not None
    answer = {"loss": stats.loss, "logprob": stats.student_logprob_N, "entropy": stats.entropy_N}
    return answer | problem.differentiate(stats.loss)


def make_problem(runner: Runner, shape: LinearShape, config: Any, trains_head: bool = False) -> LinearProblem:
    return make_linear_problem(*shape, DTYPES[choose_size(config)], runner.device, trains_head)


def run_case(
    benchmark: Any,
    runner: Runner,
    name: str,
    shape: LinearShape,
    problem: LinearProblem,
    ours: Any,
    peers: list[Peer[LinearProblem]],
) -> None:
    dtype, is_policy = problem.hidden_ND.dtype, name.startswith("policy")
    case = Case(
        kernel="linear_token_stats",
        name=name,
        shape=f"{shape} {name_dtype(dtype)}",
        dtype=dtype,
        work=Work(operations=MATRIX_PRODUCTS.get(name, 3) * 2.0 * shape.rows * shape.vocabulary * shape.hidden),
        ours=ours,
        solve=partial(solve_linear, problem, not is_policy),
        rounds_logits=is_policy,
        target_ms=TARGETS_MS.get((name, shape.rows, shape.hidden)) if dtype == torch.bfloat16 else None,
    )
    runner.run(benchmark, case, peers, problem)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_kl(benchmark: Any, runner: Runner, shape: LinearShape, head: str, request: pytest.FixtureRequest) -> None:
    problem = make_problem(runner, shape, request.config, trains_head=head == "trained")
    ours = {OURS: partial(compute_kl, problem)}
    run_case(benchmark, runner, f"KL, {head} head", shape, problem, ours, LINEAR_KL_PEERS)


def test_policy_gradient(benchmark: Any, runner: Runner, shape: LinearShape, request: pytest.FixtureRequest) -> None:
    problem = make_problem(runner, shape, request.config)
    ours = {OURS: partial(compute_policy, problem)}
    run_case(benchmark, runner, "policy gradient, frozen head", shape, problem, ours, LINEAR_POLICY_PEERS)


def test_kl_with_least_memory(
    benchmark: Any, runner: Runner, shape: LinearShape, request: pytest.FixtureRequest
) -> None:
    problem = make_problem(runner, shape, request.config)
    ours = {
        OURS: partial(compute_kl, problem, min_memory=True),
        "ours, in chunks": partial(compute_kl, problem),
    }
    run_case(benchmark, runner, "KL, frozen head, least memory", shape, problem, ours, LINEAR_RECOMPUTE_PEERS)
