"""The method itself, on the tiny base model: who gets gradients, what moves the student, what stays exact."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import imagine_opd
from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError, RowError, TeacherError
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Row

RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-4,
    "max_steps": 2,
    "save_strategy": "no",
    "teacher_checks": False,
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_trainer(tiny, rows, tmp_path, teacher=None, **fields) -> ImagineOPDTrainer:
    args = build_config(tmp_path / "run", {**RUN, **fields})
    return ImagineOPDTrainer(copy.deepcopy(tiny.model), args, rows, processor=tiny.processor, teacher=teacher)


def take_micro_batches(trainer: ImagineOPDTrainer, rows: list[Row], size: int):
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))


def compute_gradients(trainer: ImagineOPDTrainer, rows: list[Row], size: int) -> dict[str, torch.Tensor]:
    micro_batches, total = take_micro_batches(trainer, rows, size)
    trainer.model.train()
    trainer.model.zero_grad()
    for micro_batch in micro_batches:
        trainer.compute_loss(trainer.model, micro_batch, num_items_in_batch=total).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def read_metrics(trainer: ImagineOPDTrainer) -> list[dict]:
    return [json.loads(line) for line in Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()]


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("mode", ["full", "sampled_token"])
def test_gradients_reach_only_the_student(tiny, make_rows, tmp_path, mode):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, distillation_mode=mode)
    gradients = compute_gradients(trainer, make_rows(4), 4)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-6
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == set(gradients)
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.module.parameters())


def test_teacher_keeps_its_weights_while_the_student_moves(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(8), tmp_path)
    start = weights_of(trainer.teacher.module)
    trainer.train()
    assert largest_difference(start, weights_of(trainer.teacher.module)) == 0.0
    assert largest_difference(start, weights_of(trainer.model)) > 1e-4
    assert not trainer.teacher.module.training


@pytest.mark.parametrize("mode", ["full", "sampled_token"])
def test_identical_views_give_no_loss_and_no_gradient(tiny, make_rows, tmp_path, mode):
    rows = [Row(row.images, row.question) for row in make_rows(4)]  # no box: the teacher sees what the student sees
    trainer = make_trainer(tiny, rows, tmp_path, distillation_mode=mode)
    micro_batches, total = take_micro_batches(trainer, rows, 4)
    loss = trainer.compute_loss(trainer.model, micro_batches[0], num_items_in_batch=total)
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in trainer.model.parameters() if p.grad is not None)
    assert abs(float(loss.detach())) < 1e-6
    assert largest < 1e-5


def answer_logprob(trainer: ImagineOPDTrainer, rows: list[Row], traces: list[str]) -> float:
    """Mean log-prob of the reference traces under the student's view."""
    from imagine_opd.kernels import linear_token_stats
    from imagine_opd.models.access import get_head
    from imagine_opd.rollout import finish_completions
    from imagine_opd.scoring import score_side

    tokenizer = trainer.processor.tokenizer
    ids = [tokenizer(f"{trace} {tokenizer.eos_token}", add_special_tokens=False)["input_ids"] for trace in traces]
    ids_BT = torch.tensor(ids)
    rollouts = finish_completions(ids_BT, torch.zeros(ids_BT.shape), trainer.token_ids)
    prompts = [pair.student for pair in trainer.builder.build_pairs(rows)]
    with torch.no_grad():
        hidden_ND = score_side(trainer.model, prompts, rollouts, rollouts.completion_mask_BT, trainer.token_ids.pad)
        head = get_head(trainer.model)
        stats = linear_token_stats(hidden_ND, head, None, None, ids_BT[rollouts.completion_mask_BT])
    return float(stats.student_logprob_N.mean())


