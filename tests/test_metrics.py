"""A step's figures: means by count, totals, maxima, seconds per step, and nothing left after a log."""

from __future__ import annotations

import time

import pytest

from imagine_opd.metrics.step import StepMetrics


def test_figures_are_means_totals_extremes_and_seconds_per_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    figures = StepMetrics()
    for step in (1, 2):
        figures.start_step()
        figures.add_mean("reverse_kl", 3.0 * step, 2 * step)
        figures.add_total("rows_dropped/truncated", step)
        figures.add_max("longest", 10.0 - step)
        figures.add_min("shortest", 3.0 - step)
        with figures.stage("rollout"):
            clock[0] += 2.0
        clock[0] += 1.0
        figures.end_step()
        clock[0] += 100.0  # between steps
    figures.add_mean("empty", 0.0, 0)
    found = figures.drain()
    assert found == {
        "longest": 9.0,
        "shortest": 1.0,
        "reverse_kl": pytest.approx(1.5),
        "rows_dropped/truncated": 3.0,
        "step_time": 3.0,
        "time/rollout_s": 2.0,
    }
    assert figures.drain() == {}


def test_figures_of_several_processes_become_one():
    ours, theirs = StepMetrics(), StepMetrics()
    for figures, value in ((ours, 1.0), (theirs, 4.0)):
        figures.add_mean("mean", value, value)
        figures.add_total("total", value)
        figures.add_max("most", value)
        figures.add_min("least", value)
    theirs.add_min("theirs alone", 7.0)
    own = []
    theirs.drain(lambda figures: own.append(figures) or [figures])
    found = ours.drain(lambda figures: [figures, *own])
    assert found == {"mean": 1.0, "total": 5.0, "most": 4.0, "least": 1.0, "theirs alone": 7.0}


def test_a_stage_waits_for_the_device_at_both_ends():
    waits = []
    with StepMetrics(lambda: waits.append(len(waits))).stage("score"):
        assert waits == [0]
    assert waits == [0, 1]
