"""The plan of a run: printed before step 0, and obeyed by the teacher."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from imagine_opd import run_plan
from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError
from imagine_opd.parallel.processes import name_parallelism
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


def test_placement_that_an_adapters_teacher_cannot_have_is_refused(tiny, make_rows, tmp_path):
    asked = {"use_peft": True, "teacher_placement": "cpu"}
    with pytest.raises(ConfigError, match=r"teacher_placement='cpu': with an adapter .*leave it out"):
        make_trainer(tiny, make_rows(2), tmp_path, **asked)
    with pytest.raises(ConfigError, match=r"teacher_placement='cpu': with an adapter .*leave it out"):
        make_trainer(tiny, make_rows(2), tmp_path, **asked, teacher_model_kind="ema")


def test_without_a_plan_the_teacher_is_where_the_config_says(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    broken = Row((row.images[0][:200],), row.question, row.boxes)
    trainer = make_trainer(tiny, [broken], tmp_path, teacher_placement="cpu")
    assert (trainer.run_plan, trainer.teacher.placement) == (None, "cpu")


def test_plan_names_the_adapter_that_trains_and_not_the_fields(tiny, make_rows, tmp_path):
    from peft import LoraConfig

    args = build_config(tmp_path / "run", RUN)
    config = LoraConfig(r=6, target_modules=["q_proj", "v_proj"], use_dora=True)
    model = copy.deepcopy(tiny.model)
    trainer = ImagineOPDTrainer(model, args, make_rows(2), processor=tiny.processor, peft_config=config)
    text = trainer.run_plan.describe()
    assert "DoRA r=6" in text.splitlines()[0]
    layers = len(model.get_decoder().layers)
    assert f"adapters on {2 * layers} layers" in text
    assert trainer.run_plan.plan.settings.lora_r == 6


@pytest.mark.parametrize(
    ("world_size", "environment", "name"),
    [
        (1, {"ACCELERATE_USE_DEEPSPEED": "true"}, "none"),
        (2, {}, "ddp"),
        (2, {"ACCELERATE_USE_FSDP": "true"}, "fsdp2"),
        (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        (2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ddp"),
        (2, {"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2"),
    ],
)
def test_how_processes_share_is_read_from_the_launch(monkeypatch, world_size, environment, name):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    args = SimpleNamespace(world_size=world_size, deepspeed=None, deepspeed_plugin=None, fsdp=None)
    assert name_parallelism(args) == name
    args.deepspeed, args.deepspeed_plugin = "zero.json", SimpleNamespace(zero_stage=2)
    assert name_parallelism(args) == ("none" if world_size == 1 else "zero2")


@pytest.mark.parametrize("fields", [{}, {"use_peft": True}], ids=["full", "lora"])
def test_moving_teacher_is_refused_before_deepspeed_splits_the_student(tiny, make_rows, tmp_path, monkeypatch, fields):
    monkeypatch.setattr("imagine_opd.run_checks.name_parallelism", lambda args: "zero3")
    with pytest.raises(ConfigError, match=r"teacher_model_kind='ema' .*ZeRO-3.*use FSDP2"):
        make_trainer(tiny, make_rows(2), tmp_path, teacher_model_kind="ema", **fields)


def test_adapter_is_not_saved_over_the_model_it_belongs_to(tiny, make_rows, tmp_path):
    tiny.model.save_pretrained(tmp_path / "run")
    args = build_config(tmp_path / "x" / ".." / "run", {**RUN, "use_peft": True})
    with pytest.raises(ConfigError, match=r"output_dir=.*holds the model that the adapter is trained on"):
        ImagineOPDTrainer(str(tmp_path / "run"), args, make_rows(2), processor=tiny.processor)


def test_rows_that_cannot_be_used_leave_the_run_without_a_plan(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    broken = Row((row.images[0][:200],), row.question, row.boxes)
    assert make_trainer(tiny, [broken], tmp_path).run_plan is None
