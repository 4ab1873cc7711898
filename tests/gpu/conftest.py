"""Tests in this folder need a CUDA device and are skipped without one."""

import sys
from pathlib import Path

import pytest
import torch

# The cases and the tolerance table are those of tests/kernels.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
