"""The kernels as compiled for GPUs that need not be there: values stay in registers and loads are wide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "benches/baselines/compiled_kernels.json"
MOST_SPILLED_BYTES = 64
"""A few words at a loop's edge; a kernel that really spills does so by hundreds."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    pytest.importorskip("triton.backends.nvidia")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    script = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:triton", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr  # the launch options settle what Triton would warn about
    rows: list[dict[str, object]] = json.loads(done.stdout)
    print(*rows, sep="\n")  # shown by pytest -s, or when a test fails
    return rows


def name(row: dict[str, object]) -> tuple[object, ...]:
    return row["architecture"], row["kernel"], row["variant"]


def test_no_kernel_spills_beyond_the_bound(compiled: list[dict[str, object]]) -> None:
    assert [row for row in compiled if row["spilled_bytes"] > MOST_SPILLED_BYTES] == []


def test_two_programs_fit_on_a_multiprocessor(compiled: list[dict[str, object]]) -> None:
    # 65,536 registers.
    assert max(row["registers"] * 32 * row["warps"] for row in compiled) <= 65536 // 2
    assert max(row["shared_bytes"] for row in compiled) <= 160 * 1024


def test_rows_of_aligned_vocabularies_load_in_wide_words(compiled: list[dict[str, object]]) -> None:
    aligned = [
        row
        for row in compiled
        if row["kernel"] in ("stats_kernel", "gradient_kernel", "both_kernel", "second_look_kernel")
        and "V=59" not in row["variant"]
        and ("151669" not in row["variant"] or "padded" in row["variant"])
    ]
    assert len(aligned) > 40
    assert [name(row) for row in aligned if not row["wide_loads"]] == []


def test_committed_report_lists_the_variants_that_there_are(compiled: list[dict[str, object]]) -> None:
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    assert sorted(map(name, report["kernels"])) == sorted(map(name, compiled))
