"""Runs of the demo: what only its teacher knows, which scenes show it, which weights are trained and for how long.

Importing this loads no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.demo.scenes import Glyphs, Scene, scenes_to_rows
from imagine_opd.errors import ConfigError
from imagine_opd.types import Row

Views = Literal["right", "wrong"]


@dataclass(frozen=True, slots=True)
class Privilege:
    """What the teacher knows and the student does not.

    scenes: what they show and how the student sees them, in words; teacher_gets, wrong_teacher_gets: the privilege,
    right and with `--views wrong`; gives: the same in short, for tables; evidence, evidence_label: how the contact
    sheet shows it. glyphs: the scenes' digits; labelled: whether rows carry boxes and hints; fields: of
    `ImagineOPDConfig`.
    """

    scenes: str
    teacher_gets: str
    gives: str
    wrong_teacher_gets: str = ""
    evidence: Literal["picture", "words"] = "picture"
    evidence_label: str = "evidence crop, teacher only"
    glyphs: Glyphs = "small"
    labelled: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


_CROPS = Privilege(
    scenes="five shapes with a small digit each; the student sees it at a third of its size",
    teacher_gets="the crop around the digit asked for",
    wrong_teacher_gets="a crop around another digit (control)",
    gives="sees the crop",
)

PRIVILEGES: dict[str, Privilege] = {
    "crops": _CROPS,
    "contrast": dataclasses.replace(
        _CROPS,
        teacher_gets=f"{_CROPS.teacher_gets}, once as it is and once in its mean colour",
        wrong_teacher_gets=f"{_CROPS.wrong_teacher_gets}, once as it is and once in its mean colour",
        fields={"contrast": "mean", "contrast_beta": 1.0},
    ),
    "hint": Privilege(
        scenes=_CROPS.scenes,
        teacher_gets="place and digit of the shape asked for, in words",
        wrong_teacher_gets="place and digit of another shape, in words (control)",
        gives="is told",
        evidence="words",
        evidence_label="hint, teacher only",
        fields={"teacher_view": "whole", "text_hint": "row", "text_hint_template": " {hint}"},
    ),
    "resolution": Privilege(
        scenes="five shapes with a large digit each; the student sees it shrunk to 12 pixels and blown up again",
        teacher_gets="the scene as it is, and no label",
        gives="sees it clear",
        evidence_label="what the teacher sees",
        glyphs="large",
        labelled=False,
        fields={"teacher_view": "whole", "student_scale": 1 / 12},
    ),
}
"""`--privilege`."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """How a demo trains. scenes are rendered once; steps of `batch` scenes each."""

    steps: int
    batch: int
    scenes: int
    learning_rate: float


PLANS = {
    ("full", False): DemoPlan(steps=400, batch=32, scenes=6000, learning_rate=5e-4),
    ("sampled_token", False): DemoPlan(steps=400, batch=32, scenes=6000, learning_rate=5e-4),
    ("full", True): DemoPlan(steps=1400, batch=32, scenes=12_000, learning_rate=5e-4),
    ("sampled_token", True): DemoPlan(steps=1400, batch=32, scenes=12_000, learning_rate=5e-4),
}
"""By `--mode` and `--long`."""

LORA_FIELDS: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 64,
    # What the student lacks is sight: with a frozen vision tower the digits stay as unreadable as they are.
    "freeze_vision": False,
    "merge_adapter": True,
    "learning_rate": 3e-3,
}
"""`--lora`: in place of the plan's own learning rate, which is one for whole weights."""


def make_rows(scenes: list[Scene], privilege: str, views: Views) -> list[Row]:
    """Rows of these scenes; without boxes and hints where the privilege needs none."""
    rows = scenes_to_rows(scenes, views)
    if PRIVILEGES[privilege].labelled:
        return rows
    return [dataclasses.replace(row, boxes=(), hint="") for row in rows]


def make_run_fields(mode: str, privilege: str, lora: bool, long: bool, seed: int, processes: int = 1) -> dict[str, Any]:
    """Config fields of a demo run, what both sides see among them. A step's scenes are shared out to the processes.

    Raises `ConfigError` when they cannot be shared out evenly.
    """
    plan = PLANS[mode, long]
    if plan.batch % processes:
        raise ConfigError(
            f"{processes} processes: a step of {plan.batch} scenes cannot be shared out evenly; start 2, 4 or 8"
        )
    fields: dict[str, Any] = {
        **TINY_RECIPE,
        **PRIVILEGES[privilege].fields,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.batch // processes,
        "gradient_accumulation_steps": 1,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "distillation_mode": mode,
        "logging_steps": 20,
        "save_strategy": "no",
        "seed": seed,
        "teacher_check_rows": 32,
        "check_rows": 64,
    }
    if mode == "sampled_token":
        fields["advantage_baseline"] = "expected"
    if lora:
        fields |= LORA_FIELDS
    return fields


def describe_run(mode: str, privilege: str, views: Views, lora: bool, long: bool) -> str:
    """What is about to happen, in three sentences."""
    plan, kind = PLANS[mode, long], PRIVILEGES[privilege]
    gets = kind.teacher_gets if views == "right" else kind.wrong_teacher_gets
    weights = f", an adapter of rank {LORA_FIELDS['lora_r']}" if lora else ""
    return (
        f"Each scene shows {kind.scenes}.\n"
        f"The teacher is the same model, frozen, and gets {gets}. "
        f"Training: {plan.steps} steps of {plan.batch} scenes, mode {mode}{weights}.\n"
    )
