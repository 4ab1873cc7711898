"""What a step does not do twice changes nothing that it learns: each switch on and off, over seeds."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from test_trainer import RUN, largest_difference, make_trainer, read_metrics, take_micro_batches, weights_of

from imagine_opd import ImagineOPDTrainer, vision_features
from imagine_opd.config import build_config
from imagine_opd.models.peft_models import add_adapter

FAST = {
    "share_vision_features": True,
    "share_prefill": True,
    "prefetch_views": True,
    "padding_free": True,
    "max_tokens_per_forward": 110,
}
OFF = {**dict.fromkeys(FAST, False), "max_tokens_per_forward": None}
RUNS = {
    "frozen tower": {"freeze_vision": True},
    "trained tower": {"freeze_vision": False},
    "adapter": {"use_peft": True, "lora_r": 4, "learning_rate": 1e-3},
}
FIGURES = ("loss", "reverse_kl", "entropy", "completions/mean_length", "rollout_drift")


def train(tiny, rows, folder, **fields):
    """Weights and logs of two steps of two micro-batches, two completions a row."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2, "max_steps": 2}
    trainer = make_trainer(tiny, rows, folder, **{**sizes, "seed": 0, **fields})
    trainer.train()
    logs = [line for line in read_metrics(trainer) if "reverse_kl" in line]
    return weights_of(trainer.model), logs, trainer


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", RUNS)
def test_all_switches_together_learn_what_none_of_them_does(tiny, make_rows, tmp_path, kind, seed):
    rows = make_rows(8, seed=100 + seed)
    plain, plain_logs, _ = train(tiny, rows, tmp_path / "plain", seed=seed, **RUNS[kind], **OFF)
    fast, fast_logs, trainer = train(tiny, rows, tmp_path / "fast", seed=seed, **RUNS[kind], **FAST)
    assert trainer.features is not None
    assert trainer.features.is_frozen == (kind != "trained tower")
    start = weights_of(tiny.model)
    assert largest_difference(plain, fast) < 2e-5
    if kind != "adapter":  # whose names are others
        assert largest_difference(plain, start) > 1e-4
    for left, right in zip(plain_logs, fast_logs, strict=True):
        for name in FIGURES:
            assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("name", FAST)
def test_each_switch_alone_learns_the_same(tiny, make_rows, tmp_path, name):
    rows = make_rows(8)
    plain, _, _ = train(tiny, rows, tmp_path / "plain", freeze_vision=True, **OFF)
    found, _, _ = train(tiny, rows, tmp_path / "found", freeze_vision=True, **{**OFF, name: FAST[name]})
    assert largest_difference(plain, found) < 2e-5


def test_no_scoring_forward_goes_through_the_head_and_response_rows_alone_are_projected(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, num_generations=2)
    micro_batches, total = take_micro_batches(trainer, make_rows(4), 4)
    seen = []
    heads = [trainer.model.get_output_embeddings(), trainer.teacher.module.get_output_embeddings()]
    hooks = [head.register_forward_hook(lambda *call: seen.append(call)) for head in heads]
    try:
        _, result = trainer.compute_loss(trainer.model, micro_batches[0], True, num_items_in_batch=total)
    finally:
        for hook in hooks:
            hook.remove()
    assert not seen
    assert len(result.stats.reverse_kl_N) == int((micro_batches[0].weights_BT > 0).sum())


def test_views_made_ahead_are_those_made_when_due(tiny, make_rows, tmp_path):
    """To the last bit: the thread does the same, only earlier."""
    rows = make_rows(6)
    (now, _, _), (ahead, logs, _) = (
        train(tiny, rows, tmp_path / str(is_on), prefetch_views=is_on, max_steps=4, num_train_epochs=2)
        for is_on in (False, True)
    )
    assert largest_difference(now, ahead) == 0.0
    assert all("time/views_background_s" in line for line in logs)


