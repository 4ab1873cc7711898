"""Random inputs of the benches, and the true answers to them in a wider dtype, a block of rows at a time.

Weights deviate by 3 / sqrt(D), so logits deviate by 3; the teacher's hidden states are the student's with noise: two
models that mostly agree, as in self-distillation. Nothing is zeros: a GPU multiplies zeros faster than real data.
"""

# N kept tokens, V vocabulary, D hidden, R rows of a block

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benches.formula import compute_kl_stats, compute_logprob_stats, compute_policy_loss

LOGITS_DEVIATION = 3.0
TEACHER_NOISE = 0.3
BLOCK_ELEMENTS = 2**27
"""Logits of one block of rows of a true answer: 0.5 GiB in fp32, of which a handful are alive at a time."""

Answer = dict[str, Tensor]
"""`logprob`, `entropy`, `kl`: [N]. `loss`: the mean over rows. `grad`, `grad_hidden`, `grad_weight`: its gradients."""


@dataclass(frozen=True)
class LogitsProblem:
    """Logits in memory; `student_NV` gets a gradient."""

    student_NV: Tensor
    teacher_NV: Tensor
    token_ids_N: Tensor
    old_logprob_N: Tensor
    """What the sampler assigned, for the ratio of a policy gradient: near the truth, not equal to it."""
    advantage_N: Tensor


