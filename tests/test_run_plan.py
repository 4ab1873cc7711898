"""The plan of a run: printed before step 0, and obeyed by the teacher."""

from __future__ import annotations

import copy

import torch

from imagine_opd import run_plan
from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Row

RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "save_strategy": "no",
    "teacher_checks": False,
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_trainer(tiny, rows, tmp_path, **fields) -> ImagineOPDTrainer:
    args = build_config(tmp_path / "run", {**RUN, **fields})
    return ImagineOPDTrainer(copy.deepcopy(tiny.model), args, rows, processor=tiny.processor)


def test_plan_is_printed_before_the_first_step(tiny, make_rows, tmp_path, capsys):
    trainer = make_trainer(tiny, make_rows(2), tmp_path)
    trainer.train()
    text = capsys.readouterr().out
    assert text.index("memory plan: Qwen3VLForConditionalGeneration") < text.index("'loss':")
    assert "teacher: a second copy" in text
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    assert trainer.run_plan.plan.get_bytes("student weights") == weights


def test_teacher_goes_to_host_memory_where_a_copy_does_not_fit(tiny, make_rows, tmp_path, monkeypatch):
    rows = make_rows(2)
    roomy = make_trainer(tiny, rows, tmp_path / "a")
    assert (roomy.run_plan.placement, roomy.teacher.placement) == ("copy", "copy")
    needed = roomy.run_plan.plan.device_bytes
    monkeypatch.setattr(run_plan, "measure_device_bytes", lambda device: int(needed * 0.9))
    tight = make_trainer(tiny, rows, tmp_path / "b")
    assert (tight.run_plan.placement, tight.teacher.placement) == ("cpu", "cpu")
    assert "does not fit" in tight.run_plan.describe()
    forced = make_trainer(tiny, rows, tmp_path / "c", teacher_placement="device")
    assert (forced.run_plan.placement, forced.teacher.placement) == ("copy", "copy")
    assert "as the config says" in forced.run_plan.reason
    for trainer in (roomy, tight):
        trainer.train()
    for name, weight in roomy.model.state_dict().items():
        assert torch.equal(weight, tight.model.state_dict()[name]), name


def test_adapter_and_live_teachers_are_planned_without_a_copy(tiny, make_rows, tmp_path):
    adapter = make_trainer(tiny, make_rows(2), tmp_path / "a", use_peft=True, lora_r=4)
    assert adapter.run_plan.placement == "adapter_off"
    assert adapter.run_plan.plan.get_bytes("teacher weights") == 0
    live = make_trainer(tiny, make_rows(2), tmp_path / "b", teacher_model_kind="live")
    assert live.run_plan.placement == "student"


def test_rows_that_cannot_be_used_leave_the_run_without_a_plan(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    broken = Row((row.images[0][:200],), row.question, row.boxes)
    assert make_trainer(tiny, [broken], tmp_path).run_plan is None
