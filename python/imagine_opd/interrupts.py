"""SIGTERM and SIGINT in a run: finish the step, save a checkpoint, raise `RunStoppedError`; a second stops at once.

A scheduler may signal one process of many, so all agree at the end of each step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Handler = Callable[[int, FrameType | None], Any] | int | None


class InterruptCallback(TrainerCallback):
    """Ends training at the end of the step in which a signal came, with a checkpoint. stopped_by: the signal's number.

    A signal in the very last step changes nothing: the run is then finished.
    """

    def __init__(self) -> None:
        self.stopped_by = 0
        self._received = 0
        self._handlers: dict[int, _Handler] = {}

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Handlers for the block, in the main thread only; what was there before is put back."""
        self.stopped_by = self._received = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner = os.getpid()

        def receive(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:  # a loader's process: its parent decides
                return
            if self._received:
                self._put_back()
                os.kill(owner, number)
                return
            self._received = number
            name = signal.Signals(number).name
            # os.write, as a print could be the very call that was interrupted.
            os.write(2, f"\n{name}: the step is finished and a checkpoint saved; once more stops at once\n".encode())

        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # not ours to change: set from C, or to be ignored
                self._handlers[number] = signal.signal(number, receive)
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        number = agree_on_signal(self._received, args.device)
        if number and state.global_step < state.max_steps:
            self.stopped_by = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time before the scheduler kills is for the checkpoint

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped_by:  # the Trainer takes the early end for the end of an epoch
            control.should_save = control.should_evaluate = False


def agree_on_signal(number: int, device: torch.device) -> int:
    """The largest signal number any process has received; 0 for none. All processes must call this."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    if torch.distributed.get_world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared.item())
