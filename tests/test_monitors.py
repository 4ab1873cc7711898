"""The collapse monitors on made-up histories: each speaks at the right log, once, and stays silent otherwise."""

from __future__ import annotations

import math

import pytest
from transformers import TrainerControl, TrainerState

from imagine_opd.config import build_config
from imagine_opd.guards.monitors import CollapseCallback, CollapseWatch, Monitor, make_monitors
from imagine_opd.guards.repetition import measure_repetition

SHRINK = Monitor("collapse_length_low", "length", "floor", 0.5, True, "completions are shrinking")
CUT = Monitor("collapse_truncation", "cut", "ceiling", 0.9, False, "completions are cut")


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3], 0.0),
        ([], 0.0),
        ([1, 2, 3, 4, 5, 6], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # 5 four-grams, one of them twice
        ([7] * 13, 0.9),
        ([1, 2] * 6, 7 / 9),
    ],
)
def test_repetition_is_the_share_of_four_grams_seen_before(ids, share):
    assert measure_repetition(ids) == pytest.approx(share)


def observe_all(watch: CollapseWatch, name: str, values: list[float], start: int = 1):
    return [finding for step, value in enumerate(values, start) for finding in watch.observe(step, {name: value})]


def test_fall_below_the_share_of_the_start_is_found_after_window_and_patience():
    watch = CollapseWatch([SHRINK], window=2, baseline_logs=4, patience=3)
    assert observe_all(watch, "length", [100, 110, 90, 100, 95, 80, 51]) == []
    # means of two: 45.5 at 8, 30 at 9, 20 at 10
    findings = observe_all(watch, "length", [40, 20, 20, 20], start=8)
    assert len(findings) == 1
    found = findings[0]
    assert (found.value, found.limit, found.baseline, found.since_step, found.step) == (20, 50, 100, 8, 10)
    assert str(found) == (
        "completions are shrinking: length is 20, below 50 (0.5 of its start, 100), since step 8 "
        "(collapse_length_low, seen at step 10)"
    )


def test_a_short_dip_and_noise_are_no_collapse():
    watch = CollapseWatch([SHRINK], window=2, baseline_logs=4, patience=3)
    assert observe_all(watch, "length", [100] * 4 + [10, 10, 100, 100, 10, 90, 10, 90, 10, 90] * 5) == []


def test_monitor_speaks_again_only_after_it_was_back_inside():
    watch = CollapseWatch([CUT], window=1, baseline_logs=3, patience=2)
    findings = observe_all(watch, "cut", [1.0] * 6 + [0.1] + [1.0] * 5)
    assert [(found.since_step, found.step) for found in findings] == [(1, 2), (8, 9)]


def test_absent_and_non_finite_figures_change_nothing():
    with_gaps = CollapseWatch([CUT], window=2, baseline_logs=1, patience=2)
    findings = []
    for step, value in enumerate([1.0, math.nan, 1.0, None, math.inf, 1.0], 1):
        findings += with_gaps.observe(step, {} if value is None else {"cut": value})
    assert [(found.since_step, found.step, found.value) for found in findings] == [(3, 6, 1.0)]


def make_history(**changes: list[float]) -> list[dict[str, float]]:
    steady = {
        "loss": 0.1,
        "completions/mean_length": 100.0,
        "tag_rate": 0.9,
        "completions/repetition": 0.02,
        "entropy": 1.0,
        "completions/clipped_ratio": 0.1,
    }
    late = {name: values[0] for name, values in changes.items()}
    return [{**steady, "step": step, **(late if step > 12 else {})} for step in range(1, 31)]


@pytest.mark.parametrize(
    ("metric", "value", "monitor", "sentence"),
    [
        ("completions/mean_length", 30.0, "collapse_length_low", "completions are shrinking"),
        ("completions/mean_length", 300.0, "collapse_length_high", "completions are growing longer"),
        ("tag_rate", 0.2, "collapse_tag_share", "completions lose their answer tags"),
        ("completions/repetition", 0.6, "collapse_repetition", "completions repeat themselves"),
        ("entropy", 0.01, "collapse_entropy_share", "the student's distribution is collapsing"),
        ("completions/clipped_ratio", 0.99, "collapse_truncation", "completions are cut by the length cap"),
    ],
)
def test_each_collapse_has_its_monitor_and_no_other_speaks(tmp_path, metric, value, monitor, sentence):
    config = build_config(tmp_path, {})
    watch = CollapseWatch(make_monitors(config), config.collapse_window, 10, config.collapse_patience)
    findings = [found for logs in make_history(**{metric: [value]}) for found in watch.observe(logs["step"], logs)]
    assert [found.monitor.name for found in findings] == [monitor]
    assert sentence in str(findings[0])
    assert metric in str(findings[0])
    off = CollapseWatch(make_monitors(build_config(tmp_path, {monitor: None})), 5, 10, 3)
    assert not any(off.observe(logs["step"], logs) for logs in make_history(**{metric: [value]}))


def run_callback(tmp_path, history, resume_at: int = 0, **fields):
    said: list[str] = []
    callback = CollapseCallback(build_config(tmp_path, fields), said.append)
    state, control = TrainerState(), TrainerControl()
    state.log_history = [dict(logs) for logs in history[:resume_at]]
    callback.on_train_begin(None, state, control)
    for logs in history[resume_at:]:
        state.global_step = logs["step"]
        callback.on_log(None, state, control, logs={k: v for k, v in logs.items() if k != "step"})
        if control.should_training_stop:
            break
    return said, state, control


def test_a_warning_by_default_and_the_run_goes_on(tmp_path):
    said, state, control = run_callback(tmp_path, make_history(tag_rate=[0.0]))
    assert len(said) == 1
    assert said[0].startswith("collapse: completions lose their answer tags: tag_rate is")
    assert not control.should_training_stop
    assert not control.should_save
    assert state.global_step == 30


def test_stop_on_collapse_saves_and_stops_at_the_step_that_shows_it(tmp_path):
    said, state, control = run_callback(tmp_path, make_history(tag_rate=[0.0]), stop_on_collapse=True)
    assert control.should_training_stop
    assert control.should_save
    assert said[0].endswith("saved and stopped (stop_on_collapse)")
    assert state.global_step < 25


@pytest.mark.parametrize("resume_at", [5, 13, 17])
def test_resumed_run_speaks_at_the_same_step(tmp_path, resume_at):
    history = make_history(entropy=[0.001])
    whole = run_callback(tmp_path, history)[0]
    assert run_callback(tmp_path, history, resume_at)[0] == whole


def test_final_summary_and_evaluation_logs_are_not_watched(tmp_path):
    history = [{"step": s, "eval_accuracy": 0.1, "completions/clipped_ratio": 1.0} for s in range(1, 30)]
    assert run_callback(tmp_path, history)[0] == []
