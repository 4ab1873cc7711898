"""What a run was made with: device, driver, versions and the folder the package was read from.

`python -m benches.environment FILE` writes it as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "imagine-opd",
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "numpy",
    "pillow",
    "liger-kernel",
    "trl",
    "cut-cross-entropy",
)


def describe_environment() -> dict[str, Any]:
    """Names and versions; a package that is not installed is null."""
    import imagine_opd

    return {
        "device": describe_device(),
        "cpu": describe_cpu(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "on_gpu": torch.cuda.is_available(),
        "driver": read_driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: find_version(name) for name in PACKAGES},
        "package_folder": str(Path(imagine_opd.__file__).parent),
    }


def describe_device() -> str:
    """The GPU's name, or the CPU's architecture."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def describe_cpu() -> str:
    """The processor's name and how many of its cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else f'{platform.machine()} CPU'}, {os.cpu_count()} cores"


def name_file(device: str) -> str:
    """A device's name in letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", device)


def find_version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_driver() -> str | None:
    """The GPU driver's version as nvidia-smi gives it."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(describe_environment(), indent=1), encoding="utf-8")
