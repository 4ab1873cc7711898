"""Imagine-OPD: teach a vision-language model to see fine detail without cropping tools.

`train`, `evaluate` and `ask` are the doors. Importing this package is quick: torch and transformers are loaded by the
first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from imagine_opd.types import Box, Row, ViewConfig

if TYPE_CHECKING:
    from imagine_opd.api import Answer, TrainResult, ask, evaluate, train
    from imagine_opd.config import ImagineOPDConfig
    from imagine_opd.evaluation import EvalResult
    from imagine_opd.trainer import ImagineOPDTrainer

__version__ = "0.1.0"

_LAZY = {
    "train": "api",
    "evaluate": "api",
    "ask": "api",
    "Answer": "api",
    "TrainResult": "api",
    "EvalResult": "evaluation",
    "ImagineOPDConfig": "config",
    "ImagineOPDTrainer": "trainer",
}

__all__ = [
    "Answer",
    "Box",
    "EvalResult",
    "ImagineOPDConfig",
    "ImagineOPDTrainer",
    "Row",
    "TrainResult",
    "ViewConfig",
    "ask",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'imagine_opd' has no attribute {name!r}")
    return getattr(import_module(f"imagine_opd.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
