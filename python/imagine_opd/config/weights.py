"""Fields of the weights: who teaches, what is trained, in which dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

_DTYPES = ("float32", "bfloat16", "float16")
CHOICES: dict[str, tuple[str, ...]] = {
    "model_dtype": (*_DTYPES, "auto"),
    "teacher_model_kind": ("base", "ema", "live"),
    "teacher_placement": ("auto", "device", "cpu"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "teacher_update_rate": (0.0, 1.0),
    "teacher_sync_steps": (1, None),
    "lora_r": (1, None),
    "lora_alpha": (1, None),
    "lora_dropout": (0.0, 1.0),
}


@dataclass
class WeightFields:
    """Student and teacher weights (docs/weights.md).

    model_dtype: dtype of loaded weights. Trained adapter weights are fp32 whatever it is.
    teacher_model_kind: `base`, the frozen initial weights; `ema`, a moving average of the student; `live`, the student
        itself. A separate checkpoint: `train(..., teacher=...)`, with `base`.
    teacher_placement: a teacher with weights of its own is on the `device`, or held by the `cpu` and brought in block
        by block; `auto` asks the memory planner.
    teacher_dtype: dtype of a teacher with weights of its own; None: the student's.
    teacher_update_rate, teacher_sync_steps: every so many optimizer steps an `ema` teacher moves by this share of
        the way to the student.
    use_peft: train an adapter (needs `peft`); the teacher is then the model without it. `lora_...`, `use_dora`,
        `use_rslora` as in peft. lora_dropout is 0: a completion is sampled without dropout, and scored with it, it
        would not be the student's own any more. lora_target_modules: `all-linear`, a regular expression or a list.
    freeze_vision: leave the vision tower and its projector as they are. None: on with `use_peft`, off otherwise.
    merge_adapter: the run's final folder holds the whole model with the adapter merged; checkpoints hold the adapter.
    """

    model_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})
    teacher_model_kind: str = field(default="base", metadata={"help": "Teacher weights: base (frozen), ema or live."})
    teacher_placement: str = field(default="auto", metadata={"help": "Where own teacher weights are: device or cpu."})
    teacher_dtype: str | None = field(default=None, metadata={"help": "Dtype of own teacher weights."})
    teacher_update_rate: float = field(default=0.05, metadata={"help": "Share of the way an ema teacher moves."})
    teacher_sync_steps: int = field(default=1, metadata={"help": "Optimizer steps between two moves of it."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input (0: on-policy)."})
    lora_target_modules: list[str] | str = field(
        default="all-linear", metadata={"help": "all-linear, a regular expression or a list of names."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole beside the adapter."}
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: magnitudes are learnt apart from directions."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    freeze_vision: bool | None = field(default=None, metadata={"help": "Default: on with use_peft, else off."})
    merge_adapter: bool = field(default=False, metadata={"help": "Save the final model with the adapter merged."})


def refuse_bad_weights(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the weights that do not go together."""
    if config.teacher_dtype is not None and config.teacher_dtype not in _DTYPES:
        raise ConfigError(f"teacher_dtype={config.teacher_dtype!r}: expected one of {', '.join(_DTYPES)}, or None")
    if config.teacher_update_rate == 0.0:
        raise ConfigError("teacher_update_rate=0.0 never moves the teacher; use teacher_model_kind='base'")
    if config.lora_dropout == 1.0:
        raise ConfigError("lora_dropout=1.0 drops everything; expected less than 1")
    for name in ("lora_target_modules", "lora_modules_to_save"):
        value = getattr(config, name)
        is_list = isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
        allowed = is_list or (isinstance(value, str) if name == "lora_target_modules" else value is None)
        if not allowed:
            raise ConfigError(f"{name}={value!r}: expected a list of module names")
    if config.use_dora and not config.use_peft:
        raise ConfigError("use_dora=True does nothing without use_peft=True")
    if config.teacher_model_kind == "live" and config.teacher_placement == "cpu":
        raise ConfigError("teacher_placement='cpu': a live teacher is the student, which is on the device")
