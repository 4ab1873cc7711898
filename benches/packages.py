"""The package under test on a machine without it: a wheel from `dist/`, unpacked into a folder of its own.

Everything of a run, kernels included, then comes from that one wheel, never half from the source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class SetupError(Exception):
    """What is missing, in a sentence."""


def make_environment(site: Path, wheels: Path | None, on_cpu: bool) -> dict[str, str]:
    """Environment variables for the stages; fills `site` with wheels where the package or peers are to come from it."""
    environment = dict(os.environ)
    # One growing segment: a peer that needs 40 GB must not find the memory in pieces.
    environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    chosen = sorted(wheels.glob("*.whl")) if wheels else []
    if not can_import(environment):
        chosen.insert(0, find_wheel(ROOT / "dist"))
    if chosen:
        install(chosen, site)
    paths = [str(site), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if not can_import(environment):
        raise SetupError("imagine_opd cannot be imported from the wheel either; build one with `maturin build`")
    return environment


def can_import(environment: dict[str, str]) -> bool:
    """Whether the package comes with its compiled part."""
    command = [sys.executable, "-c", "import imagine_opd._rust"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=False).returncode == 0


def find_wheel(folder: Path) -> Path:
    """The newest wheel of the package."""
    wheels = sorted(folder.glob("imagine_opd-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise SetupError(f"imagine_opd is not installed and {folder} holds no wheel; run `maturin build --out dist`")
    return wheels[-1]


def install(wheels: list[Path], site: Path) -> None:
    """Without an index and without dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--upgrade", "--target", str(site), *map(str, wheels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"pip could not unpack the wheels: {done.stderr.strip()[-400:]}")


def list_stale_kernels(package_folder: Path) -> list[str]:
    """Kernel files that differ between the package in use and the source tree."""
    used = package_folder / "kernels"
    return [
        path.name
        for path in sorted((ROOT / "kernels").glob("*.py"))
        if not (used / path.name).is_file() or (used / path.name).read_bytes() != path.read_bytes()
    ]