def test_evidence_moves_the_student_to_the_truth_and_wrong_evidence_does_not(tiny, make_scenes_and_rows, tmp_path):
    scenes, right = make_scenes_and_rows(16, "right")
    _, wrong = make_scenes_and_rows(16, "wrong")
    traces = [scene.trace for scene in scenes]
    gains = {}
    for name, rows in (("right", right), ("wrong", wrong)):
        fields = {"max_steps": 12, "per_device_train_batch_size": 16, "warmup_steps": 2}
        trainer = make_trainer(tiny, rows, tmp_path / name, **fields)
        before = answer_logprob(trainer, right, traces)
        trainer.train()
        gains[name] = answer_logprob(trainer, right, traces) - before
    assert gains["right"] > 0.1
    assert gains["wrong"] < 0.0


def test_accumulation_1x4_equals_4x1(tiny, make_rows, tmp_path):
    rows = make_rows(4)
    whole = compute_gradients(make_trainer(tiny, rows, tmp_path), rows, 4)
    split = compute_gradients(make_trainer(tiny, rows, tmp_path, gradient_accumulation_steps=4), rows, 1)
    scale = max(float(g.abs().max()) for g in whole.values())
    assert largest_difference(whole, split) < 1e-5 * scale


def test_training_with_accumulation_ends_at_the_same_weights(tiny, make_rows, tmp_path):
    rows = make_rows(8)
    one = make_trainer(tiny, rows, tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    four = make_trainer(tiny, rows, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    one.train()
    four.train()
    assert largest_difference(weights_of(one.model), weights_of(four.model)) < 2e-4
    # The clip and Adam forgive a wrong scale of the loss; the logged figures do not.
    logs = [read_metrics(trainer)[0] for trainer in (one, four)]
    assert logs[0]["missing_mass"] == 0.0  # the teacher excludes nothing here
    for name in ("loss", "grad_norm", "reverse_kl"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3)


@pytest.mark.parametrize("mode", ["full", "sampled_token"])
def test_resumed_run_equals_the_uninterrupted_one_tensor_for_tensor(tiny, make_rows, tmp_path, mode):
    rows = make_rows(10)
    fields = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
        "distillation_mode": mode,
    }
    whole = make_trainer(tiny, rows, tmp_path / "whole", **fields)
    whole.train()
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    torch.manual_seed(987)  # the resumed process starts with another random state
    resumed = make_trainer(tiny, rows, tmp_path / "resumed", **fields)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert largest_difference(weights_of(whole.model), weights_of(resumed.model)) == 0.0
    assert largest_difference(weights_of(whole.teacher.module), weights_of(resumed.teacher.module)) == 0.0


def test_planted_image_token_costs_its_row_and_not_the_run(tiny, make_rows, tmp_path, monkeypatch):
    from imagine_opd.rollout import finish_completions

    trainer = make_trainer(tiny, make_rows(4), tmp_path, max_steps=1)
    image_id = tiny.processor.tokenizer.convert_tokens_to_ids(tiny.processor.image_token)
    generate = trainer.engine.generate

    def plant(model, prompts, *args, **kwargs):
        rollouts = generate(model, prompts, *args, **kwargs)
        ids_BT = rollouts.completion_ids_BT.clone()
        ids_BT[2, 3] = image_id
        return finish_completions(ids_BT, rollouts.sampling_logprobs_BT, trainer.token_ids)

    monkeypatch.setattr(trainer.engine, "generate", plant)
    micro_batches, total = take_micro_batches(trainer, make_rows(4), 4)
    assert (micro_batches[0].weights_BT > 0).any(dim=1).tolist() == [True, True, False, True]
    assert int(total) == int(micro_batches[0].weights_BT.sum())
    trainer.train()
    line = json.loads(Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()[0])
    assert line["rows_dropped/vision_token"] >= 1.0
    assert line["loss"] > 0.0


def test_row_whose_image_breaks_during_the_run_is_dropped_and_counted(tiny, make_rows, tmp_path, capsys):
    rows = make_rows(4)
    rows[1] = Row((rows[1].images[0][:200],), rows[1].question, rows[1].boxes, source="data.jsonl:2")
    trainer = make_trainer(tiny, rows, tmp_path, max_steps=1)
    trainer.train()
    assert "data.jsonl:2" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()]
    assert sum(value for key, value in lines[0].items() if key.startswith("rows_dropped/")) == 1.0


