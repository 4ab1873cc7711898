"""Memory that runs out anywhere in a run, not only in a micro-batch, is told with that place's numbers and advice."""

from __future__ import annotations

import copy

import pytest
import torch

from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import DeviceMemoryError
from imagine_opd.evaluation import evaluate_model
from imagine_opd.trainer import ImagineOPDTrainer

RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 12,
    "max_steps": 2,
    "save_strategy": "no",
    "teacher_check_rows": 3,
    "probe_rows": 4,
    "disable_tqdm": True,
    "use_cpu": True,
}
QUIET = {"teacher_checks": False, "probe_rows": 0}


@pytest.fixture
def make_trainer(tiny, make_rows, tmp_path):
    def make(**fields) -> ImagineOPDTrainer:
        args = build_config(tmp_path, {**RUN, **fields})
        rows = make_rows(8)
        return ImagineOPDTrainer(copy.deepcopy(tiny.model), args, rows, rows[:3], processor=tiny.processor)

    return make


def run_out(monkeypatch, owner, name: str, call: int = 1) -> None:
    """`owner.name` finds no memory at its `call`-th call."""
    exact, calls = getattr(owner, name), []

    def refuse(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return exact(*args, **kwargs)

    monkeypatch.setattr(owner, name, refuse)


def explain(trainer) -> str:
    with pytest.raises(DeviceMemoryError) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    text = str(caught.value)
    assert text.endswith("The allocator said: CUDA out of memory. Tried to allocate 2.00 GiB")
    return text


@pytest.mark.parametrize(("size", "at_once"), [(None, 4), (2, 2)])
def test_rollout_is_told_with_its_prompts_and_the_field_that_parts_them(make_trainer, monkeypatch, size, at_once):
    trainer = make_trainer(**QUIET, generation_batch_size=size)
    run_out(monkeypatch, trainer.engine, "generate")
    text = explain(trainer)
    assert text.startswith(
        f"out of memory in the rollout: {at_once} prompts at once, the longest of 27 tokens, 9 of images; completions "
        f"up to 12 tokens. What to change: (1) generation_batch_size={at_once // 2} (now {at_once}). "
    )
    assert "teacher_placement='cpu': " in text
    assert " MiB of the teacher's weights leave the device" in text


def test_advice_for_a_rollout_leaves_out_a_teacher_that_holds_nothing(make_trainer, monkeypatch):
    trainer = make_trainer(**QUIET, use_peft=True, lora_r=4)
    run_out(monkeypatch, trainer.engine, "generate")
    assert "teacher_placement" not in explain(trainer)


@pytest.mark.parametrize("fields", [{}, {"distillation_mode": "sampled_token", "advantage_baseline": "position"}])
def test_teacher_pass_is_told_with_its_micro_batch_in_the_step_and_before_it(make_trainer, monkeypatch, fields):
    from imagine_opd import trainer as trainer_module

    trainer = make_trainer(**QUIET, **fields)
    assert trainer.objective_config.shapes_advantages == bool(fields)
    run_out(monkeypatch, trainer_module, "score_teacher", call=2)
    assert explain(trainer).startswith("out of memory in a micro-batch of 2 completions (2 rows): longest sequence ")


@pytest.mark.parametrize("call", [1, 2])
def test_start_up_checks_are_told_with_their_rows(make_trainer, monkeypatch, call):
    """Call 1 is the student's rollout, 2 the teacher's."""
    trainer = make_trainer()
    run_out(monkeypatch, trainer.builder.local_engine, "generate", call)
    assert explain(trainer).startswith(
        "out of memory in the teacher checks before step 0: 3 prompts at once, the longest of 33 tokens, 13 of images; "
        "completions up to 12 tokens. What to change: (1) teacher_check_rows=1 (now 3). "
    )


def test_probe_is_told_with_its_own_rows(make_trainer, monkeypatch):
    from imagine_opd.guards import run as run_guards

    trainer = make_trainer()
    run_out(monkeypatch, run_guards, "build_probe")
    text = explain(trainer)
    assert text.startswith("out of memory in the privilege probe before step 0: 4 prompts at once, the longest of 33")
    assert "What to change: (1) probe_rows=2 (now 4). " in text


def test_periodic_check_is_told_with_its_step(make_trainer, monkeypatch):
    from imagine_opd.guards import run as run_guards

    trainer = make_trainer(teacher_check_steps=1, probe_rows=0)
    run_out(monkeypatch, run_guards, "check_teacher_again", call=2)
    assert explain(trainer).startswith("out of memory in the teacher checks at step 2: 3 prompts at once, ")


def test_evaluation_is_told_with_its_rows_and_the_callers_field(make_trainer, monkeypatch, tiny):
    trainer = make_trainer(**QUIET, per_device_eval_batch_size=2)
    run_out(monkeypatch, type(trainer.engine), "generate")
    with pytest.raises(DeviceMemoryError, match=r"in the evaluation: 2 prompts .* \(1\) per_device_eval_batch_size=1 "):
        trainer.evaluate()
    run_out(monkeypatch, type(trainer.engine), "generate")
    rows, config = trainer.eval_dataset, tiny.view_config
    with pytest.raises(DeviceMemoryError, match=r"in the evaluation: 3 prompts .* \(1\) batch_size=1 \(now 3\)"):
        evaluate_model(trainer.model, trainer.processor, rows, config, trainer.args)
