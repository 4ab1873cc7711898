"""Fixtures of the kernel benches: the runner that compares, times and records, and the run's end of time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benches.cases import Runner
from benches.ceilings import measure_ceilings
from benches.environment import describe_device
from benches.measure import find_device
from benches.results import RESULTS, Results
from benches.shapes import choose_size

SECONDS_BY_SIZE = {"tiny": 0.0, "small": 1.0, "target": 2.0}
"""How long the implementations of a case take turns; three rounds at least."""

STARTED = time.monotonic()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU the largest shapes of both kernels come first: where time runs out, the targets have been measured."""
    if choose_size(config) != "target":
        return

    def count_rows(item: pytest.Item) -> int:
        shape = getattr(item, "callspec", None) and item.callspec.params.get("shape")  # type: ignore[attr-defined]
        return getattr(shape, "rows", 0)

    items.sort(key=count_rows, reverse=True)


@pytest.fixture(scope="session")
def runner(request: pytest.FixtureRequest) -> Runner:
    """The ceilings are measured once, and on a GPU only: off it nothing but ratios is quoted."""
    config, device = request.config, find_device()
    on_gpu = device.type == "cuda"
    results = config.stash[RESULTS] = Results(describe_device(), on_gpu)
    rows_file = config.getoption("bench_rows")
    return Runner(
        device,
        measure_ceilings(device) if on_gpu else None,
        results,
        SECONDS_BY_SIZE[choose_size(config)],
        Path(rows_file) if rows_file else None,
    )


@pytest.fixture(autouse=True)
def skip_when_time_is_up(request: pytest.FixtureRequest, runner: Runner) -> None:
    """`--bench-seconds`: what has not begun by then is skipped, and listed as left out."""
    seconds = request.config.getoption("bench_seconds")
    if seconds is not None and time.monotonic() - STARTED > seconds:
        reason = f"not begun within {seconds:g} s"
        runner.leave_out(request.node.name, reason)
        pytest.skip(reason)
