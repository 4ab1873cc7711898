"""Every code block of README and docs runs, in a folder that holds what the text says is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imagine_opd.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "kernels/README.md",
]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def list_blocks(language: str) -> list:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (kind, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if kind == language
    ]


@pytest.fixture
def user_folder(tmp_path, make_rows, monkeypatch) -> Path:
    """A folder as the README's reader has it: `rows.jsonl`, its images, `photo.png`, and nothing of ours."""
    import json

    lines = []
    for index, row in enumerate(make_rows(8)):
        (tmp_path / f"{index}.png").write_bytes(row.images[0])
        boxes = [[box.x0, box.y0, box.x1, box.y1] for box in row.boxes]
        lines.append(
            json.dumps({"image": f"{index}.png", "question": row.question, "boxes": boxes, "answer": row.answer})
        )
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "photo.png").write_bytes(make_rows(1)[0].images[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", list_blocks("python"))
def test_python_block_runs(code, user_folder):
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("text", list_blocks("json") + list_blocks("jsonl"))
def test_json_block_is_json(text):
    import json

    for line in text.strip().splitlines() if not text.lstrip().startswith("{\n") else [text]:
        json.loads(line)


@pytest.mark.parametrize("text", list_blocks("bash"))
def test_command_block_names_commands_that_exist(text, capsys):
    """Shell lines are run as far as is cheap: make targets exist, our own commands parse.

    The launches of docs/scaling.md are run by test_processes.py.
    """
    for line in text.strip().replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        if words[0] == "make":
            assert set(words[1:]) <= MAKE_TARGETS, line
        elif words[0] == "accelerate":
            check_launch(words)
        elif words[0] == "imagine-opd":
            with pytest.raises(SystemExit) as caught:
                main([words[1], "--help"])
            assert caught.value.code == 0
            import shlex

            from imagine_opd.cli import build_parser

            build_parser().parse_known_args(shlex.split(line.split("#")[0])[1:])
        else:
            assert words[0] in ("pip", "git", "cd", "python", "pytest", ".venv/bin/python"), line


def check_launch(words: list[str]) -> None:
    """The launcher takes its options, and `imagine-opd` the rest; the config is one that is shipped."""
    from accelerate.commands.launch import launch_command_parser

    from imagine_opd.cli import build_parser

    assert words[1] == "launch"
    options = launch_command_parser().parse_args(words[2:])
    assert options.module
    assert options.training_script == "imagine_opd"
    assert (ROOT / options.config_file).is_file()
    build_parser().parse_args(options.training_script_args)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
