"""What this device can do at best: the copy bandwidth and the matrix-product rate that the benches are held against.

`python -m benches.ceilings FILE` measures both and writes them as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benches.measure import find_device, time_in_turns


@dataclass(frozen=True)
class Ceilings:
    """Measured, not read from a data sheet."""

    copy_gb_per_s: float
    """A large copy within the device, bytes read plus bytes written, 1 GB = 1e9 bytes."""
    gemm_tflop_per_s: float
    """A square matrix product of random bf16 data (fp32 on a CPU), two operations per multiply and add."""


def measure_ceilings(device: torch.device, copy_bytes: int | None = None, side: int | None = None) -> Ceilings:
    """Copy `copy_bytes` and multiply two [side, side] matrices; 4 GiB and 8192 on a GPU by default, less on a CPU."""
    on_gpu = device.type == "cuda"
    copy_gb_per_s = measure_copy(device, copy_bytes or (2**32 if on_gpu else 2**28))
    return Ceilings(copy_gb_per_s, measure_gemm(device, side or (8192 if on_gpu else 1024)))


def measure_copy(device: torch.device, copy_bytes: int) -> float:
    """GB/s, read plus written."""
    source = torch.randint(0, 256, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turns({"copy": lambda: {"target": target.copy_(source)}}, device, seconds=1.0)["copy"]
    return 2 * copy_bytes / timing.median_ms / 1e6


def measure_gemm(device: torch.device, side: int) -> float:
    """TFLOP/s of [side, side] times [side, side]."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = time_in_turns({"gemm": lambda: {"product": left @ right}}, device, seconds=1.0)["gemm"]
    return 2 * side**3 / timing.median_ms / 1e9


def main(arguments: list[str]) -> None:
    """Measure and write; a second argument, `tiny`, is for trying the script out."""
    sizes = {"copy_bytes": 2**24, "side": 256} if arguments[1:] == ["tiny"] else {}
    found = measure_ceilings(find_device(), **sizes)
    print(f"copy {found.copy_gb_per_s:.0f} GB/s, matrix product {found.gemm_tflop_per_s:.2f} TFLOP/s")
    Path(arguments[0]).write_text(json.dumps(asdict(found)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
