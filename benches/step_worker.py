"""One peer of the step bench in a process of its own: commands in on standard input, one JSON line each out.

    python -m benches.step_worker --peer ours --case cpu --folder DIR

`{"do": "step"}` runs one optimizer step and answers with its seconds, in all and by stage, and its loss. With
`"record": FILE` the completions, the loss and some gradients are written there; `"completions": FILE` takes those of
another peer's record instead of sampling; `"memory": true` counts the peak. `{"do": "stop"}` ends the process.
A peer's memory is its own this way, its packages too, and it can be held still while another works.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benches.step_cases import StepCase, build_model, build_processor, make_rows
from benches.view_memory import read_status_mib

MOST_STEPS = 64
MOST_GRADIENT_ROWS = 4096

PARENT_DEATH_SIGNAL = 1
"""What Linux calls PR_SET_PDEATHSIG."""
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


def run_plain(case: StepCase, link: Link, folder: Path, options: argparse.Namespace) -> None:
    """The loop of `step_plain`."""
    from benches.step_plain import PlainLoop

    device = find_device()
    processor = build_processor(case)
    model = build_model(case, processor, device)
    teacher = build_model(case, processor, device).requires_grad_(False).eval() if case.trains == "full" else None
    loop = PlainLoop(case, model, teacher, processor, options.keeps)
    rows = make_rows(case, folder, MOST_STEPS)
    # The step that is compared takes our completions: without this the first timed one would be the first to generate.
    loop.generate(loop.make_inputs(rows[: case.rows])[0])
    meter, clock, number = Meter(device), Clock(device), 0
    link.answer(ready=True)
    while (command := link.read())["do"] == "step":
        part = rows[number * case.rows : (number + 1) * case.rows]
        given = torch.load(command["completions"])["completion_ids_BT"] if "completions" in command else None
        kept: dict[str, Any] = {}
        loop.before_update = lambda: kept.update(gradients=pick_gradients(model)) if "record" in command else None  # noqa: B023
        if command.get("memory"):
            meter.start()
        clock.start()
        loss, ids_BT = loop.step(part, clock.stage, given)
        taken = clock.stop()
        number += 1
        if "record" in command:
            torch.save({"completion_ids_BT": ids_BT.cpu(), "loss": loss, **kept}, command["record"])
        memory = meter.read() if command.get("memory") else {}
        link.answer(loss=loss, tokens=ids_BT.numel(), **taken, **memory)


def find_device() -> torch.device:
    """The current CUDA device, or the CPU with one thread."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    torch.set_num_threads(1)
    return torch.device("cpu")


def run_ours(case: StepCase, link: Link, folder: Path, options: argparse.Namespace) -> None:
    """`ImagineOPDTrainer` as it is."""
    from benches.step_ours import run

    run(case, link, folder)


def run_trl(case: StepCase, link: Link, folder: Path, options: argparse.Namespace) -> None:
    """TRL's `DistillationTrainer`."""
    from benches.step_trl import run

    run(case, link, folder)


PEERS: dict[str, Callable[[StepCase, Link, Path, argparse.Namespace], None]] = {
    "ours": run_ours,
    "plain": run_plain,
    "trl": run_trl,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--case", type=json.loads, required=True, help="the fields of a StepCase as JSON")
    parser.add_argument("--folder", type=Path, required=True, help="for pictures and the run's folder")
    parser.add_argument("--keeps", choices=("all", "completion"), default="all", help="logits of the plain peer")
    options = parser.parse_args(arguments)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)  # one that is stopped would stay for ever
    fields = {**options.case, "picture": tuple(options.case["picture"])}
    link = Link()
    find_device()
    try:
        PEERS[options.peer](StepCase(**fields), link, options.folder, options)
    except LookupError as reason:
        link.answer(left_out=str(reason.args[0]))
        link.read()
    return 0


def pack_case(case: StepCase) -> str:
    """What `--case` takes."""
    return json.dumps(dataclasses.asdict(case))


if __name__ == "__main__":
    sys.exit(main())
