"""Loss or gradient that is not finite: the step is left out, counted and dumped; too many in a row end the run.

A left-out step leaves weights, optimizer state and learning-rate schedule as they were; only the step counter and the
data go on. All ranks decide alike. With an fp16 gradient scaler an overflow of the scaled gradient is the scaler's
own business (it skips the step and lowers its scale) and counts here only once the scale has come down to 1.

Under DeepSpeed the engine steps inside `backward`: the step cannot be taken back, so the run ends at the first one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from imagine_opd.errors import DivergenceError

DUMP_FOLDER = "nonfinite"
_MOST_DUMPS = 20
_MOST_NAMES = 5
_LEAST_SCALE = 1.0


@dataclass(frozen=True, slots=True)
class BatchDump:
    """What is kept of a micro-batch: one JSON object for each completion, and tensors for the file beside it."""

    lines: tuple[dict[str, Any], ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class NonfiniteStep:
    """A step that was left out: its number, whether the `loss` or the `gradient`, and the first parameters with it."""

    step: int
    source: str
    parameters: tuple[str, ...]
    folder: Path | None

    def __str__(self) -> str:
        named = ""
        if self.parameters:
            named = f" in {len(self.parameters)} parameters" if len(self.parameters) > _MOST_NAMES else " in"
            named += f" {', '.join(self.parameters[:_MOST_NAMES])}"
        kept = f"; its batch is in {self.folder}" if self.folder is not None else ""
        return f"step {self.step}: the {self.source} is not finite{named}{kept}"


class NonfiniteGuard:
    """Watches the losses and the summed gradient of each optimizer step; `settle` must see every step's end.

    Args:
        accelerator: the Trainer's.
        output_dir: dumps go to `nonfinite/step-N` in it.
        most_in_a_row: so many bad steps in a row raise `DivergenceError`.
        describe: micro-batch to what is dumped of it.
        say: prints a line for the user.
    """

    def __init__(
        self,
        accelerator: Any,
        output_dir: str | Path,
        most_in_a_row: int,
        describe: Callable[[Any], BatchDump],
        say: Callable[[str], None],
    ) -> None:
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.most_in_a_row = most_in_a_row
        self.describe = describe
        self.say = say
        self.in_a_row = 0
        self.total = 0
        self._batches: list[Any] = []
        self._bad_loss: torch.Tensor | None = None

    def note_loss(self, loss: torch.Tensor, batch: Any) -> None:
        """After each micro-batch's backward. Costs no wait for the device."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        self._batches.append(batch)

    def settle(self, model: nn.Module, optimizer: Any, step: int) -> NonfiniteStep | None:
        """Once the step's gradient is whole and not yet clipped: whether to leave it out, and if so see to it.

        `step` is the number the log will give it. Raises `DivergenceError` after too many in a row.
        """
        batches, self._batches = self._batches, []
        bad_loss, self._bad_loss = self._bad_loss, None
        if bad_loss is None:
            return None
        is_bad_loss, is_bad_gradient = self._share(bad_loss, find_bad_gradient(model).to(bad_loss.device))
        scaler = self.accelerator.scaler
        if is_bad_gradient and not is_bad_loss and scaler is not None and scaler.get_scale() > _LEAST_SCALE:
            is_bad_gradient = False
        if not is_bad_loss and not is_bad_gradient:
            self.in_a_row = 0
            _clear_skip(optimizer)
            return None
        self.in_a_row += 1
        self.total += 1
        source = "loss" if is_bad_loss else "gradient"
        names = tuple(
            name.removeprefix("module.") for name, parameter in model.named_parameters() if _is_bad(parameter.grad)
        )
        found = NonfiniteStep(step, source, names, self._dump(step, source, names, batches))
        self.say(f"{found} (left out)")
        if self.accelerator.distributed_type == "DEEPSPEED":
            raise DivergenceError(f"{found}; DeepSpeed has already stepped: resume from the last checkpoint")
        if self.in_a_row >= self.most_in_a_row:
            raise DivergenceError(
                f"{self.in_a_row} steps in a row were not finite (max_nonfinite_steps), the last: {found}. "
                "Lower learning_rate or max_grad_norm, check the model's weights and dtype, and look at the batch"
            )
        skip_next_step(optimizer)
        return found

    def _share(self, *flags: torch.Tensor) -> list[bool]:
        """The flags, each set where any rank has it."""
        counts = self.accelerator.reduce(torch.stack(flags).float(), reduction="sum")
        return [bool(count > 0) for count in counts.tolist()]

    def _dump(self, step: int, source: str, names: Sequence[str], batches: Sequence[Any]) -> Path | None:
        folder = self.output_dir / DUMP_FOLDER / f"step-{step}"
        rank = self.accelerator.process_index
        if self.total > _MOST_DUMPS:
            return None
        tensors: dict[str, torch.Tensor] = {}
        lines: list[dict[str, Any]] = []
        for index, batch in enumerate(batches):
            dump = self.describe(batch)
            lines += [{"micro_batch": index, **line} for line in dump.lines]
            # Copied: safetensors refuses tensors that share memory.
            found = {f"{index}.{name}": tensor.detach().cpu().clone() for name, tensor in dump.tensors.items()}
            tensors.update({name: tensor.contiguous() for name, tensor in found.items()})
        record = {"step": step, "source": source, "rank": rank, "parameters": list(names), "completions": lines}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
            (folder / f"rank-{rank}.json").write_text(text + "\n", encoding="utf-8")
            save_file(tensors, folder / f"rank-{rank}.safetensors")
        except (OSError, SafetensorError) as error:
            self.say(f"the batch of step {step} could not be written to {folder}: {error}")
            return None
        return folder


