"""Collapse monitors: logged figures in, a finding out when one stays beyond its limit.

Training on one's own completions collapses in a few known ways, each with a loss that looks converged: completions
shrink or run to the cap, lose their answer tags, repeat themselves, or become certain. `CollapseWatch` is the rule
and knows nothing of a trainer; `CollapseCallback` feeds it the log and warns or stops.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from imagine_opd.config import ImagineOPDConfig


@dataclass(frozen=True, slots=True)
class Monitor:
    """One rule: the moving mean of `metric` may not fall below (`floor`) or rise above (`ceiling`) `limit`.

    `relative`: the limit is a share of the figure's own mean over the first logs.
    """

    name: str
    metric: str
    kind: str
    limit: float
    relative: bool
    meaning: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A monitor out of its limit: the moving mean, the limit in the figure's own unit, and the steps it has lasted."""

    monitor: Monitor
    value: float
    limit: float
    baseline: float | None
    since_step: int
    step: int

    def __str__(self) -> str:
        side = "below" if self.monitor.kind == "floor" else "above"
        share = ""
        if self.monitor.relative and self.baseline is not None:
            share = f" ({self.monitor.limit:g} of its start, {self.baseline:.4g})"
        return (
            f"{self.monitor.meaning}: {self.monitor.metric} is {self.value:.4g}, {side} {self.limit:.4g}{share}, "
            f"since step {self.since_step} ({self.monitor.name}, seen at step {self.step})"
        )


class CollapseWatch:
    """Feeds each log to the monitors. Figures that are absent or not finite leave a monitor as it was.

    A monitor speaks once, when the mean of its last `window` figures has been out of its limit `patience` logs in a
    row, and again only after it was back inside. Relative ones begin after `baseline_logs` logs.
    """

    def __init__(self, monitors: Sequence[Monitor], window: int, baseline_logs: int, patience: int) -> None:
        self.monitors = tuple(monitors)
        self.window = window
        self.baseline_logs = baseline_logs
        self.patience = patience
        self.clear()

    def clear(self) -> None:
        """Forget all figures."""
        self._recent: dict[str, deque[float]] = {m.name: deque(maxlen=self.window) for m in self.monitors}
        self._first: dict[str, list[float]] = {m.name: [] for m in self.monitors}
        self._out_steps: dict[str, list[int]] = {m.name: [] for m in self.monitors}

    def observe(self, step: int, figures: Mapping[str, Any]) -> list[Finding]:
        """What the log of `step` shows: the monitors that speak now."""
        findings = []
        for monitor in self.monitors:
            value = figures.get(monitor.metric)
            if isinstance(value, (int, float)) and math.isfinite(value):
                finding = self._observe_one(monitor, step, float(value))
                if finding is not None:
                    findings.append(finding)
        return findings

    def _observe_one(self, monitor: Monitor, step: int, value: float) -> Finding | None:
        first, recent = self._first[monitor.name], self._recent[monitor.name]
        out_steps = self._out_steps[monitor.name]
        if len(first) < self.baseline_logs:
            first.append(value)
            if monitor.relative:
                return None  # the start itself cannot be judged by the start
        recent.append(value)
        mean = sum(recent) / len(recent)
        baseline = sum(first) / len(first) if monitor.relative else None
        limit = monitor.limit * baseline if baseline is not None else monitor.limit
        is_out = mean < limit if monitor.kind == "floor" else mean > limit
        if not is_out or len(recent) < self.window:
            out_steps.clear()
            return None
        out_steps.append(step)
        if len(out_steps) != self.patience:
            return None
        return Finding(monitor, mean, limit, baseline, out_steps[0], step)


def make_monitors(config: ImagineOPDConfig) -> list[Monitor]:
    """The monitors of the config; a limit of `None` leaves its monitor out."""
    length, entropy = "completions/mean_length", "entropy"
    table = (
        ("collapse_length_low", length, "floor", True, "completions are shrinking"),
        ("collapse_length_high", length, "ceiling", True, "completions are growing longer"),
        ("collapse_tag_share", "tag_rate", "floor", True, "completions lose their answer tags"),
        ("collapse_repetition", "completions/repetition", "ceiling", False, "completions repeat themselves"),
        ("collapse_entropy_share", entropy, "floor", True, "the student's distribution is collapsing"),
        ("collapse_truncation", "completions/clipped_ratio", "ceiling", False, "completions are cut by the length cap"),
    )
    return [
        Monitor(name, metric, kind, float(limit), relative, meaning)
        for name, metric, kind, relative, meaning in table
        if (limit := getattr(config, name)) is not None
    ]


class CollapseCallback(TrainerCallback):
    """Watches the log; warns once for each finding, or with `stop_on_collapse` saves a checkpoint and stops the run.

    A resumed run reads its earlier log again, so it speaks at the step at which the uninterrupted run would.
    """

    def __init__(self, config: ImagineOPDConfig, say: Callable[[str], None]) -> None:
        self.watch = CollapseWatch(
            make_monitors(config), config.collapse_window, config.collapse_baseline_logs, config.collapse_patience
        )
        self.stop = config.stop_on_collapse
        self.say = say
        self.findings: list[Finding] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch.clear()
        self.findings = []
        for logs in state.log_history:
            if "loss" in logs:
                self.watch.observe(int(logs["step"]), logs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        for finding in self.watch.observe(state.global_step, logs):
            self.findings.append(finding)
            if self.stop:
                control.should_save = True  # the Trainer looks at it right after the log
                control.should_training_stop = True
            if state.is_world_process_zero:
                end = "; saved and stopped (stop_on_collapse)" if self.stop else ""
                self.say(f"collapse: {finding}{end}")
