"""Timing: named steps in, the median milliseconds and the peak memory of each out, taken in turns in one process.

A step is one call of an implementation, forward and backward, that returns the tensors it made. Steps take turns, and
every other round runs backwards, so that a busy or warm machine slows all of them alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Step = Callable[[], dict[str, Tensor]]

FLUSH_BYTES = 2**29
"""Written before each timed step on a GPU: more than ten times the L2 cache of an H200 (60 MB), so that no step finds
its inputs there."""

AHEAD_CYCLES = 4_000_000
"""Of waiting on the GPU before each timed step, 2 ms: Python queues the step's launches meanwhile, as in training,
where it runs ahead. Without it up to 0.9 ms of Python were in the times of steps of 1 ms."""

MIN_ROUNDS, MAX_ROUNDS = 3, 101


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step over all rounds."""

    median_ms: float
    spread_ms: float
    """Between the quartiles."""
    rounds: int
    cpu_ms: float | None = None
    """The median of what all threads of the process took; None on a GPU."""


@dataclass(frozen=True)
class Memory:
    """MiB of GPU memory that a step takes beside its inputs."""

    peak_mib: float
    extra_mib: float
    """The peak without the tensors it returns."""


def find_device() -> torch.device:
    """The current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has queued; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turns(
    steps: Mapping[str, Step],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS),
    *,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time every step once a round until `seconds` have passed, within `rounds` (least, most); one round warms up."""
    time_step = _make_clock(device)
    taken_ms: dict[str, list[float]] = {name: [] for name in steps}
    cpu_ms: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values() if warm_up else ():
        time_step(step)
    end = time.perf_counter() + seconds
    names = list(steps)
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() > end:
            break
        for name in names:
            wall_ms, of_threads_ms = time_step(steps[name])
            taken_ms[name].append(wall_ms)
            cpu_ms[name] += [] if of_threads_ms is None else [of_threads_ms]
        names.reverse()
    return {
        name: dataclasses.replace(
            summarize(values_ms), cpu_ms=statistics.median(cpu_ms[name]) if cpu_ms[name] else None
        )
        for name, values_ms in taken_ms.items()
    }


def summarize(values_ms: list[float]) -> Timing:
    """Median and distance of the quartiles of some times."""
    if len(values_ms) < 2:
        return Timing(values_ms[0], 0.0, len(values_ms))
    low, middle, high = statistics.quantiles(values_ms, n=4, method="inclusive")
    return Timing(middle, high - low, len(values_ms))


def measure_memory(step: Step, device: torch.device) -> Memory | None:
    """Peak memory of one call as the caching allocator counts it; None off the GPU, where nothing counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    storages = {out.untyped_storage().data_ptr(): out.untyped_storage().nbytes() for out in outputs.values()}
    return Memory(peak / 2**20, (peak - sum(storages.values())) / 2**20)


def _make_clock(device: torch.device) -> Callable[[Step], tuple[float, float | None]]:
    """A function that runs a step and gives its milliseconds, and those of all threads where the host does the work.

    By CUDA events on a GPU, by the host's clocks else.
    """
    if device.type != "cuda":

        def time_on_host(step: Step) -> tuple[float, float]:
            start, cpu_start = time.perf_counter(), time.process_time()
            answer = step()
            # Read before the answer is let go: giving memory back is no part of the step.
            taken_ms = (time.perf_counter() - start) * 1e3, (time.process_time() - cpu_start) * 1e3
            del answer
            return taken_ms

        return time_on_host

    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_on_gpu(step: Step) -> tuple[float, None]:
        flushed.fill_(1)
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)), None

    return time_on_gpu
