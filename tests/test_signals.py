"""SIGTERM and SIGINT: the step is finished, a checkpoint saved, the exit code given, and the run can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import TESTS, Act, make_toy, names_in, run_program, take_weights

import imagine_opd
from imagine_opd.checkpoints import saving
from imagine_opd.checkpoints.files import find_fault
from imagine_opd.cli import main
from imagine_opd.demo import base_model_path
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import RunStoppedError

STEPS = 8
RUN = {
    **TINY_RECIPE,
    "model": str(base_model_path()),
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 4,
    "learning_rate": 5e-4,
    "max_steps": STEPS,
    "save_strategy": "no",
    "teacher_checks": False,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_to_go_on_from(tmp_path, capsys, number, code):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    whole = make_toy(tmp_path / "whole")
    whole.train()
    trainer = make_toy(tmp_path / "run", [Act(3, lambda: os.kill(os.getpid(), number))], save_strategy="no")
    with pytest.raises(RunStoppedError) as caught:
        trainer.train()
    assert (caught.value.code, caught.value.signal_number) == (code, number)
    assert isinstance(caught.value, SystemExit)
    assert f"stopped by {number.name} after step 3 of 6" in str(caught.value)
    assert str(caught.value) in capsys.readouterr().out
    assert names_in(tmp_path / "run") == ["checkpoint-3"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    resumed = make_toy(tmp_path / "run", save_strategy="no")
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 6
    assert torch.equal(take_weights(resumed), take_weights(whole))


def test_a_second_signal_stops_at_once(tmp_path):
    calls = []

    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            calls.append(1)

    with pytest.raises(KeyboardInterrupt):
        make_toy(tmp_path, [Act(3, interrupt)]).train()
    assert calls == [1]
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    trainer = make_toy(tmp_path, [Act(6, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert trainer.train().global_step == 6


def test_a_signal_neither_evaluates_nor_saves_twice(tmp_path, monkeypatch):
    """The Trainer takes the early stop for the end of an epoch, where this run would evaluate and save."""
    saved = []
    fields = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1}
    trainer = make_toy(tmp_path, [Act(3, lambda: os.kill(os.getpid(), signal.SIGTERM))], **fields)
    trainer.evaluate = lambda **kwargs: pytest.fail("evaluated while a scheduler waits")
    seal = saving.seal_checkpoint
    monkeypatch.setattr(saving, "seal_checkpoint", lambda *args: saved.append(args[1]) or seal(*args))
    with pytest.raises(RunStoppedError):
        trainer.train()
    assert saved == [3]


def test_runs_outside_the_main_thread_leave_signals_alone(tmp_path):
    found = []
    act = Act(1, lambda: found.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=lambda: found.append(make_toy(tmp_path, [act], max_steps=1).train().global_step))
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM), 1]


def test_a_stopped_run_gives_its_exit_code_to_the_shell():
    code = "from imagine_opd.errors import RunStoppedError; raise RunStoppedError('stopped', 15)"
    assert run_program("-c", code).returncode == 143


def test_the_command_line_ends_with_the_signals_code(monkeypatch):
    import imagine_opd.cli.train
    from imagine_opd.cli import main

    def stop(*args) -> None:
        raise RunStoppedError("stopped", signal.SIGTERM)

    monkeypatch.setattr(imagine_opd.cli.train, "run_train", stop)
    assert main(["train", "run.yaml"]) == 143


def test_two_processes_agree_on_a_signal_to_one_and_go_on_to_the_same_weights(tmp_path):
    done = run_program(str(TESTS / "toy_runs.py"), str(tmp_path), timeout_s=120)
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == {
        "whole": [0, 0],
        "stopped": [143, 143],
        "resumed": [0, 0],
        "one process": [0],
        "fewer rows": [1],
    }, logs
    weights = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert weights["parts-0.json"] == weights["parts-1.json"] == weights["whole-0.json"]
    assert weights["one-0.json"] != weights["whole-0.json"]  # it drops out other elements
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(names_in(tmp_path / "parts" / "checkpoint-6"))
    assert "was made by 2 processes, this run has 1" in (tmp_path / "one-0.log").read_text()
    assert "rows_per_step=4 (now 2): rows would be left out or taken twice" in (tmp_path / "other-0.log").read_text()
    assert names_in(tmp_path / "other") == ["checkpoint-2", "checkpoint-3"]


@pytest.fixture
def write_recipe(tmp_path, make_rows):
    lines = []
    for index, row in enumerate(make_rows(4)):
        (tmp_path / f"{index}.png").write_bytes(row.images[0])
        boxes = [[box.x0, box.y0, box.x1, box.y1] for box in row.boxes]
        lines.append(json.dumps({"image": f"{index}.png", "question": row.question, "boxes": boxes}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**RUN, "data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / name)}))
        return path

    return write


def read_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    whole, _, _ = (path.read_text(encoding="utf-8") if path.is_file() else "").rpartition("\n")
    lines = whole.splitlines()
    return [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)]


def test_command_that_gets_sigterm_ends_with_143_and_a_checkpoint_and_goes_on_to_the_same_weights(
    tmp_path, write_recipe
):
    run, recipe = tmp_path / "run", write_recipe("run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(imagine_opd.__file__).parents[1])}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "imagine_opd", "train", str(recipe)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not read_steps(run):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    said = (tmp_path / "log").read_text()
    (stopped,) = names_in(run, "checkpoint-")
    step = int(stopped.rpartition("-")[2])
    assert f"stopped by SIGTERM after step {step} of {STEPS}" in said
    assert "Traceback" not in said
    assert 0 < step < STEPS
    assert find_fault(run / stopped) is None
    assert read_steps(run) == list(range(1, step + 1))
    assert not (run / "model.safetensors").exists()  # the run is not finished
    assert main(["train", str(recipe), "--resume_from_checkpoint", "auto"]) == 0
    assert main(["train", str(write_recipe("whole"))]) == 0
    assert read_steps(run) == list(range(1, STEPS + 1))
    left, right = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", run))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