@dataclass(frozen=True)
class LinearProblem:
    """Hidden states and heads; `hidden_ND` gets a gradient, and so does `weight_VD` where the head is trained."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    token_ids_N: Tensor
    old_logprob_N: Tensor
    advantage_N: Tensor

    def differentiate(self, loss: Tensor) -> Answer:
        """The gradients that are asked for, by name."""
        inputs = {"grad_hidden": self.hidden_ND, "grad_weight": self.weight_VD}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def make_logits_problem(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> LogitsProblem:
    """Two sets of logits that mostly agree."""
    draw = _seed_draw(device)
    student_NV = (draw(rows, vocabulary) * LOGITS_DEVIATION).to(dtype)
    teacher_NV = (student_NV + draw(rows, vocabulary) * LOGITS_DEVIATION * TEACHER_NOISE).to(dtype)
    ids_N = torch.randint(0, vocabulary, (rows,), device=device)
    old_N = torch.cat([compute_logprob_stats(student_NV[r], ids_N[r])[0] for r in _split_rows(rows, vocabulary)])
    return LogitsProblem(student_NV.requires_grad_(), teacher_NV, ids_N, old_N + 0.1 * draw(rows), draw(rows))


def make_linear_problem(
    rows: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: torch.device, trains_head: bool
) -> LinearProblem:
    """A student, and a teacher with a head of its own (a copy: it is read from its own memory)."""
    draw = _seed_draw(device)
    hidden_ND = draw(rows, hidden)
    teacher_hidden_ND = (hidden_ND + TEACHER_NOISE * draw(rows, hidden)).to(dtype)
    hidden_ND = hidden_ND.to(dtype)
    weight_VD = (draw(vocabulary, hidden) * LOGITS_DEVIATION / hidden**0.5).to(dtype)
    ids_N = torch.randint(0, vocabulary, (rows,), device=device)
    old_N = torch.cat(
        [compute_logprob_stats(hidden_ND[r] @ weight_VD.T, ids_N[r])[0] for r in _split_rows(rows, vocabulary)]
    )
    return LinearProblem(
        hidden_ND.requires_grad_(),
        weight_VD.requires_grad_(trains_head),
        teacher_hidden_ND,
        weight_VD.detach().clone(),
        ids_N,
        old_N + 0.1 * draw(rows),
        draw(rows),
    )


def solve_logits(problem: LogitsProblem, uses_teacher: bool) -> Answer:
    """The KL problem with a teacher, the policy-gradient problem without one."""
    wide = _widen(problem.student_NV)

    def solve_block(block: slice) -> Answer:
        student_RV = problem.student_NV[block].detach().to(wide).requires_grad_()
        teacher_RV = problem.teacher_NV[block].to(wide) if uses_teacher else None
        answer = _answer_block(problem, block, student_RV, teacher_RV)
        (grad_RV,) = torch.autograd.grad(answer["loss"], student_RV)
        return answer | {"grad": grad_RV}

    return _join(map(solve_block, _split_rows(*problem.student_NV.shape)), summed=("loss",))


def solve_linear(problem: LinearProblem, uses_teacher: bool) -> Answer:
    """The KL problem with a teacher, the policy-gradient problem without one."""
    wide = _widen(problem.hidden_ND)
    weight_VD = problem.weight_VD.detach().to(wide).requires_grad_(problem.weight_VD.requires_grad)
    teacher_weight_VD = problem.teacher_weight_VD.to(wide)

    def solve_block(block: slice) -> Answer:
        hidden_RD = problem.hidden_ND[block].detach().to(wide).requires_grad_()
        teacher_RV = problem.teacher_hidden_ND[block].to(wide) @ teacher_weight_VD.T if uses_teacher else None
        answer = _answer_block(problem, block, hidden_RD @ weight_VD.T, teacher_RV)
        leaves = {"grad_hidden": hidden_RD} | ({"grad_weight": weight_VD} if weight_VD.requires_grad else {})
        gradients = torch.autograd.grad(answer["loss"], list(leaves.values()))
        return answer | dict(zip(leaves, gradients, strict=True))

    blocks = map(solve_block, _split_rows(len(problem.hidden_ND), len(weight_VD)))
    return _join(blocks, summed=("loss", "grad_weight"))


def measure_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|, the root of the sums of squares, a block of rows at a time; NaN stays NaN."""
    difference, size = 0.0, 0.0
    height = max(1, BLOCK_ELEMENTS // max(1, truth.numel() // max(1, len(truth)))) if truth.ndim else 1
    pairs = zip(value.split(height), truth.split(height), strict=True) if truth.ndim else [(value, truth)]
    for part, true_part in pairs:
        true_part = true_part.to(torch.promote_types(true_part.dtype, torch.float32))
        difference += torch.linalg.vector_norm(part.detach().to(true_part.dtype) - true_part).item() ** 2
        size += torch.linalg.vector_norm(true_part).item() ** 2
    return float((difference / max(size, 1e-300)) ** 0.5)


def _answer_block(
    problem: LogitsProblem | LinearProblem, block: slice, student_RV: Tensor, teacher_RV: Tensor | None
) -> Answer:
    rows, ids_R = len(problem.token_ids_N), problem.token_ids_N[block]
    if teacher_RV is not None:
        logprob_R, entropy_R, kl_R = compute_kl_stats(student_RV, teacher_RV, ids_R)
        return {"logprob": logprob_R, "entropy": entropy_R, "kl": kl_R, "loss": kl_R.sum() / rows}
    logprob_R, entropy_R = compute_logprob_stats(student_RV, ids_R)
    loss_R = compute_policy_loss(logprob_R, problem.old_logprob_N[block], problem.advantage_N[block])
    return {"logprob": logprob_R, "entropy": entropy_R, "loss": loss_R.sum() / rows}


def _join(blocks: Iterable[Answer], summed: tuple[str, ...]) -> Answer:
    """Blocks of rows on top of each other; sums are added up as they come, a head's gradient is gigabytes."""
    parts: dict[str, list[Tensor]] = {}
    for block in blocks:
        for name, value in block.items():
            if name in summed and name in parts:
                parts[name][0] += value.detach()
            else:
                parts.setdefault(name, []).append(value.detach())
    return {name: values[0] if name in summed else torch.cat(values) for name, values in parts.items()}


def _widen(tensor: Tensor) -> torch.dtype:
    """fp64, and fp32 on a GPU: wide enough for bf16, and fp64 at the size of a target would not fit beside it."""
    return torch.float32 if tensor.device.type == "cuda" else torch.float64


def _split_rows(rows: int, vocabulary: int) -> Iterator[slice]:
    height = max(1, BLOCK_ELEMENTS // vocabulary)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _seed_draw(device: torch.device) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    return lambda *shape: torch.randn(*shape, device=device)
