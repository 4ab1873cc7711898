"""From what a user passes to `linear_token_stats` to what runs: heads read, sizes checked, dtypes and chunks chosen."""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imagine_opd.errors import ConfigError
from imagine_opd.kernels.backends import choose_backend
from imagine_opd.kernels.checks import refuse_bad_ids, refuse_bad_side, refuse_other_devices
from imagine_opd.kernels.linear import LinearPlan
from imagine_opd.kernels.linear_autograd import Tensors
from imagine_opd.kernels.types import BackendName, OutputHead, StatsOptions, make_spec

_ALIGNMENT = 64
"""Columns of a chunk are a multiple of this where the heads have padding enough: aligned rows load in wide words."""


def plan_linear(
    student_hidden_ND: Tensor,
    student_head: Any,
    teacher_hidden_ND: Tensor | None,
    teacher_head: Any,
    token_ids_N: Tensor,
    mask_N: Tensor | None,
    *,
    temperature: float,
    options: StatsOptions,
    backend: BackendName,
    vocab_size: int | None,
    logits_dtype: torch.dtype | None,
    chunk_rows: int | None,
    min_memory: bool,
) -> tuple[Tensors, LinearPlan]:
    """The tensors, in the operators' order, and the plan. Raises `ConfigError` for what does not fit together."""
    if (teacher_hidden_ND is None) != (teacher_head is None):
        missing = "hidden states" if teacher_hidden_ND is None else "head"
        raise ConfigError(f"the teacher has no {missing}; give both, or neither for log-prob and entropy only")
    rows = token_ids_N.shape[0] if token_ids_N.ndim else 0
    student = read_head("student", student_head)
    refuse_bad_side("student", student_hidden_ND, student, rows)
    refuse_bad_ids(token_ids_N, rows, "hidden states")
    tensors = {"student hidden states": student_hidden_ND, "student head": student.weight_VD, "token ids": token_ids_N}
    teacher: OutputHead | None = None
    student_dtype = teacher_dtype = choose_operand_dtype(student_hidden_ND, student.weight_VD)
    if teacher_hidden_ND is not None:
        teacher = student if teacher_head is student_head else read_head("teacher", teacher_head)
        refuse_bad_side("teacher", teacher_hidden_ND, teacher, rows)
        tensors.update({"teacher hidden states": teacher_hidden_ND, "teacher head": teacher.weight_VD})
        teacher_dtype = choose_operand_dtype(teacher_hidden_ND, teacher.weight_VD)
    for name, head in (("student bias", student), ("teacher bias", teacher)):
        if head is not None and head.bias_V is not None:
            tensors[name] = head.bias_V
    refuse_other_devices(tensors)
    sizes = {head.weight_VD.shape[0] for head in (student, teacher) if head is not None}
    if vocab_size is None and len(sizes) > 1:
        raise ConfigError(
            f"the heads have {student.weight_VD.shape[0]} and {teacher and teacher.weight_VD.shape[0]} rows; "
            "give vocab_size, the tokens that both know, if the longer one is padding"
        )
    vocabulary = min(sizes) if vocab_size is None else vocab_size
    if not 0 < vocabulary <= min(sizes):
        raise ConfigError(f"vocab_size is {vocab_size}; expected 1 to {min(sizes)}, the rows of the smaller head")
    columns = min(min(sizes), -(-vocabulary // _ALIGNMENT) * _ALIGNMENT)

    wide = torch.promote_types(torch.promote_types(student_dtype, teacher_dtype), torch.float32)
    chosen_dtype = read_logits_dtype(logits_dtype, wide, student_dtype, teacher_dtype, student_hidden_ND.is_cuda)
    if min_memory and chosen_dtype != wide:
        raise ConfigError(
            f"logits_dtype is {logits_dtype} with min_memory=True, which keeps no logits: leave one of them out"
        )
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ConfigError(f"chunk_rows is {chunk_rows!r}; expected a whole number of at least 1, or None")
    plan = LinearPlan(
        spec=make_spec(temperature, options),
        backend=choose_backend(backend, {"logits": student_hidden_ND.new_empty(0, dtype=chosen_dtype)}),
        vocabulary=vocabulary,
        columns=columns,
        chunk_rows=chunk_rows or 0,
        logits_dtype=_name(chosen_dtype),
        student_dtype=_name(student_dtype),
        teacher_dtype=_name(teacher_dtype),
        student_scale=float(student.logit_scale),
        student_softcap=float(student.softcap or 0.0),
        teacher_scale=float(teacher.logit_scale) if teacher else 1.0,
        teacher_softcap=float(teacher.softcap or 0.0) if teacher else 0.0,
        min_memory=min_memory,
    )
    return (
        student_hidden_ND,
        student.weight_VD,
        student.bias_V,
        teacher_hidden_ND,
        None if teacher is None else teacher.weight_VD,
        None if teacher is None else teacher.bias_V,
        token_ids_N.to(torch.int64),
        mask_N,
    ), plan


def read_head(name: str, head: Any) -> OutputHead:
    """A weight, an `nn.Linear` or an `OutputHead` as the latter, with whole tensors where they are sharded."""
    if isinstance(head, nn.Linear):
        head = OutputHead(head.weight, head.bias)
    elif isinstance(head, Tensor):
        head = OutputHead(head)
    if not isinstance(head, OutputHead):
        raise ConfigError(
            f"{name} head is {type(head).__name__}; expected a weight [V, D], an nn.Linear or an OutputHead"
        )
    bias_V = None if head.bias_V is None else gather_shards(head.bias_V)
    return OutputHead(gather_shards(head.weight_VD), bias_V, head.logit_scale, head.softcap)


def gather_shards(tensor: Tensor) -> Tensor:
    """A sharded parameter (DTensor) as a whole tensor, gathered once for all chunks.

    Its gradient is averaged over the ranks on the way back to the shards, as FSDP does with every other parameter's.
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient.div_(mesh.size()))  # type: ignore[no-untyped-call]
    return whole


def choose_operand_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Of a side's operands in matrix products: autocast's dtype inside it, else the wider of the two.

    On CPU at least fp32: there are no products of 16-bit operands with fp32 results, and converting is as quick.
    """
    dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    if hidden_ND.device.type == "cpu":
        return torch.promote_types(dtype, torch.float32)
    if torch.is_autocast_enabled(hidden_ND.device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(hidden_ND.device.type)
    return dtype


def read_logits_dtype(
    asked: torch.dtype | None, wide: torch.dtype, student: torch.dtype, teacher: torch.dtype, is_cuda: bool
) -> torch.dtype:
    """The dtype of a chunk's logits: fp32 or wider unless a 16-bit one is asked for."""
    if asked is None or asked == wide:
        return wide
    if asked not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ConfigError(f"logits_dtype is {asked}; expected a floating-point dtype, or None")
    if is_cuda and asked != wide and {student, teacher} != {asked}:
        raise ConfigError(
            f"logits_dtype is {asked} and the products' operands are {student} and {teacher}; expected {wide}, or the "
            "operands' dtype"
        )
    return asked


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
