"""Runs by kind of teacher: resumed as if whole, a folder that other tools load, adapters merged."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText
from weight_cases import LORA, make_inputs

from imagine_opd.errors import ConfigError


def make_trainer(tiny, rows, folder, model=None, **fields):
    from imagine_opd.config import ImagineOPDConfig
    from imagine_opd.demo.recipe import TINY_RECIPE
    from imagine_opd.trainer import ImagineOPDTrainer

    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
    run = {"max_steps": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    checks = {"teacher_checks": False, "save_steps": 2}
    args = ImagineOPDConfig(str(folder), **{**TINY_RECIPE, **small, **run, **checks, **fields})
    model = copy.deepcopy(tiny.model) if model is None else model
    return ImagineOPDTrainer(model, args, rows, processor=tiny.processor)


@pytest.mark.parametrize(
    "fields",
    [
        {**LORA},
        {**LORA, "use_dora": True},
        {**LORA, "teacher_model_kind": "ema", "lora_modules_to_save": ["lm_head"]},
        {"teacher_model_kind": "ema"},
        {"teacher_model_kind": "live"},
        {"teacher_placement": "cpu", "freeze_vision": True},
    ],
    ids=["lora", "dora", "lora-ema", "ema", "live", "cpu"],
)
def test_resumed_run_equals_the_whole_one_with_its_teacher(tiny, make_rows, tmp_path, fields):
    rows = make_rows(8)
    torch.manual_seed(0)
    whole = make_trainer(tiny, rows, tmp_path / "run", **fields)
    optimized = {id(p) for group in whole.create_optimizer().param_groups for p in group["params"]}
    whole.train()
    assert optimized == {id(p) for p in whole.model.parameters() if p.requires_grad}
    torch.manual_seed(0)
    resumed = make_trainer(tiny, rows, tmp_path / "run", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    mine, theirs = whole.teacher.state_dict(), resumed.teacher.state_dict()
    assert mine.keys() == theirs.keys()
    assert bool(mine) == (fields.get("teacher_model_kind") == "ema")
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    moved = [name for name, p in whole.model.named_parameters() if p.requires_grad]
    start = dict(make_trainer(tiny, rows, tmp_path / "other", **fields).model.named_parameters())
    named = dict(whole.model.named_parameters())
    assert any(not torch.equal(named[name], start[name]) for name in moved)
    frozen = [name for name in named if not named[name].requires_grad]
    assert all(torch.equal(named[name], start[name]) for name in frozen)


def test_lora_run_leaves_a_folder_that_transformers_loads(tiny, make_rows, tmp_path):
    from imagine_opd.models.access import load_model, load_processor

    base = tmp_path / "base"
    tiny.model.save_pretrained(base)
    trainer = make_trainer(tiny, make_rows(4), tmp_path / "run", load_model(base), **LORA)
    trainer.train()
    trainer.save_model()
    inputs = make_inputs(tiny, make_rows)
    expected = trainer.model.eval()(**inputs).logits
    assert (expected - tiny.model(**inputs).logits).abs().max() > 0.01
    assert not (tmp_path / "run" / "model.safetensors").exists()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    assert torch.equal(load_model(tmp_path / "run").eval()(**inputs).logits, expected)
    assert load_processor(None, tmp_path / "run").image_token == tiny.processor.image_token


def test_moving_teacher_is_warned_of_once(tiny, make_rows, tmp_path, capsys):
    make_trainer(tiny, make_rows(2), tmp_path, teacher_model_kind="live")
    assert capsys.readouterr().out.count("the teacher moves with the student (teacher_model_kind='live')") == 1
    make_trainer(tiny, make_rows(2), tmp_path)
    assert "the teacher moves" not in capsys.readouterr().out


def test_merge_adapter_leaves_a_plain_model_and_checkpoints_with_the_adapter(tiny, make_rows, tmp_path):
    from imagine_opd import train
    from imagine_opd.demo.recipe import TINY_RECIPE

    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "save_steps": 2}
    run = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "teacher_checks": False, "learning_rate": 1e-2}
    rows = [
        {"image": row.images[0], "question": row.question, "boxes": [[b.x0, b.y0, b.x1, b.y1] for b in row.boxes]}
        for row in make_rows(4)
    ]
    folder = tmp_path / "run"
    fields = {**TINY_RECIPE, **small, **run, **LORA, "merge_adapter": True}
    result = train(copy.deepcopy(tiny.model), rows, output_dir=folder, processor=tiny.processor, **fields)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "imagine_opd.json"} <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    assert (folder / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert not (folder / "checkpoint-2" / "model.safetensors").exists()
    inputs = make_inputs(tiny, make_rows)
    merged = AutoModelForImageTextToText.from_pretrained(folder).eval()
    expected = result.model.eval()(**inputs).logits
    assert (merged(**inputs).logits - expected).abs().max() < 1e-4
    assert (tiny.model.eval()(**inputs).logits - expected).abs().max() > 0.01


def test_merging_what_cannot_be_merged_is_refused_before_the_run(tiny, make_rows, tmp_path):
    with pytest.raises(ConfigError, match="merge_adapter=True, but no adapter is trained"):
        make_trainer(tiny, make_rows(2), tmp_path, merge_adapter=True)
