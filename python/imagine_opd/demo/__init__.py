"""The tiny world: drawn scenes, a tiny real Qwen3-VL and its shipped base checkpoint, on which Imagine-OPD is shown.

Importing this package loads no torch; the names that need it load it when first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine_opd.demo.scenes import Scene, make_scenes, scenes_to_rows

if TYPE_CHECKING:
    from imagine_opd.demo.sheet import SheetRow, draw_contact_sheet
    from imagine_opd.demo.tiny import TINY_VIEWS

_LAZY = {
    "SheetRow": "sheet",
    "draw_contact_sheet": "sheet",
    "TINY_VIEWS": "tiny",
}

__all__ = [
    "TINY_VIEWS",
    "Scene",
    "SheetRow",
    "base_model_path",
    "draw_contact_sheet",
    "make_scenes",
    "scenes_to_rows",
]


def base_model_path() -> Path:
    """Folder of the tiny base model: weights (bf16; load with `dtype=torch.float32`) and processor."""
    return Path(__file__).parent / "base"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'imagine_opd.demo' has no attribute {name!r}")
    return getattr(import_module(f"imagine_opd.demo.{_LAZY[name]}"), name)
