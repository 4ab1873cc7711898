"""A step's figures: summed while it runs, given out as means, totals, extremes and seconds per step at each log."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imagine_opd.metrics.clock import Clock

BUSY_STAGES = ("rollout", "advantages", "step", "update")
"""The stages that make up a step for the device; what is left of `step_time` it waits for the host."""


class StepMetrics:
    """Collects figures between two logs. Stages are timed by `clock`, without waiting for the device."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.run_seconds: dict[str, float] = defaultdict(float)
        """Of all steps so far, in total; `step_time` is all of it."""
        self.run_steps = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything since the last log."""
        self.steps = 0
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._totals: dict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}
        self._minima: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._spans: deque[tuple[str, Any, Any]] = deque()
        self._open: dict[str, Any] = {}

    def add_mean(self, name: str, total: float, count: float = 1.0) -> None:
        """A sum over `count` items; the log shows their mean."""
        self._sums[name] += total
        self._counts[name] += count

    def put(self, name: str, value: float) -> None:
        """A figure of its own moment; the log shows the last."""
        self._sums[name], self._counts[name] = value, 1.0

    def add_total(self, name: str, number: float = 1.0) -> None:
        """A count; the log shows its total."""
        self._totals[name] += number

    def add_max(self, name: str, value: float) -> None:
        """A value; the log shows the largest."""
        self._maxima[name] = max(value, self._maxima.get(name, value))

    def add_min(self, name: str, value: float) -> None:
        """A value; the log shows the smallest."""
        self._minima[name] = min(value, self._minima.get(name, value))

    def add_seconds(self, name: str, seconds: float) -> None:
        """Time that passed beside the step; the log shows `time/NAME_s` per step."""
        self._seconds[f"time/{name}_s"] += seconds

    def start_step(self) -> None:
        """An optimizer step begins: what is timed is per step, and `step_time` is the seconds of a whole one."""
        self.steps += 1
        self._step_started = self.clock.mark()

    def end_step(self) -> None:
        """The optimizer has stepped; what is done between steps (logs, checkpoints, evaluation) is no part of one."""
        self.finish("update")
        self._spans.append(("step_time", self._step_started, self.clock.mark()))
        self._fold_spans()  # those of earlier steps, as a rule: a log may be many steps away

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the log shows `time/NAME_s`, seconds per step."""
        started = self.clock.mark()
        try:
            yield
        finally:
            self._spans.append((f"time/{name}_s", started, self.clock.mark()))

    def begin(self, name: str) -> None:
        """A stage begins that ends elsewhere, with `finish`."""
        self._open[name] = self.clock.mark()

    def finish(self, name: str) -> None:
        """The stage ends; nothing where it has not begun."""
        if name in self._open:
            self._spans.append((f"time/{name}_s", self._open.pop(name), self.clock.mark()))

    def drain(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, float]:
        """The figures since the last log, which is now. `gather` gives those of all processes, which become one."""
        self._read_clock()
        parts = gather((self._sums, self._counts, self._totals, self._maxima, self._minima, self._seconds))
        steps = max(self.steps, 1)
        self.clear()
        sums, counts, totals, maxima, minima, seconds = (
            _join([part[place] for part in parts], join) for place, join in enumerate(_JOINS)
        )
        figures = {name: total / counts[name] for name, total in sums.items() if counts[name]}
        for found in (totals, maxima, minima):
            figures.update(found)
        for name, spent in seconds.items():
            figures[name] = spent / steps
            self.run_seconds[name] += spent
        self.run_steps += steps
        if figures.get("step_time"):
            figures["time/idle_share"] = figures["time/idle_s"] / figures["step_time"]
        return dict(sorted(figures.items()))

    def _fold_spans(self) -> None:
        """Add the spans that have come to pass, without a wait."""
        while self._spans and self.clock.is_past(self._spans[0][2]):
            name, begin, end = self._spans.popleft()
            self._seconds[name] += self.clock.seconds(begin, end)

    def _read_clock(self) -> None:
        if self._spans:
            self.clock.settle()
            self._fold_spans()
        if "step_time" in self._seconds:
            busy = sum(self._seconds.get(f"time/{name}_s", 0.0) for name in BUSY_STAGES)  # these do not overlap
            self._seconds["time/idle_s"] = max(0.0, self._seconds["step_time"] - busy)


def describe_times(run_seconds: Mapping[str, float], steps: int) -> str:
    """Where the time of a run's steps went, stage by stage, in one line; empty without a timed step."""
    whole = run_seconds.get("step_time", 0.0)
    if not steps or whole <= 0.0:
        return ""
    shown = [(label, sum(run_seconds.get(f"time/{name}_s", 0.0) for name in names)) for label, names in _SHOWN]
    waited = run_seconds.get("time/views_s", 0.0)
    shown.append(("waiting for views", waited))
    shown.append(("for the host besides", max(0.0, run_seconds.get("time/idle_s", 0.0) - waited)))
    parts = [f"{label} {spent / steps:.3g} s ({spent / whole:.0%})" for label, spent in shown if spent > 0.0]
    beside = run_seconds.get("time/views_background_s", 0.0)
    more = f"; views made beside them took {beside / steps:.3g} s" if beside else ""
    return f"a step took {whole / steps:.3g} s: {', '.join(parts)}{more}"


_SHOWN = (
    ("rollout", ("rollout",)),
    ("teacher", ("teacher",)),
    ("student", ("student", "loss", "backward")),
    ("update", ("update",)),
)
_JOINS: tuple[Callable[[list[float]], float], ...] = (sum, sum, sum, max, min, max)


def _join(parts: list[dict[str, float]], join: Callable[[list[float]], float]) -> dict[str, float]:
    """Each name of any process, joined over the processes that have it."""
    names = {name for part in parts for name in part}
    return {name: join([part[name] for part in parts if name in part]) for name in names}
