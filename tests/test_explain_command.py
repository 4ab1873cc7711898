"""`imagine-opd explain` and `dry_run` as a user calls them: what is printed, which page is written, what is refused."""

from __future__ import annotations

import copy
import html
import json
from pathlib import Path

import pytest
import torch

import imagine_opd
from imagine_opd import api
from imagine_opd.cli import main
from imagine_opd.demo import base_model_path
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import RowError, TeacherError

RUN = {**TINY_RECIPE, "use_cpu": True, "disable_tqdm": True, "teacher_check_rows": 2, "max_steps": 2}


@pytest.fixture
def dataset(tmp_path, make_rows) -> Path:
    lines = []
    for index, row in enumerate(make_rows(4)):
        (tmp_path / f"{index}.png").write_bytes(row.images[0])
        boxes = [[box.x0, box.y0, box.x1, box.y1] for box in row.boxes]
        line = {"image": f"{index}.png", "question": row.question, "boxes": boxes, "answer": row.answer}
        lines.append(json.dumps(line))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_dry_run_explains_the_first_row_and_trains_nothing(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    result = imagine_opd.train(base_model_path(), dataset, output_dir=out, eval_data=dataset, dry_run=True, **RUN)
    assert result.global_step == 0
    assert result.metrics["teacher/identical_view_drift"] < 1e-4
    assert [path.name for path in out.iterdir()] == ["explain.html"]
    printed = capsys.readouterr().out
    assert "question   what digit is on the" in printed
    assert "\x1b" not in printed  # captured: no terminal
    assert "<h2>One rollout</h2>" in (out / "explain.html").read_text(encoding="utf-8")
    from imagine_opd.models.access import load_model

    fresh = load_model(base_model_path()).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in result.model.state_dict().items())


def test_dry_run_of_a_teacher_that_cannot_teach_writes_the_page_and_fails(dataset, tiny, tmp_path):
    teacher = copy.deepcopy(tiny.model)
    with torch.no_grad():
        teacher.model.language_model.norm.weight.zero_()
    with pytest.raises(TeacherError, match="the teacher is uniform"):
        imagine_opd.train(base_model_path(), dataset, teacher=teacher, output_dir=tmp_path / "run", dry_run=True, **RUN)
    assert "the teacher is uniform" in (tmp_path / "run/explain.html").read_text(encoding="utf-8")


def test_dry_run_refuses_what_training_refuses(dataset, tmp_path):
    lines = dataset.read_text().splitlines()
    dataset.write_text("\n".join([*lines, json.dumps({"image": "none.png", "question": "what ?"})]))
    with pytest.raises(RowError, match=r"rows.jsonl:5"):
        imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", dry_run=True, **RUN)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def recipe(dataset, tmp_path) -> Path:
    fields = {**RUN, "model": str(base_model_path()), "data": str(dataset), "output_dir": str(tmp_path / "run")}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fields))
    return path


def test_command_explains_the_row_asked_for(recipe, tmp_path, make_rows, capsys):
    page = tmp_path / "pages" / "row.html"
    assert main(["explain", str(recipe), "--row", "3", "--html", str(page), "--box_margin", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "row        3 of 4, from 0 (rows.jsonl:4)" in printed
    assert f"question   {make_rows(4)[3].question}" in printed
    assert "box_margin = 0.25 (default 0.1)" in printed
    assert "Row 3 (of 4, from 0) explained" in page.read_text(encoding="utf-8")
    assert main(["explain", str(recipe), "--row=9"]) == 1
    assert "there is no row 9" in capsys.readouterr().err


def list_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.split("\n")]


def test_documented_row_is_what_the_command_prints(dataset, tmp_path, capsys):
    """But for the rollout and the checks, whose last digits depend on the machine, and for how large it is."""
    page = (Path(__file__).parents[1] / "docs/explain.md").read_text(encoding="utf-8")
    row, rest = page.split("```text\n")[1].split("\nrollout ")
    memory = "memory " + rest.split("\nmemory ")[1].split("\nchecks ")[0]
    plan = [line for line in list_lines(memory) if "peak on the device" not in line and "a second copy (" not in line]
    path = tmp_path / "plain.yaml"
    path.write_text(f"model: {base_model_path()}\ndata: {dataset}\noutput_dir: {tmp_path / 'run'}\nuse_cpu: true\n")
    assert main(["explain", str(path), "--row", "1"]) == 0
    printed = list_lines(capsys.readouterr().out)
    documented = [*list_lines(row)[1:], *plan]
    assert len(documented) > 50
    assert [line for line in documented if line not in printed] == []


def test_plan_of_memory_in_text_and_page_is_the_one_that_training_prints(recipe, tmp_path, capsys):
    page = tmp_path / "row.html"
    assert main(["explain", str(recipe), "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert main(["train", str(recipe), "--max_steps", "1", "--teacher_checks", "false"]) == 0
    printed = list_lines(capsys.readouterr().out)
    first = next(place for place, line in enumerate(printed) if line.startswith("memory plan: "))
    last = next(place for place, line in enumerate(printed) if line.startswith("teacher: "))
    plan = printed[first : last + 1]
    assert len(plan) > 20
    assert any("peak on the device: always + " in line for line in plan)
    assert [line[11:] for line in list_lines(text.split("\nmemory ")[1].split("\n\n")[0])][1:] == plan[1:]
    assert f"memory     {plan[0]}\n" in text
    assert "<h3>Memory</h3>\n<pre>" + "\n".join(plan) + "</pre>" in html.unescape(page.read_text(encoding="utf-8"))


def test_command_train_takes_dry_run(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert f"the page is {tmp_path / 'run' / 'explain.html'}" in printed
    assert "the model is in" not in printed


def test_checkpoint_is_explained_with_its_own_weights(dataset, tmp_path):
    fields = {**RUN, "max_steps": 1, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    imagine_opd.train(base_model_path(), dataset, output_dir=tmp_path / "run", **fields)
    found = api.explain_row(
        base_model_path(), dataset, output_dir=tmp_path / "run", resume_from_checkpoint=True, **fields
    )
    assert dict(found.teacher_checks)["teacher/identical_view_drift"] > 1e-3


def test_terminal_gets_colours_unless_told_otherwise(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api.sys.stdout, "isatty", lambda: True, raising=False)
    for told, coloured in (("", False), (None, True)):
        monkeypatch.setenv("NO_COLOR", "1") if told is not None else monkeypatch.delenv("NO_COLOR")
        api.explain_row(base_model_path(), dataset, output_dir=tmp_path / "run", **RUN)
        assert ("\x1b[30;48;5;" in capsys.readouterr().out) == coloured
