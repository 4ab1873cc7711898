"""What the launches share: compile options, and the arguments that describe sides, a spec and weights in use."""

# N kept tokens, V vocabulary

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch

from imagine_opd.kernels.algebra_triton import CLAMP, DROP, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, INF
from imagine_opd.kernels.types import Logits, StatsSpec

COMPILE_OPTIONS = {"enable_fp_fusion": True}
"""Fusion of multiply and add is asked for by name: Triton is about to change the default and warns until one does."""

POLICIES = {"clamp": CLAMP.value, "drop": DROP.value, "inf": INF.value}


def make_rows_dense(side: Logits) -> Logits:
    """Any row stride goes, but the columns of a row must lie side by side."""
    return side if side.values_NV.stride(1) == 1 else side._replace(values_NV=side.values_NV.contiguous())


def choose_load_columns(student: Logits, teacher: Logits | None, columns: int) -> int:
    """Columns that are read: with padding a multiple of 16, since a mask that ends anywhere makes narrow loads."""
    width = min(side.values_NV.shape[1] for side in (student, teacher or student))
    aligned = -(-columns // 16) * 16
    return aligned if aligned <= width else columns


def list_side_arguments(student: Logits, teacher: Logits | None) -> list[Any]:
    """Biases, strides, scales and softcaps of both sides, in the kernels' order."""
    other = teacher or student
    return [
        student.values_NV if student.bias_V is None else student.bias_V,
        other.values_NV if other.bias_V is None else other.bias_V,
        student.values_NV.stride(0),
        other.values_NV.stride(0),
        student.scale,
        other.scale,
        student.softcap,
        other.softcap,
    ]


def list_temperatures(spec: StatsSpec) -> tuple[float, float]:
    return 1.0 / spec.temperature, 1.0 / spec.teacher_temperature


def list_mixture(spec: StatsSpec) -> tuple[float, float, float]:
    """log b, log(1 - b) and 1 - b."""
    return (math.log(spec.jsd_beta), math.log1p(-spec.jsd_beta), 1.0 - spec.jsd_beta) if spec.jsd_beta else (0.0,) * 3


def name_flags(student: Logits, teacher: Logits | None, spec: StatsSpec) -> dict[str, Any]:
    return {
        **name_adjustments(student, teacher),
        "SAME_TEMPERATURE": spec.temperature == spec.teacher_temperature,
    }


def name_adjustments(student: Logits, teacher: Logits | None) -> dict[str, int]:
    def find(side: Logits | None) -> int:
        if side is None:
            return 0
        return (
            (HAS_BIAS.value if side.bias_V is not None else 0)
            | (HAS_SCALE.value if side.scale != 1.0 else 0)
            | (HAS_SOFTCAP.value if side.softcap else 0)
        )

    return {"STUDENT_ADJUST": find(student), "TEACHER_ADJUST": find(teacher)}


def name_uses(uses: tuple[bool, ...]) -> dict[str, bool]:
    return dict(zip(("USES_LOGPROB", "USES_KL", "USES_ENTROPY", "USES_FORWARD", "USES_JSD"), uses, strict=True))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
