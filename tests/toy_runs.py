"""A `SafeSaving` run of a one-layer model: quick enough to fault many times; as a program, one process of several."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ModelOutput

import imagine_opd
from imagine_opd.checkpoints.saving import SafeSaving

TESTS = Path(__file__).parent


class Toy(torch.nn.Module):
    """Its dropout draws from the global random state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> ModelOutput:
        return ModelOutput(loss=torch.nn.functional.dropout(self.layer(x), 0.3).square().mean())


class Rows(torch.utils.data.Dataset):
    """Counts how often a row is taken."""

    def __init__(self, count: int, width: int) -> None:
        self.x = torch.randn(count, width, generator=torch.Generator().manual_seed(5))
        self.taken: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.taken.append(index)
        return {"x": self.x[index]}


class Act(TrainerCallback):
    """Calls `action` at the beginning of step `step` (1 is the first)."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def make_toy(folder: Path, callbacks: list[Any] | None = None, count: int = 12, width: int = 4, **fields) -> SafeSaving:
    """A run of two rows a step, a checkpoint each step."""
    torch.manual_seed(3)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
    }
    args = TrainingArguments(output_dir=str(folder), **{**settings, **fields})
    rows = Rows(count, width)
    return SafeSaving(model=Toy(width), args=args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


def take_weights(trainer: SafeSaving) -> torch.Tensor:
    return trainer.model.layer.weight.detach().clone()


def names_in(folder: Path, start: str = "") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(start))


def run_program(*command: str, timeout_s: float = 280.0, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """A Python program with one thread, that takes the package and test modules of this run."""
    path = os.pathsep.join([str(Path(imagine_opd.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    full = [*prefix, sys.executable, *command]
    return subprocess.run(full, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def run_ranks(folder: Path, resume: str | None, world_size: int = 2, step: int = 0, fields: dict | None = None) -> list:
    """Run in forked processes to the end; before step `step` the last alone gets SIGTERM. Returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.dup2(os.open(f"{folder}-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
            os.dup2(1, 2)
            torch.set_num_threads(1)
            stop = Act(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            callbacks = [stop] if step and rank == world_size - 1 else []
            trainer = make_toy(folder, callbacks, ddp_backend="gloo", save_total_limit=2, **(fields or {}))
            trainer.train(resume_from_checkpoint=resume)
            Path(f"{folder}-{rank}.json").write_text(json.dumps(take_weights(trainer).tolist()))
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """`FOLDER`: two processes whole, two stopped and gone on, one with as many rows a step. Prints the exit codes."""
    folder = Path(sys.argv[1])
    codes = {"whole": run_ranks(folder / "whole", None)}
    codes["stopped"] = run_ranks(folder / "parts", "auto", step=3)
    shutil.copytree(folder / "parts", folder / "one")
    shutil.copytree(folder / "parts", folder / "other")
    codes["resumed"] = run_ranks(folder / "parts", "auto")
    codes["one process"] = run_ranks(folder / "one", "auto", 1, fields={"gradient_accumulation_steps": 2})
    codes["fewer rows"] = run_ranks(folder / "other", "auto", 1)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
