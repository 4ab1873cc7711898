"""A step's figures: summed while it runs, given out as means, totals, maxima and seconds per step at each log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
        self._seconds: dict[str, float] = defaultdict(float)

    def add_mean(self, name: str, total: float, count: float = 1.0) -> None:
        """A sum over `count` items; the log shows their mean."""
        self._sums[name] += total
        self._counts[name] += count

    def add_total(self, name: str, number: float = 1.0) -> None:
        """A count; the log shows its total."""
        self._totals[name] += number

    def add_max(self, name: str, value: float) -> None:
        """A value; the log shows the largest."""
        self._maxima[name] = max(value, self._maxima.get(name, value))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the log shows `time/NAME_s`, seconds per step."""
        self.synchronize()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self._seconds[name] += time.perf_counter() - started

    def drain(self) -> dict[str, float]:
        """The figures since the last log, which is now."""
        figures = {name: total / self._counts[name] for name, total in self._sums.items() if self._counts[name]}
        figures.update(self._totals)
        figures.update(self._maxima)
        figures.update({f"time/{name}_s": spent / max(self.steps, 1) for name, spent in self._seconds.items()})
        self.clear()
        return dict(sorted(figures.items()))
