"""What the peers of the step bench have in common: commands and answers, the clock of the stages, the memory meter."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benches.view_memory import read_status_mib

MOST_STEPS = 64
MOST_GRADIENT_ROWS = 4096

OTHER = "other"
"""The stage of what is done between the stages."""

COMPARED = ("language_model.norm.weight", "layers.0.self_attn.q_proj.lora_B", "layers.1.mlp.down_proj.lora_A")
COMPARED_FULL = ("language_model.norm.weight", "layers.0.self_attn.q_proj.weight", "embed_tokens.weight")


class Link:
    """Commands and answers. What else the process prints goes to standard error."""

    def __init__(self) -> None:
        self.output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def read(self) -> dict[str, Any]:
        """The next command; the end of the input stops."""
        line = sys.stdin.readline()
        return json.loads(line) if line.strip() else {"do": "stop"}

    def answer(self, **fields: Any) -> None:
        """One line."""
        self.output.write(json.dumps(fields) + "\n")
        self.output.flush()


@dataclass
class Clock:
    """Seconds of a step, in all and by stage: of wall time, and of CPU time of all threads, which other work on the
    machine disturbs less. A stage inside another is taken out of it."""

    device: torch.device
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    stages_cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _stopped: tuple[float, float] | None = None

    def start(self) -> None:
        """A step begins. What other threads have done since the last one was told (views made ahead) is in its CPU
        time."""
        self.stages.clear()
        self.stages_cpu.clear()
        self._open: list[str] = []
        now = self.read()
        ahead_s = 0.0
        if self._stopped is not None:
            whole_s, own_s = now[1] - self._stopped[0], time.thread_time() - self._stopped[1]
            ahead_s = max(0.0, whole_s - own_s)
        self.begin = self._last = (now[0], now[1] - ahead_s)

    def read(self) -> tuple[float, float]:
        """Both times, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what is done inside to a stage; what another thread does is in the CPU time of the one it runs beside."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = self.read()
        name = self._open[-1] if self._open else OTHER
        self.stages[name] += now[0] - self._last[0]
        self.stages_cpu[name] += now[1] - self._last[1]
        self._last = now

    def stop(self) -> dict[str, Any]:
        """The step's figures."""
        self._turn()
        self._stopped = self._last[1], time.thread_time()
        seconds, cpu_s = (end - begin for end, begin in zip(self._last, self.begin, strict=True))
        return {
            "seconds": seconds,
            "cpu_s": cpu_s,
            "stages": dict(self.stages),
            "stages_cpu": dict(self.stages_cpu),
        }


class Meter:
    """Peak memory of a step above what the process held before it: of the device, or resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0.0

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device) / 2**20
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed and kept must not hide what is taken anew
        self.before = read_status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> dict[str, float]:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = read_status_mib("VmHWM")
        return {"peak_mib": peak - self.before, "held_mib": self.before}


class Turns(TrainerCallback):  # type: ignore[misc]
    """For a `transformers.Trainer`: answers after each step and waits for the next command; keeps what a record is
    made of. It logs every step, and the log comes last."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link, self.meter, self.clock = link, Meter(device), Clock(device)
        self.command: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.completion_ids_BT: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.link.answer(ready=True)
        self.wait(control)

    def wait(self, control: Any) -> None:
        """For the next command; the clocks start when it comes."""
        self.command = self.link.read()
        control.should_training_stop = self.command["do"] != "step"
        self.kept = {}
        if self.command.get("memory"):
            self.meter.start()
        self.clock.start()

    def load_completions(self) -> Any:
        """`[B, T]` ids that the command names, or None."""
        return torch.load(self.command["completions"])["completion_ids_BT"] if "completions" in self.command else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if "record" in self.command:
            self.kept = {"gradients": pick_gradients(model)}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or self.command.get("do") != "step":
            return
        taken = self.clock.stop()
        memory = self.meter.read() if self.command.get("memory") else {}
        loss = logs["loss"]
        if "record" in self.command:
            record = {"completion_ids_BT": self.completion_ids_BT, "loss": loss, **self.kept}
            torch.save(record, self.command["record"])
        self.link.answer(loss=loss, tokens=int(self.completion_ids_BT.numel()), **taken, **memory)
        self.wait(control)


def pick_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of a few parameters: the last norm, an early and a late matrix, the tied head where it is trained."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and any(part in name for part in (*COMPARED, *COMPARED_FULL)):
            # Of the tied head the first words: of a 4B model it is 1.5 GB.
            found[name.removeprefix("base_model.model.")] = parameter.grad[:MOST_GRADIENT_ROWS].float().cpu().clone()
    return found


def find_device() -> torch.device:
    """The current CUDA device, or the CPU with one thread."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(1)
    return torch.device("cpu")
