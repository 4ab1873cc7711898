"""Peak memory of one call on a batch of files: the name of a step in, MiB beyond what the process held before out.

    python -m benches.view_memory ours 1 FILE...

A process of its own for each figure: what another step has left behind would be in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure_peak_mib(step: str, threads: int, paths: Sequence[Path]) -> float | None:
    """In a fresh process; None where the system does not count it (it is not Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benches.view_memory", step, str(threads), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{step}: {done.stderr.strip()[-400:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def read_status_mib(field: str) -> float:
    """A field of this process's status: VmRSS, what it holds; VmHWM, the most it has held."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise LookupError(field)


def measure_here(step: str, threads: int, paths: Sequence[Path]) -> float:
    """One call, after another on a small picture that loads what is loaded once."""
    import torch
    from PIL import Image

    from benches.view_cases import make_batch_steps
    from benches.view_peers import silence_deprecations

    silence_deprecations()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.jpeg"
        Image.new("RGB", (320, 320), (90, 120, 150)).save(small)
        make_batch_steps([small], threads)[step]()
    run = make_batch_steps(paths, threads)[step]
    before = read_status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most so far is what it holds now
    answer = run()
    peak = read_status_mib("VmHWM") - before
    assert all(len(pixels) for pixels in answer.values())
    return peak


if __name__ == "__main__":
    name, count, *files = sys.argv[1:]
    print(json.dumps(measure_here(name, int(count), [Path(file) for file in files])))
