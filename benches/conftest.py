"""Fixtures of the benches: what compares, times and records, pictures of the views, and the run's end of time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benches.cases import Runner
from benches.ceilings import measure_ceilings
from benches.environment import describe_cpu, describe_device
from benches.measure import find_device
from benches.results import RESULTS, Results
from benches.shapes import choose_size
from benches.step_plan import choose_level as choose_step_level
from benches.step_plan import start_results
from benches.step_table import STEP_RESULTS, StepResults
from benches.view_files import Pictures, choose_level
from benches.view_table import VIEW_RESULTS, ViewResults

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


@pytest.fixture(scope="session")
def pictures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Files of the level that the command line asks for."""
    return Pictures(tmp_path_factory.mktemp("pictures"), choose_level(request.config))


@pytest.fixture(scope="session")
def view_results(request: pytest.FixtureRequest) -> Iterator[ViewResults]:
    """What the views' benches find. Transformers' line on torchvision's decoder is kept out of the log."""
    from benches.view_peers import is_news

    results = ViewResults(describe_cpu(), choose_level(request.config).name)
    request.config.stash[VIEW_RESULTS] = results
    log = logging.getLogger("transformers.image_utils")
    log.addFilter(is_news)
    yield results
    log.removeFilter(is_news)


@pytest.fixture(scope="session")
def step_results(request: pytest.FixtureRequest) -> StepResults:
    """What the step bench finds."""
    results = request.config.stash[STEP_RESULTS] = start_results(choose_step_level(request.config))
    return results


@pytest.fixture(scope="session")
def step_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For pictures, records and the peers' logs."""
    return tmp_path_factory.mktemp("step")


@pytest.fixture(autouse=True)
def skip_when_time_is_up(request: pytest.FixtureRequest) -> None:
    """`--bench-seconds`: what has not begun by then is skipped, and listed as left out."""
    seconds = request.config.getoption("bench_seconds")
    if seconds is not None and time.monotonic() - STARTED > seconds:
        reason = f"not begun within {seconds:g} s"
        kept = next((name for name in ("view_results", "step_results") if name in request.fixturenames), "runner")
        request.getfixturevalue(kept).leave_out(request.node.name, reason)
        pytest.skip(reason)
