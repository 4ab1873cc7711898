"""Everything that needs a GPU in one command, in five minutes: ceilings, tests, tuning, benches, report.

    python benches/gpu_suite.py --output DIR

Each stage is a process of its own with a time limit; a stage that fails or runs late leaves the others their results.
Writes into DIR: summary.md, <device>.json (what is kept as benches/baselines/<device>.json), benches.json
(pytest-benchmark's), sweep.json, tuning.json, tests.log and suite.log. Exit code 1 if a stage or a test failed.
`--step-seconds 280` adds whole optimizer steps of a 4B model, and step.json; `--stages step` runs that stage alone.
`--cpu` runs all of it at tiny shapes without a GPU, to try the script out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benches import KERNEL_BENCHES  # noqa: E402
from benches.environment import name_file  # noqa: E402
from benches.packages import SetupError, list_stale_kernels, make_environment  # noqa: E402
from benches.step_table import read_kept  # noqa: E402
from benches.step_table import render_page as render_step  # noqa: E402
from benches.table import Row, render_left_out, render_markdown, render_text  # noqa: E402

SECONDS = 300.0
LAST_SECONDS = 10.0
"""Kept for the report."""
LATE_SECONDS = {"gpu": 60.0, "cpu": 300.0}
"""How late the last case of the step may end; without a GPU nobody waits for it."""

STAGE_SECONDS = {"environment": 30.0, "ceilings": 30.0, "tests": 90.0, "sweep": 70.0, "step": 520.0, "benches": 520.0}
"""The most a stage may take; the step gets what the command line gives it, the benches what is left. On an H200 all but
the step took 5, 6, 60, 46 and (benches) 150 seconds. Of the step the first case had not ended after
164 seconds at 256 new tokens, where ours takes 24 seconds a step; at 64 ours takes 4 to 6 and the plain loop 12."""

TEST_PROCESSES = 4
"""Most of the tests' time is compiling kernels."""

STEP_CPU_SECONDS = 60.0
"""Of the step without a GPU, where it is not said."""


@dataclass
class Stage:
    """How a stage went."""

    name: str
    seconds: float
    outcome: str
    """`passed`, `failed` with an exit code, `stopped` at its limit, or `skipped` for want of time."""

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass
class Suite:
    """One run: where it writes, when it ends, and what it has found so far."""

    output: Path
    work: Path
    environment: dict[str, str]
    on_cpu: bool
    end: float
    chosen: tuple[str, ...] = tuple(STAGE_SECONDS)
    step_s: float = 0.0
    """For the stage `step`; 0 leaves it out."""
    stages: list[Stage] = field(default_factory=list)

    def run(
        self,
        name: str,
        arguments: list[str],
        log: str = "suite.log",
        keep_s: float = LAST_SECONDS,
        limit_s: float | None = None,
    ) -> Stage:
        """Run `python arguments` as a stage, if it was chosen, and append what it says to a log."""
        if name not in self.chosen:
            return Stage(name, 0.0, "passed")
        limit_s = min(limit_s or STAGE_SECONDS[name], self.end - time.monotonic() - keep_s)
        if limit_s < 1.0:
            return self.close(Stage(name, 0.0, "skipped: no time left"))
        started = time.monotonic()
        with (self.output / log).open("a", encoding="utf-8") as file:
            file.write(f"\n== {name}: python {' '.join(arguments)}\n")
            file.flush()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
                outcome = "passed" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                outcome = f"stopped after {limit_s:.0f} s"
        return self.close(Stage(name, time.monotonic() - started, outcome))

    def close(self, stage: Stage) -> Stage:
        """Note it and say so."""
        self.stages.append(stage)
        print(f"{stage.name}: {stage.outcome} ({stage.seconds:.0f} s)", flush=True)
        return stage

    def seconds_left(self) -> float:
        """For further stages."""
        return self.end - time.monotonic() - LAST_SECONDS

    def read_json(self, name: str) -> Any:
        """What a stage left in the work folder, or None."""
        path = self.work / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def run_stages(suite: Suite) -> None:
    """In the order in which one needs another: tuning comes before the benches that use it."""
    suite.run("environment", ["-m", "benches.environment", str(suite.work / "environment.json")])
    run_ceilings(suite)
    run_tests(suite)
    run_sweep(suite)
    if suite.step_s:
        run_step(suite)
    run_benches(suite)


