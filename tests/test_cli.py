"""The command line: help as documented, exit codes as promised, one clear sentence on failure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from imagine_opd.cli import main
from imagine_opd.cli.train import parse_overrides, read_overrides
from imagine_opd.demo import base_model_path
from imagine_opd.demo.recipe import TINY_RECIPE

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("command", ["", "demo", "train", "explain", "ask"])
def test_help_is_the_documented_one(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    # Words, not line breaks: Python releases wrap the same help differently.
    shown = capsys.readouterr().out.split()
    assert " ".join(shown) in " ".join((DOCS / "cli.md").read_text(encoding="utf-8").split()), "run `make docs`"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["demo", "--mode", "half"],
        ["demo", "--speed", "9"],
        ["ask", "model"],
        ["train"],
        ["train", "c.yaml", "--lr"],
    ],
)
def test_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: imagine-opd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "none.yaml: cannot be read"),
        (["ask", "/nowhere/model", "a.png", "what ?"], "/nowhere/model"),
        (["ask", str(base_model_path()), "none.png", "what ?"], "none.png"),
        (["demo", "--output", "/proc/self/demo"], "not writable"),
    ],
)
def test_failed_run_exits_with_1_and_one_sentence(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_config_file_faults_are_named(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    for text, message in (("a: [", "not valid YAML"), ("- 1", "expected fields"), ("model: x", "has no 'data'")):
        path.write_text(text)
        assert main(["train", str(path)]) == 1
        assert message in capsys.readouterr().err
    path.write_text(
        f"model: {base_model_path()}\ndata: none.jsonl\nlearning_rate: fast\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert main(["train", str(path)]) == 1
    assert "learning_rate='fast'" in capsys.readouterr().err


def test_overrides_are_read_as_yaml():
    words = ["--learning_rate", "1.0e-6", "--bf16=true", "--max-steps", "3", "--output_dir", "a b"]
    overrides = read_overrides(parse_overrides(words))
    assert overrides == {"learning_rate": 1e-6, "bf16": True, "max_steps": 3, "output_dir": "a b"}
    template = ["--student_prompt_template", "Q: {question}", "--resume_from_checkpoint", "true"]
    overrides = read_overrides(parse_overrides(template))
    assert overrides == {"student_prompt_template": "Q: {question}", "resume_from_checkpoint": True}
    with pytest.raises(ValueError, match="expected --field value, found 'stray'"):
        parse_overrides(["stray"])


def test_train_then_ask(tmp_path, make_rows, capsys):
    lines = []
    for index, row in enumerate(make_rows(4)):
        (tmp_path / f"{index}.png").write_bytes(row.images[0])
        boxes = [[box.x0, box.y0, box.x1, box.y1] for box in row.boxes]
        lines.append(json.dumps({"image": f"{index}.png", "question": row.question, "boxes": boxes}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    fields = {**TINY_RECIPE, "model": str(base_model_path()), "data": str(tmp_path / "rows.jsonl"), "use_cpu": True}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**fields, "learning_rate": "1e-4", "save_strategy": "no", "disable_tqdm": True}))
    out = tmp_path / "run"
    assert main(["train", str(config), "--max_steps", "1", "--output_dir", str(out), "--teacher_check_rows=2"]) == 0
    assert f"trained 1 steps; the model is in {out}" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["config"]["learning_rate"] == 1e-4
    assert main(["ask", str(out), str(tmp_path / "0.png"), make_rows(1)[0].question]) == 0
    assert re.search(r"^answer: \S+$", capsys.readouterr().out, re.MULTILINE)
