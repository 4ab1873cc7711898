"""The divergences that the kernels lack, in plain PyTorch: hidden states and heads in, a loss with its gradient out.

A chunk of rows at a time: logits of both sides, statistics and divergence, the loss of the rows and its derivatives,
the closed-form gradient of the logits, and the products that take it back. Logits [N, V] never exist, and nothing of
a chunk outlives it. Here are per-entry clips, top-k with a tail, and targets tilted behind a softcap.
"""

# N kept tokens, C rows of a chunk, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from imagine_opd.kernels import BackendName, OutputHead, StatsOptions, TokenStats, tuning
from imagine_opd.kernels.autograd import attach_gradients
from imagine_opd.kernels.checks import refuse_bad_row_inputs
from imagine_opd.kernels.linear import (
    ChunkProjector,
    Gradients,
    LinearPlan,
    Needs,
    Side,
    add_gradients,
    allocate_gradients,
    is_same_memory,
    make_side,
    scale_weights,
    split_chunks,
)
from imagine_opd.kernels.linear_autograd import check_row_loss
from imagine_opd.kernels.matmul import project
from imagine_opd.kernels.planning import plan_linear
from imagine_opd.kernels.reference_blocks import read_logits
from imagine_opd.kernels.types import LOWEST, MISSING_LOG_RATIO, Logits
from imagine_opd.loss.divergences import Divergence, compute_divergence

DivergenceLoss = Callable[..., torch.Tensor]
"""(TokenStats of C rows, their divergence [C], *row_inputs of those rows) to the loss [C] of each row."""

_CHUNK_BUFFERS = 12
"""Tensors [C, V] that live at once; measured by the test of the largest allocation."""


@dataclass(frozen=True, slots=True)
class Tilt:
    """The teacher's hidden states without the evidence, and how strongly its logits lead away from them.

    The target's logits are (1 + beta) z - beta z_neutral, that is q ~ p (p / p_neutral)^beta.
    """

    neutral_hidden_ND: torch.Tensor
    beta: float


@dataclass(frozen=True)
class DenseStats(TokenStats):
    """With `topk`: what each side gives to the student's k likeliest tokens, `[N]`; constants."""

    student_mass_N: torch.Tensor | None = None
    teacher_mass_N: torch.Tensor | None = None


def dense_token_stats(
    student_hidden_ND: torch.Tensor,
    student_head: nn.Linear | OutputHead,
    teacher_hidden_ND: torch.Tensor,
    teacher_head: nn.Linear | OutputHead,
    token_ids_N: torch.Tensor,
    row_loss: DivergenceLoss,
    *,
    row_inputs: Sequence[torch.Tensor] = (),
    divergence: Divergence,
    temperature: float = 1.0,
    backend: BackendName = "auto",
    tilt: Tilt | None = None,
) -> DenseStats:
    """As `linear_token_stats` with a row loss, which also gets the divergence and is differentiated in it and log p(y).

    Statistics are those of the whole vocabulary, whatever the divergence leaves out; `loss` alone has a gradient.
    """
    refuse_bad_row_inputs(row_loss, row_inputs, token_ids_N)
    tensors, plan = plan_linear(
        student_hidden_ND, student_head, teacher_hidden_ND, teacher_head, token_ids_N, None,
        temperature=temperature, options=StatsOptions(), backend=backend, vocab_size=None, logits_dtype=None,
        chunk_rows=None, min_memory=False,
    )  # fmt: skip
    hidden_ND, weight_VD, bias_V, target_hidden_ND, target_weight_VD, target_bias_V, ids_N, _ = tensors
    assert target_hidden_ND is not None
    assert target_weight_VD is not None
    inputs = [hidden_ND, weight_VD, *([] if bias_V is None else [bias_V])]
    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    needs = Needs(wanted[0], wanted[1], bias_V is not None and wanted[-1])
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        student = make_side(hidden_ND, weight_VD, bias_V, plan.student_dtype, plan.student_scale, plan.student_softcap)
        if is_same_memory(target_weight_VD, weight_VD) and plan.teacher_dtype == plan.student_dtype:
            target_weight_VD = student.weight_VD  # converted once
        teacher = make_side(
            target_hidden_ND, target_weight_VD, target_bias_V, plan.teacher_dtype, plan.teacher_scale,
            plan.teacher_softcap,
        )  # fmt: skip
        neutral = None if tilt is None else tilt.neutral_hidden_ND.detach().to(teacher.hidden_ND.dtype)
        gradients = allocate_gradients(student, needs, hidden_ND.dtype, False)
        runner = _ChunkRunner(
            student, teacher, neutral, 0.0 if tilt is None else tilt.beta, plan, divergence, gradients
        )
        parts = [
            runner(chunk, ids_N[chunk], row_loss, [values[chunk] for values in row_inputs])
            for chunk in split_chunks(len(ids_N), runner.height)
        ]
        stats = _join_stats(parts, runner.stats_dtype, ids_N.device)
    if not any(wanted):
        return stats
    found = [gradients.hidden_ND, gradients.weight_VD, *([] if bias_V is None else [gradients.bias_V])]
    attached = attach_gradients(stats, plan.backend, inputs, found)
    assert isinstance(attached, DenseStats)
    return attached


