"""The recipe that travels beside a model: what it was trained to see and to be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imagine_opd.errors import ConfigError

RECIPE_FILE = "imagine_opd.json"
"""Written beside the weights: `RECIPE_FIELDS` of the run."""

RECIPE_FIELDS = (
    "student_prompt_template",
    "teacher_prompt_template",
    "direct_prompt_template",
    "min_pixels",
    "max_pixels",
    "crop_min_pixels",
    "crop_max_pixels",
    "box_margin",
    "min_crop_px",
    "max_completion_length",
    "chat_template_kwargs",
)
"""What must be the same when the trained model is asked as when it was trained."""


def save_recipe(config: Any, folder: str | Path) -> None:
    """Write `RECIPE_FIELDS` into `folder`, so that the model is later asked as it was trained."""
    recipe = {name: getattr(config, name) for name in RECIPE_FIELDS}
    Path(folder, RECIPE_FILE).write_text(json.dumps(recipe, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_recipe(model: object) -> dict[str, Any]:
    """The recipe saved beside a model folder, or `{}`. Raises `ConfigError` when the file is damaged."""
    if not isinstance(model, (str, Path)) or not Path(model, RECIPE_FILE).is_file():
        return {}
    path = Path(model, RECIPE_FILE)
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}); remove it or train again") from error
    if not isinstance(recipe, dict) or (unknown := set(recipe) - set(RECIPE_FIELDS)):
        found = sorted(unknown) if isinstance(recipe, dict) else type(recipe).__name__
        raise ConfigError(f"{path}: expected an object with fields of {RECIPE_FIELDS}, found {found}")
    return recipe
