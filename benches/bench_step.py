"""One optimizer step of the trainer against a plain Hugging Face loop and TRL's trainer: equal losses first, then time
and memory."""

from __future__ import annotations

import pytest

from benches.step_plan import LEVELS, choose_level, run_planned
from benches.table import OURS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    planned = LEVELS[choose_level(metafunc.config)]()
    metafunc.parametrize("planned", planned, ids=[part.id for part in planned])


def test_step(benchmark, planned, step_folder, step_results):
    def time_ours(step):
        return benchmark.pedantic(step, rounds=1)

    rows = run_planned(planned, step_folder, step_results, time_ours=time_ours)
    ours = next(row for row in rows if row.peer == OURS)
    benchmark.extra_info.update(
        device=step_results.device,
        level=step_results.level,
        stages_s=ours.stages_s,
        peak_mib=ours.peak_mib,
        peers={row.peer: {"step_s": row.step_s, "peak_mib": row.peak_mib} for row in rows if row.peer != OURS},
    )
