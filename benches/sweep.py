"""Tuning: launch shapes of the row kernels and chunk heights of the linear ones are tried, the fastest are written.

`python -m benches.sweep FOLDER --seconds S [--publish] [--tiny]` writes `sweep.json` (every candidate) and
`tuning.json` (the winners, in the form of `kernels/tuning.json`); `--publish` also writes them into that table, in the
tree and in the package in use. A candidate's answer is compared with the truth before it is timed; the
candidates of one question are timed in turns. `--tiny` interprets the kernels on a CPU to try the script out.
"""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benches.bench_linear_token_stats import compute_kl
from benches.bench_token_stats import compute_fused, compute_gradient, compute_stats
from benches.cases import TOLERANCES, compare, shorten
from benches.environment import describe_device
from benches.measure import Step, find_device, measure_memory, time_in_turns
from benches.problems import Answer, make_linear_problem, make_logits_problem, solve_linear, solve_logits
from benches.shapes import LINEAR_SHAPES, LOGITS_SHAPES
from imagine_opd.kernels.tuning import TABLE, TileConfig, Tuning, override, save

MOST_EXTRA_MIB = 3072.0
"""What the linear kernels may take beyond inputs and outputs."""

# (columns of a tile, warps): 8 to 64 columns for each thread.
TILES = [(2048, 2), (2048, 4), (2048, 8), (4096, 2), (4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16)]
FIRST_STAGES, OTHER_STAGES = 3, [2, 4]
CHUNK_ROWS = [512, 640, 768, 1024, 1280, 1536, 1664]
DEFAULT = "default"
NO_TIME = "no time left"
ROW_KERNELS_SHARE = 0.6
"""Of the time; chunks have the rest."""

LEAST_GAIN = 0.02
"""By which a candidate must be faster than what stands: less is within the spread of the times."""


@dataclass
class Sweep:
    """Candidates tried so far, and until when new ones may begin."""

    device: torch.device
    end: float
    candidates: list[dict[str, Any]] = field(default_factory=list)

    def race(self, question: str, steps: Mapping[str, Step], truth: Answer, dtype: torch.dtype) -> dict[str, float]:
        """Milliseconds of the candidates that answer right; those that fail are noted with the reason."""
        right: dict[str, Step] = {}
        notes: dict[str, dict[str, Any]] = {}
        for name, step in steps.items():
            notes[name] = self.check(step, truth, dtype)
            if "left_out" not in notes[name]:
                right[name] = step
        timings = time_in_turns(right, self.device, seconds=1.0, rounds=(3, 15)) if right else {}
        for name, timing in timings.items():
            memory = measure_memory(right[name], self.device)
            notes[name] |= {"median_ms": timing.median_ms, "spread_ms": timing.spread_ms}
            notes[name] |= {"extra_mib": None if memory is None else memory.extra_mib}
        self.candidates += [{"question": question, "candidate": name, **note} for name, note in notes.items()]
        for name, note in notes.items():
            print(f"{question}: {name}: {note.get('left_out') or format(note['median_ms'], '.3f') + ' ms'}", flush=True)
        # Over the limit of memory a candidate is timed and shown, but cannot win.
        return {
            name: timing.median_ms
            for name, timing in timings.items()
            if (notes[name]["extra_mib"] or 0.0) <= MOST_EXTRA_MIB or not question.startswith("chunk")
        }

    def list_faults(self) -> list[str]:
        """Wrong answers, and questions that no candidate answered though there was time."""
        faults = [f"{c['question']}: {c['candidate']}: {c['left_out']}" for c in self.candidates if c.get("wrong")]
        asked: dict[str, list[dict[str, Any]]] = {}
        for candidate in self.candidates:
            asked.setdefault(candidate["question"], []).append(candidate)
        for question, candidates in asked.items():
            if all("left_out" in c for c in candidates) and any(c["left_out"] != NO_TIME for c in candidates):
                faults.append(f"{question}: no candidate ran, the last: {candidates[-1]['left_out']}")
        return faults

    def check(self, step: Step, truth: Answer, dtype: torch.dtype) -> dict[str, Any]:
        """`{"error": ...}`, with `left_out` where the candidate may not be timed."""
        if time.monotonic() > self.end:
            return {"left_out": NO_TIME}
        try:
            error = compare(step, truth)
        except Exception as raised:  # too much shared memory, say: the next candidate may do
            return {"left_out": f"{type(raised).__name__}: {shorten(raised)}"}
        if error <= TOLERANCES[dtype]:
            return {"error": error}
        return {"error": error, "wrong": True, "left_out": f"answers differ by {error:.2g}"}


def with_tuning(step: Step, tuning: Tuning) -> Step:
    """The step under these launch shapes."""

    def tuned() -> Answer:
        with override(tuning):
            return step()

    return tuned


def pick(times_ms: Mapping[str, float], fallback: str) -> str:
    """The fastest name; the fallback where nothing was timed, or where it is as fast within `LEAST_GAIN`."""
    if not times_ms:
        return fallback
    best = min(times_ms, key=lambda name: times_ms[name])
    return fallback if times_ms.get(fallback, float("inf")) * (1 - LEAST_GAIN) <= times_ms[best] else best