def test_steps_without_a_usable_row_change_nothing_and_many_of_them_stop_the_run(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    broken = Row((row.images[0][:200],), row.question, row.boxes, source="data.jsonl:2")
    trainer = make_trainer(tiny, [broken, row], tmp_path)
    for _ in range(9):
        micro_batches, total = take_micro_batches(trainer, [broken], 1)
        loss = trainer.compute_loss(trainer.model, micro_batches[0], num_items_in_batch=total)
        loss.backward()
        assert float(loss.detach()) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in trainer.model.parameters() if p.grad is not None)
    with pytest.raises(RowError, match="no row of the last 10 steps"):
        take_micro_batches(trainer, [broken], 1)


def test_text_that_cannot_be_asked_costs_its_row(tiny, make_rows, tmp_path, capsys):
    rows = make_rows(2)
    rows[0] = Row(rows[0].images, "what <|image_pad|> ?", rows[0].boxes, source="data.jsonl:1")
    trainer = make_trainer(tiny, rows, tmp_path)
    micro_batches, _ = take_micro_batches(trainer, rows, 2)
    assert len(micro_batches[0].prompts) == 1
    assert "data.jsonl:1: the text contains the image placeholder" in capsys.readouterr().out


def test_row_without_a_crop_gets_the_students_instruction(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    plain = Row(row.images, row.question)
    trainer = make_trainer(tiny, [plain], tmp_path, teacher_prompt_template="what digit is on {question}")
    with_crop, without = trainer.builder.build_pairs([row, plain])
    assert with_crop.teacher.text != with_crop.student.text
    assert without.teacher.text == without.student.text


def test_generation_batch_size_bounds_a_call_and_leaves_the_loss_whole(tiny, make_rows, tmp_path, monkeypatch):
    rows = make_rows(5)
    trainer = make_trainer(tiny, rows, tmp_path, generation_batch_size=2)
    sizes = []
    generate = trainer.engine.generate
    spy = lambda model, prompts, *args, **kw: sizes.append(len(prompts)) or generate(model, prompts, *args, **kw)  # noqa: E731
    monkeypatch.setattr(trainer.engine, "generate", spy)
    whole, total = take_micro_batches(trainer, rows, 5)
    split, same_total = take_micro_batches(trainer, rows, 1)
    assert sizes == [2, 2, 1] * 2
    assert int(total) == int(same_total)
    ids_BT = torch.cat([part.rollouts.completion_ids_BT for part in split])
    assert torch.equal(whole[0].rollouts.completion_ids_BT, ids_BT)


def test_bf16_reaches_both_scored_forwards(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(2), tmp_path, bf16=True)
    seen = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.module)):
        layer = model.model.language_model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output.dtype}))
    micro_batches, total = take_micro_batches(trainer, make_rows(2), 2)
    loss = trainer.compute_loss(trainer.model, micro_batches[0], num_items_in_batch=total)
    assert seen == {"student": torch.bfloat16, "teacher": torch.bfloat16}
    assert loss.dtype == torch.float32


