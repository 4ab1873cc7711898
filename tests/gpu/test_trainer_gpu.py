"""The trainer on a GPU: its step equals the CPU's, runs train, resume and save there."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.trainer import ImagineOPDTrainer

pytestmark = pytest.mark.gpu

RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-4,
    "max_steps": 2,
    "save_strategy": "no",
    "teacher_checks": False,
    "disable_tqdm": True,
}
CLOSE = 1e-3
"""Relative to the largest gradient. Batches of other shapes are summed in another order: 1e-4 was seen, where a CPU
stays below 1e-5."""


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is compared is the step, not the precision that PyTorch gives the patch embedding's convolution by default:
    # rounding its operands to TF32 alone moves gradients by 1.0e-3 of the largest on an H200, and on a CPU, too.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_trainer(tiny: Any, rows: Any, folder: Path, **fields: Any) -> ImagineOPDTrainer:
    args = build_config(folder / "run", {**RUN, **fields})
    return ImagineOPDTrainer(copy.deepcopy(tiny.model), args, rows, processor=tiny.processor)


def take_gradients(
    trainer: ImagineOPDTrainer, micro_batches: Any, total: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss, and its gradients on the CPU."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = 0.0
    for micro_batch in micro_batches:
        part = trainer.compute_loss(trainer.model, micro_batch, num_items_in_batch=total)
        part.backward()
        loss += float(part.detach())
    named = trainer.model.named_parameters()
    return loss, {name: p.grad.detach().cpu() for name, p in named if p.grad is not None}


def move(value: Any, device: str) -> Any:
    """A dataclass of tensors, and of such dataclasses, on another device; what else it holds stays where it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    return dataclasses.replace(value, **{name: move(item, device) for name, item in fields.items()})


def assert_close_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 1e-6
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) < CLOSE * largest, name


@pytest.mark.parametrize("mode", ["full", "sampled_token"])
def test_a_step_on_the_gpu_equals_the_cpus(tiny: Any, make_rows: Any, tmp_path: Path, mode: str) -> None:
    rows = make_rows(4)
    fields = {"distillation_mode": mode}
    there = make_trainer(tiny, rows, tmp_path / "gpu", kernel_backend="triton", **fields)
    here = make_trainer(tiny, rows, tmp_path / "cpu", use_cpu=True, **fields)
    micro_batches, total = there.get_batch_samples(iter([rows]), 1, there.accelerator.device)
    assert all(parameter.is_cuda for parameter in there.model.parameters())
    loss, gradients = take_gradients(there, micro_batches, total)
    wanted_loss, wanted = take_gradients(here, [move(batch, "cpu") for batch in micro_batches], total.cpu())
    assert loss == pytest.approx(wanted_loss, rel=1e-3, abs=1e-6)
    assert_close_gradients(gradients, wanted)


def test_accumulation_1x4_equals_4x1(tiny: Any, make_rows: Any, tmp_path: Path) -> None:
    rows = make_rows(4)
    answers = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(tiny, rows, tmp_path / str(size), gradient_accumulation_steps=steps)
        batches = [rows[start : start + size] for start in range(0, 4, size)]
        micro_batches, total = trainer.get_batch_samples(iter(batches), len(batches), trainer.accelerator.device)
        answers.append(take_gradients(trainer, micro_batches, total))
    (whole_loss, whole), (split_loss, split) = answers
    assert whole_loss == pytest.approx(split_loss, rel=1e-3)
    assert_close_gradients(split, whole)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tiny: Any, make_rows: Any, tmp_path: Path) -> None:
    rows = make_rows(8)
    fields = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tiny, rows, tmp_path / "whole", **fields)
    whole.train()
    resumed = make_trainer(tiny, rows, tmp_path / "resumed", **fields)
    start = {name: tensor.clone() for name, tensor in resumed.model.state_dict().items()}
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-2")))
    assert resumed.state.global_step == 4
    ends = whole.model.state_dict()
    assert all(tensor.is_cuda for tensor in ends.values())
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in ends.items()) > 1e-4
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, ends[name], rtol=1e-4, atol=1e-6, msg=name)


SWITCHES = ("share_vision_features", "share_prefill", "prefetch_views")


@pytest.mark.parametrize("fields", [{"freeze_vision": True}, {"use_peft": True, "lora_r": 4}], ids=["full", "adapter"])
def test_switches_of_speed_change_no_gradient(tiny: Any, make_rows: Any, tmp_path: Path, fields: Any) -> None:
    rows, answers = make_rows(4), []
    for is_on in (False, True):
        switches = dict.fromkeys(SWITCHES, is_on)
        trainer = make_trainer(tiny, rows, tmp_path / str(is_on), num_generations=2, **fields, **switches)
        micro_batches, total = trainer.get_batch_samples(iter([rows]), 1, trainer.accelerator.device)
        answers.append((micro_batches[0].rollouts.completion_ids_BT, *take_gradients(trainer, micro_batches, total)))
    assert trainer.features is not None
    assert trainer.features.is_frozen
    (plain_ids, plain_loss, plain), (ids, loss, found) = answers
    assert torch.equal(plain_ids, ids)
    assert loss == pytest.approx(plain_loss, rel=1e-3, abs=1e-6)
    assert_close_gradients(found, plain)


def test_packed_forwards_give_the_gradients_of_padded_ones(tiny: Any, make_rows: Any, tmp_path: Path) -> None:
    rows, answers = make_rows(4), []
    for packed in (False, True):
        trainer = make_trainer(tiny, rows, tmp_path / str(packed), padding_free=packed)
        micro_batches, total = trainer.get_batch_samples(iter([rows]), 1, trainer.accelerator.device)
        answers.append(take_gradients(trainer, micro_batches, total))
    assert answers[1][0] == pytest.approx(answers[0][0], rel=1e-3, abs=1e-6)
    assert_close_gradients(answers[1][1], answers[0][1])


def test_stages_are_timed_by_the_device(tiny: Any, make_rows: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tiny, make_rows(8), tmp_path)
    trainer.train()
    logs = [line for line in trainer.state.log_history if "step_time" in line]
    assert logs
    for line in logs:
        parts = [line[f"time/{name}_s"] for name in ("rollout", "step", "update", "idle")]
        assert sum(parts) == pytest.approx(line["step_time"], rel=1e-3)
        assert all(part >= 0 for part in parts)
        assert line["time/teacher_s"] + line["time/student_s"] + line["time/backward_s"] <= line["time/step_s"] * 1.001