def describe_micro_batch(batch: Any) -> BatchDump:
    """What to keep of a `batches.MicroBatch`: rows by id, both prompts' text, completions and weights; no pixels."""
    rollouts, weights_BT = batch.rollouts, batch.weights_BT
    lines = []
    for index, (row, pair) in enumerate(zip(batch.rows, batch.prompts, strict=True)):
        kept_T = rollouts.completion_mask_BT[index].bool()
        lines.append(
            {
                "id": row.id,
                "source": row.source,
                "student_prompt": pair.student.text,
                "teacher_prompt": pair.teacher.text,
                "completion_ids": rollouts.completion_ids_BT[index][kept_T].tolist(),
                "weights": weights_BT[index][kept_T].tolist(),
            }
        )
    tensors = {
        "completion_ids_BT": rollouts.completion_ids_BT,
        "completion_mask_BT": rollouts.completion_mask_BT,
        "sampling_logprobs_BT": rollouts.sampling_logprobs_BT,
        "weights_BT": weights_BT,
    }
    return BatchDump(tuple(lines), tensors)


def find_bad_gradient(model: nn.Module) -> torch.Tensor:
    """A bool scalar: some gradient of this process (its shard, where sharded) is not finite."""
    grads = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        return torch.tensor(False)
    # The norm is NaN or infinite as soon as one value is, at one pass over the memory and one small tensor a parameter.
    return ~torch.isfinite(torch.nn.utils.get_total_norm(grads))


def skip_next_step(optimizer: Any) -> None:
    """Make the next `step()` of accelerate's optimizer do nothing and report itself as skipped.

    The Trainer then leaves the learning-rate schedule alone too. A gradient scaler forgets the gradient it has seen.
    """
    original = optimizer.step

    def step(closure: Any = None) -> None:
        optimizer.step = original
        scaler = optimizer.scaler
        if scaler is not None:
            # As after an overflow; by a value, for the scaler's own asks for the unscaled gradient that clipping makes.
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        optimizer._is_overflow = True

    optimizer.step = step


def _clear_skip(optimizer: Any) -> None:
    # accelerate writes the flag itself only where it has a scaler.
    if getattr(optimizer, "_is_overflow", False) and optimizer.scaler is None:
        optimizer._is_overflow = False


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _is_bad(grad: torch.Tensor | None) -> bool:
    return grad is not None and not bool(torch.isfinite(_local(grad)).all())
