"""The memory plan of a run, from its model and its first rows: printed before step 0, and what settles where the
teacher's weights are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from imagine_opd.config import ImagineOPDConfig
from imagine_opd.memory import (
    MemoryPlan,
    TeacherPlacement,
    advise_memory,
    choose_teacher_placement,
    measure_views,
    plan_memory,
    read_adapter,
    read_memory_settings,
    read_model_shape,
    show_gib,
)
from imagine_opd.parallel import name_parallelism
from imagine_opd.privilege import ViewFunction, build_pairs
from imagine_opd.settings import make_privilege_config
from imagine_opd.types import PromptPair, Row, ViewConfig

_PLANNED_ROWS = 4


@dataclass(frozen=True, slots=True)
class RunPlan:
    """placement: `copy`, `cpu`, `adapter_off` or `student`; reason: why, as a sentence; device_bytes: what there is."""

    plan: MemoryPlan
    placement: str
    reason: str
    device_bytes: int

    def describe(self) -> str:
        """The plan as text, item by item, and where the teacher is."""
        return f"{self.plan.describe(self.device_bytes)}\nteacher: {self.reason}"

    def advise(self) -> list[str]:
        """What would lower the peak, the largest first."""
        return advise_memory(self.plan)

    def advise_weights(self) -> list[str]:
        """What would lower the weights that are held through every pass."""
        held = self.plan.get_bytes("teacher weights") if self.placement == "copy" else 0
        return [f"teacher_placement='cpu': {show_gib(held)} of the teacher's weights leave the device"] if held else []


def plan_run(
    student: nn.Module,
    args: ImagineOPDConfig,
    processor: Any,
    view_config: ViewConfig,
    rows: Sequence[Row],
    teacher: Any = None,
    student_view: ViewFunction | None = None,
    teacher_view: ViewFunction | None = None,
) -> RunPlan | None:
    """The plan of a run whose student is as it will train; `None` when none of the first rows can be used.

    teacher: of its own, a loaded model; a name counts as one of the student's size.
    """
    first = list(islice(rows, _PLANNED_ROWS))
    pairs = build_pairs(first, processor, view_config, make_privilege_config(args), student_view, teacher_view)
    used = [pair for pair in pairs if isinstance(pair, PromptPair)]
    if not used:
        return None
    shape = read_model_shape(student)
    chosen: TeacherPlacement | None = {"device": "copy", "cpu": "cpu"}.get(args.teacher_placement)  # type: ignore[assignment]
    settings = read_memory_settings(
        args,
        measure_views(shape, [pair.student for pair in used]),
        measure_views(shape, [pair.teacher for pair in used]),
        model_dtype="auto",
        **(read_adapter(shape) or {"lora_r": 0, "use_dora": False}),
        freeze_vision=bool(args.freeze_vision),
        teacher_placement=None,
        parallelism=name_parallelism(args),
        num_processes=args.world_size,
        device_type=args.device.type,
    )
    own = read_model_shape(teacher) if isinstance(teacher, nn.Module) else shape if teacher is not None else None
    total = measure_device_bytes(args.device)
    choice = choose_teacher_placement(shape, settings, total, own)
    placement, reason = choice.placement, choice.reason
    if chosen is not None and placement in ("copy", "cpu") and chosen != placement:
        placement, reason = chosen, f"teacher_placement={args.teacher_placement!r} as the config says ({choice.reason})"
    plan = plan_memory(shape, dataclasses.replace(settings, teacher_placement=placement), own)
    return RunPlan(plan, placement, reason, total)


def measure_device_bytes(device: torch.device) -> int:
    """The memory of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def settle_placement(asked: str, plan: RunPlan | None) -> str:
    """`device` or `cpu`: what the config asks for, or with `auto` what the plan says."""
    if asked != "auto":
        return asked
    return "cpu" if plan is not None and plan.placement == "cpu" else "device"
