"""The run folder's lines: whole JSON, kept up to the resumed step, never an earlier run's loss."""

from __future__ import annotations

import json
from types import SimpleNamespace

from imagine_opd.callbacks import TeacherUpdateCallback, append_line, drop_lines_after, set_aside


def test_lines_after_the_checkpoint_and_a_torn_one_are_dropped(tmp_path):
    path = tmp_path / "completions.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step, "completion": "a\u2028b\u0085c\nd"})  # none of these ends a line of JSON
    with path.open("a") as file:
        file.write('{"step": 2, "comp')
    drop_lines_after(path, 2)
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert [line["step"] for line in kept] == [1, 2]
    assert kept[0]["completion"] == "a\u2028b\u0085c\nd"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    append_line(tmp_path / "new" / "metrics.jsonl", {"step": 1, "loss": float("nan"), "kl": float("inf")})
    assert json.loads((tmp_path / "new" / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "kl": None}


def test_an_earlier_runs_file_is_renamed_to_the_first_free_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ("one", "two"):
        path.write_text(text)
        set_aside(path)
    assert (tmp_path / "metrics.1.jsonl").read_text() == "one"
    assert (tmp_path / "metrics.2.jsonl").read_text() == "two"
    assert not path.exists()


def test_moving_teacher_does_not_follow_a_step_that_was_left_out():
    updates: list[str] = []
    callback = TeacherUpdateCallback(SimpleNamespace(update=updates.append))
    for skipped in (False, True, False):
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        callback.on_optimizer_step(None, None, None, model="student", optimizer=optimizer)
    callback.on_optimizer_step(None, None, None, model="student")
    assert updates == ["student"] * 3
