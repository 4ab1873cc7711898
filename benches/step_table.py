"""The table of the step bench: one row for each peer of a case, its ratios to ours, and the file that keeps them.

    python -m benches.step_table benches/baselines/step_cpu.json docs/benchmarks.md

writes the ratios of a kept run between the marks of a page. On a CPU only ratios are quoted, by CPU time: one thread
works, and other work on the machine must not choose among the peers. On a GPU they are of wall time, since the CPU
waits for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benches.kept import fill_page, write_run
from benches.table import OURS, align_cells, format_figure, mark_cells, render_left_out

MARK = "<!-- begin: step, from {name} -->"
BEGIN, END = MARK.format(name="benches/baselines/step_cpu.json"), "<!-- end: step -->"

TARGETS = {"outside": 2.0, "rollout": 1.0, "memory": 3.0}
"""Against the plain loop: how many times faster outside generation, in generation, and smaller in memory."""
PEER_TARGETS = {"step": 1.0, "memory": 1.0}
"""Against TRL at identical views: not slower, and leaner."""

STAGES = ("views", "rollout", "teacher", "student", "loss", "backward", "update", "other")
"""In the order of a step; what else a trainer times comes after."""


@dataclass(frozen=True)
class StepRow:
    """One peer of one case. Seconds are medians of a step, by wall time and by CPU time of all threads."""

    group: str
    """`peers`, or what grows: `crops`, `new_tokens`, `vocabulary`."""
    case: str
    crops: int
    new_tokens: int
    vocabulary: int
    trains: str
    peer: str
    rounds: int
    step_s: float
    step_cpu_s: float
    stages_s: dict[str, float]
    stages_cpu_s: dict[str, float]
    peak_mib: float
    """Above what the process held before the step."""
    held_mib: float
    loss_error: float | None = None
    """Of the peer's loss on the completions of ours, relative."""
    gradient_error: float | None = None
    """The worst of the compared parameters, relative to the gradient's norm."""

    def read_s(self, stage: str, cpu: bool) -> float:
        """Seconds of a stage, of the whole `step`, or of all `outside` the rollout."""
        stages, whole = (self.stages_cpu_s, self.step_cpu_s) if cpu else (self.stages_s, self.step_s)
        if stage == "step":
            return whole
        return whole - stages.get("rollout", 0.0) if stage == "outside" else stages.get(stage, 0.0)


@dataclass
class StepResults:
    """Rows in the order of the plan, and how they came about."""

    device: str
    level: str
    on_gpu: bool
    rows: list[StepRow] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def leave_out(self, name: str, reason: str) -> None:
        """Note a peer or a case that does not run."""
        self.left_out.append((name, reason))

    def render(self) -> str:
        """Both tables for a terminal, with their note."""
        by = "wall time" if self.on_gpu else "CPU time"
        note = f"{self.device}, {self.level}: losses and gradients were compared first; ratios by {by}"
        cpu = not self.on_gpu
        tables = [align_cells(lines, left=2) for lines in (list_ratios(self.rows, cpu), list_shares(self.rows, cpu))]
        return "\n\n".join(filter(None, [note, *(tables if self.rows else []), render_left_out(self.left_out)]))

    def write(self, path: Path, environment: dict[str, Any]) -> None:
        """Keep the run as JSON, one row a line."""
        head = {"level": self.level, "on_gpu": self.on_gpu, "left_out": self.left_out}
        write_run(path, head, environment, self.rows)


STEP_RESULTS = pytest.StashKey[StepResults]()


def read_results(path: Path) -> StepResults:
    """Of a kept run."""
    return read_kept(json.loads(path.read_text(encoding="utf-8")))


def read_kept(kept: dict[str, Any]) -> StepResults:
    """Of a kept run's JSON."""
    rows = [StepRow(**row) for row in kept["rows"]]
    left_out = [(name, reason) for name, reason in kept["left_out"]]
    environment = kept["environment"]
    device = environment["device" if kept["on_gpu"] else "cpu"]
    return StepResults(device, kept["level"], kept["on_gpu"], rows, left_out)


