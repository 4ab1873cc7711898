"""The peers: each takes a problem and returns a step that answers it, found only where its package can be imported.

Conventions, read in Liger-Kernel 0.8.5, TRL 1.16.0 and cut-cross-entropy 25.1.1:
1. Liger and TRL: beta = 1 is the reverse KL, KL(student || teacher); 0 is the forward KL.
2. `LigerFusedLinearJSD` and `LigerJSD` divide by the number of rows. `LigerFusedLinearJSDLoss` does too, mixes in half
   a cross-entropy unless its weight is set to 0, rounds logits to the inputs' dtype, and always makes the gradient of
   the head.
3. TRL's `ChunkedDivergenceFunction` gives the divergence of each row and recomputes the logits in backward. Its
   log-prob functions keep the chunk's logits in the inputs' dtype.
4. cut-cross-entropy drops small gradients unless `filter_eps=None`, which is set here: peers give the same answer.
"""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from benches.formula import compile_formula, compute_kl_stats, compute_logprob_stats, compute_policy_loss
from benches.measure import Step
from benches.problems import Answer, LinearProblem, LogitsProblem

P = TypeVar("P")


@dataclass(frozen=True)
class Peer(Generic[P]):
    """One implementation. `make(problem)` imports its package and may raise: the peer is then left out, with why.

    rounds_logits: its logits are rounded to the inputs' dtype, which is allowed for when answers are compared.
    """

    name: str
    make: Callable[[P], Step]
    rounds_logits: bool = False
    needs_gpu: bool = False


def _answer_logits_kl(problem: LogitsProblem, stats: tuple[Tensor, Tensor, Tensor], differentiate: bool) -> Answer:
    logprob_N, entropy_N, kl_N = stats
    answer = {"logprob": logprob_N, "entropy": entropy_N, "kl": kl_N}
    if not differentiate:
        return answer
    return answer | {"grad": torch.autograd.grad(kl_N.mean(), problem.student_NV)[0]}


def _make_logits_kl(compiled: bool, differentiate: bool) -> Callable[[LogitsProblem], Step]:
    def make(problem: LogitsProblem) -> Step:
        compute = compile_formula(compute_kl_stats) if compiled else compute_kl_stats

        def step() -> Answer:
            with torch.set_grad_enabled(differentiate):
                stats = compute(problem.student_NV, problem.teacher_NV, problem.token_ids_N)
                return _answer_logits_kl(problem, stats, differentiate)

        return step

    return make


def _make_liger_jsd(problem: LogitsProblem) -> Step:
    from liger_kernel.transformers.jsd import LigerJSD

    jsd = LigerJSD(beta=1.0)

    def step() -> Answer:
        logp_NV = torch.log_softmax(problem.student_NV.float(), dim=-1)
        logq_NV = torch.log_softmax(problem.teacher_NV.float(), dim=-1)
        loss = jsd(logp_NV, logq_NV)
        return {"loss": loss, "grad": torch.autograd.grad(loss, problem.student_NV)[0]}

    return step


def _finish_policy(problem: LogitsProblem, logprob_N: Tensor, entropy_N: Tensor | None) -> Answer:
    loss = compute_policy_loss(logprob_N, problem.old_logprob_N, problem.advantage_N).mean()
    answer = {"logprob": logprob_N, "grad": torch.autograd.grad(loss, problem.student_NV)[0]}
    return answer if entropy_N is None else answer | {"entropy": entropy_N}


def _make_logits_policy(compiled: bool) -> Callable[[LogitsProblem], Step]:
    def make(problem: LogitsProblem) -> Step:
        compute = compile_formula(compute_logprob_stats) if compiled else compute_logprob_stats
        return lambda: _finish_policy(problem, *compute(problem.student_NV, problem.token_ids_N))

    return make


def _make_trl_logprob(problem: LogitsProblem) -> Step:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda: _finish_policy(problem, *selective_log_softmax_and_entropy(problem.student_NV, problem.token_ids_N))


LOGITS_STATS_PEERS = [
    Peer("torch", _make_logits_kl(compiled=False, differentiate=False)),
    Peer("torch.compile", _make_logits_kl(compiled=True, differentiate=False)),
]
LOGITS_KL_PEERS = [
    Peer("torch", _make_logits_kl(compiled=False, differentiate=True)),
    Peer("torch.compile", _make_logits_kl(compiled=True, differentiate=True)),
    Peer("liger jsd", _make_liger_jsd, needs_gpu=True),
]
LOGITS_POLICY_PEERS = [
    Peer("torch", _make_logits_policy(compiled=False)),
    Peer("torch.compile", _make_logits_policy(compiled=True)),
    Peer("trl log-prob + entropy", _make_trl_logprob, needs_gpu=True),
]


