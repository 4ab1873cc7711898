"""Fixtures of the kernel tests: both implementations, small tiles, and quiet infinities in the interpreter."""

import warnings
from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 128 columns, so that small rows also cross tile borders."""
    from imagine_opd.kernels import tuning

    tile = tuning.TileConfig(128, 4, 1)
    with tuning.override(tuning.Tuning(tile, tile, tile)):
        yield


@pytest.fixture(autouse=True)
def _quiet_infinities() -> Iterator[None]:
    # The interpreter computes with numpy, which warns where a GPU quietly gives the inf that the kernels count on.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        yield
