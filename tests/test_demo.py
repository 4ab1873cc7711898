"""The demo command end to end, on a plan of a few steps: files, numbers and table as promised."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from imagine_opd.cli import demo as demo_command
from imagine_opd.cli import main


@pytest.fixture
def tiny_plan(monkeypatch):
    plan = demo_command.DemoPlan(steps=3, batch=8, scenes=24, learning_rate=5e-4)
    monkeypatch.setattr(demo_command, "PLANS", dict.fromkeys(demo_command.PLANS, plan))
    monkeypatch.setattr(demo_command, "EVAL_SCENES", 24)


@pytest.mark.parametrize(("mode", "views"), [("full", "right"), ("sampled_token", "wrong")])
def test_demo_leaves_result_sheet_and_model(tiny_plan, tmp_path, capsys, mode, views):
    out = tmp_path / "demo"
    assert main(["demo", "--output", str(out), "--mode", mode, "--views", views, "--seed", "3"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["mode"], result["seed"], result["scenes"]) == (mode, 3, 24)
    for name in ("student_before", "student_after", "teacher"):
        assert 0 <= result[name]["low"] <= result[name]["accuracy"] <= result[name]["high"] <= 1
    gap = result["teacher"]["accuracy"] - result["student_before"]["accuracy"]
    moved = result["student_after"]["accuracy"] - result["student_before"]["accuracy"]
    assert result["gap_closed"] == pytest.approx(moved / gap, abs=1e-3)
    assert {"setup", "train", "evaluate"} <= result["seconds"].keys()
    with Image.open(out / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 400
    assert (out / "model" / "model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "gap closed" in printed
    assert "95 % interval" in printed


def test_default_plans_are_equal_in_steps_so_that_modes_compare_at_equal_time():
    for long in (False, True):
        assert demo_command.PLANS["full", long].steps == demo_command.PLANS["sampled_token", long].steps
