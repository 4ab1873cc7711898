"""Training runs killed by SIGKILL at any moment and started again become what the uninterrupted run is, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import TESTS, names_in, run_program

WAYS = [
    ("full", 2, ["5", "15", "17", "18", "20", "25", "26", "30", "45"]),
    ("lora", 4, ["5", "20", "26"]),
    ("ema", 5, ["5", "20", "26"]),
    ("lora-ema", 6, ["5", "20", "26"]),
]
"""What trains, a seed, and the file operations in which it is killed."""


def read_lines(folder: Path, name: str) -> list[dict]:
    """The lines of a run, without clocks and without the last one's means over the part that ran at the end."""
    lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "step_time"))}
        for line in lines
        if "train_runtime" not in line
    ]


def check_kills(tmp_path: Path, way: str, seed: int, kills: list[str], timeout_s: float = 280.0) -> list[dict]:
    """The kills that came before a run's end; each run must have become what the uninterrupted one is."""
    done = run_program(str(TESTS / "kill_runs.py"), str(tmp_path), way, str(seed), *kills, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    whole, runs = tmp_path / "whole", sorted(path for path in tmp_path.glob("killed-*") if path.is_dir())
    assert runs
    left, optimizer = load_weights(whole, way), torch.load(whole / "checkpoint-8" / "optimizer.pt")["state"]
    assert [line["step"] for line in read_lines(whole, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7, 8]
    for run in runs:
        right = load_weights(run, way)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
        for name in ("metrics.jsonl", "completions.jsonl"):
            assert read_lines(whole, name) == read_lines(run, name)
        assert json.loads((run / "steps.json").read_text()) == 8
        assert names_in(run, "checkpoint-") == ["checkpoint-8"]
        assert names_in(run, "tmp-") == []
        states = torch.load(run / "checkpoint-8" / "optimizer.pt")["state"]
        assert states.keys() == optimizer.keys()
        for key, state in states.items():
            assert all(torch.equal(state[name], optimizer[key][name]) for name in state)
    return [kill for kill in json.loads(done.stdout.splitlines()[-1])["kills"] if kill["status"] == -signal.SIGKILL]


def load_weights(run: Path, way: str) -> dict[str, torch.Tensor]:
    """What a run has learnt, its average included; every part must have moved."""
    student = load_file(run / ("adapter_model.safetensors" if "lora" in way else "model.safetensors"))
    if "ema" not in way:
        return student
    average = load_file(run / "checkpoint-8" / "teacher_ema.safetensors")
    assert any(tensor.any() for tensor in average.values())
    return {**student, **{f"average of {name}": tensor for name, tensor in average.items()}}


def test_run_killed_three_times_ends_with_the_weights_and_lines_of_the_uninterrupted_one(tmp_path):
    # The 20th operation of the first run that gets so far lies behind its first checkpoint.
    kills = check_kills(tmp_path, "full", 1, ["20", "writing", "any"])
    assert len(kills) >= 2  # `any` may come after the end
    assert kills[0]["left"][0].startswith("checkpoint-")


@pytest.mark.slow
@pytest.mark.parametrize(("way", "seed", "numbers"), WAYS, ids=[way for way, *_ in WAYS])
def test_run_killed_at_random_moments_ends_as_the_uninterrupted_one(tmp_path, way, seed, numbers):
    planned = [kill for number in numbers for kill in ("writing", number, "any")]
    kills = check_kills(tmp_path, way, seed, planned, timeout_s=900)
    assert len(kills) >= 2 * len(numbers) + (way == "full") * 2, kills
    assert any(name.startswith("tmp-checkpoint") for kill in kills for name in kill["left"])
