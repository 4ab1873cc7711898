"""A step's figures: means by count, totals, maxima, seconds per step, and nothing left after a log."""

from __future__ import annotations

import pytest

from imagine_opd.metrics.clock import Clock
from imagine_opd.metrics.step import StepMetrics, describe_times


class HandClock(Clock):
    """Moves when it is told to."""

    def __init__(self):
        self.now = 0.0
        self.settled = 0

    def mark(self):
        return self.now

    def is_past(self, mark):
        return self.settled > 0  # nothing is known to be done before one has waited

    def settle(self):
        self.settled += 1


def test_figures_are_means_totals_extremes_and_seconds_per_step():
    clock = HandClock()
    figures = StepMetrics(clock)
    for step in (1, 2):
        figures.start_step()
        figures.add_mean("reverse_kl", 3.0 * step, 2 * step)
        figures.add_total("rows_dropped/truncated", step)
        figures.add_max("longest", 10.0 - step)
        figures.add_min("shortest", 3.0 - step)
        with figures.stage("rollout"):
            clock.now += 2.0
        clock.now += 1.0
        figures.end_step()
        clock.now += 100.0  # between steps
    figures.add_mean("empty", 0.0, 0)
    found = figures.drain()
    assert found == {
        "longest": 9.0,
        "shortest": 1.0,
        "reverse_kl": pytest.approx(1.5),
        "rows_dropped/truncated": 3.0,
        "step_time": 3.0,
        "time/rollout_s": 2.0,
        "time/idle_s": 1.0,
        "time/idle_share": pytest.approx(1 / 3),
    }
    assert figures.drain() == {}


def test_a_stage_may_end_elsewhere_and_one_that_never_began_is_none():
    clock = HandClock()
    figures = StepMetrics(clock)
    figures.start_step()
    figures.finish("backward")
    figures.begin("update")
    clock.now += 4.0
    figures.end_step()
    assert figures.drain() == {"step_time": 4.0, "time/update_s": 4.0, "time/idle_s": 0.0, "time/idle_share": 0.0}


def test_run_is_told_where_its_time_went():
    clock = HandClock()
    figures = StepMetrics(clock)
    for _ in range(2):
        figures.start_step()
        for name, seconds in (("views", 1.0), ("rollout", 5.0), ("step", 4.0)):
            with figures.stage(name):
                clock.now += seconds
        figures.add_seconds("views_background", 3.0)
        figures.end_step()
        figures.drain()
    told = describe_times(figures.run_seconds, figures.run_steps)
    assert told == ("a step took 10 s: rollout 5 s (50%), waiting for views 1 s (10%); views made beside them took 3 s")
    assert describe_times({}, 0) == ""


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


def test_nothing_waits_for_the_device_before_a_log():
    clock = HandClock()
    figures = StepMetrics(clock)
    figures.start_step()
    with figures.stage("score"):
        figures.add_mean("loss", 1.0)
    figures.end_step()
    assert clock.settled == 0
    figures.drain()
    assert clock.settled == 1
