"""A step's figures: means by count, totals, maxima, seconds per step, and nothing left after a log."""

from __future__ import annotations

import pytest

from imagine_opd.metrics import StepMetrics


def test_figures_are_means_totals_maxima_and_seconds_per_step():
    figures = StepMetrics()
    for step in (1, 2):
        figures.steps += 1
        figures.add_mean("reverse_kl", 3.0 * step, 2 * step)
        figures.add_total("rows_dropped/truncated", step)
        figures.add_max("longest", 10.0 - step)
        with figures.stage("rollout"):
            pass
    figures.add_mean("empty", 0.0, 0)
    found = figures.drain()
    assert found.pop("time/rollout_s") >= 0.0
    assert found == {"longest": 9.0, "reverse_kl": pytest.approx(1.5), "rows_dropped/truncated": 3.0}
    assert figures.drain() == {}


def test_a_stage_waits_for_the_device_at_both_ends():
    waits = []
    with StepMetrics(lambda: waits.append(len(waits))).stage("score"):
        assert waits == [0]
    assert waits == [0, 1]