def test_run_folder_tells_what_happened(tiny, make_rows, tmp_path):
    result = imagine_opd.train(
        copy.deepcopy(tiny.model),
        [
            {"image": row.images[0], "question": row.question, "boxes": row.boxes, "answer": row.answer}
            for row in make_rows(8)
        ],
        output_dir=tmp_path / "run",
        processor=tiny.processor,
        eval_data=make_rows(4),
        **{**RUN, "teacher_checks": True},
    )
    folder = tmp_path / "run"
    run = json.loads((folder / "run.json").read_text())
    assert run["seed"] == 42
    assert run["rows"] == 8
    assert {"torch", "transformers", "imagine-opd"} <= run["versions"].keys()
    assert run["config"]["distillation_mode"] == "full"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "loss",
        "reverse_kl",
        "entropy",
        "completions/mean_length",
        "tag_rate",
        "time/rollout_s",
        "time/teacher_s",
    }
    assert wanted <= lines[0].keys()
    assert lines[0]["reverse_kl"] == pytest.approx(lines[0]["loss"], rel=1e-4)
    assert lines[0]["teacher/privilege_gap"] > 0.1
    assert lines[0]["teacher/identical_view_drift"] < 1e-4
    assert json.loads((folder / "completions.jsonl").read_text().splitlines()[0])["completion"]
    assert 0.0 <= result.metrics["eval_accuracy"] <= 1.0
    assert result.global_step == 2
    assert not (folder / "training_args.bin").exists()


def test_saved_model_loads_by_transformers_alone_and_answers_alike(tiny, make_rows, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trainer = make_trainer(tiny, make_rows(4), tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForImageTextToText.from_pretrained(trainer.args.output_dir, dtype=torch.float32)
    assert largest_difference(weights_of(trainer.model), weights_of(loaded)) == 0.0
    assert type(AutoProcessor.from_pretrained(trainer.args.output_dir)) is type(tiny.processor)
    row = make_rows(1)[0]
    here = imagine_opd.ask(trainer.model, row.images[0], row.question, processor=tiny.processor, **TINY_RECIPE)
    there = imagine_opd.ask(trainer.args.output_dir, row.images[0], row.question)  # the recipe lies beside the weights
    assert here == there
    assert here.answer is not None


def test_second_run_in_a_folder_keeps_the_first_ones_metrics(tiny, make_rows, tmp_path):
    for _ in range(2):
        make_trainer(tiny, make_rows(4), tmp_path, max_steps=1).train()
    assert (tmp_path / "run" / "metrics.1.jsonl").is_file()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_another_teacher_on_resume_is_refused(tiny, make_rows, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tiny, make_rows(4), tmp_path, **fields)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    args = build_config(tmp_path / "again", {**RUN, **fields})
    wrong = ImagineOPDTrainer(str(checkpoint), args, make_rows(4), processor=tiny.processor)  # as teacher: half trained
    with pytest.raises(TeacherError, match="was trained with another teacher"):
        wrong.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_strategy": "steps"}, "eval_strategy='steps' needs eval_data"),
        ({"dataloader_drop_last": True}, "leaves none"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True: batches would differ"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False: batches would differ"),
        ({"accelerator_config": {"dispatch_batches": True}}, "rows are no tensors"),
    ],
)
def test_settings_that_do_not_go_with_the_rows_are_refused(tiny, make_rows, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tiny, make_rows(2), tmp_path, **fields)


def test_compiled_kernels_are_refused_without_a_gpu_before_the_run(tiny, make_rows, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="kernel_backend='triton' needs a CUDA device"):
        make_trainer(tiny, make_rows(2), tmp_path, kernel_backend="triton")


def test_progress_bar_shows_the_kl(tiny, make_rows, tmp_path, capsys):
    make_trainer(tiny, make_rows(2), tmp_path, max_steps=1, disable_tqdm=False).train()
    assert "kl=" in capsys.readouterr().err


def test_best_model_is_chosen_by_accuracy(tiny, make_rows, tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = build_config(tmp_path / "run", {**RUN, **fields, "load_best_model_at_end": True})
    trainer = ImagineOPDTrainer(tiny.model, args, make_rows(4), make_rows(4), processor=tiny.processor)
    trainer.train()
    assert trainer.state.best_metric is not None
    lines = read_metrics(trainer)
    assert [line["eval_rows"] for line in lines if "eval_rows" in line] == [4.0, 4.0]


def test_evaluation_without_rows_is_refused(tiny, make_rows, tmp_path):
    with pytest.raises(ConfigError, match="eval_data"):
        make_trainer(tiny, make_rows(2), tmp_path).evaluate()
