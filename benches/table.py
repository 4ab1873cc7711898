"""The profile table: one row per implementation, shape and case, and the arithmetic of its columns.

`work` is the least that any implementation must do: each input read once and each output written once (bytes), or the
matrix products that cannot be avoided (operations). Rates are this work over the time, so reading twice or computing
twice lowers the rate, and a rate at the ceiling is the end of the road.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benches.kept import fill_page

if TYPE_CHECKING:  # the table itself needs no torch
    from benches.ceilings import Ceilings

OURS = "ours"


@dataclass(frozen=True)
class Work:
    """The least a case must do; one of the two is 0."""

    bytes_moved: float = 0.0
    operations: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a figure does not apply or was not measured."""

    kernel: str
    case: str
    shape: str
    implementation: str
    median_ms: float
    spread_ms: float
    rounds: int
    rate: float
    rate_unit: str
    ceiling_fraction: float | None = None
    peak_mib: float | None = None
    extra_mib: float | None = None
    times_ours: float = 1.0
    """This implementation's time over that of ours: above 1, ours is that many times faster."""
    error: float | None = None
    """|values - truth| / |truth|, the worst over what the step returns."""
    target_ms: float | None = None
    run: str = ""
    """Of which run, in a file that keeps several; beside an `ours` of another one, `times_ours` is of the two."""


def compute_rate(work: Work, median_ms: float) -> tuple[float, str]:
    """(GB/s, its unit) where bytes count, (TFLOP/s, its unit) where operations do."""
    if work.operations:
        return work.operations / (median_ms * 1e-3) / 1e12, "TFLOP/s"
    return work.bytes_moved / (median_ms * 1e-3) / 1e9, "GB/s"


def compute_fraction(rate: float, unit: str, ceilings: Ceilings | None) -> float | None:
    """The rate as a fraction of the measured ceiling in the same unit."""
    if ceilings is None:
        return None
    return rate / (ceilings.gemm_tflop_per_s if unit == "TFLOP/s" else ceilings.copy_gb_per_s)


def compute_ratio(peer_ms: float, ours_ms: float) -> float:
    """How many times faster ours is: 2.0 means that the peer takes twice as long."""
    return peer_ms / ours_ms


HEADINGS = (
    "kernel",
    "shape",
    "implementation",
    "ms",
    "rate",
    "of ceiling",
    "peak MiB",
    "extra MiB",
    "ours is × faster",
    "target ms",
)


def format_figure(value: float) -> str:
    """Three significant digits, never an exponent where a person would write none."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_row(row: Row) -> tuple[str, ...]:
    """The cells of a row, under `HEADINGS`."""
    return (
        f"{row.kernel}: {row.case}",
        row.shape,
        row.implementation,
        f"{format_figure(row.median_ms)} ± {format_figure(row.spread_ms / 2)}",
        f"{format_figure(row.rate)} {row.rate_unit}",
        "–" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.0%}",
        "–" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
        "–" if row.extra_mib is None else f"{row.extra_mib:,.0f}",
        "–" if row.implementation == OURS else f"{row.times_ours:.2f}",
        "–" if row.target_ms is None else f"{row.target_ms:g}",
    )


def render_text(rows: Iterable[Row]) -> str:
    """The table for a terminal."""
    return align_cells([HEADINGS, *map(format_row, rows)], left=3)


def render_markdown(rows: Iterable[Row]) -> str:
    """The same table for a page."""
    return mark_cells([HEADINGS, *map(format_row, rows)], left=3)


def align_cells(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells for a terminal, columns aligned: the first `left` to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def mark_cells(lines: Sequence[Sequence[str]], left: int) -> str:
    """The same lines in Markdown; the first are the headings."""
    headings, *others = lines
    rule = [":--"] * left + ["--:"] * (len(headings) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, rule, *others])


OTHER_RUN, EARLIER = "†", "‡"
NOTE = (
    f"{OTHER_RUN} the peer was timed in an earlier run than ours. {EARLIER} a case of that earlier run, before the "
    "kernels were changed; not timed since."
)

BEGIN, END = "<!-- begin: kernels, from {name} -->", "<!-- end: kernels -->"


def render_page(rows: Iterable[Row]) -> str:
    """A line for each case: our time, and how many times faster ours is than each peer; figures of a run whose peers
    stand beside a later `ours` are marked, with a note below."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((f"{row.kernel}: {row.case}", row.shape), []).append(row)
    runs = {case: row.run for case, found in cases.items() for row in found if row.implementation == OURS}
    earlier = {row.run for case, found in cases.items() for row in found if row.run != runs.get(case, row.run)}
    lines = []
    for case, found in cases.items():
        peers = [
            f"{row.implementation} {row.times_ours:.2f}{OTHER_RUN if row.run != runs.get(case) else ''}"
            for row in found
            if row.implementation != OURS
        ]
        for row in found:
            if row.implementation == OURS:
                _, _, _, time, _, ceiling, _, extra, _, target = format_row(row)
                time += f" {EARLIER}" if row.run in earlier else ""
                lines.append((*case, ", ".join(peers), time, target, ceiling, extra))
    headings = ("kernel", "shape", "ours is × faster than", "ours, ms", "target ms", "of ceiling", "extra MiB")
    return mark_cells([headings, *lines], left=3) + (f"\n\n{NOTE}" if earlier else "")


def write_page(rows: Iterable[Row], page: str, name: str) -> str:
    """The page with the table of a kept run between its marks."""
    begin = BEGIN.format(name=name)
    return fill_page(page, begin, END, render_page(rows))


def read_rows(path: Path) -> list[Row]:
    """Of a kept run."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def render_left_out(left_out: Iterable[tuple[str, str]]) -> str:
    """The implementations that were not timed, one line for each and its reason."""
    return "\n".join(f"left out: {name}: {reason}" for name, reason in dict.fromkeys(left_out))


if __name__ == "__main__":
    kept, target = map(Path, sys.argv[1:3])
    page = write_page(read_rows(kept), target.read_text(encoding="utf-8"), kept.as_posix())
    target.write_text(page, encoding="utf-8")
