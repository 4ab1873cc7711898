"""A step that is not finite leaves no trace but its dump: weights, optimizer state and schedule stay as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from imagine_opd.errors import DivergenceError, ImagineError
from imagine_opd.guards import nonfinite
from imagine_opd.guards.nonfinite import (
    BatchDump,
    NonfiniteGuard,
    describe_micro_batch,
    find_bad_gradient,
    skip_next_step,
)
from imagine_opd.types import Prompt, PromptPair, Rollouts, Row


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.last(self.first(x)) ** 2).mean()}


class GuardedTrainer(Trainer):
    """A plain Trainer with the guard wired as in ours; `bad[step]` says what to spoil there, and where."""

    bad: dict[int, str]

    def wire(self, bad: dict[int, str], most_in_a_row: int = 5) -> None:
        self.bad, self.said, self.found = bad, [], []
        self.guard = NonfiniteGuard(
            self.accelerator, self.args.output_dir, most_in_a_row, self.describe, self.said.append
        )
        self.trail: dict[int, tuple] = {}

    def describe(self, batch) -> BatchDump:
        return BatchDump(({"x": batch["x"].tolist()},), {"x": batch["x"]})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs)["loss"]
        kind = self.bad.get(self.state.global_step + 1)
        if kind == "loss":
            loss = loss * float("nan")
        if kind == "constant":  # every gradient is finite
            loss = loss + float("inf")
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.bad.get(self.state.global_step + 1) == "gradient":
            self.model.last.weight.grad[0, 1] = float("inf")
        self.guard.note_loss(loss, inputs)
        if self.accelerator.sync_gradients:
            self.trail[self.state.global_step + 1] = self.snapshot()
            found = self.guard.settle(model, self.optimizer, self.state.global_step + 1)
            if found is not None:
                self.found.append(found)
        return loss

    def snapshot(self):
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        moments = {
            f"{i}.{key}": value.clone()
            for i, state in enumerate(self.optimizer.state.values())
            for key, value in state.items()
        }
        return weights, moments, self.lr_scheduler.get_last_lr()


def make_trainer(tmp_path, bad, most_in_a_row=5, **fields) -> GuardedTrainer:
    torch.manual_seed(0)
    rows = [{"x": torch.randn(3)} for _ in range(32)]
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    args = TrainingArguments(output_dir=str(tmp_path / "run"), **{**given, **fields})
    trainer = GuardedTrainer(model=Line(), args=args, train_dataset=rows)
    trainer.wire(bad, most_in_a_row)
    return trainer


def assert_same(left, right) -> None:
    for one, other in zip(left[:2], right[:2], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name
    assert left[2] == right[2]


@pytest.mark.parametrize("kind", ["loss", "constant", "gradient"])
def test_weights_optimizer_state_and_schedule_are_those_before_the_bad_step(tmp_path, kind):
    trainer = make_trainer(tmp_path, {3: kind})
    trainer.train()
    assert trainer.state.global_step == 6
    assert_same(trainer.trail[3], trainer.trail[4])
    with pytest.raises(AssertionError):
        assert_same(trainer.trail[4], trainer.trail[5])
    assert trainer.trail[5][2] != trainer.trail[4][2]  # the schedule goes on with the good steps
    assert [found.step for found in trainer.found] == [3]
    assert trainer.found[0].source == ("gradient" if kind == "gradient" else "loss")
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.guard.total == 1


def test_run_with_a_bad_first_step_equals_one_that_starts_at_the_second(tmp_path):
    clean = make_trainer(tmp_path / "clean", {})
    clean.train()
    assert clean.found == []
    assert not (tmp_path / "clean" / "run" / "nonfinite").exists()
    spoilt = make_trainer(tmp_path / "spoilt", {1: "loss"})
    start = {n: p.detach().clone() for n, p in spoilt.model.named_parameters()}
    spoilt.train()
    assert spoilt.trail[1][1] == {}
    assert spoilt.trail[2][1] == {}  # Adam's moments do not exist before the first good step
    assert all(torch.equal(start[name], spoilt.trail[2][0][name]) for name in start)


def test_the_sentence_names_source_parameters_and_folder(tmp_path):
    trainer = make_trainer(tmp_path, {2: "gradient"})
    trainer.train()
    folder = tmp_path / "run" / "nonfinite" / "step-2"
    assert trainer.said == [f"step 2: the gradient is not finite in last.weight; its batch is in {folder} (left out)"]
    record = json.loads((folder / "rank-0.json").read_text())
    assert (record["step"], record["source"], record["parameters"]) == (2, "gradient", ["last.weight"])
    assert [line["micro_batch"] for line in record["completions"]] == [0, 1]
    tensors = load_file(folder / "rank-0.safetensors")
    assert sorted(tensors) == ["0.x", "1.x"]
    assert tensors["1.x"].tolist() == record["completions"][1]["x"]


def test_too_many_in_a_row_end_the_run_with_the_reason(tmp_path):
    trainer = make_trainer(tmp_path, dict.fromkeys(range(2, 7), "loss"), most_in_a_row=3)
    with pytest.raises(DivergenceError, match=r"3 steps in a row were not finite \(max_nonfinite_steps\), the last: "):
        trainer.train()
    assert [found.step for found in trainer.found] == [2, 3]
    assert issubclass(DivergenceError, ImagineError)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_good_steps_between_start_the_count_anew(tmp_path):
    trainer = make_trainer(tmp_path, {1: "loss", 2: "loss", 4: "gradient", 5: "loss"}, most_in_a_row=3)
    trainer.train()
    assert [found.step for found in trainer.found] == [1, 2, 4, 5]
    assert trainer.guard.total == 4


def test_without_clipping_the_step_is_left_out_too(tmp_path):
    trainer = make_trainer(tmp_path, {3: "gradient"}, max_grad_norm=0.0)
    trainer.train()
    assert_same(trainer.trail[3], trainer.trail[4])
    assert trainer.found[0].parameters == ("last.weight",)


def test_full_disk_is_said_and_the_run_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, {2: "loss"})
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "nonfinite").write_text("a file in the way")
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.said[0].startswith("the batch of step 2 could not be written to")


def test_tensors_that_cannot_be_written_are_said_and_the_run_goes_on(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(nonfinite, "save_file", fail)
    trainer = make_trainer(tmp_path, {2: "loss"})
    trainer.train()
    assert trainer.state.global_step == 6
    assert "No space left on device" in trainer.said[0]
    names = "first.weight, first.bias, last.weight, last.bias"
    assert trainer.said[1] == f"step 2: the loss is not finite in {names} (left out)"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_gradient_is_found_wherever_it_is(value):
    model = Line()
    assert not find_bad_gradient(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.last.weight.grad = None
    assert not find_bad_gradient(model)
    model.first.bias.grad[-1] = value
    assert find_bad_gradient(model)


def make_scaled(scale: float):
    AcceleratorState(cpu=True)
    model = Line()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), scaler=scaler)
    accelerator = SimpleNamespace(
        scaler=scaler, distributed_type="NO", process_index=0, reduce=lambda tensor, reduction: tensor
    )
    return model, scaler, optimizer, accelerator


def run_scaled_step(parts, guard, spoil: str | None = None, clips: bool = True):
    """One step as the Trainer runs it: backward, settle, unscale and clip where it clips, step."""
    model, scaler, optimizer, _ = parts
    optimizer.gradient_state._set_sync_gradients(True)
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3))["loss"]
    scaler.scale(loss).backward()
    if spoil == "gradient":
        model.last.bias.grad[0] = float("inf")
    guard.note_loss(torch.tensor(float("nan")) if spoil == "loss" else loss, None)
    found = guard.settle(model, optimizer, 1)
    if clips:
        scaler.unscale_(optimizer.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return found


def test_overflow_of_the_scaled_gradient_is_left_to_the_scaler(tmp_path):
    parts = make_scaled(1024.0)
    model, scaler, optimizer, accelerator = parts
    guard = NonfiniteGuard(accelerator, tmp_path, 2, lambda batch: BatchDump((), {}), print)
    before = model.first.weight.detach().clone()
    for _ in range(4):  # more than most_in_a_row: the scale is being found
        assert run_scaled_step(parts, guard, "gradient") is None
        assert optimizer.step_was_skipped
    assert scaler.get_scale() == 64.0
    assert torch.equal(before, model.first.weight)
    assert run_scaled_step(parts, guard) is None
    assert not optimizer.step_was_skipped
    assert not torch.equal(before, model.first.weight)


@pytest.mark.parametrize("clips", [True, False])
def test_with_a_scaler_a_bad_loss_is_left_out_and_the_next_step_is_sound(tmp_path, clips):
    parts = make_scaled(8.0)
    model, scaler, optimizer, accelerator = parts
    guard = NonfiniteGuard(accelerator, tmp_path, 3, lambda batch: BatchDump((), {}), print)
    before = model.first.weight.detach().clone()
    for _ in range(2):
        assert run_scaled_step(parts, guard, "loss", clips).source == "loss"
        assert optimizer.step_was_skipped
    assert scaler.get_scale() == 2.0
    assert torch.equal(before, model.first.weight)
    assert run_scaled_step(parts, guard, clips=clips) is None
    assert not optimizer.step_was_skipped
    assert not torch.equal(before, model.first.weight)


def test_a_gradient_that_stays_infinite_at_scale_one_is_a_bad_step(tmp_path):
    parts = make_scaled(1.0)
    guard = NonfiniteGuard(parts[3], tmp_path, 3, lambda batch: BatchDump((), {}), print)
    found = run_scaled_step(parts, guard, "gradient")
    assert (found.source, found.parameters) == ("gradient", ("last.bias",))


def test_deepspeed_cannot_take_a_step_back_and_ends_at_once(tmp_path):
    model, _, optimizer, accelerator = make_scaled(1.0)
    accelerator.distributed_type = "DEEPSPEED"
    guard = NonfiniteGuard(accelerator, tmp_path, 5, lambda batch: BatchDump((), {}), print)
    guard.note_loss(torch.tensor(float("inf")), None)
    with pytest.raises(DivergenceError, match="DeepSpeed has already stepped: resume from the last checkpoint"):
        guard.settle(model, optimizer, 7)


def test_only_the_next_step_is_skipped():
    model, optimizer = Line(), None
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.ones(2, 3))["loss"].backward()
    before = model.first.weight.detach().clone()
    skip_next_step(optimizer)
    optimizer.step()
    assert torch.equal(before, model.first.weight)
    assert optimizer.step_was_skipped
    optimizer.step()
    assert not torch.equal(before, model.first.weight)


def test_dump_of_a_micro_batch_holds_rows_prompts_completions_and_weights():
    row = Row((b"",), "what?", id="r1", source="rows.jsonl:1")
    pair = PromptPair(*(Prompt(side, (1,), (0,), None, (), "qwen_vl") for side in ("S?", "T?")))
    ids_BT, mask_BT = torch.tensor([[5, 6, 0]]), torch.tensor([[True, True, False]])
    batch = SimpleNamespace(
        rows=(row,),
        prompts=(pair,),
        rollouts=Rollouts(ids_BT, mask_BT, torch.zeros(1, 3)),
        weights_BT=torch.tensor([[0.0, 0.5, 0.0]]),
    )
    dump = describe_micro_batch(batch)
    assert dump.lines == (
        {
            "id": "r1",
            "source": "rows.jsonl:1",
            "student_prompt": "S?",
            "teacher_prompt": "T?",
            "completion_ids": [5, 6],
            "weights": [0.0, 0.5],
        },
    )
    assert torch.equal(dump.tensors["completion_ids_BT"], ids_BT)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from accelerate import Accelerator
from torch import nn
from imagine_opd.errors import DivergenceError
from imagine_opd.guards.nonfinite import BatchDump, NonfiniteGuard

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
guard = NonfiniteGuard(accelerator, sys.argv[1], 2, lambda batch: BatchDump((), {}), lambda text: None)
rank, seen = accelerator.process_index, []
for step in range(1, 6):
    loss = model(torch.ones(1, 2)).mean()
    accelerator.backward(loss)
    bad = (step == 2 and rank == 1) or step >= 4  # at 2 one rank alone has a bad loss, and a finite gradient
    guard.note_loss(loss.detach() * float("nan") if bad else loss, None)
    before = model.module.weight.detach().clone()
    try:
        found = guard.settle(model, optimizer, step)
    except DivergenceError:
        seen.append("end")
        break
    optimizer.step()
    seen.append((found is None, bool(torch.equal(before, model.module.weight))))
    optimizer.zero_grad()
print(f"rank {rank}:", seen, flush=True)
torch.distributed.destroy_process_group()
"""


def test_all_ranks_leave_out_and_end_alike(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    source = Path(__file__).parents[1] / "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = "[(True, False), (False, True), (True, False), (False, True), 'end']"
    assert f"rank 0: {expected}" in done.stdout
    assert f"rank 1: {expected}" in done.stdout
    assert sorted(path.name for path in (tmp_path / "nonfinite" / "step-2").iterdir()) == [
        *("rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors"),
    ]
