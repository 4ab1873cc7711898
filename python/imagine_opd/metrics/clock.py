"""Seconds between two moments of a run: by the host's clock, or on a GPU by its own, which the host never waits for."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks moments; `seconds` tells the time between two of them."""

    def mark(self) -> Any:
        """Now."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to a later one."""
        return float(end - begin)

    def is_past(self, mark: Any) -> bool:
        """Whether a mark has come to pass."""
        return True

    def settle(self) -> None:
        """To be called before `seconds`: waits until the last mark has come to pass."""


class DeviceClock(Clock):
    """Marks are events in the GPU's queue: the moment at which it has done all that was asked of it before.

    Between a mark behind the last work and one before the next it idles, and that is what these clocks then show.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """See `Clock.mark`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """See `Clock.seconds`."""
        return float(begin.elapsed_time(end)) / 1000.0

    def is_past(self, mark: Any) -> bool:
        """See `Clock.is_past`."""
        return bool(mark.query())

    def settle(self) -> None:
        """See `Clock.settle`."""
        torch.cuda.synchronize(self.device)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device. Of other devices than CUDA's the host's, which there tells when work was asked for."""
    return DeviceClock(device) if device.type == "cuda" else Clock()
