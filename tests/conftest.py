"""What must hold before any test module is imported, and fixtures on the tiny world: model, processor, rows."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from imagine_opd.types import Row, ViewConfig

# Triton decides at its import whether kernels are interpreted, and any test may be the first to import it. Without a
# GPU the interpreter is the only way to run them; with one the same tests run the compiled kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass(frozen=True)
class Tiny:
    """The loaded base: shared by a session, so tests that train copy the model first."""

    model: Any
    processor: Any
    view_config: ViewConfig


@pytest.fixture(scope="session")
def tiny_session() -> Tiny:
    from imagine_opd.demo import TINY_VIEWS, base_model_path
    from imagine_opd.models.access import load_model, load_processor
    from imagine_opd.views import view_config_from

    torch.set_num_threads(1)  # the model is too small for two threads to pay
    processor = load_processor(None, base_model_path())
    model = load_model(base_model_path()).eval()
    return Tiny(model, processor, view_config_from(processor.image_processor, **TINY_VIEWS))


@pytest.fixture
def tiny(tiny_session: Tiny) -> Tiny:
    return Tiny(copy.deepcopy(tiny_session.model), tiny_session.processor, tiny_session.view_config)


@pytest.fixture(scope="session")
def make_scenes_and_rows():
    from imagine_opd.demo import make_scenes, scenes_to_rows

    def make(count: int, views: str = "right", seed: int = 77):
        scenes = make_scenes(count, seed, "small")
        return scenes, scenes_to_rows(scenes, views)

    return make


@pytest.fixture(scope="session")
def make_rows(make_scenes_and_rows):
    def make(count: int, views: str = "right", seed: int = 77) -> list[Row]:
        return list(make_scenes_and_rows(count, views, seed)[1])

    return make
