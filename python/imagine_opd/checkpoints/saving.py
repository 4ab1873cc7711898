"""`SafeSaving`: a `transformers.Trainer` whose checkpoints are whole or absent, and which stops on a signal with one.

The Trainer asks `_get_output_dir` where its checkpoints go, and rotates and clears there. It is told the staging
folder of the step, so that it writes there and finds nothing of its own to delete.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerState

from imagine_opd.checkpoints.files import (
    STATE_FILE,
    DataOrder,
    clear_leftovers,
    find_checkpoint,
    find_fault,
    find_staging,
    list_checkpoints,
    measure_checkpoint_bytes,
    read_step,
    refuse_other_order,
    rotate_checkpoints,
    seal_checkpoint,
    set_aside_later,
)
from imagine_opd.errors import OutputError, RunStoppedError
from imagine_opd.interrupts import InterruptCallback
from imagine_opd.outputs import guard_writing


class SavedPart(Protocol):
    """State beside the Trainer's own that a checkpoint holds. Both are called in every process, with its folder."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class SafeSaving(Trainer):
    """Checkpoints and signals. `saved_parts`: appended to before `train`; saved and loaded with each checkpoint.

    Takes these doors of the Trainer: `train`, `save_model`, `_run_epoch`, `_save_checkpoint`, `_get_output_dir` and
    `_push_from_checkpoint`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.saved_parts: list[SavedPart] = []
        self.interrupts = InterruptCallback()
        self._opened: str | None = None
        self._push_waits = False
        self.add_callback(self.interrupts)

    # before

    def open_checkpoint(self, resume: str | Path | bool | None) -> str | None:
        """The checkpoint to go on from, the same in all processes, its rows' order compared and `saved_parts` loaded.

        `resume` is a folder, `True`, `"auto"` or `None`. Raises `ConfigError`.
        """
        if resume is not None and resume == self._opened:
            return self._opened
        checkpoint = share_from_first(find_checkpoint(resume, Path(self.args.output_dir)))
        if checkpoint is not None:
            refuse_other_order(Path(checkpoint), self._describe_order(), self.args.ignore_data_skip)
            for part in self.saved_parts:
                part.load(Path(checkpoint))
        self._opened = checkpoint
        return checkpoint

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train, from a complete checkpoint or afresh. Raises `RunStoppedError` after a signal, and `OutputError`."""
        checkpoint = self.open_checkpoint(resume_from_checkpoint)
        self._opened = None
        if self.args.should_save:
            prepare_folder(Path(self.args.output_dir), checkpoint, self.args.save_total_limit)
        with self.interrupts.catch_signals():
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        if self.interrupts.stopped_by:
            name = signal.Signals(self.interrupts.stopped_by).name
            step, path = self.state.global_step, Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            rest = "holds weights only" if self.args.save_only_model else "is complete: resume_from_checkpoint='auto'"
            text = f"stopped by {name} after step {step} of {self.state.max_steps}; {path} {rest}"
            if self.args.should_save:
                print(text, flush=True)
            raise RunStoppedError(text, self.interrupts.stopped_by)
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run killed after its last step, in its final save, would take one step more when it goes on.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    # while saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, with a failed write as `OutputError`."""
        if _internal_call:  # a part of a checkpoint, which says more
            super().save_model(output_dir, _internal_call)
            return
        with guard_writing(Path(output_dir or self.args.output_dir), "the model", self._estimate_model_bytes):
            super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        return str(find_staging(Path(super()._get_output_dir(trial)), self.state.global_step))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        step, staging = self.state.global_step, find_staging(folder, self.state.global_step)
        staged = staging / f"checkpoint-{step}"
        with self._guard_checkpoint(folder, step):
            if self.args.should_save and staging.exists():
                shutil.rmtree(staging)
            self.accelerator.wait_for_everyone()  # nobody writes before what was left there is gone
            super()._save_checkpoint(model, trial)
            for part in self.saved_parts:
                part.save(staged)
            self._locate_best(folder)
            # A process that failed never comes here: its launcher ends the others, and the folder keeps its tmp name.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE_FILE))
                seal_checkpoint(folder, step, self._describe_order())
                rotate_checkpoints(folder, self.args.save_total_limit, step, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
        if self._push_waits:
            self._push_waits = False
            super()._push_from_checkpoint(str(folder / f"checkpoint-{step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._push_waits = True  # for the folder's name: the upload goes on in the background

    @contextmanager
    def _guard_checkpoint(self, folder: Path, step: int) -> Iterator[None]:
        try:
            with guard_writing(folder, f"checkpoint-{step}", lambda: self._estimate_bytes(folder)):
                yield
        except OutputError as error:
            if self.args.should_save:
                shutil.rmtree(find_staging(folder, step), ignore_errors=True)
            last = next((path for path in reversed(list_checkpoints(folder)) if find_fault(path) is None), None)
            rest = "no checkpoint was saved before" if last is None else f"the last complete checkpoint is {last}"
            failure = OutputError(f"{error}; {rest}")
            failure.errno = error.errno
            raise failure from error.__cause__

    def _locate_best(self, folder: Path) -> None:
        """The best checkpoint's final path: the Trainer looked for it in the staging folder."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (folder / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")

    def _estimate_bytes(self, folder: Path) -> int:
        """A checkpoint's size: the last one's, or for the first the weights and what the optimizer holds."""
        if (known := measure_checkpoint_bytes(folder)) is not None:
            return known
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return self._estimate_model_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _estimate_model_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())

    def _describe_order(self) -> DataOrder:
        args = self.args
        return DataOrder(
            rows=len(self.train_dataset),
            rows_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            world_size=args.world_size,
            seed=args.seed,
            data_seed=args.data_seed,
            train_sampling_strategy=args.train_sampling_strategy,
            dataloader_drop_last=args.dataloader_drop_last,
        )


def prepare_folder(folder: Path, checkpoint: str | None, limit: int | None) -> None:
    """Before a run writes in `folder`: finish what a killed run left, and set aside checkpoints after its start."""
    if not folder.is_dir():
        return
    begin = Path(checkpoint) if checkpoint is not None else None
    step = read_step(begin) if begin is not None and begin.resolve().parent == folder.resolve() else 0
    with guard_writing(folder, "the place for new checkpoints"):
        cleared = clear_leftovers(folder)
        aside = set_aside_later(folder, step)
        if begin is not None and step:  # the killed run may have saved and not rotated
            best = TrainerState.load_from_json(str(begin / STATE_FILE)).best_model_checkpoint
            rotate_checkpoints(folder, limit, step, best)
    if cleared:
        print(f"{folder}: removed what a killed run left: {', '.join(cleared)}", flush=True)
    if aside is not None:
        print(f"{aside}: holds the checkpoints of an earlier run after step {step}", flush=True)


def share_from_first(checkpoint: str | None) -> str | None:
    """The first process's choice, for all: one that reads another state of the disk would go on elsewhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return checkpoint
    shared = [checkpoint]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
