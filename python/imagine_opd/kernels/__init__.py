"""The one door to the loss kernels: two sets of logits [N, V] and token ids [N] in, per-token statistics [N] out.

The files beside this one are links to the top-level `kernels/` folder. Triton is imported by the first call that
runs on a GPU.
"""

# N kept tokens, V vocabulary

from __future__ import annotations

import functools
import importlib.util
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.kernels.autograd import Backend

__all__ = ["BackendName", "TokenStats", "token_stats"]

BackendName = Literal["auto", "triton", "reference"]

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TokenStats:
    """Per-token statistics of student p and teacher q, natural logarithms, each [N] in fp32 or fp64."""

    student_logprob_N: torch.Tensor
    """log p(y) of the token at hand."""
    teacher_logprob_N: torch.Tensor
    """log q(y) of the token at hand; a constant for autograd."""
    reverse_kl_N: torch.Tensor
    """KL(p || q) over the whole vocabulary, at least 0 up to rounding."""
    entropy_N: torch.Tensor
    """H(p), from 0 to ln V."""


def token_stats(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor,
    token_ids_N: torch.Tensor,
    temperature: float = 1.0,
    backend: BackendName = "auto",
) -> TokenStats:
    """Log-probs of given tokens, reverse KL and entropy of each row, differentiable in the student's logits.

    With p, q = softmax(logits / temperature) of student and teacher: log p(y), log q(y), KL(p||q) = sum p log(p/q),
    H(p) = -sum p log p. Row i of the logits predicts `token_ids_N[i]`: nothing is shifted here. No gradient flows to
    the teacher, and no second derivative exists. An id outside [0, V) gives NaN log-probs in its row; a row whose
    statistics the loss does not use may hold anything. `backend`: "triton", "reference" (PyTorch), or "auto": Triton
    for fp32, bf16 and fp16 on a CUDA device, the reference elsewhere. Raises `ConfigError` (a `ValueError`) on tensors
    that do not fit together. Derivation: `kernels/README.md`.
    """
    _check_tensors(student_logits_NV, teacher_logits_NV, token_ids_N)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}; expected a finite number above 0")
    from imagine_opd.kernels import autograd

    implementation = _choose_backend(backend, student_logits_NV, teacher_logits_NV)
    ids_N = token_ids_N.to(torch.int64)
    return TokenStats(*autograd.apply(implementation, student_logits_NV, teacher_logits_NV, ids_N, float(temperature)))


def _check_tensors(student_NV: torch.Tensor, teacher_NV: torch.Tensor, token_ids_N: torch.Tensor) -> None:
    if student_NV.ndim != 2 or student_NV.shape != teacher_NV.shape:
        raise ConfigError(
            f"student logits are {list(student_NV.shape)} and teacher logits {list(teacher_NV.shape)}; "
            "expected the same [N, V] for both (flatten batch and time first)"
        )
    if student_NV.shape[1] == 0:
        raise ConfigError("the logits have no columns; expected a vocabulary of at least one token")
    if token_ids_N.shape != student_NV.shape[:1]:
        raise ConfigError(
            f"token ids are {list(token_ids_N.shape)}; expected [{student_NV.shape[0]}], one for each row of the logits"
        )
    if not (student_NV.is_floating_point() and teacher_NV.is_floating_point()):
        raise ConfigError(f"logits are {student_NV.dtype} and {teacher_NV.dtype}; expected floating-point tensors")
    if token_ids_N.is_floating_point() or token_ids_N.is_complex() or token_ids_N.dtype == torch.bool:
        raise ConfigError(f"token ids are {token_ids_N.dtype}; expected an integer tensor")
    devices = [str(tensor.device) for tensor in (student_NV, teacher_NV, token_ids_N)]
    if len(set(devices)) != 1:
        raise ConfigError(f"student logits, teacher logits and token ids are on {', '.join(devices)}; expected one")


def _choose_backend(backend: BackendName, student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> Backend:
    if backend not in get_args(BackendName):
        raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(map(repr, get_args(BackendName)))}")
    fits = student_NV.dtype in _TRITON_DTYPES and teacher_NV.dtype in _TRITON_DTYPES
    if backend == "auto":
        backend = "triton" if student_NV.is_cuda and fits and _has_triton() else "reference"
    if backend == "reference":
        from imagine_opd.kernels import reference

        return reference.BACKEND
    if not fits:
        raise ConfigError(
            f"logits are {student_NV.dtype} and {teacher_NV.dtype}; backend 'triton' takes float32, bfloat16 and "
            "float16, backend 'reference' takes the others"
        )
    if not _has_triton():
        raise ConfigError("backend 'triton' needs the triton package; install it or take backend 'reference'")
    # Off the GPU a kernel runs in Triton's interpreter only, which is how the tests check it.
    if not student_NV.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"logits are on {student_NV.device}; backend 'triton' needs a CUDA device")
    from imagine_opd.kernels import token_stats_triton

    return token_stats_triton.BACKEND  # type: ignore[no-any-return,unused-ignore]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
