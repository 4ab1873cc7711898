"""The demo command end to end, on a plan of a few steps: files, numbers, table; and what each option sets."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_in_processes

from imagine_opd.cli import demo as demo_command
from imagine_opd.cli import main
from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path, make_scenes, plans
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError
from imagine_opd.models.access import load_model

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_demo.py"


def shorten_demo(patch):
    plan = plans.DemoPlan(steps=3, batch=8, scenes=24, learning_rate=5e-4)
    patch.setattr(plans, "PLANS", dict.fromkeys(plans.PLANS, plan))
    patch.setattr(demo_command, "PLANS", plans.PLANS)
    patch.setattr(demo_command, "EVAL_SCENES", 23)


@pytest.fixture
def tiny_plan(monkeypatch):
    shorten_demo(monkeypatch)


def run_short_demo(folder: str):
    """In each of several processes: the result it returned."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_demo(patch)
        return demo_command.run_demo(folder, "full", "right", 0, False)


def test_two_processes_make_one_demo(tmp_path):
    """Checks, probe, steps, evaluation and files, all shared: what one process writes, once."""
    alone = run_short_demo(str(tmp_path / "one"))
    first, second = run_in_processes(run_short_demo, str(tmp_path / "two"), timeout_s=300)
    figures = ("student_before", "student_after", "teacher", "gap_closed", "scenes")
    for name in figures:
        assert first[name] == second[name] == alone[name], name
    assert json.loads((tmp_path / "two" / "result.json").read_text())["processes"] == 2
    weights = [load_model(tmp_path / folder / "model").state_dict() for folder in ("one", "two")]
    start = load_model(base_model_path()).state_dict()
    moved = max(float((weights[0][name] - start[name]).abs().max()) for name in start)
    apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in start)
    assert apart < 0.05 * moved
    logs = [(tmp_path / folder / "model" / "metrics.jsonl").read_text().splitlines() for folder in ("one", "two")]
    assert len(logs[0]) == len(logs[1])


def test_processes_that_cannot_share_a_step_are_refused():
    with pytest.raises(ConfigError, match="3 processes: a step of 32 scenes"):
        plans.make_run_fields("full", "crops", False, False, 0, processes=3)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "teacher, sees the crop"),
        ({"mode": "sampled_token", "views": "wrong"}, "teacher, sees the crop"),
        ({"privilege": "contrast"}, "teacher, sees the crop"),
        ({"privilege": "hint"}, "teacher, is told"),
        ({"privilege": "resolution"}, "teacher, sees it clear"),
    ],
    ids=["default", "sampled_token-wrong", "contrast", "hint", "resolution"],
)
def test_demo_leaves_result_sheet_and_model(tiny_plan, tmp_path, capsys, options, label):
    out = tmp_path / "demo"
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["demo", "--output", str(out), "--seed", "3", *words]) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["mode"], result["seed"], result["scenes"]) == (options.get("mode", "full"), 3, 23)
    assert (result["privilege"], result["lora"]) == (options.get("privilege", "crops"), False)
    for name in ("student_before", "student_after", "teacher"):
        assert 0 <= result[name]["low"] <= result[name]["accuracy"] <= result[name]["high"] <= 1
    gap = result["teacher"]["accuracy"] - result["student_before"]["accuracy"]
    moved = result["student_after"]["accuracy"] - result["student_before"]["accuracy"]
    assert gap > 0.25
    assert result["gap_closed"] == pytest.approx(moved / gap, abs=1e-3)
    assert {"setup", "train", "evaluate"} <= result["seconds"].keys()
    with Image.open(out / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 400
    assert (out / "model" / "model.safetensors").is_file()
    trained = json.loads((out / "model" / "run.json").read_text())["config"]
    wanted = plans.PRIVILEGES[options.get("privilege", "crops")].fields
    assert {name: trained[name] for name in wanted} == wanted
    printed = capsys.readouterr().out
    assert "gap closed" in printed
    assert "95 % interval" in printed
    assert label in printed
    assert "no more than the student" not in printed  # each privilege gives the teacher something


def test_demo_with_lora_trains_an_adapter_alone(tiny_plan, tmp_path, capsys, monkeypatch):
    import imagine_opd.api
    from imagine_opd.models.access import load_model

    pytest.importorskip("peft")
    trained = []

    def keep(*args, **fields):
        trained.append(train(*args, **fields))
        return trained[0]

    train = imagine_opd.api.train
    monkeypatch.setattr(imagine_opd.api, "train", keep)
    assert main(["demo", "--output", str(tmp_path / "demo"), "--lora"]) == 0
    assert json.loads((tmp_path / "demo" / "result.json").read_text())["lora"] is True
    weights = dict(trained[0].model.get_base_model().named_parameters())
    learnt = {name for name, weight in weights.items() if weight.requires_grad}
    assert learnt == {name for name in weights if "lora_" in name}
    assert any("visual" in name for name in learnt)  # sight is trained too
    assert all(weights[name].any() for name in learnt if "lora_B" in name)  # they start at zero
    base = dict(load_model(base_model_path()).named_parameters())
    kept = {name.replace(".base_layer", ""): weight for name, weight in weights.items() if name not in learnt}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)
    assert "adapter of rank 32" in capsys.readouterr().out


