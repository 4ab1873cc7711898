"""What a plan is asked and what it is made of: the settings that memory depends on, the phases of a step, one item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from imagine_opd.errors import ConfigError
from imagine_opd.memory.shapes import ViewSize

TeacherPlacement = Literal["adapter_off", "copy", "cpu", "student"]
Phase = Literal["rollout", "teacher", "student", "objective", "backward", "update"]

PHASES: tuple[Phase, ...] = ("rollout", "teacher", "student", "objective", "backward", "update")
"""Of a step, in their order; `student` is its forward."""

GIB = 2**30
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The settings that memory depends on; names and units as in `ImagineOPDConfig` where it has them.

    student_view, teacher_view: the longest prompt of each side.
    model_dtype: of loaded weights; `auto`: as the model has them. compute_dtype: bf16=True gives `bfloat16`.
    teacher_dtype: of the teacher's weights where they are its own; `None`: the student's.
    lora_r: rank of LoRA; 0: all weights are trained. lora_targets: as `target_modules` of peft.
    teacher_placement: `None`: `adapter_off` or `student` where that serves, else `copy`. `choose_teacher_placement`
        finds the one for a device.
    parallelism, num_processes: how many processes share the model, and how; `zero...` are the stages of DeepSpeed.
    """

    student_view: ViewSize
    teacher_view: ViewSize
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 8
    num_generations: int = 1
    generation_batch_size: int | None = None
    max_completion_length: int = 256
    padding_free: bool = False
    max_tokens_per_forward: int | None = None
    share_vision_features: bool = True
    model_dtype: str = "float32"
    compute_dtype: str = "float32"
    optim: str = "adamw_torch_fused"
    activation_checkpointing: bool = False
    lora_r: int = 0
    lora_targets: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = 0.0
    use_dora: bool = False
    freeze_vision: bool = False
    teacher_model_kind: str = "base"
    teacher_placement: TeacherPlacement | None = None
    teacher_dtype: str | None = None
    parallelism: Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "none"
    num_processes: int = 1
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("model_dtype", "compute_dtype", "teacher_dtype"):
            value = getattr(self, name)
            known = {"auto": 0, **ITEMSIZES} if name == "model_dtype" else ITEMSIZES
            if value is not None and value not in known:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if self.num_processes > 1 and self.parallelism == "none":
            raise ConfigError(
                f"num_processes={self.num_processes}: say how they share the model: ddp, fsdp2, zero1, zero2 or zero3"
            )


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One thing in memory: what it is, its bytes, in which phases of a step it is there, and where."""

    name: str
    nbytes: int
    phases: tuple[Phase, ...] = PHASES
    place: Literal["device", "host"] = "device"

    @property
    def stays(self) -> bool:
        """Whether it is there in every phase."""
        return self.phases == PHASES


def count_rollouts(settings: MemorySettings) -> int:
    """Completions sampled in one call."""
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.num_generations
    return min(settings.generation_batch_size or rows, rows)
