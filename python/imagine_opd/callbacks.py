"""What a run shows and leaves while it goes: a progress bar, `metrics.jsonl` (one line per log), `run.json`."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from imagine_opd.metrics import StepMetrics
from imagine_opd.outputs import guard_writing

METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
RUN_FILE = "run.json"
_PACKAGES = ("imagine-opd", "torch", "torchvision", "transformers", "accelerate", "triton", "numpy", "pillow", "peft")


class RunFolderCallback(TrainerCallback):
    """Appends every log to `metrics.jsonl`; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        with guard_writing(Path(args.output_dir), RUN_FILE):
            self._begin_files(Path(args.output_dir), args, state)

    def _begin_files(self, folder: Path, args: TrainingArguments, state: TrainerState) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, COMPLETIONS_FILE):
            if state.global_step > 0:
                drop_lines_after(folder / name, state.global_step)
            else:
                set_aside(folder / name)
        run = {**self.description, "config": args.to_dict(), "seed": args.seed, "versions": read_versions()}
        text = json.dumps(run, indent=2, ensure_ascii=False, default=str)
        Path(folder, RUN_FILE).write_text(text + "\n", encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            append_line(Path(args.output_dir, METRICS_FILE), {"step": state.global_step, **logs})


class StepProgressCallback(ProgressCallback):
    """The Trainer's progress bar with the few figures one watches beside it; `metrics.jsonl` holds them all."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = {"kl": logs.get("reverse_kl"), "entropy": logs.get("entropy"), "tags": logs.get("tag_rate")}
        self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None})


class StepTimeCallback(TrainerCallback):
    """Ends the step's time before checks, logs and checkpoints take theirs."""

    def __init__(self, metrics: StepMetrics) -> None:
        self.metrics = metrics

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.metrics.end_step()


class TeacherUpdateCallback(TrainerCallback):
    """Lets a moving teacher follow the student after each optimizer step."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A step that was left out (overflow, a loss that is not finite) moves no student, and so no average of it.
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.teacher.update(kwargs["model"])


def append_line(path: Path, item: dict[str, Any]) -> None:
    """Append one JSON line; a number that is not finite is written as `null`."""
    plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in item.items()}
    with guard_writing(path, "a line of the log"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False, default=float) + "\n")


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a JSONL file up to `step`; a torn last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines would also cut at U+2028 inside a text
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    written = path.with_suffix(".tmp")
    written.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    written.replace(path)  # whole or not at all


def set_aside(path: Path) -> None:
    """Rename an earlier run's file to the first free `name.N.jsonl`: a new run loses nothing of an old one."""
    if not path.is_file():
        return
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)


def read_versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages a result depends on."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