def sweep_tiles(
    sweep: Sweep, name: str, step: Step, truth: Answer, base: Tuning, tiles: Sequence[tuple[int, int]]
) -> Tuning:
    """The best tile of one row kernel (`stats`, `gradient` or `fused`): columns and warps first, then stages."""
    current: TileConfig = getattr(base, name)

    def try_tiles(question: str, candidates: Sequence[TileConfig]) -> TileConfig:
        named = {format_tile(tile): tile for tile in candidates}
        steps = {key: with_tuning(step, replace(base, **{name: tile})) for key, tile in named.items()}
        return named[pick(sweep.race(question, steps, truth, dtype_of(truth)), next(iter(named)))]

    best = try_tiles(f"{name}: tile", [current, *(TileConfig(*tile, FIRST_STAGES) for tile in tiles)])
    best = try_tiles(f"{name}: stages", [best, *(best._replace(num_stages=stages) for stages in OTHER_STAGES)])
    return replace(base, **{name: best})


def sweep_rows_in_flight(sweep: Sweep, step: Step, truth: Answer, base: Tuning, counts: Sequence[int]) -> Tuning:
    """How many rows the fused kernel has under way: fewer keep their logits in the cache for the second pass."""
    steps = {str(count): with_tuning(step, replace(base, rows_in_flight=count)) for count in counts}
    won = pick(sweep.race("fused: rows in flight", steps, truth, dtype_of(truth)), str(base.rows_in_flight))
    return replace(base, rows_in_flight=int(won))


def sweep_row_kernels(sweep: Sweep, tiny: bool) -> Tuning:
    """Statistics, then the gradient with the best statistics, then the fused launch and its rows in flight."""
    shape = LOGITS_SHAPES["tiny" if tiny else "target"][0]
    dtype = torch.float32 if tiny else torch.bfloat16
    problem = make_logits_problem(*shape, dtype, sweep.device)
    truth = solve_logits(problem, uses_teacher=True)
    weight_N = torch.full_like(problem.old_logprob_N, 1 / shape.rows)
    steps: dict[str, Step] = {
        "stats": partial(compute_stats, problem, backend="triton"),
        "gradient": partial(compute_gradient, problem, backend="triton"),
        "fused": partial(compute_fused, problem, weight_N, backend="triton"),
    }
    tuning = Tuning()
    for name, step in steps.items():
        tuning = sweep_tiles(sweep, name, step, truth, tuning, TILES[1:2] if tiny else TILES)
    processors = 2 if tiny else torch.cuda.get_device_properties(sweep.device).multi_processor_count
    counts = [0, processors] if tiny else [0, processors // 2, processors * 3 // 4, processors, 2 * processors]
    return sweep_rows_in_flight(sweep, steps["fused"], truth, tuning, counts)


def sweep_chunk_rows(sweep: Sweep, tiny: bool, base: Tuning) -> Tuning:
    """The best height of a chunk for each hidden size, frozen and trained; the default is kept where it wins."""
    shapes = LINEAR_SHAPES["tiny" if tiny else "target"]
    dtype = torch.float32 if tiny else torch.bfloat16
    chunk_rows = dict(base.chunk_rows)
    for shape in [shape for shape in shapes if shape.rows == shapes[0].rows]:
        for trains_head in (False, True):
            key = f"{shape.hidden}+dW" if trains_head else str(shape.hidden)
            if time.monotonic() > sweep.end:
                print(f"chunk rows {key}: no time left", flush=True)
                continue
            problem = make_linear_problem(*shape, dtype, sweep.device, trains_head)
            truth = solve_linear(problem, uses_teacher=True)
            heights: dict[str, int | None] = {DEFAULT: None}
            heights |= {str(rows): rows for rows in ([4] if tiny else CHUNK_ROWS)}
            steps = {
                name: with_tuning(partial(compute_kl, problem, chunk_rows=rows), base) for name, rows in heights.items()
            }
            won = heights[pick(sweep.race(f"chunk rows {key}", steps, truth, dtype), DEFAULT)]
            if won is not None:
                chunk_rows[key] = won
            del problem, truth, steps
            if sweep.device.type == "cuda":
                torch.cuda.empty_cache()
    return replace(base, chunk_rows=chunk_rows)


def format_tile(tile: TileConfig) -> str:
    """As candidates are named."""
    return f"{tile.block_v} columns, {tile.num_warps} warps, {tile.num_stages} stages"


def dtype_of(truth: Answer) -> torch.dtype:
    """Of the tolerance: the truth is fp64 for the tiny fp32 problem, fp32 for the bf16 one."""
    return torch.float32 if truth["grad"].dtype == torch.float64 else torch.bfloat16


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0, help="when no further candidate begins")
    parser.add_argument("--publish", action="store_true", help="also into kernels/tuning.json")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()
    sweep = Sweep(find_device(), started + ROW_KERNELS_SHARE * arguments.seconds)
    tables = [arguments.folder / "tuning.json", *(list_tables() if arguments.publish else [])]
    # Written after each half, in case the next one does not come back.
    tuning = sweep_row_kernels(sweep, arguments.tiny)
    write(arguments.folder, tables, sweep, tuning)
    sweep.end = started + arguments.seconds
    write(arguments.folder, tables, sweep, sweep_chunk_rows(sweep, arguments.tiny, tuning))
    faults = sweep.list_faults()
    if faults:
        sys.exit("\n".join(faults))


def list_tables() -> list[Path]:
    """Of the package in use and of the tree: one file where the first is a link to the second."""
    return sorted({TABLE.resolve(), Path(__file__).resolve().parents[1] / "kernels/tuning.json"})


def write(folder: Path, tables: Sequence[Path], sweep: Sweep, tuning: Tuning) -> None:
    """The winners into each table, the candidates into the folder."""
    for table in tables:
        save(table, describe_device(), tuning)
    found = {"device": describe_device(), "tuning": asdict(tuning), "candidates": sweep.candidates}
    (folder / "sweep.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
