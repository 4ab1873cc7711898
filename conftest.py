"""The command line's `--benchmark`: run the kernel benches instead of the tests and print their profile table."""

from __future__ import annotations

from pathlib import Path

import pytest
from benches.results import RESULTS

ROOT = Path(__file__).parent
KERNEL_BENCHES = ("benches/bench_token_stats.py", "benches/bench_linear_token_stats.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benches")
    group.addoption("--benchmark", action="store_true", help="run the kernel benches and print their profile table")
    group.addoption(
        "--bench-shapes",
        choices=("target", "small", "tiny"),
        help="shapes of the kernel benches (default: target on a GPU, small on a CPU)",
    )
    group.addoption("--bench-seconds", type=float, help="skip benches that have not begun after so many seconds")
    group.addoption(
        "--bench-rows", metavar="FILE", help="append each row of the profile table to FILE, one JSON a line"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark"):
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(ROOT / path) for path in KERNEL_BENCHES]
    # The profile table says it all; `--benchmark-verbose` brings pytest-benchmark's own back.
    config.option.benchmark_quiet = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash.get(RESULTS, None)
    if results is not None and (results.rows or results.left_out):
        terminalreporter.section("kernels and their peers")
        terminalreporter.write_line(results.render())
