"""The matrix products around the loss: operands in their own dtype, sums and results in a wider one where asked.

cuBLAS writes fp32 results of 16-bit operands at nearly the speed of 16-bit ones, which keeps the rounding of logits out
of the KL's gradient. Elsewhere operands arrive in the dtype of the result.
"""

# C rows of a chunk, V vocabulary, D hidden

from __future__ import annotations

import functools

import torch
from torch import Tensor

SLAB_ROWS = 8192
"""Rows of a head's gradient that are made at once where they must be scaled before they are added."""


def project(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> None:
    """out = hidden @ weight.T, in the dtype of `out`."""
    multiply(hidden_CD, weight_VD.t(), out_CV)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, in the dtype of `out`."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif writes_wide(left, out):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        wide = torch.promote_types(left.dtype, out.dtype)  # a narrow result does not narrow the operands
        out.copy_(left.to(wide) @ right.to(wide))


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: Tensor | None = None) -> None:
    """total += factor * left @ right, added up in the dtype of `total`."""
    if factor is not None or (writes_wide(left, total) and not can_add_wide(left.dtype, left.device)):
        for start in range(0, len(left), SLAB_ROWS):
            slab = slice(start, start + SLAB_ROWS)
            part = torch.empty_like(total[slab])
            multiply(left[slab], right, part)
            total[slab].add_(part if factor is None else part.mul_(factor))
    elif left.dtype == total.dtype:
        total.addmm_(left, right)
    elif writes_wide(left, total):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def writes_wide(operand: Tensor, result: Tensor) -> bool:
    """Whether cuBLAS writes this result of 16-bit operands itself."""
    is_half = operand.dtype in (torch.bfloat16, torch.float16)
    return operand.is_cuda and is_half and result.dtype == torch.float32


@functools.cache
def can_add_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this release of torch adds products of 16-bit operands to an fp32 total; 2.8 does not."""
    total = torch.ones(16, 16, device=device)
    operand = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, operand, operand, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 17.0).all())
