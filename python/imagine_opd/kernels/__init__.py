"""The doors to the loss kernels: logits, or hidden states and heads, and token ids in; per-token statistics out.

The files beside this one are links to the top-level `kernels/` folder. Triton is imported by the first call that
runs on a GPU.
"""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from imagine_opd.errors import ConfigError
from imagine_opd.kernels.types import BackendName, OutputHead, RowWeights, StatsOptions, TokenStats

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BackendName",
    "OutputHead",
    "RowWeights",
    "StatsOptions",
    "TokenStats",
    "linear_token_stats",
    "token_stats",
]

_PLAIN = StatsOptions()


def token_stats(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    token_ids_N: torch.Tensor,
    temperature: float = 1.0,
    backend: BackendName = "auto",
    *,
    mask_N: torch.Tensor | None = None,
    options: StatsOptions = _PLAIN,
    weights: RowWeights | None = None,
    in_place: bool = False,
) -> TokenStats:
    """Log-probs of given tokens, reverse KL and entropy of each row, differentiable in the student's logits.

    With p, q = softmax(logits / temperature) of student and teacher: log p(y), log q(y), KL(p||q) = sum p log(p/q),
    H(p) = -sum p log p. Row i of the logits predicts `token_ids_N[i]`: nothing is shifted here. No gradient flows to
    the teacher, and no second derivative exists. An id outside [0, V) gives NaN log-probs in its row; a row whose
    statistics the loss does not use may hold anything. `teacher_logits_NV=None`: log-prob and entropy only, the rest
    is NaN. Derivation: `kernels/README.md`.

    backend: "triton", "reference" (PyTorch), or "auto": Triton for fp32, bf16 and fp16 on a CUDA device.
    mask_N: rows where it is 0 are not read, give 0 everywhere and get no gradient.
    weights: the loss sum_i w_i stat_i in advance; one launch then makes statistics and gradient, `loss` is what to
        differentiate (once), and the other fields are constants.
    in_place: write the gradient over `student_logits_NV`, which must not be a leaf.
    Raises `ConfigError` (a `ValueError`) on tensors that do not fit together.
    """
    from imagine_opd.kernels import checks
    from imagine_opd.kernels.autograd import apply_token_stats, apply_weighted_stats
    from imagine_opd.kernels.backends import choose_backend
    from imagine_opd.kernels.types import make_spec

    checks.refuse_bad_logits(student_logits_NV, teacher_logits_NV, token_ids_N)
    checks.refuse_missing_teacher(teacher_logits_NV is not None, options, weights)
    spec = make_spec(temperature, options)
    mask_N = checks.read_mask(mask_N, token_ids_N)
    checks.refuse_bad_weights(weights, token_ids_N, options)
    if in_place and student_logits_NV.is_leaf and student_logits_NV.requires_grad:
        raise ConfigError(
            "in_place=True writes the gradient over the logits, and these are a leaf whose values you would lose; "
            "leave it False"
        )
    read = {"student logits": student_logits_NV}
    if teacher_logits_NV is not None:
        read["teacher logits"] = teacher_logits_NV
    name = choose_backend(backend, read)
    ids_N = token_ids_N.to(torch.int64)
    if weights is None:
        return apply_token_stats(student_logits_NV, teacher_logits_NV, ids_N, mask_N, spec, name, in_place)
    return apply_weighted_stats(student_logits_NV, teacher_logits_NV, ids_N, mask_N, weights, spec, name, in_place)


def linear_token_stats(
    student_hidden_ND: torch.Tensor,
    student_head: torch.Tensor | nn.Linear | OutputHead,
    teacher_hidden_ND: torch.Tensor | None,
    teacher_head: torch.Tensor | nn.Linear | OutputHead | None,
    token_ids_N: torch.Tensor,
    row_loss: Callable[..., torch.Tensor] | None = None,
    *,
    row_inputs: Sequence[torch.Tensor] = (),
    temperature: float = 1.0,
    backend: BackendName = "auto",
    mask_N: torch.Tensor | None = None,
    options: StatsOptions = _PLAIN,
    vocab_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    min_memory: bool = False,
) -> TokenStats:
    """`token_stats` from hidden states and output heads, in chunks of rows: logits [N, V] never exist.

    Row i of the hidden states predicts `token_ids_N[i]`. A head is a weight [V, D], an `nn.Linear`, or an
    `OutputHead` with bias, scale and softcap; the teacher's hidden size may differ. Gradients flow to the student's
    hidden states, and to its head's weight and bias where they require one; none to the teacher. Without a teacher
    (`None`, `None`) there are log-prob and entropy only.

    row_loss: `row_loss(stats, *row_inputs)` gives the loss [C] of C rows from their statistics and their part of each
        tensor in `row_inputs` (first dimension N). The gradient is made in forward, chunk by chunk: three products of
        N x V x D for a frozen head, four for a trained one. `loss` is what to differentiate (once), the other fields
        are constants. No gradient reaches `row_inputs`, nor anything else that the function uses. Without row_loss
        each statistic is differentiable, and backward projects once more.
    mask_N: rows where it is 0 are left out before anything is projected, and give 0.
    vocab_size: tokens that exist, where the heads are padded; the padding gets no probability and no gradient.
    logits_dtype: of a chunk's logits; default fp32, or fp64 when an input is. Half of the memory with bf16, which is
        too coarse for a KL near 0.
    chunk_rows: default by memory and by how well the products fill the device.
    min_memory: no chunk of logits at all, for about twice the products.
    Products take operands in their own dtype, under autocast in its dtype. Raises `ConfigError` (a `ValueError`).
    """
    from imagine_opd.kernels import checks
    from imagine_opd.kernels.linear_autograd import apply_linear, apply_row_loss
    from imagine_opd.kernels.planning import plan_linear

    mask_N = checks.read_mask(mask_N, token_ids_N)
    checks.refuse_missing_teacher(teacher_hidden_ND is not None, options, None)
    checks.refuse_bad_row_inputs(row_loss, row_inputs, token_ids_N)
    tensors, plan = plan_linear(
        student_hidden_ND,
        student_head,
        teacher_hidden_ND,
        teacher_head,
        token_ids_N,
        mask_N,
        temperature=temperature,
        options=options,
        backend=backend,
        vocab_size=vocab_size,
        logits_dtype=logits_dtype,
        chunk_rows=chunk_rows,
        min_memory=min_memory,
    )
    if row_loss is None:
        return apply_linear(tensors, plan)
    return apply_row_loss(tensors, plan, row_loss, row_inputs)
