"""A step's figures: summed while it runs, given out as means, totals, extremes and seconds per step at each log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StepMetrics:
    """Collects figures between two logs. `synchronize` is called at both ends of a timed stage (for a GPU)."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.steps = 0
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

    def start_step(self) -> None:
        """An optimizer step begins: what is timed is per step, and `step_time` is the seconds of a whole one."""
        self.synchronize()
        self.steps += 1
        self._step_started = time.perf_counter()

    def end_step(self) -> None:
        """The optimizer has stepped; what is done between steps (logs, checkpoints, evaluation) is no part of one."""
        self.synchronize()
        self._seconds["step_time"] += time.perf_counter() - self._step_started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the log shows `time/NAME_s`, seconds per step."""
        self.synchronize()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self._seconds[f"time/{name}_s"] += time.perf_counter() - started

    def drain(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, float]:
        """The figures since the last log, which is now. `gather` gives those of all processes, which become one."""
        parts = gather((self._sums, self._counts, self._totals, self._maxima, self._minima, self._seconds))
        steps = max(self.steps, 1)
        self.clear()
        sums, counts, totals, maxima, minima, seconds = (
            _join([part[place] for part in parts], join) for place, join in enumerate(_JOINS)
        )
        figures = {name: total / counts[name] for name, total in sums.items() if counts[name]}
        for found in (totals, maxima, minima):
            figures.update(found)
        figures.update({name: spent / steps for name, spent in seconds.items()})
        return dict(sorted(figures.items()))


_JOINS: tuple[Callable[[list[float]], float], ...] = (sum, sum, sum, max, min, max)


def _join(parts: list[dict[str, float]], join: Callable[[list[float]], float]) -> dict[str, float]:
    """Each name of any process, joined over the processes that have it."""
    names = {name for part in parts for name in part}
    return {name: join([part[name] for part in parts if name in part]) for name in names}
