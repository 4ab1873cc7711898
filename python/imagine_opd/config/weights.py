"""Fields of the weights: who teaches, what is trained, in which dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "model_dtype": ("float32", "bfloat16", "float16", "auto"),
}
RANGES: dict[str, tuple[float, float | None]] = {}


@dataclass
class WeightFields:
    """Student and teacher weights.

    teacher_model_kind: `base`, the frozen initial weights. A separate checkpoint: `train(..., teacher=...)`.
    model_dtype: dtype of loaded weights.
    """

    teacher_model_kind: str = field(default="base", metadata={"help": "Teacher weights: base (frozen initial)."})
    model_dtype: str = field(default="float32", metadata={"help": "float32, bfloat16, float16 or auto."})


def refuse_bad_weights(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the weights that do not go together."""
    if config.teacher_model_kind != "base":
        raise ConfigError(
            f"teacher_model_kind={config.teacher_model_kind!r}: expected 'base' (the frozen initial weights); "
            "give another checkpoint as train(..., teacher=...)"
        )
