"""The memory planner: a model and the settings of a run in; bytes on device and host, the teacher's place, advice out.

What stays for the whole run is added up; what comes and goes is counted by phase of the step, and the largest phase
makes the peak. Every process has a plan of its own; they are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from imagine_opd.memory.items import StepMemory
from imagine_opd.memory.settings import (
    GIB,
    PHASES,
    MemoryItem,
    MemorySettings,
    Phase,
    TeacherPlacement,
    count_rollouts,
)
from imagine_opd.memory.shapes import ModelShape, ViewSize, read_adapter, read_model_shape

USABLE_SHARE = 0.95
"""Of a device: the rest is lost between the allocator's blocks."""


@dataclass(frozen=True)
class MemoryPlan:
    """What one process holds during a step of Imagine-OPD."""

    shape: ModelShape
    settings: MemorySettings
    teacher_shape: ModelShape | None
    items: tuple[MemoryItem, ...]
    trained_numel: int

    def sum_bytes(self, phase: Phase) -> int:
        """What is on the device in one phase, for the whole run or for the phase."""
        return sum(item.nbytes for item in self.items if item.place == "device" and phase in item.phases)

    @cached_property
    def lasting_bytes(self) -> int:
        """What is on the device in every phase."""
        return sum(item.nbytes for item in self.items if item.place == "device" and item.stays)

    @cached_property
    def peak_phase(self) -> Phase:
        """The phase with the most memory."""
        return max(PHASES, key=self.sum_bytes)

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        return self.sum_bytes(self.peak_phase)

    @property
    def host_bytes(self) -> int:
        """What the process holds in the machine's memory for the model, besides data and Python."""
        return sum(item.nbytes for item in self.items if item.place == "host")

    def get_bytes(self, name: str) -> int:
        """Of the items whose name starts so; 0 where there is none."""
        return sum(item.nbytes for item in self.items if item.name.startswith(name))

    def describe(self, device_bytes: int | None = None) -> str:
        """The plan as text, one item a line."""
        settings = self.settings
        adapter = {"lora_r": settings.lora_r, "use_dora": settings.use_dora, **read_adapter(self.shape)}
        rank, name = adapter["lora_r"], "DoRA" if adapter["use_dora"] else "LoRA"
        kind = f"{name} r={rank}" if rank else "all weights"
        share = f", {settings.num_processes} processes ({settings.parallelism})" if settings.num_processes > 1 else ""
        lines = [
            f"memory plan: {self.shape.name}, {_count(self.shape.numel)} parameters, {kind} "
            f"({_count(self.trained_numel)} trained){share}"
        ]
        self._describe_group(lines, "always", [item for item in self.items if item.stays])
        for phase in PHASES:
            self._describe_group(lines, phase, [i for i in self.items if phase in i.phases and not i.stays])
        of = "" if device_bytes is None else f" of {show_gib(device_bytes)}"
        lines.append(f"peak on the device: always + {self.peak_phase} = {show_gib(self.device_bytes)}{of}")
        for item in self.items:
            if item.place == "host" and item.nbytes:
                lines.append(f"on the host: {item.name}, {show_gib(item.nbytes)}")
        return "\n".join(lines)

    @staticmethod
    def _describe_group(lines: list[str], title: str, items: list[MemoryItem]) -> None:
        items = [item for item in items if item.place == "device" and item.nbytes]
        lines.append(f"{title:<56}{show_gib(sum(item.nbytes for item in items)):>10}")
        lines.extend(f"  {item.name:<54}{show_gib(item.nbytes):>10}" for item in items)


@dataclass(frozen=True, slots=True)
class PlacementChoice:
    """Where the teacher's weights are, and why, in one sentence."""

    placement: TeacherPlacement
    reason: str


def plan_memory(model: Any, settings: MemorySettings, teacher: Any = None) -> MemoryPlan:
    """The plan of one process. `model`: a loaded model, one on the meta device, a `transformers` config or a
    `ModelShape`; `teacher`: the same for a teacher of its own checkpoint.

    A loaded model counts as it is: its dtypes with `model_dtype="auto"`, its adapters, its frozen weights.
    """
    shape = read_model_shape(model)
    teacher_shape = None if teacher is None else read_model_shape(teacher)
    run = StepMemory(shape, settings, teacher_shape)
    return MemoryPlan(shape, settings, teacher_shape, tuple(run.list_items()), run.trained_numel)


