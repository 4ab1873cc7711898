"""A supervisor that kills training runs by SIGKILL and starts them again, as a program: what is left must be one run.

    python tests/kill_runs.py FOLDER WAY SEED KILL [KILL ...]

WAY is `full` weights, `lora`, `ema` (a moving teacher), or `lora-ema`. KILL is `any` (at any moment of the run),
`writing` (a little after a checkpoint's temporary folder appears), or `N` (in the N-th file operation by which
checkpoints are sealed, rotated and cleared). Every run is a process of its own, forked after the imports and before
torch has done anything; what it knows of the last one lies on the disk. Prints one JSON object: seconds of the whole
run, and for each kill what lay in the folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path, make_scenes, scenes_to_rows
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.models.access import load_model, load_processor
from imagine_opd.trainer import ImagineOPDTrainer

STEPS = 8
RUN = {
    **TINY_RECIPE,
    "max_steps": STEPS,
    "max_completion_length": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
    "num_train_epochs": 10,
    "teacher_checks": False,
    "disable_tqdm": True,
    "use_cpu": True,
}

WAYS = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4},
    "ema": {"teacher_model_kind": "ema"},
    "lora-ema": {"use_peft": True, "lora_r": 4, "teacher_model_kind": "ema"},
}


class StepCounter(TrainerCallback):
    """State beside the Trainer's own, as a moving teacher or a monitor has it."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1

    def save(self, folder: Path) -> None:
        (folder / "counter.json").write_text(json.dumps(self.steps))

    def load(self, folder: Path) -> None:
        self.steps = json.loads((folder / "counter.json").read_text())


def train(folder: Path, way: str) -> None:
    """One process's life: from the last complete checkpoint, or afresh, to the end."""
    torch.set_num_threads(1)
    torch.manual_seed(time.time_ns() % 2**32)  # whatever a run depends on must come from its folder
    model = load_model(base_model_path())
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1  # draws from the global random state in every forward
    rows = list(scenes_to_rows(make_scenes(10, 77, "small"), "right"))  # 5 steps an epoch
    counter = StepCounter()
    args = build_config(folder, {**RUN, **WAYS[way]})
    trainer = ImagineOPDTrainer(
        model, args, rows, processor=load_processor(None, base_model_path()), callbacks=[counter]
    )
    trainer.saved_parts.append(counter)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    (folder / "steps.json").write_text(json.dumps(counter.steps))


def fork_run(folder: Path, way: str, kill_at: int | None = None) -> int:
    """Start a run; with `kill_at` it kills itself in that file operation. Returns the process's number."""
    if child := os.fork():
        return child
    try:
        log = os.open(folder.parent / f"{folder.name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill_at is not None:
            plant_kill(kill_at)
        train(folder, way)
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def plant_kill(number: int) -> None:
    """Have this process killed before the `number`-th rename, flush, new folder or removed file of `checkpoints.py`."""
    import imagine_opd.checkpoints.files as checkpoints

    done = 0

    def watch(call):
        def watched(*args, **kwargs):
            nonlocal done
            if any(frame.filename == checkpoints.__file__ for frame in traceback.extract_stack(limit=8)):
                done += 1
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return watched

    for name in ("rename", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, watch(getattr(os, name)))


def wait_for(child: int) -> int:
    """The exit code of a run; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_with_kills(folder: Path, way: str, kills: list[str], chance: random.Random, whole_s: float) -> list[dict]:
    """Kill and start again; a run that comes to its end all the same is followed by another beside it."""
    found: list[dict] = []
    number, whole = 1, False
    for kill in kills:
        number, whole = number + whole, False
        run = folder / f"killed-{number}"
        status, seconds = kill_run(run, way, kill, chance, whole_s)
        left = sorted(path.name for path in run.glob("*checkpoint*")) if run.is_dir() else []
        found.append({"kill": kill, "run": number, "status": status, "seconds": seconds, "left": left})
        whole = status == 0
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"a run ended by itself with {status}; see {run}.log")
    if not whole and (status := wait_for(fork_run(folder / f"killed-{number}", way))) != 0:
        raise SystemExit(f"the last run ended with {status}; see {folder}/killed-{number}.log")
    return found


def kill_run(run: Path, way: str, kill: str, chance: random.Random, whole_s: float) -> tuple[int, float]:
    """Start a run and kill it; its status, 0 when it was quicker, and the seconds it lived."""
    before = set(run.glob("tmp-*"))
    started = time.perf_counter()
    child = fork_run(run, way, int(kill) if kill.isdigit() else None)
    delay_s = chance.uniform(0.0, whole_s) if kill == "any" else chance.uniform(0.0, 0.06)
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code), time.perf_counter() - started
        writing = kill == "writing" and set(run.glob("tmp-checkpoint-*")) - before
        if writing:
            time.sleep(delay_s)
        if writing or (kill == "any" and time.perf_counter() - started >= delay_s):
            os.kill(child, signal.SIGKILL)
            return wait_for(child), time.perf_counter() - started
        time.sleep(0.0005)


def main() -> None:
    """See the file's top."""
    folder, way, seed, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    started = time.perf_counter()
    if (status := wait_for(fork_run(folder / "whole", way))) != 0:
        raise SystemExit(f"the whole run ended with {status}; see {folder}/whole.log")
    whole_s = time.perf_counter() - started
    found = run_with_kills(folder, way, kills, random.Random(seed), whole_s)
    print(json.dumps({"whole_s": whole_s, "kills": found}))


if __name__ == "__main__":
    main()