class _ChunkRunner:
    """Statistics and loss of a chunk of rows; their gradient is added to `gradients` on the way."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        neutral_hidden_ND: torch.Tensor | None,
        beta: float,
        plan: LinearPlan,
        divergence: Divergence,
        gradients: Gradients,
    ) -> None:
        self.student, self.teacher, self.neutral_hidden_ND, self.beta = student, teacher, neutral_hidden_ND, beta
        self.plan, self.divergence, self.gradients = plan, divergence, gradients
        self.stats_dtype = torch.promote_types(getattr(torch, plan.logits_dtype), torch.float32)
        self.needs_gradient = any(tensor is not None for tensor in gradients)
        rows, hidden = student.hidden_ND.shape
        row_bytes = plan.columns * self.stats_dtype.itemsize * _CHUNK_BUFFERS
        trains_head = gradients.weight_VD is not None
        height = tuning.choose_chunk_rows(rows, hidden, row_bytes, trains_head, student.hidden_ND.device)
        self.height = max(1, min(height, rows))
        self.project_chunk = ChunkProjector(student, teacher, plan, self.height)

    def __call__(
        self, chunk: slice, ids_C: torch.Tensor, row_loss: DivergenceLoss, row_inputs: Sequence[torch.Tensor]
    ) -> DenseStats:
        student_logits, teacher_logits = self.project_chunk(chunk)
        assert teacher_logits is not None
        logp_CV = self._read_logprobs(self._read_logits(student_logits))
        logq_CV = self._read_logprobs(self._tilt(self._read_logits(teacher_logits), chunk))
        stats = _compute_stats(logp_CV, logq_CV, ids_C)
        value_C, grad_CV, student_mass_C, teacher_mass_C = compute_divergence(logp_CV, logq_CV, self.divergence)
        stats = replace(stats, student_mass_N=student_mass_C, teacher_mass_N=teacher_mass_C)
        del logq_CV
        loss_C, weights_2C = self._weigh(stats, value_C, row_loss, row_inputs)
        if weights_2C is not None:
            weights_2C, factor = scale_weights(weights_2C, self.student.hidden_ND.dtype)
            logprob_weight_C1, divergence_weight_C1 = weights_2C[:, :, None] / self.plan.spec.temperature
            grad_CV.mul_(divergence_weight_C1).sub_(logp_CV.exp_().mul_(logprob_weight_C1))
            vocabulary = self.plan.vocabulary
            is_known_C1 = ((ids_C >= 0) & (ids_C < vocabulary))[:, None]
            # A NaN log-prob in use stays loud.
            logprob_weight_C1 = logprob_weight_C1.masked_fill(~is_known_C1 & (logprob_weight_C1 != 0), torch.nan)
            grad_CV.scatter_add_(1, ids_C.clamp(0, vocabulary - 1)[:, None], logprob_weight_C1)
            grad_CV = self._unwrap(grad_CV, student_logits)
            # A row without any weight may hold anything, NaN included: its gradient is 0.
            used_C = (weights_2C != 0).any(0)
            grad_CV = torch.where(used_C[:, None], grad_CV, 0.0).to(self.student.hidden_ND.dtype)
            add_gradients(self.gradients, chunk, self.student, grad_CV, factor, slice(0, vocabulary), used_C)
        return replace(stats, loss_N=loss_C)

    def _read_logits(self, logits: Logits) -> torch.Tensor:
        return read_logits(logits, slice(None), self.plan.vocabulary, self.stats_dtype)

    def _read_logprobs(self, logits_CV: torch.Tensor) -> torch.Tensor:
        excluded_CV = logits_CV < LOWEST
        # Subtract, then scale: the difference is nearly exact, a scaled logit of 10^4 has lost 10^-3.
        shifted_CV = (logits_CV - logits_CV.amax(1, keepdim=True)).div_(self.plan.spec.temperature)
        shifted_CV.masked_fill_(excluded_CV, -torch.inf)
        return shifted_CV.log_softmax(1).clamp_(min=LOWEST)

    def _tilt(self, logits_CV: torch.Tensor, chunk: slice) -> torch.Tensor:
        if self.neutral_hidden_ND is None:
            return logits_CV
        values_CV = torch.empty(
            chunk.stop - chunk.start, self.plan.columns, dtype=self.stats_dtype, device=logits_CV.device
        )
        project(self.neutral_hidden_ND[chunk], self.teacher.weight_VD[: self.plan.columns], values_CV)
        teacher = self.teacher
        neutral_CV = self._read_logits(Logits(values_CV, teacher.bias_V, teacher.scale, teacher.softcap))
        # What either side excludes stays as the evidence has it.
        excluded_CV = (logits_CV < LOWEST) | (neutral_CV < LOWEST)
        return torch.where(excluded_CV, logits_CV, logits_CV + self.beta * (logits_CV - neutral_CV))

    def _weigh(
        self,
        stats: TokenStats,
        value_C: torch.Tensor,
        row_loss: DivergenceLoss,
        row_inputs: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of each row, and its derivatives in log p(y) and in the divergence, [2, C]."""
        leaves = [stats.student_logprob_N.clone(), value_C.clone()]
        for leaf in leaves:
            leaf.requires_grad_(self.needs_gradient)
        with torch.enable_grad():
            loss_C = row_loss(replace(stats, student_logprob_N=leaves[0]), leaves[1], *row_inputs)
            loss_C = check_row_loss(loss_C, len(value_C))
            if not loss_C.requires_grad:
                return loss_C.detach(), None
            found = torch.autograd.grad(loss_C.sum(), leaves, allow_unused=True)
        weights = [torch.zeros_like(value_C) if part is None else part.to(value_C.dtype) for part in found]
        return loss_C.detach(), torch.stack(weights)

    def _unwrap(self, grad_CV: torch.Tensor, logits: Logits) -> torch.Tensor:
        """From the logits to the raw products: d softcap(z) = 1 - tanh(z / c)^2."""
        if logits.softcap:
            capped_CV = self._read_logits(logits).div_(logits.softcap)
            grad_CV = grad_CV.mul_(1.0 - capped_CV * capped_CV)
        return grad_CV.mul_(logits.scale) if logits.scale != 1.0 else grad_CV


