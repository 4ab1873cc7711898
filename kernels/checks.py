"""What the doors refuse: tensors and options that do not fit together, with what was found and what was expected."""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from imagine_opd.errors import ConfigError
from imagine_opd.kernels.types import OutputHead, RowWeights, StatsOptions


def refuse_bad_logits(student_NV: Tensor, teacher_NV: Tensor | None, token_ids_N: Tensor) -> None:
    """Raise `ConfigError` unless logits and ids belong together."""
    tensors = {"student logits": student_NV, "token ids": token_ids_N}
    if teacher_NV is not None:
        tensors["teacher logits"] = teacher_NV
    if student_NV.ndim != 2 or (teacher_NV is not None and student_NV.shape != teacher_NV.shape):
        teacher = "" if teacher_NV is None else f" and teacher logits {list(teacher_NV.shape)}"
        raise ConfigError(
            f"student logits are {list(student_NV.shape)}{teacher}; "
            "expected the same [N, V] for both (flatten batch and time first)"
        )
    if student_NV.shape[1] == 0:
        raise ConfigError("the logits have no columns; expected a vocabulary of at least one token")
    for name, tensor in tensors.items():
        if name != "token ids" and not tensor.is_floating_point():
            raise ConfigError(f"{name} are {tensor.dtype}; expected a floating-point tensor")
    refuse_bad_ids(token_ids_N, student_NV.shape[0], "logits")
    refuse_other_devices(tensors)


def refuse_bad_ids(token_ids_N: Tensor, rows: int, what: str) -> None:
    """Raise `ConfigError` unless there is one integer id for each row."""
    if token_ids_N.shape != (rows,):
        raise ConfigError(f"token ids are {list(token_ids_N.shape)}; expected [{rows}], one for each row of the {what}")
    if token_ids_N.is_floating_point() or token_ids_N.is_complex() or token_ids_N.dtype == torch.bool:
        raise ConfigError(f"token ids are {token_ids_N.dtype}; expected an integer tensor")


def refuse_other_devices(tensors: dict[str, Tensor]) -> None:
    """Raise `ConfigError` unless all are on one device."""
    if len({str(tensor.device) for tensor in tensors.values()}) != 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ConfigError(f"{found}: expected one device")


def read_mask(mask_N: Tensor | None, token_ids_N: Tensor) -> Tensor | None:
    """The mask as bool: any dtype, a row is kept where it is not 0."""
    if mask_N is None:
        return None
    if mask_N.shape != token_ids_N.shape:
        raise ConfigError(f"mask_N is {list(mask_N.shape)}; expected {list(token_ids_N.shape)}, one for each token id")
    if mask_N.device != token_ids_N.device:
        raise ConfigError(f"mask_N is on {mask_N.device}, token ids on {token_ids_N.device}: expected one device")
    return mask_N if mask_N.dtype == torch.bool else mask_N != 0


def refuse_missing_teacher(has_teacher: bool, options: StatsOptions, weights: RowWeights | None) -> None:
    """Raise `ConfigError` when something is asked for that only a teacher can give."""
    if has_teacher:
        return
    asked = [name for name in ("forward_kl", "exact_kl", "jsd_beta", "teacher_temperature") if getattr(options, name)]
    if weights is not None:
        asked += [
            f"weights.{name}"
            for name in ("reverse_kl_N", "forward_kl_N", "jsd_N")
            if getattr(weights, name) is not None
        ]
    if asked:
        raise ConfigError(f"{', '.join(asked)} needs a teacher, and there is none: pass the teacher's tensors")


def refuse_bad_weights(weights: RowWeights | None, token_ids_N: Tensor, options: StatsOptions) -> None:
    """Raise `ConfigError` unless each weight is an [N] constant of a statistic that is computed."""
    if weights is None:
        return
    found = {item.name: getattr(weights, item.name) for item in fields(weights)}
    used = {name: weight_N for name, weight_N in found.items() if weight_N is not None}
    if not used:
        raise ConfigError("weights has no weight; give at least one, such as RowWeights(reverse_kl_N=...)")
    for name, weight_N in used.items():
        if weight_N.shape != token_ids_N.shape:
            raise ConfigError(f"weights.{name} is {list(weight_N.shape)}; expected {list(token_ids_N.shape)}")
        if weight_N.requires_grad:
            raise ConfigError(f"weights.{name} requires a gradient and would get none: detach it, or leave weights out")
    refuse_other_devices({"token ids": token_ids_N, **used})
    if "forward_kl_N" in used and not options.forward_kl:
        raise ConfigError("weights.forward_kl_N needs options=StatsOptions(forward_kl=True)")
    if "jsd_N" in used and options.jsd_beta is None:
        raise ConfigError("weights.jsd_N needs options=StatsOptions(jsd_beta=...)")


def refuse_bad_row_inputs(
    row_loss: Callable[..., Any] | None, row_inputs: Sequence[Tensor], token_ids_N: Tensor
) -> None:
    """Raise `ConfigError` unless each input of the row loss has one entry for each row and needs no gradient."""
    if row_loss is None and row_inputs:
        raise ConfigError("row_inputs go with row_loss; give one")
    for index, values in enumerate(row_inputs):
        if not isinstance(values, Tensor):
            raise ConfigError(f"row_inputs[{index}] is {type(values).__name__}; expected a tensor")
        if values.device != token_ids_N.device:
            raise ConfigError(f"row_inputs[{index}] is on {values.device}, token ids on {token_ids_N.device}")
        if values.shape[:1] != token_ids_N.shape:
            raise ConfigError(
                f"row_inputs[{index}] is {list(values.shape)}; expected {len(token_ids_N)} entries, one for each row"
            )
        if values.requires_grad:
            raise ConfigError(f"row_inputs[{index}] requires a gradient and would get none: detach it")


def refuse_bad_side(name: str, hidden_ND: Tensor, head: OutputHead, rows: int) -> None:
    """Raise `ConfigError` unless hidden states [N, D], weight [V, D] and bias [V] belong together."""
    weight_VD, bias_V = head.weight_VD, head.bias_V
    if hidden_ND.ndim != 2 or hidden_ND.shape[0] != rows:
        raise ConfigError(
            f"{name} hidden states are {list(hidden_ND.shape)}; expected [{rows}, D], one row for each token id "
            "(flatten batch and time first)"
        )
    if weight_VD.ndim != 2 or weight_VD.shape[1] != hidden_ND.shape[1] or weight_VD.shape[0] == 0:
        raise ConfigError(
            f"{name} head is {list(weight_VD.shape)}; expected [V, {hidden_ND.shape[1]}], the {name}'s hidden size"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ConfigError(f"{name} bias is {list(bias_V.shape)}; expected [{weight_VD.shape[0]}]")
    for what, tensor in (("hidden states", hidden_ND), ("head", weight_VD), ("bias", bias_V)):
        if tensor is not None and not tensor.is_floating_point():
            raise ConfigError(f"{name} {what}: {tensor.dtype}; expected a floating-point tensor")
