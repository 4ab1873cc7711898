"""The next step's rows read, and their views and prompts made by a thread, while the device works on this step.

One thread makes them, a step at a time, in the order in which they are asked for. Rust does most of the work, without
Python's lock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from imagine_opd.types import Row

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class StepRows(Generic[Made]):
    """The rows of one step, micro-batch by micro-batch. is_last: the loader has no more after them.

    made: what the thread makes of them; `None`: nothing was begun.
    """

    batches: list[list[Row]]
    is_last: bool
    made: Future[tuple[list[Made], float]] | None = None


class Lookahead(Generic[Made]):
    """Args:
    make: rows to what is made of them, one item a row. It runs in the thread.
    is_last: whether the loader has just given its last micro-batch.
    is_on: false: rows are read when they are asked for, and nothing is made ahead.
    """

    def __init__(
        self, make: Callable[[Sequence[Row]], list[Made]], is_last: Callable[[], bool], is_on: bool = True
    ) -> None:
        self._make, self._is_last, self._is_on = make, is_last, is_on
        self._pool: ThreadPoolExecutor | None = None
        self._source: Iterator[list[Row]] | None = None
        self._next: StepRows[Made] | None = None
        self._failed: Exception | None = None

    def take(self, source: Iterator[list[Row]], count: int, more: bool) -> StepRows[Made]:
        """The next `count` micro-batches of `source`; where `more` are to come, those after them are begun."""
        rows = self._next if self._source is source else None
        self._source, self._next = source, None
        if self._failed is not None:  # while these rows were read ahead
            failed, self._failed = self._failed, None
            raise failed
        rows = rows or self._read(source, count)
        if more and self._is_on and not rows.is_last:
            try:
                self._next = self._read(source, count)
            except Exception as error:  # of whatever dataset: this step has its rows
                self._failed = error
        return rows

    def close(self) -> None:
        """Let the thread end; what it has begun is dropped."""
        self._source = self._next = self._failed = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _read(self, source: Iterator[list[Row]], count: int) -> StepRows[Made]:
        batches = list(itertools.islice(source, count))
        rows = [row for batch in batches for row in batch]
        is_last = len(batches) < count or self._is_last()
        return StepRows(batches, is_last, self._begin(rows) if self._is_on and rows else None)

    def _begin(self, rows: Sequence[Row]) -> Future[tuple[list[Made], float]]:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="imagine_opd-views")
        return self._pool.submit(self._run, rows)

    def _run(self, rows: Sequence[Row]) -> tuple[list[Made], float]:
        started = time.perf_counter()
        return self._make(rows), time.perf_counter() - started