def test_row_that_fails_in_the_thread_is_counted_and_said_as_ever(tiny, make_rows, tmp_path, capsys):
    rows = make_rows(4)
    rows[1] = replace(rows[1], images=(rows[1].images[0][:100],), source="data.jsonl:2")
    fields = {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential", "max_steps": 2}
    logs = train(tiny, rows, tmp_path, teacher_checks=False, probe_rows=0, **fields)[1]
    dropped = [sum(value for name, value in line.items() if name.startswith("rows_dropped/")) for line in logs]
    assert dropped == [1, 0]
    assert capsys.readouterr().out.count("data.jsonl:2") == 1


def test_run_says_where_its_time_went(tiny, make_rows, tmp_path, capsys):
    _, logs, _ = train(tiny, make_rows(8), tmp_path)
    told = capsys.readouterr().out
    assert "a step took" in told
    assert "rollout" in told.split("a step took")[1]
    for line in logs:
        stages = [line[f"time/{name}_s"] for name in ("rollout", "step", "update", "idle")]
        assert sum(stages) == pytest.approx(line["step_time"], rel=1e-6)
        inside = [line[f"time/{name}_s"] for name in ("teacher", "student", "loss", "backward")]
        assert 0 < sum(inside) <= line["time/step_s"] * 1.001
        assert 0 <= line["time/idle_share"] < 1


def test_tower_of_a_teacher_of_its_own_is_not_taken_for_the_students(tiny, make_rows, tmp_path):
    teacher = copy.deepcopy(tiny.model)
    trainer = make_trainer(tiny, make_rows(4), tmp_path / "same", teacher=teacher, freeze_vision=True)
    assert trainer.features.teacher_shares  # equal to the last bit: the same features
    with torch.no_grad():
        next(iter(teacher.model.visual.parameters())).add_(1e-3)
    trainer = make_trainer(tiny, make_rows(4), tmp_path / "other", teacher=teacher, freeze_vision=True)
    assert trainer.features.is_frozen
    assert not trainer.features.teacher_shares


def test_features_that_are_not_the_models_own_are_found_before_step_0(tiny, make_rows, tmp_path, monkeypatch, capsys):
    fields = {"freeze_vision": True, "teacher_checks": True, "teacher_check_rows": 2, "max_steps": 1}
    sound = make_trainer(tiny, make_rows(4), tmp_path / "sound", **fields)
    sound.train()
    assert sound.features is not None
    assert "share_vision_features is off" not in capsys.readouterr().out
    exact = vision_features.join_features
    monkeypatch.setattr(vision_features, "join_features", lambda images, form: exact(list(images)[::-1], form))
    mixed = make_trainer(tiny, make_rows(4), tmp_path / "mixed", **fields)
    mixed.train()
    assert mixed.features is mixed.engine.features is None
    assert "share_vision_features is off: with shared image features the teacher's" in capsys.readouterr().out


def test_teacher_with_an_adapter_of_its_own_is_looked_into(tiny, make_rows, tmp_path):
    own = add_adapter(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    trainer = make_trainer(tiny, make_rows(4), tmp_path, teacher=own, freeze_vision=True)
    assert trainer.features.teacher_shares


def test_adapter_inside_the_tower_is_not_shared_with_a_teacher_without_it(tiny, make_rows, tmp_path):
    student = add_adapter(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules=["q_proj", "qkv"]))
    for name, parameter in student.named_parameters():
        if "visual" in name:
            parameter.requires_grad_(False)
    args = build_config(tmp_path, {**RUN})
    trainer = ImagineOPDTrainer(student, args, make_rows(4), processor=tiny.processor)
    assert trainer.teacher.placement == "adapter_off"
    assert trainer.features.is_frozen
    assert not trainer.features.teacher_shares


def test_run_shorter_than_a_log_says_where_its_time_went(tiny, make_rows, tmp_path, capsys):
    train(tiny, make_rows(8), tmp_path, logging_steps=50)
    assert "a step took" in capsys.readouterr().out


def test_no_features_are_held_between_steps(tiny, make_rows, tmp_path):
    _, logs, trainer = train(tiny, make_rows(8), tmp_path, freeze_vision=True)
    assert not trainer.features._kept
    assert all(line["vision/shared"] > 0.4 for line in logs)


@pytest.mark.parametrize("kind", ["ema", "live"])
def test_moving_teachers_share_what_does_not_move(tiny, make_rows, tmp_path, kind):
    rows, fields = make_rows(8), {"freeze_vision": True, "teacher_model_kind": kind, "teacher_checks": False}
    plain, _, _ = train(tiny, rows, tmp_path / "plain", **fields, **OFF)
    fast, _, trainer = train(tiny, rows, tmp_path / "fast", **fields, **FAST)
    assert trainer.features.teacher_shares
    assert largest_difference(plain, fast) < 2e-5


def test_teacher_held_in_host_memory_shares_the_tower_too(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, freeze_vision=True, teacher_placement="cpu")
    assert trainer.features.teacher_shares
