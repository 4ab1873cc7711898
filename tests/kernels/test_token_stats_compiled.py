"""The kernels as compiled for sm_90, on any machine: the launch shapes chosen leave every value in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_no_register_spills_on_sm90(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_for_sm90.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr  # the launch options settle what Triton would warn about
    kernels = json.loads(done.stdout)
    print(*kernels, sep="\n")  # shown by pytest -s, or when the test fails
    assert len(kernels) == 13
    assert [kernel for kernel in kernels if kernel["spilled_bytes"]] == []
    # Two programs of 8 warps and more fit on a multiprocessor of 65,536 registers.
    assert max(kernel["registers"] * 32 * kernel["warps"] for kernel in kernels) <= 65536 // 2
