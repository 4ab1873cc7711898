"""What the step bench measures, by level: cases and peers in, rows of the table out.

    python -m benches.step_plan --level gpu --seconds 270 --output step.json

runs a level without pytest, as the GPU suite does; a case that has not begun within the seconds is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches.environment import describe_cpu, describe_device, describe_environment
from benches.step_cases import StepCase, make_case
from benches.step_runner import Agreement, Measured, PeerError, TimeOurs, run_peers
from benches.step_table import StepResults, StepRow

GROWTH = {"crops": "crops: {}", "new_tokens": "new tokens: {}", "vocabulary": "vocabulary: {:,}"}
"""How a case of each group is called."""

PLAIN, LEAN, TRL = "plain", "plain, completion logits", "trl"


@dataclass(frozen=True)
class Planned:
    """A case with its peers. Without rounds the one step whose memory is counted is timed as well."""

    group: str
    label: str
    case: StepCase
    peers: tuple[str, ...]
    rounds: int

    @property
    def id(self) -> str:
        return f"{self.group}: {self.label}"


def plan_peers(name: str, rounds: int) -> list[Planned]:
    """The targets' cases: with an adapter, full, and beside TRL."""
    adapter, full = make_case(name, trains="lora"), make_case(name, trains="full")
    same = make_case(name, trains="lora", views="same")
    crops = f"{adapter.crops} crops"
    return [
        Planned("peers", f"LoRA, {crops}", adapter, ("ours", PLAIN, LEAN), rounds),
        Planned("peers", f"full, {crops}", full, ("ours", PLAIN, LEAN), rounds),
        Planned("peers", "LoRA, same views", same, ("ours", TRL), rounds),
    ]


def plan_growth(name: str, peers: tuple[str, ...] = ("ours", PLAIN, LEAN)) -> list[Planned]:
    """One quantity at a time, the others as in the adapter's case, which stands in all three."""
    base = make_case(name, trains="lora")
    found = []
    for group, values in {
        "crops": (1, 2, 4),
        "new_tokens": (base.new_tokens // 2, 2 * base.new_tokens),
        "vocabulary": (base.vocabulary // 4, base.vocabulary // 2),
    }.items():
        for value in values:
            case = make_case(name, trains="lora", **{group: value})
            found.append(Planned(group, f"LoRA, {GROWTH[group].format(value)}", case, peers, 0))
    return found


LEVELS: dict[str, Callable[[], list[Planned]]] = {
    "full": lambda: [*plan_peers("cpu", 3), *plan_growth("cpu")],
    "quick": lambda: plan_peers("cpu", 1),
    "tiny": lambda: [*plan_peers("tiny", 1), plan_growth("tiny")[0]],
    "gpu": lambda: plan_gpu("gpu", 1),
    "gpu-tiny": lambda: plan_gpu("tiny", 1),
}


def plan_gpu(name: str, rounds: int) -> list[Planned]:
    """The most telling first, the adapter and then all weights: time on a device is short."""
    adapter, full, same = plan_peers(name, rounds)
    static = make_case(name, trains="lora", cache="static")
    return [
        adapter,
        full,
        Planned("peers", "LoRA, static cache", static, ("ours", PLAIN), rounds),
        same,
        *(part for part in plan_growth(name, ("ours", PLAIN)) if part.group == "crops"),
    ]


def choose_level(config: Any) -> str:
    """Of a pytest run: `--bench-shapes tiny` for a look at the plumbing."""
    tiny = config.getoption("bench_shapes") == "tiny"
    if torch.cuda.is_available():
        return "gpu-tiny" if tiny else "gpu"
    return "tiny" if tiny else "full"


def run_planned(
    planned: Planned,
    folder: Path,
    results: StepResults,
    say: Callable[[str], None] = lambda text: None,
    time_ours: TimeOurs = lambda step: step(),
) -> list[StepRow]:
    """The rows of a case, which are added to the results; a peer that cannot run here is left out with its reason."""
    found, agreements, missing = run_peers(
        planned.case, planned.peers, folder, planned.rounds, say=say, time_ours=time_ours
    )
    for name, reason in missing.items():
        results.leave_out(f"{name} ({planned.label})", reason)
    rows = make_rows(planned, found, agreements)
    results.rows += rows
    return rows


def make_rows(planned: Planned, found: dict[str, Measured], agreements: dict[str, Agreement]) -> list[StepRow]:
    """A row for each peer that ran."""
    case = planned.case
    rows = []
    for name, measured in found.items():
        agreement = agreements.get(name)
        rows.append(
            StepRow(
                group=planned.group,
                case=planned.label,
                crops=case.crops,
                new_tokens=case.new_tokens,
                vocabulary=case.vocabulary,
                trains=case.trains,
                peer=name,
                rounds=len(measured.answers),
                step_s=measured.read_step_s(),
                step_cpu_s=measured.read_step_s(cpu=True),
                stages_s=measured.list_stages(),
                stages_cpu_s=measured.list_stages(cpu=True),
                peak_mib=measured.peak_mib,
                held_mib=measured.held_mib,
                loss_error=agreement.loss_error if agreement else None,
                gradient_error=max(agreement.gradient_errors.values()) if agreement else None,
            )
        )
    return rows


def start_results(level: str) -> StepResults:
    """Empty ones of this machine."""
    on_gpu = torch.cuda.is_available()
    return StepResults(describe_device() if on_gpu else describe_cpu(), level, on_gpu)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", choices=LEVELS, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="what has not begun by then is left out")
    parser.add_argument("--output", type=Path, required=True, help="the JSON that is kept; written after each case")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    results, environment = start_results(options.level), describe_environment()
    failed = False
    slowest_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for planned in LEVELS[options.level]():
            started = time.monotonic()
            if started + slowest_s > end:
                results.leave_out(planned.id, f"no time left of {options.seconds:g} s")
            else:
                try:
                    run_planned(planned, Path(folder), results, lambda text: print(text, flush=True))
                except PeerError as error:
                    results.leave_out(planned.id, str(error))
                    failed = True
                slowest_s = max(slowest_s, time.monotonic() - started)
            results.write(options.output, environment)
    print(results.render())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