def _make_linear_kl(compiled: bool) -> Callable[[LinearProblem], Step]:
    def make(problem: LinearProblem) -> Step:
        compute = compile_formula(compute_kl_stats) if compiled else compute_kl_stats

        def step() -> Answer:
            with torch.no_grad():
                teacher_NV = problem.teacher_hidden_ND @ problem.teacher_weight_VD.T
            student_NV = problem.hidden_ND @ problem.weight_VD.T
            logprob_N, entropy_N, kl_N = compute(student_NV, teacher_NV, problem.token_ids_N)
            loss = kl_N.mean()
            return {"loss": loss, "logprob": logprob_N, "entropy": entropy_N} | problem.differentiate(loss)

        return step

    return make


def _make_liger_fused_jsd(problem: LinearProblem) -> Step:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=1.0)

    def step() -> Answer:
        loss = jsd(problem.hidden_ND, problem.weight_VD, problem.teacher_hidden_ND, problem.teacher_weight_VD, None)
        return {"loss": loss} | problem.differentiate(loss)

    return step


def _make_liger_chunked_jsd(problem: LinearProblem) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=problem.hidden_ND.is_cuda
    )

    def step() -> Answer:
        loss = jsd(
            problem.hidden_ND,
            problem.weight_VD,
            problem.teacher_hidden_ND,
            problem.teacher_weight_VD,
            problem.token_ids_N,
        )
        return {"loss": loss} | problem.differentiate(loss)

    return step


def _make_trl_divergence(problem: LinearProblem) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def step() -> Answer:
        kl_N, entropy_N = ChunkedDivergenceFunction.apply(
            problem.hidden_ND,
            problem.weight_VD,
            None,
            problem.teacher_hidden_ND,
            problem.teacher_weight_VD,
            None,
            1.0,
        )
        loss = kl_N.mean()
        return {"loss": loss, "kl": kl_N, "entropy": entropy_N} | problem.differentiate(loss)

    return step


def _finish_linear_policy(problem: LinearProblem, logprob_N: Tensor, entropy_N: Tensor | None = None) -> Answer:
    loss = compute_policy_loss(logprob_N, problem.old_logprob_N, problem.advantage_N).mean()
    answer = {"loss": loss, "logprob": logprob_N} | problem.differentiate(loss)
    return answer if entropy_N is None else answer | {"entropy": entropy_N}


def _make_linear_policy(compiled: bool) -> Callable[[LinearProblem], Step]:
    def make(problem: LinearProblem) -> Step:
        compute = compile_formula(compute_logprob_stats) if compiled else compute_logprob_stats
        return lambda: _finish_linear_policy(
            problem, *compute(problem.hidden_ND @ problem.weight_VD.T, problem.token_ids_N)
        )

    return make


def _make_trl_chunked_logprob(problem: LinearProblem) -> Step:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    def step() -> Answer:
        logprob_N, entropy_N, *_ = ChunkedLogProbFunction.apply(
            problem.hidden_ND,
            problem.weight_VD,
            None,
            problem.token_ids_N,
            1.0,
            COLUMNS,
            None,
            1.0,
            ("entropy",),
        )
        return _finish_linear_policy(problem, logprob_N, entropy_N)

    return step


def _make_liger_scaled_cross_entropy(problem: LinearProblem) -> Step:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def step() -> Answer:
        nll_N, entropy_N = Function.apply(problem.hidden_ND, problem.weight_VD, problem.token_ids_N, 1.0, -100, 1, True)
        return _finish_linear_policy(problem, -nll_N, entropy_N.detach())

    return step


def _make_cut_cross_entropy(problem: LinearProblem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step() -> Answer:
        nll_N = linear_cross_entropy(
            problem.hidden_ND, problem.weight_VD, problem.token_ids_N, reduction="none", filter_eps=None
        )
        return _finish_linear_policy(problem, -nll_N.float())

    return step


LINEAR_KL_PEERS = [
    Peer("torch", _make_linear_kl(compiled=False), rounds_logits=True),
    Peer("torch.compile", _make_linear_kl(compiled=True), rounds_logits=True),
    Peer("liger fused jsd", _make_liger_fused_jsd, needs_gpu=True),
    Peer("liger chunked jsd", _make_liger_chunked_jsd, rounds_logits=True),
    Peer("trl chunked divergence", _make_trl_divergence),
]
LINEAR_RECOMPUTE_PEERS = [Peer("trl chunked divergence", _make_trl_divergence)]
LINEAR_POLICY_PEERS = [
    Peer("torch", _make_linear_policy(compiled=False), rounds_logits=True),
    Peer("torch.compile", _make_linear_policy(compiled=True), rounds_logits=True),
    Peer("trl chunked log-prob", _make_trl_chunked_logprob, rounds_logits=True),
    Peer("liger scaled cross-entropy", _make_liger_scaled_cross_entropy, rounds_logits=True),
    Peer("cut-cross-entropy", _make_cut_cross_entropy, needs_gpu=True),
]
