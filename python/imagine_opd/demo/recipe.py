"""The config fields of the tiny world, for training and asking: bare questions, 48-pixel scenes, 32-pixel crops."""

from __future__ import annotations

from typing import Any

TINY_RECIPE: dict[str, Any] = {
    "student_prompt_template": "{question}",
    "teacher_prompt_template": "{question}",
    "direct_prompt_template": "{question}",
    "min_pixels": 48 * 48,
    "max_pixels": 48 * 48,
    "crop_min_pixels": 32 * 32,
    "crop_max_pixels": 32 * 32,
    "box_margin": 0.0,
    "min_crop_px": 32,
    "max_completion_length": 18,
}
"""Fields of `ImagineOPDConfig`; the shipped base model's folder carries the same as `imagine_opd.json`."""