def _compute_stats(logp_CV: torch.Tensor, logq_CV: torch.Tensor, ids_C: torch.Tensor) -> DenseStats:
    """The statistics of whole rows, all constants."""
    vocabulary = logp_CV.shape[1]
    is_known_C = (ids_C >= 0) & (ids_C < vocabulary)
    local_C1 = ids_C.clamp(0, vocabulary - 1)[:, None]
    p_CV = logp_CV.exp()
    excluded_CV = logq_CV <= LOWEST
    ratio_CV = (logp_CV - logq_CV).masked_fill_(excluded_CV, MISSING_LOG_RATIO)
    return DenseStats(
        student_logprob_N=logp_CV.gather(1, local_C1)[:, 0].masked_fill_(~is_known_C, torch.nan),
        teacher_logprob_N=logq_CV.gather(1, local_C1)[:, 0].masked_fill_(~is_known_C, torch.nan),
        reverse_kl_N=(ratio_CV.mul_(p_CV)).sum(1).clamp_(min=0.0),
        entropy_N=-(p_CV * logp_CV).sum(1),
        missing_mass_N=p_CV.mul_(excluded_CV).sum(1),
    )


def _join_stats(parts: Sequence[DenseStats], dtype: torch.dtype, device: torch.device) -> DenseStats:
    """The statistics of all chunks, and the sum of their losses; of none, empty ones and a loss of exactly 0."""
    names = ["student_logprob_N", "teacher_logprob_N", "reverse_kl_N", "entropy_N", "missing_mass_N", "loss_N"]
    names += [name for name in ("student_mass_N", "teacher_mass_N") if parts and getattr(parts[0], name) is not None]
    empty = torch.zeros(0, dtype=dtype, device=device)
    joined = {name: torch.cat([getattr(part, name) for part in parts]) if parts else empty for name in names}
    return DenseStats(**joined, loss=joined["loss_N"].sum())
