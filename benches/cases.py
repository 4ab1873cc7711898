"""One case of a bench: ours and its peers answer the same problem, answers are compared, then all are timed in turns.

A peer that cannot be imported, runs out of memory or answers differently is left out with the reason, and never timed;
an answer of ours that differs fails the bench.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benches.ceilings import Ceilings
from benches.measure import Memory, Step, Timing, measure_memory, synchronize, time_in_turns
from benches.peers import Peer
from benches.problems import Answer, measure_error
from benches.results import Results
from benches.table import OURS, Row, Work, compute_fraction, compute_rate, compute_ratio

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Most that |answer - truth| / |truth| may be, by dtype of inputs and gradients: fp32 sums over a vocabulary agree to
1e-5, and a gradient stored in bf16 is off by 2e-3."""

ROUNDED_LOGITS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""The same where logits are rounded to the dtype of the inputs: the gradient of a KL between close models is a
difference of nearly equal numbers, and bf16 logits alone put it off by 3 to 15 %."""


@dataclass(frozen=True)
class Case:
    """What is timed and under which name. `solve` gives the truth; `ours` may hold further ways of ours, by name."""

    kernel: str
    name: str
    shape: str
    dtype: torch.dtype
    work: Work
    ours: Mapping[str, Step]
    solve: Callable[[], Answer]
    rounds_logits: bool = False
    """Ours rounds logits to the dtype of the inputs here, as the log-prob path may."""
    target_ms: float | None = None


@dataclass(frozen=True)
class Runner:
    """Runs cases on one device under pytest-benchmark and keeps what they give."""

    device: torch.device
    ceilings: Ceilings | None
    results: Results
    seconds: float
    rows_file: Path | None = None
    """Rows are appended to it as they come, so that a run that is cut short keeps them."""

    def run(self, benchmark: Any, case: Case, peers: Iterable[Peer[Any]], problem: object) -> None:
        """Compare, time in turns, record; then pytest-benchmark times ours by its own clock for its own statistics."""
        truth = case.solve()
        errors = {name: compare(step, truth) for name, step in case.ours.items()}
        allowed = (ROUNDED_LOGITS_TOLERANCE if case.rounds_logits else TOLERANCES)[case.dtype]
        for name, error in errors.items():
            assert error <= allowed, f"{case.kernel}, {case.name}: {name} is off by {error:.2g}, allowed {allowed:g}"
        steps, left_out = dict(case.ours), []
        for peer in peers:
            step, found = self.admit(peer, problem, truth, case.dtype)
            if step is None:
                left_out.append((peer.name, str(found)))
            else:
                steps[peer.name], errors[peer.name] = step, float(found)
        del truth
        self.release()
        timings = time_in_turns(steps, self.device, self.seconds)
        memories = {name: measure_memory(step, self.device) for name, step in steps.items()}
        rows = make_rows(case, timings, memories, errors, self.ceilings)
        self.record(benchmark, rows, left_out)

        def run_ours() -> None:
            steps[OURS]()
            synchronize(self.device)

        benchmark.pedantic(run_ours, rounds=max(3, min(20, timings[OURS].rounds)), warmup_rounds=1)

    def admit(self, peer: Peer[Any], problem: object, truth: Answer, dtype: torch.dtype) -> tuple[Step | None, Any]:
        """(its step, its error), or (None, why it is left out)."""
        if peer.needs_gpu and self.device.type != "cuda":
            return None, "needs a CUDA device"
        try:
            step = peer.make(problem)
            error = compare(step, truth)
        except ImportError as missing:
            return None, f"cannot be imported: {shorten(missing)}"
        except torch.OutOfMemoryError:
            self.release()
            return None, "out of memory"
        except Exception as raised:  # a peer's fault is a line in the table, not the end of the run
            return None, f"{type(raised).__name__}: {shorten(raised)}"
        allowed = (ROUNDED_LOGITS_TOLERANCE if peer.rounds_logits else TOLERANCES)[dtype]
        if not error <= allowed:
            return None, f"answers differ by {error:.2g}, allowed {allowed:g}"
        return step, error

    def release(self) -> None:
        """Hand cached memory back, so that one implementation's blocks are not in another's way."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def record(self, benchmark: Any, rows: list[Row], left_out: list[tuple[str, str]]) -> None:
        """To the table, to the rows' file and to pytest-benchmark's `extra_info`."""
        self.results.rows += rows
        self.results.left_out += left_out
        benchmark.extra_info.update(
            device=self.results.device,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            rows=[asdict(row) for row in rows],
            left_out=[{"implementation": name, "reason": reason} for name, reason in left_out],
            times_faster={row.implementation: round(row.times_ours, 3) for row in rows if row.implementation != OURS},
        )
        self._append([{"row": asdict(row)} for row in rows] + [{"left_out": pair} for pair in left_out])

    def leave_out(self, name: str, reason: str) -> None:
        """Note a whole bench that does not run, so that the report does not pass over it."""
        self.results.left_out.append((name, reason))
        self._append([{"left_out": (name, reason)}])

    def _append(self, entries: list[dict[str, Any]]) -> None:
        if self.rows_file is not None:
            with self.rows_file.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(entry)}\n" for entry in entries))


def compare(step: Step, truth: Answer) -> float:
    """The worst error of what a step returns; NaN if anything is."""
    answer = step()
    errors = [measure_error(value, truth[name]) for name, value in answer.items()]
    return max(errors, key=lambda error: (error != error, error))


def make_rows(
    case: Case,
    timings: Mapping[str, Timing],
    memories: Mapping[str, Memory | None],
    errors: Mapping[str, float],
    ceilings: Ceilings | None,
) -> list[Row]:
    """The lines of the table, ours first; ratios are against `ours`."""
    rows = []
    for name, timing in timings.items():
        rate, unit = compute_rate(case.work, timing.median_ms)
        memory = memories[name]
        rows.append(
            Row(
                kernel=case.kernel,
                case=case.name,
                shape=case.shape,
                implementation=name,
                median_ms=timing.median_ms,
                spread_ms=timing.spread_ms,
                rounds=timing.rounds,
                rate=rate,
                rate_unit=unit,
                ceiling_fraction=compute_fraction(rate, unit, ceilings),
                peak_mib=None if memory is None else memory.peak_mib,
                extra_mib=None if memory is None else memory.extra_mib,
                times_ours=compute_ratio(timing.median_ms, timings[OURS].median_ms),
                error=errors[name],
                target_ms=case.target_ms if name == OURS else None,
            )
        )
    return rows


def shorten(error: BaseException) -> str:
    """The first line of a message, 160 characters at most."""
    return (str(error).strip().splitlines() or [""])[0][:160]