def test_default_plans_are_equal_in_steps_so_that_modes_compare_at_equal_time():
    for long in (False, True):
        assert plans.PLANS["full", long].steps == plans.PLANS["sampled_token", long].steps


@pytest.mark.parametrize(
    ("privilege", "wanted"),
    [
        ("crops", {"teacher_view": "crops", "contrast": "none", "text_hint": "none", "student_scale": 1.0}),
        ("contrast", {"teacher_view": "crops", "contrast": "mean", "contrast_beta": 1.0, "text_hint": "none"}),
        ("hint", {"teacher_view": "whole", "contrast": "none", "text_hint": "row", "text_hint_template": " {hint}"}),
        ("resolution", {"teacher_view": "whole", "contrast": "none", "text_hint": "none", "student_scale": 1 / 12}),
    ],
)
def test_privilege_is_made_of_the_packages_own_fields(privilege, wanted, tmp_path):
    config = build_config(tmp_path, plans.make_run_fields("full", privilege, lora=False, long=False, seed=4))
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.max_steps, config.learning_rate, config.seed, config.use_peft) == (400, 5e-4, 4, False)
    assert {name: getattr(config, name) for name in TINY_RECIPE} == TINY_RECIPE


def test_lora_sets_rank_rate_and_leaves_the_vision_tower_free(tmp_path):
    config = build_config(tmp_path, plans.make_run_fields("full", "crops", lora=True, long=True, seed=0))
    assert (config.use_peft, config.lora_r, config.lora_alpha, config.freeze_vision) == (True, 32, 64, False)
    assert config.learning_rate == plans.LORA_FIELDS["learning_rate"] > 5e-4
    assert config.max_steps == 1400


def test_hint_reaches_the_teacher_alone_and_names_the_object(tiny, tmp_path):
    scene = make_scenes(1, 21)[0]
    asked = scene.objects[scene.target]
    hint = f"{asked.place} {asked.color} {asked.shape} {asked.digit} ."
    for views, shown in (("right", hint), ("wrong", scene.wrong_hint)):
        rows = plans.make_rows([scene], "hint", views)
        config = build_config(tmp_path, plans.make_run_fields("full", "hint", lora=False, long=False, seed=0))
        (pair,), _ = demo_command.build_shown(tiny.processor, rows, config)
        student, teacher = (
            tiny.processor.tokenizer.decode(prompt.input_ids) for prompt in (pair.student, pair.teacher)
        )
        assert f"{scene.question} {shown} <|im_end|>" in teacher
        assert f"{scene.question} <|im_end|>" in student
        np.testing.assert_array_equal(pair.student.view.pixel_values, pair.teacher.view.pixel_values)


def test_rows_of_reduced_resolution_carry_no_label():
    rows = plans.make_rows(make_scenes(2, 3, "large"), "resolution", "right")
    assert [(row.boxes, row.hint) for row in rows] == [((), "")] * 2
    assert all(row.boxes and row.hint for row in plans.make_rows(make_scenes(2, 3), "crops", "right"))


def test_student_of_reduced_resolution_is_judged_degraded_and_its_teacher_clear(tiny, tmp_path):
    scenes = make_scenes(60, 31, "large")
    rows = plans.make_rows(scenes, "resolution", "right")
    config = build_config(tmp_path, plans.make_run_fields("full", "resolution", lora=False, long=False, seed=0))
    sides = demo_command.evaluate_sides(tiny.model, tiny.processor, rows, config, ("imagine", "teacher"))
    config.student_scale = 1.0
    clear = demo_command.evaluate_sides(tiny.model, tiny.processor, rows, config, ("imagine",))
    assert sides["teacher"].completions == clear["imagine"].completions
    assert sides["teacher"].accuracy > 0.9
    assert sides["imagine"].accuracy < 0.7


def test_swapped_evidence_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--privilege", "resolution", "--views", "wrong"])
    assert caught.value.code == 2
    assert "no evidence to swap" in capsys.readouterr().err


def test_measured_runs_become_rows_of_the_table_without_running_again(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("measure_demo", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for seed, after in ((0, 0.862), (1, 0.3)):
        result = {
            "student_before": {"accuracy": 0.355},
            "student_after": {"accuracy": after},
            "teacher": {"accuracy": 1.0},
            "gap_closed": round((after - 0.355) / 0.645, 4),
            "seconds": {"train": 99.4},
        }
        folder = tmp_path / f"lora-{seed}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
    assert script.main(["--output", str(tmp_path), "--runs", "lora", "--seeds", "0", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "| `--lora` | 35.5 | 100.0 | 86.2, 30.0 | 78.6, −8.5 | 99, 99 |"
    from imagine_opd.cli import build_parser

    for options in script.RUNS.values():
        build_parser().parse_args(["demo", *options])
