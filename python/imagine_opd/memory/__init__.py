"""How much memory a run takes, before it takes it: plan, the teacher's place, and advice when it does not fit."""

from imagine_opd.memory.plan import (
    MemoryPlan,
    PlacementChoice,
    advise_memory,
    choose_teacher_placement,
    plan_memory,
    read_memory_settings,
    show_gib,
)
from imagine_opd.memory.settings import MemoryItem, MemorySettings, TeacherPlacement
from imagine_opd.memory.shapes import (
    ModelShape,
    ViewSize,
    estimate_view,
    measure_views,
    read_adapter,
    read_model_shape,
)

__all__ = [
    "MemoryItem",
    "MemoryPlan",
    "MemorySettings",
    "ModelShape",
    "PlacementChoice",
    "TeacherPlacement",
    "ViewSize",
    "advise_memory",
    "choose_teacher_placement",
    "estimate_view",
    "measure_views",
    "plan_memory",
    "read_adapter",
    "read_memory_settings",
    "read_model_shape",
    "show_gib",
]
