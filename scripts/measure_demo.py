"""Measures the demo: runs its commands one after another and prints the rows of docs/demo.md's table.

`python scripts/measure_demo.py --output figures --runs lora hint --seeds 0 1 2`. A run whose `result.json` is there
already is not made again, so that a list can be gone on with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RUNS: dict[str, tuple[str, ...]] = {
    "full": (),
    "sampled_token": ("--mode", "sampled_token"),
    "wrong": ("--views", "wrong"),
    "lora": ("--lora",),
    "contrast": ("--privilege", "contrast"),
    "hint": ("--privilege", "hint"),
    "wrong_hint": ("--privilege", "hint", "--views", "wrong"),
    "resolution": ("--privilege", "resolution"),
    "long": ("--long",),
    "two_processes": (),
}
"""Options of `imagine-opd demo` by the name of a run, as the table has them."""

_LAUNCH = ("accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml", "--num_processes", "2", "-m")


def measure_run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The `result.json` of one run, made unless it is there. Raises `CalledProcessError` when the run fails."""
    output = folder / f"{name}-{seed}"
    path = output / "result.json"
    if not path.exists():
        command = ["imagine_opd", "demo", *RUNS[name], "--seed", str(seed), "--output", str(output.resolve())]
        launch = _LAUNCH if name == "two_processes" else ()
        subprocess.run([sys.executable, "-m", *launch, *command], check=True, cwd=Path(__file__).parents[1])
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def format_row(name: str, results: Sequence[dict[str, Any]]) -> str:
    """One row of the table: the student before and the teacher, which no seed changes, then after, and the gap."""
    options = " ".join(RUNS[name]) or ("accelerate launch" if name == "two_processes" else "")
    first = results[0]
    after = ", ".join(f"{100 * result['student_after']['accuracy']:.1f}" for result in results)
    closed = ", ".join(f"{100 * result['gap_closed']:.1f}".replace("-", "\N{MINUS SIGN}") for result in results)
    seconds = ", ".join(f"{result['seconds']['train']:.0f}" for result in results)
    return (
        f"| {f'`{options}`' if options else 'no option'} | {100 * first['student_before']['accuracy']:.1f} "
        f"| {100 * first['teacher']['accuracy']:.1f} | {after} | {closed} | {seconds} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/figures"), help="folder of the runs' folders")
    parser.add_argument(
        "--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS), metavar="RUN", help=", ".join(RUNS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.runs:
        rows.append(format_row(name, [measure_run(name, seed, options.output) for seed in options.seeds]))
    seeds = ", ".join(str(seed) for seed in options.seeds)
    print(f"\n| run | before, % | teacher, % | after, %: seeds {seeds} | gap closed, % | training, s |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