def find_ours(rows: Iterable[StepRow], row: StepRow) -> StepRow | None:
    """The row of ours that a peer's is held against."""
    return next(
        (
            other
            for other in rows
            if other.peer == OURS and (other.group, other.case) == (row.group, row.case) and other is not row
        ),
        None,
    )


RATIO_HEADINGS = (
    *("case", "peer", "whole step ×", "outside generation ×", "target"),
    *("generation ×", "target", "peak memory ×", "target", "loss apart by"),
)


def list_ratios(rows: Sequence[StepRow], cpu: bool) -> list[tuple[str, ...]]:
    """Each peer's figure over that of ours: above 1, ours is that many times faster, or smaller."""
    lines = [RATIO_HEADINGS]
    for row in rows:
        ours = find_ours(rows, row)
        if ours is None or row.peer == OURS:
            continue
        ratios = {
            name: divide(row.read_s(name, cpu), ours.read_s(name, cpu)) for name in ("step", "outside", "rollout")
        }
        is_trl = row.peer == "trl"
        lines.append(
            (
                row.case,
                row.peer,
                f"{ratios['step']:.2f}" + (f" (≥ {PEER_TARGETS['step']:g})" if is_trl else ""),
                f"{ratios['outside']:.2f}",
                "–" if is_trl else f"{TARGETS['outside']:g}",
                f"{ratios['rollout']:.2f}",
                "–" if is_trl else f"{TARGETS['rollout']:g}",
                f"{divide(row.peak_mib, ours.peak_mib):.2f}",
                f"{(PEER_TARGETS if is_trl else TARGETS)['memory']:g}",
                "–" if row.loss_error is None else f"{row.loss_error:.0e}",
            )
        )
    return lines


def list_shares(rows: Sequence[StepRow], cpu: bool) -> list[tuple[str, ...]]:
    """Where the time goes: each stage in percent of the first other peer's whole step, and the memory in MiB."""
    lines = [("case", "peer", *STAGES, "step", "peak MiB")]
    for row in rows:
        if row.group not in ("peers", "crops"):
            continue
        whole = next(
            (other.read_s("step", cpu) for other in rows if other.case == row.case and other.peer != OURS),
            row.read_s("step", cpu),
        )
        more = sum(row.read_s(name, cpu) for name in (row.stages_cpu_s if cpu else row.stages_s) if name not in STAGES)
        shares = [row.read_s(name, cpu) + (more if name == "other" else 0.0) for name in STAGES]
        cells = [f"{100 * value / whole:.1f} %" for value in (*shares, row.read_s("step", cpu))]
        lines.append((row.case, row.peer, *cells, format_figure(row.peak_mib)))
    return lines


def divide(theirs: float, ours: float) -> float:
    """Not a number where ours takes nothing that can be measured."""
    return theirs / ours if ours > 0 else float("nan")


def render_page(results: StepResults) -> str:
    """Both tables in Markdown."""
    cpu = not results.on_gpu
    parts = [
        mark_cells(list_ratios(results.rows, cpu), left=2),
        "Where the time of a step goes, in percent of the plain loop's (of TRL's where that is the peer), and the peak "
        "above what was held before:",
        mark_cells(list_shares(results.rows, cpu), left=2),
    ]
    missing = render_left_out(results.left_out)
    return "\n\n".join([*parts, *([missing] if missing else [])])


def write_page(results: StepResults, page: str, begin: str = BEGIN) -> str:
    """The page with the tables between the marks of a kept run."""
    return fill_page(page, begin, END, render_page(results))


if __name__ == "__main__":
    kept, target = map(Path, sys.argv[1:3])
    begin = MARK.format(name=kept.as_posix())
    text = write_page(read_results(kept), target.read_text(encoding="utf-8"), begin)
    target.write_text(text, encoding="utf-8")
