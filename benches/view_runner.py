"""One case of the views: pixels of ours and of the peers are compared, then all take turns, then memory is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benches.measure import Timing, time_in_turns
from benches.table import OURS, compute_ratio
from benches.view_cases import BEST, ViewCase, ViewPeer
from benches.view_files import Level
from benches.view_memory import measure_peak_mib
from benches.view_peers import HALF
from benches.view_table import ViewResults, ViewRow

CPU = torch.device("cpu")
MEMORY_TARGET = 3.0
"""Ours is to need a third of what a peer needs."""


@dataclass(frozen=True)
class Difference:
    """Between pixels, in levels of 255."""

    most: float
    mean: float


def run_case(benchmark: Any, case: ViewCase, level: Level, results: ViewResults) -> None:
    """Compare, time in turns, record; then pytest-benchmark times ours by its own clock for its own statistics."""
    with limit_threads(case.threads):
        differences = compare_all(case)
        steps = {**case.ours, **{name: peer.step for name, peer in case.peers.items()}}
        # The comparison has run them all once.
        timings = time_in_turns(steps, CPU, level.seconds, level.rounds, warm_up=False)
        rows = make_rows(case, timings, differences) + measure_memory_of(case)
        results.rows += rows
        benchmark.extra_info.update(
            device=results.device,
            level=level.name,
            threads=case.threads,
            times_faster={row.peer: round(row.ratio, 3) for row in rows if row.unit == "ms"},
            times_smaller={row.peer: round(row.ratio, 3) for row in rows if row.unit == "MiB"},
        )
        benchmark.pedantic(case.ours[OURS], rounds=max(1, min(5, timings[OURS].rounds - 1)))


@contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """PyTorch's, for the length of a case; ours are said by its config."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare_all(case: ViewCase) -> dict[str, Difference]:
    """The difference of each peer from the way of ours it is held against; one that must be equal and is not fails."""
    differences = {}
    for ours, step in case.ours.items():
        answer = {name: case.expand(pixels) for name, pixels in step().items()}
        for name, peer in case.peers.items():
            if peer.against == ours:
                differences[name] = compare_pixels(answer, peer.step())
                found = differences[name]
                assert found.most == 0 or not peer.exact, f"{case.name}: {ours} is off {name} by {found.most:.3g} / 255"
    return differences


def compare_pixels(ours: Mapping[str, Tensor], peer: Mapping[str, Tensor]) -> Difference:
    """The worst over what a step returns; shapes may differ in how frames are grouped."""
    assert ours.keys() == peer.keys(), f"{sorted(ours)} against {sorted(peer)}"
    found = [_compare(pixels.reshape(-1), peer[name].reshape(-1)) for name, pixels in ours.items()]
    return max(found, key=lambda difference: (difference.most != difference.most, difference.most))


def _compare(ours: Tensor, peer: Tensor) -> Difference:
    assert ours.shape == peer.shape, f"{ours.numel()} values against {peer.numel()}"
    assert ours.dtype == peer.dtype, f"{ours.dtype} against {peer.dtype}"
    if torch.equal(ours, peer):
        return Difference(0.0, 0.0)
    apart = (ours.float() - peer.float()).abs()
    levels = 255 * HALF["image_std"][0] if ours.is_floating_point() else 1.0
    return Difference(float(apart.max()) * levels, float(apart.mean()) * levels)


def make_rows(case: ViewCase, timings: Mapping[str, Timing], differences: Mapping[str, Difference]) -> list[ViewRow]:
    """A row for each peer. Where several peers contend to be the best, it is the fastest that is held to the target.

    Fastest by CPU time: contenders work on as many threads, and other work on the machine must not choose among them.
    """
    contenders = [name for name, peer in case.peers.items() if peer.role == BEST]
    best = min(contenders, key=lambda name: timings[name].cpu_ms or timings[name].median_ms, default=None)
    return [make_row(case, name, peer, timings, differences[name], name == best) for name, peer in case.peers.items()]


def make_row(
    case: ViewCase, name: str, peer: ViewPeer, timings: Mapping[str, Timing], difference: Difference, is_best: bool
) -> ViewRow:
    """The peer beside the way of ours it is held against."""
    theirs, ours = timings[name], timings[peer.against]
    role = peer.role if peer.role != BEST or is_best else ""
    return ViewRow(
        case=case.name,
        threads=case.threads,
        peer=name,
        role=role,
        against=peer.against,
        unit="ms",
        peer_value=theirs.median_ms,
        ours_value=ours.median_ms,
        ratio=compute_ratio(theirs.median_ms, ours.median_ms),
        cpu_ratio=compute_ratio(theirs.cpu_ms, ours.cpu_ms) if theirs.cpu_ms and ours.cpu_ms else None,
        target=case.targets.get(role or name, case.targets.get(name)),
        rounds=theirs.rounds,
        max_difference=difference.most,
        mean_difference=difference.mean,
    )


def measure_memory_of(case: ViewCase) -> list[ViewRow]:
    """Peak memory of each step the case names, each in a process of its own."""
    peaks = {name: measure_peak_mib(name, case.threads, case.files) for name in case.memory_of}
    ours = peaks.pop(OURS, None)
    return [
        ViewRow(
            case=case.name,
            threads=case.threads,
            peer=name,
            role=case.peers[name].role,
            against=OURS,
            unit="MiB",
            peer_value=peak,
            ours_value=ours,
            ratio=peak / ours,
            target=MEMORY_TARGET,
        )
        for name, peak in peaks.items()
        if peak and ours
    ]
