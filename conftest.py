"""The command line's `--benchmark`: run the benches instead of the tests; their tables at the end of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benches import KERNEL_BENCHES, VIEW_BENCHES
from benches.results import RESULTS
from benches.step_table import STEP_RESULTS
from benches.view_table import VIEW_RESULTS

ROOT = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benches")
    group.addoption(
        "--benchmark", action="store_true", help="run the kernel benches, take a quick look at the views, print tables"
    )
    group.addoption(
        "--bench-shapes",
        choices=("target", "small", "tiny"),
        help="shapes of the kernel benches (default: target on a GPU, small on a CPU); tiny makes pictures small too",
    )
    group.addoption("--bench-seconds", type=float, help="skip benches that have not begun after so many seconds")
    group.addoption(
        "--bench-rows", metavar="FILE", help="append each row of the kernels' table to FILE, one JSON a line"
    )
    group.addoption(
        "--bench-baseline", metavar="FILE", help="write the views' table to FILE (benches/baselines/views_cpu.json)"
    )
    group.addoption(
        "--bench-step", metavar="FILE", help="write the step's table to FILE (benches/baselines/step_cpu.json)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark"):
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(ROOT / path) for path in (*KERNEL_BENCHES, *VIEW_BENCHES)]
    # The tables say it all; `--benchmark-verbose` brings pytest-benchmark's own back.
    config.option.benchmark_quiet = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, None)
    if results is not None and (results.rows or results.left_out):
        terminalreporter.section("kernels and their peers")
        terminalreporter.write_line(results.render())
    _write_section(terminalreporter, config, VIEW_RESULTS, "views and their peers", "bench_baseline")
    _write_section(terminalreporter, config, STEP_RESULTS, "a step and its peers", "bench_step")


def _write_section(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config, key: Any, title: str, option: str
) -> None:
    """A table, where its benches have run, and its file, where one is asked for."""
    results = config.stash.get(key, None)
    if results is None or not (results.rows or results.left_out):
        return
    terminalreporter.section(title)
    terminalreporter.write_line(results.render())
    if config.getoption(option):
        from benches.environment import describe_environment

        results.write(Path(config.getoption(option)), describe_environment())