def run_ceilings(suite: Suite) -> None:
    """What the device can do."""
    tiny = ["tiny"] if suite.on_cpu else []
    suite.run("ceilings", ["-m", "benches.ceilings", str(suite.work / "ceilings.json"), *tiny])


def run_tests(suite: Suite) -> None:
    """Those with the marker `gpu`."""
    tests = ["-m", "pytest", *find_gpu_tests(), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    # pytest-benchmark warns beside xdist, and warnings of other releases of torch are no failures of a kernel.
    tests += ["-p", "no:benchmark", "-o", "filterwarnings=default"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(TEST_PROCESSES)]
    suite.run("tests", [*tests, f"--junitxml={suite.work / 'tests.xml'}"], log="tests.log")


def run_sweep(suite: Suite) -> None:
    """Launch shapes of the kernels."""
    sweep_s = max(1.0, min(STAGE_SECONDS["sweep"], suite.seconds_left()) - 20.0)
    sweep = ["-m", "benches.sweep", str(suite.work), "--seconds", f"{sweep_s:.0f}"]
    # Off the GPU the winners mean nothing and are published nowhere.
    suite.run("sweep", [*sweep, "--tiny" if suite.on_cpu else "--publish"])


def run_step(suite: Suite) -> None:
    """Whole optimizer steps beside their peers; a case begins only if one as long as the longest so far fits."""
    level = "gpu-tiny" if suite.on_cpu else "gpu"
    step = ["-m", "benches.step_plan", "--level", level, "--output", str(suite.work / "step.json")]
    seconds = min(suite.step_s, suite.seconds_left())
    suite.run(
        "step",
        [*step, "--seconds", f"{max(1.0, seconds):.0f}"],
        limit_s=seconds + LATE_SECONDS["cpu" if suite.on_cpu else "gpu"],
    )


def run_benches(suite: Suite) -> None:
    """Kernels and their peers, with what time is left."""
    # Views have no part on a GPU.
    benches = ["-m", "pytest", *KERNEL_BENCHES, "--benchmark", "-p", "no:cacheprovider"]
    benches += ["--bench-shapes", "tiny" if suite.on_cpu else "target"]
    # A bench that begins in time is given a while to end, so that pytest-benchmark can write its file.
    benches += ["--bench-seconds", f"{max(1.0, suite.seconds_left() - 40.0):.0f}"]
    benches += ["--bench-rows", str(suite.work / "rows.jsonl"), f"--benchmark-json={suite.work / 'benches.json'}"]
    suite.run("benches", benches)


def find_gpu_tests() -> list[str]:
    """Test files with the marker `gpu`; the others may need packages that a GPU machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def read_tests(path: Path) -> dict[str, Any] | None:
    """Counts and the names of failed tests, from pytest's XML."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    counts = {key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suites[0].iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def collect(suite: Suite, commit: str) -> dict[str, Any]:
    """All that was found, as it is kept."""
    environment = suite.read_json("environment.json") or {"device": "unknown"}
    lines = (suite.work / "rows.jsonl").read_text(encoding="utf-8").splitlines() if _has_rows(suite) else []
    entries = [json.loads(line) for line in lines]
    folder = environment.pop("package_folder", None)
    return {
        **environment,
        "commit": commit,
        "stale_kernels": list_stale_kernels(Path(folder)) if folder else None,
        "ceilings": suite.read_json("ceilings.json"),
        "tests": read_tests(suite.work / "tests.xml"),
        "tuning": (suite.read_json("sweep.json") or {}).get("tuning"),
        "rows": [entry["row"] for entry in entries if "row" in entry],
        "left_out": [entry["left_out"] for entry in entries if "left_out" in entry],
        "step": suite.read_json("step.json"),
        "stages": [asdict(stage) for stage in suite.stages],
    }


def _has_rows(suite: Suite) -> bool:
    return (suite.work / "rows.jsonl").is_file()


def render_summary(found: dict[str, Any]) -> str:
    """The report for people."""
    rows = [Row(**row) for row in found["rows"]]
    versions = ", ".join(f"{name} {value}" for name, value in found.get("versions", {}).items() if value)
    ceilings, tests = found["ceilings"], found["tests"]
    parts = [f"# Kernels on {found['device']}", f"Commit {found['commit']}; Python {found.get('python')}, {versions}."]
    if found["stale_kernels"]:
        parts.append(f"The package in use differs from the tree in {', '.join(found['stale_kernels'])}.")
    if ceilings:
        copy, gemm = ceilings["copy_gb_per_s"], ceilings["gemm_tflop_per_s"]
        parts.append(f"Ceilings: copy {copy:,.0f} GB/s, matrix product {gemm:,.1f} TFLOP/s.")
    if tests:
        parts.append(
            f"Tests: {tests['tests']} run, {tests['failures'] + tests['errors']} failed, {tests['skipped']} skipped."
            + "".join(f"\n- {name}" for name in tests["failed"])
        )
    parts.append("\n".join(f"- {s['name']}: {s['outcome']}, {s['seconds']:.0f} s" for s in found["stages"]))
    parts.append(render_markdown(rows) if rows else "No bench has ended.")
    parts.append(render_left_out(tuple(pair) for pair in found["left_out"]).replace("left out", "- left out"))
    if found["step"]:
        parts += ["## Steps", render_step(read_kept(found["step"]))]
    if found["tuning"]:
        parts.append(f"Tuning: `{json.dumps(found['tuning'])}`")
    return "\n\n".join(part for part in parts if part) + "\n"


def write_report(suite: Suite, commit: str) -> dict[str, Any]:
    """All files but the logs; the table on the screen."""
    found = collect(suite, commit)
    for name in ("benches.json", "sweep.json", "tuning.json", "step.json"):
        if (suite.work / name).is_file():
            shutil.copy(suite.work / name, suite.output / name)
    text = json.dumps(found, indent=1)
    (suite.output / f"{name_file(found['device'])}.json").write_text(text + "\n", encoding="utf-8")
    (suite.output / "summary.md").write_text(render_summary(found), encoding="utf-8")
    print(render_text(Row(**row) for row in found["rows"]))
    return found


def find_commit() -> str:
    """Of the tree, or `unknown` where its history did not travel."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT") or "gpu_suite_out")
    parser.add_argument("--output", type=Path, default=default, help="default: $OUT, or gpu_suite_out")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of peers, installed without an index")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGE_SECONDS, default=list(STAGE_SECONDS), help="default: all")
    parser.add_argument("--commit", default=None, help="where the tree has no history to ask")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes, no GPU")
    parser.add_argument(
        "--step-seconds", type=float, help="for whole steps of a 4B model (default: none; with --cpu 60)"
    )
    options = parser.parse_args(arguments)
    if options.step_seconds is None:
        options.step_seconds = STEP_CPU_SECONDS if options.cpu else 0.0
    end = time.monotonic() + options.seconds
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        site, work = Path(temporary) / "site", Path(temporary) / "work"
        work.mkdir()
        try:
            environment = make_environment(site, options.wheels, options.cpu)
        except SetupError as failure:
            print(failure, file=sys.stderr)
            return 1
        suite = Suite(
            options.output.resolve(), work, environment, options.cpu, end, tuple(options.stages), options.step_seconds
        )
        run_stages(suite)
        write_report(suite, options.commit or find_commit())
    return 0 if all(stage.passed for stage in suite.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
