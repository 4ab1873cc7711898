"""The table of the views' benches: one row for each peer of a case, ours beside it, and the file that keeps them.

    python -m benches.view_table benches/baselines/views_cpu.json docs/benchmarks.md

writes the ratios of a kept run between the marks of a page. Times stay in the file: on a CPU only ratios are quoted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benches.kept import fill_page, write_run
from benches.table import OURS, align_cells, format_figure, mark_cells, render_left_out

BEGIN, END = "<!-- begin: views, from benches/baselines/views_cpu.json -->", "<!-- end: views -->"


@dataclass(frozen=True)
class ViewRow:
    """One peer of one case. Values are medians in `unit`: milliseconds of wall time, or MiB of peak memory."""

    case: str
    threads: int
    peer: str
    role: str
    """`best`: the fastest way that transformers has; `usual`: the way that trainers go; or nothing."""
    against: str
    """Which way of ours the peer is held against."""
    unit: str
    peer_value: float
    ours_value: float
    ratio: float
    """The peer's value over that of ours: above 1, ours is that many times faster, or smaller."""
    cpu_ratio: float | None = None
    """The same by the CPU time of all threads, which other work on the machine disturbs less."""
    target: float | None = None
    rounds: int = 1
    max_difference: float = 0.0
    """Between the pixels of both, in levels of 255."""
    mean_difference: float = 0.0


@dataclass
class ViewResults:
    """Rows in the order of the cases, and how they came about."""

    device: str
    level: str
    rows: list[ViewRow] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def leave_out(self, name: str, reason: str) -> None:
        """Note a bench that does not run."""
        self.left_out.append((name, reason))

    def render(self) -> str:
        """The table with its note."""
        note = f"{self.device}, {self.level}: pixels were compared first; × is the peer's median over that of ours"
        lines = [HEADINGS, *map(format_view_row, self.rows)]
        return "\n".join(filter(None, [note, self.rows and align_cells(lines, left=3), render_left_out(self.left_out)]))

    def write(self, path: Path, environment: dict[str, Any]) -> None:
        """Keep the run as JSON, one row a line."""
        write_run(path, {"level": self.level}, environment, self.rows)


VIEW_RESULTS = pytest.StashKey[ViewResults]()

HEADINGS = ("case", "peer", "ours", "threads", "peer's", "ours'", "ours is ×", "by CPU time", "target", "difference")


def format_view_row(row: ViewRow) -> tuple[str, ...]:
    """The cells of a row, under `HEADINGS`."""
    return (
        row.case,
        name_peer(row),
        row.against,
        str(row.threads),
        f"{format_figure(row.peer_value)} {row.unit}",
        f"{format_figure(row.ours_value)} {row.unit}",
        *format_ratios(row),
        format_difference(row),
    )


def name_peer(row: ViewRow) -> str:
    """The peer with its role."""
    return f"{row.peer} ({row.role})" if row.role else row.peer


def format_ratios(row: ViewRow) -> tuple[str, str, str]:
    """By wall time or memory, by CPU time, and what is aimed for."""
    return (
        f"{row.ratio:.2f}",
        "–" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}",
        "–" if row.target is None else f"{row.target:.1f}",
    )


def format_difference(row: ViewRow) -> str:
    """The most and the mean, where there is one."""
    return f"{row.max_difference:.3g}, mean {row.mean_difference:.2g}" if row.max_difference else "0"


def render_page(rows: Iterable[ViewRow]) -> str:
    """Ratios alone, in Markdown."""
    headings = ("case", "threads", "peer", "ours is × faster", "by CPU time", "target")
    lines = []
    for row in rows:
        against = "" if row.against == OURS else f", against {row.against}"
        what = "" if row.unit == "ms" else ", peak memory (× smaller)"
        lines.append((row.case + what, str(row.threads), name_peer(row) + against, *format_ratios(row)))
    return mark_cells([headings, *lines], left=3)


def read_rows(path: Path) -> list[ViewRow]:
    """Of a kept run."""
    return [ViewRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def write_page(rows: Iterable[ViewRow], page: str) -> str:
    """The page with the table between its marks."""
    return fill_page(page, BEGIN, END, render_page(rows))


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.write_text(write_page(read_rows(Path(sys.argv[1])), target.read_text(encoding="utf-8")), encoding="utf-8")