def choose_teacher_placement(
    model: Any, settings: MemorySettings, device_bytes: int, teacher: Any = None
) -> PlacementChoice:
    """Where the teacher's weights should be on a device of so many bytes.

    `student`: the teacher is the student as it is now (`live`). `adapter_off`: LoRA's base weights serve. `copy`: a
    second copy on the device, when it fits. `cpu`: else.
    """
    shape = read_model_shape(model)
    teacher_shape = None if teacher is None else read_model_shape(teacher)

    def plan(placement: TeacherPlacement) -> MemoryPlan:
        return plan_memory(shape, dataclasses.replace(settings, teacher_placement=placement), teacher_shape)

    run = StepMemory(shape, settings, teacher_shape)
    if not run.needs_own_teacher:
        if settings.teacher_model_kind == "live":
            return PlacementChoice("student", "the teacher is the student as it is now; no second copy")
        return PlacementChoice("adapter_off", "the student without its adapters is the base model; no second copy")
    usable = int(USABLE_SHARE * device_bytes)
    copy, streamed = plan("copy"), plan("cpu")
    copy_bytes = copy.get_bytes("teacher weights")
    rest = f"a second copy ({show_gib(copy_bytes)})"
    beside = f"{show_gib(copy.device_bytes - copy_bytes)} for everything else"
    room = f"{show_gib(usable)} ({USABLE_SHARE:.0%} of {show_gib(device_bytes)})"
    if copy.device_bytes <= usable:
        return PlacementChoice("copy", f"{rest} fits beside {beside} in {room}")
    reason = (
        f"{rest} does not fit beside {beside} in {room}; held on the CPU and streamed block by block, "
        f"{show_gib(streamed.get_bytes('teacher blocks'))} on the device"
    )
    if streamed.device_bytes > usable:
        reason += f"; even so {show_gib(streamed.device_bytes - usable)} are missing"
    return PlacementChoice("cpu", reason)


def advise_memory(plan: MemoryPlan) -> list[str]:
    """What would lower the peak, each change by itself, the largest saving first. Empty: nothing is known to help."""
    found = []
    for text, settings in _list_changes(plan):
        other = plan_memory(plan.shape, settings, plan.teacher_shape)
        saved = plan.device_bytes - other.device_bytes
        if saved >= 0.005 * plan.device_bytes:
            found.append((saved, f"{text} saves {show_gib(saved)}"))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]


def read_memory_settings(config: Any, student_view: ViewSize, teacher_view: ViewSize, **own: Any) -> MemorySettings:
    """The settings of an `ImagineOPDConfig`: every field that it has by the same name, then `own`."""
    names = {item.name for item in dataclasses.fields(MemorySettings)} & set(vars(config))
    names -= {"student_view", "teacher_view", "teacher_placement"}  # other things under these names
    found = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    found["optim"] = str(getattr(config.optim, "value", config.optim))
    found["compute_dtype"] = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    # transformers renamed it; either name may be set
    found["activation_checkpointing"] = bool(
        getattr(config, "activation_checkpointing", False) or getattr(config, "gradient_checkpointing", False)
    )
    return MemorySettings(student_view, teacher_view, **{**found, **own})


def show_gib(nbytes: int) -> str:
    """`8.3 GiB`; below a tenth of one, MiB."""
    return f"{nbytes / GIB:.1f} GiB" if abs(nbytes) >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"


def _count(numel: int) -> str:
    return f"{numel / 1e9:.2f} B" if numel >= 1e9 else f"{numel / 1e6:.2f} M"


def _halve(view: ViewSize) -> ViewSize:
    return ViewSize(view.text_tokens, view.image_tokens // 2, view.patches // 2)


def _list_changes(plan: MemoryPlan) -> Iterator[tuple[str, MemorySettings]]:
    now = plan.settings
    change: Callable[..., MemorySettings] = lambda **fields: dataclasses.replace(now, **fields)  # noqa: E731
    if (rows := now.per_device_train_batch_size) > 1:
        half = change(
            per_device_train_batch_size=rows // 2,
            gradient_accumulation_steps=now.gradient_accumulation_steps * rows // (rows // 2),
            generation_batch_size=count_rollouts(now),
        )
        yield f"micro-batch {rows} -> {rows // 2} (per_device_train_batch_size)", half
    if not now.activation_checkpointing:
        yield "activation_checkpointing", change(activation_checkpointing=True)
    if (rollouts := count_rollouts(now)) > 1:
        yield f"generation_batch_size {rollouts} -> {rollouts // 2}", change(generation_batch_size=rollouts // 2)
    if (length := now.max_completion_length) > 1:
        yield f"max_completion_length {length} -> {length // 2}", change(max_completion_length=length // 2)
    if now.student_view.patches:
        half = change(student_view=_halve(now.student_view), teacher_view=_halve(now.teacher_view))
        yield "half the pixels of every image (max_pixels, crop_max_pixels)", half
    if not now.lora_r and not plan.trained_numel < plan.shape.numel // 10:
        lora = {"lora_r": 16, "freeze_vision": True, "teacher_placement": None, "model_dtype": "bfloat16"}
        yield "LoRA r=16 over bfloat16 weights (lora_r, model_dtype)", change(**lora)
        if now.optim.startswith("adamw_torch"):
            yield "optim adamw_8bit", change(optim="adamw_8bit")
        yield "optim adafactor", change(optim="adafactor")
    if not now.freeze_vision:
        yield "freeze_vision", change(freeze_vision=True)
    if plan.get_bytes("teacher weights"):
        yield "the teacher on the CPU", change(teacher_placement="cpu")
        if (now.teacher_dtype or now.model_dtype) == "float32":
            yield "teacher weights in bfloat16", change(teacher_dtype="bfloat16")
    if now.lora_r and now.model_dtype == "float32":
        yield "frozen weights in bfloat16 (model_dtype)", change(model_dtype="bfloat16")
    if now.num_processes > 1 and now.parallelism == "ddp":
        yield "FSDP2 in place of DDP", change(parallelism="fsdp2")
