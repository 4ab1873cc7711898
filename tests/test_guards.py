"""The guards in a real run: what they log, and that each does what it promises to weights, batches and the run."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError, DeviceMemoryError, DivergenceError, TeacherError
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import SideView

RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-4,
    "max_steps": 2,
    "save_strategy": "no",
    "teacher_check_rows": 3,
    "probe_rows": 3,
    "disable_tqdm": True,
    "use_cpu": True,
}
QUIET = {"teacher_checks": False, "leak_ngram": 0}


@pytest.fixture
def make_trainer(tiny, make_rows, tmp_path):
    def make(name: str = "run", **fields) -> ImagineOPDTrainer:
        args = build_config(tmp_path / name, {**RUN, **fields})
        return ImagineOPDTrainer(copy.deepcopy(tiny.model), args, make_rows(8), processor=tiny.processor)

    return make


def read_metrics(trainer) -> list[dict]:
    return [json.loads(line) for line in Path(trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()]


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same_weights(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_every_figure_is_in_the_log_and_the_start_has_the_probe(make_trainer):
    trainer = make_trainer(probe_steps=2, teacher_check_steps=2, max_steps=3)
    trainer.train()
    first, second, third = read_metrics(trainer)[:3]
    assert first["gap/views"] > 0.5
    assert {"gap/answer", "gap/both", "teacher/privilege_gap", "teacher/identical_view_drift"} <= first.keys()
    assert first["gap/student"] == pytest.approx(0.0, abs=1e-6)
    for log in (first, second, third):
        assert {"kl/answer", "kl/trace", "kl/template", "kl/position_0", "kl/quarter_4", "kl/top5_share"} <= log.keys()
        assert log["leak_rate"] == log["leak_tokens"] == log["nonfinite_steps"] == 0.0
        assert 0.0 <= log["completions/repetition"] < 1.0
        assert log["rollout_drift"] < 1e-4
        assert log["completions/min_length"] <= log["completions/mean_length"] <= log["completions/max_length"]
        assert log["self_distillation/distillation_loss"] == pytest.approx(log["loss"], rel=1e-4)
        assert log["distillation/loss_max"] > log["self_distillation/distillation_loss"]
        assert log["step_time"] > log["time/rollout_s"] + log["time/step_s"]
        assert "distillation/student_mass" not in log
    # the checks at the end of step 2 are in its own log
    assert second["teacher/change"] == 0.0
    assert {"gap/views", "gap/student"} <= second.keys()
    assert second["gap/student"] != 0.0
    assert "teacher/change" not in third


def test_probe_has_rows_of_its_own_and_the_students_own_view(tiny, make_rows, tmp_path):
    rows = make_rows(6)
    fields = {**RUN, "teacher_check_rows": 1, "probe_rows": 5, "max_steps": 1}
    blank = lambda row: SideView(row.images, hint=" ( no hint )")  # noqa: E731
    trainer = ImagineOPDTrainer(
        copy.deepcopy(tiny.model),
        build_config(tmp_path / "run", fields),
        rows,
        processor=tiny.processor,
        student_view=blank,
    )
    trainer.train()
    prompts = trainer.guards.probe.prompts["student"]
    assert len(prompts) == 5
    assert all("( no hint )" in prompt.text for prompt in prompts)
    assert trainer.teacher_report.rows == 1


@pytest.mark.parametrize(("steps", "is_measured"), [(0, False), (1, True)])
def test_probe_without_teacher_checks_runs_where_its_steps_are_set(make_trainer, steps, is_measured):
    trainer = make_trainer(teacher_checks=False, probe_steps=steps, max_steps=1)
    trainer.train()
    assert ("gap/views" in read_metrics(trainer)[0]) == is_measured


def test_training_twice_expects_no_student_that_equals_its_teacher(make_trainer):
    trainer = make_trainer(max_steps=1, learning_rate=0.05)
    trainer.train()
    trainer.train()
    assert trainer.teacher_report.identical_view_drift > 1e-3


def test_topk_logs_the_mass_that_it_covers(make_trainer):
    trainer = make_trainer(**QUIET, max_steps=1, distillation_mode="topk_tail", distillation_topk=2)
    trainer.train()
    log = read_metrics(trainer)[0]
    assert 0.5 < log["distillation/student_mass"] < 1.0
    assert 0.0 < log["distillation/teacher_mass"] < log["distillation/student_mass"]


def test_num_tokens_runs_on_over_steps_and_a_resume(make_trainer, monkeypatch):
    trainer = make_trainer(**QUIET, max_steps=2, save_strategy="steps", save_steps=2)
    seen = []
    exact = trainer.builder.build

    def build(*args):
        micro_batches, rollouts, total = exact(*args)
        prompts = [len(pair.student.input_ids) for batch in micro_batches for pair in batch.prompts]
        seen.append(sum(prompts) + int(rollouts.completion_mask_BT.sum()))
        return micro_batches, rollouts, total

    monkeypatch.setattr(trainer.builder, "build", build)
    trainer.train()
    assert [log["num_tokens"] for log in read_metrics(trainer)[:2]] == [seen[0], seen[0] + seen[1]]
    resumed = make_trainer(**QUIET, max_steps=3, save_strategy="no")
    resumed.train(resume_from_checkpoint="auto")
    third = next(log for log in read_metrics(resumed) if log["step"] == 3)
    assert sum(seen) < third["num_tokens"] < sum(seen) + 1.5 * max(seen)


def test_no_callback_is_added_twice(make_trainer):
    kinds = [type(callback) for callback in make_trainer().callback_handler.callbacks]
    assert len(set(kinds)) == len(kinds)


def test_guards_change_nothing_of_a_sound_run(make_trainer):
    guarded, quiet = make_trainer("guarded", probe_steps=1, teacher_check_steps=1), make_trainer("quiet", **QUIET)
    guarded.train()
    quiet.train()
    assert same_weights(weights_of(guarded), weights_of(quiet))
    assert "teacher/change" not in read_metrics(quiet)[0]


def spoil(monkeypatch, steps: set[int], factor: float = float("nan")):
    from imagine_opd import trainer as trainer_module

    exact = trainer_module.objective
    seen: dict[str, ImagineOPDTrainer] = {}

    def objective(*args):
        result = exact(*args)
        bad = seen["trainer"].state.global_step + 1 in steps
        return dataclasses.replace(result, loss_sum=result.loss_sum * factor) if bad else result

    monkeypatch.setattr(trainer_module, "objective", objective)
    return seen


def test_step_of_a_nan_loss_is_left_out_and_its_rows_are_named(make_trainer, monkeypatch, capsys):
    seen = spoil(monkeypatch, {2})
    trainer = seen["trainer"] = make_trainer(**QUIET, max_steps=3, gradient_accumulation_steps=2, logging_steps=3)
    trail = {}
    exact = trainer.guards.settle_step

    def settle(*args):
        trail[trainer.state.global_step + 1] = weights_of(trainer)
        exact(*args)

    monkeypatch.setattr(trainer.guards, "settle_step", settle)
    trainer.train()
    assert not same_weights(trail[1], trail[2])
    assert same_weights(trail[2], trail[3])
    assert not same_weights(trail[3], weights_of(trainer))
    assert read_metrics(trainer)[0]["nonfinite_steps"] == 1.0
    folder = Path(trainer.args.output_dir, "nonfinite", "step-2")
    record = json.loads((folder / "rank-0.json").read_text())
    assert record["source"] == "loss"
    assert [line["id"] for line in record["completions"]] == [row.id for row in trainer_rows(trainer, 2)]
    assert "what digit" in record["completions"][0]["student_prompt"]
    tensors = load_file(folder / "rank-0.safetensors")
    assert sorted({name.partition(".")[0] for name in tensors}) == ["0", "1"]
    ids = tensors["0.completion_ids_BT"][0][tensors["0.completion_mask_BT"][0]].tolist()
    assert ids == record["completions"][0]["completion_ids"]
    assert "step 2: the loss is not finite" in capsys.readouterr().out


def trainer_rows(trainer, step: int) -> list:
    """The rows of a step of two micro-batches of four, as the sampler draws them."""
    torch.manual_seed(trainer.args.seed)
    batches = [batch for epoch in range(3) for batch in draw_epoch(trainer, epoch)]
    return [row for batch in batches[2 * (step - 1) : 2 * step] for row in batch]


def draw_epoch(trainer, epoch: int) -> list:
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return list(loader)


def test_too_many_bad_steps_end_the_run(make_trainer, monkeypatch):
    seen = spoil(monkeypatch, set(range(1, 9)), float("inf"))
    trainer = seen["trainer"] = make_trainer(**QUIET, max_steps=8, max_nonfinite_steps=3)
    before = weights_of(trainer)
    with pytest.raises(DivergenceError, match="3 steps in a row were not finite"):
        trainer.train()
    assert same_weights(before, weights_of(trainer))


def test_masked_leaks_leave_the_loss_and_unlikelihood_pushes_them_down(make_trainer):
    """Every completion of the tiny world says "look at"; as a leak phrase it is in each of them."""
    plain, mask, push = (
        make_trainer(name, **{**QUIET, "max_steps": 1, "leak_phrases": ["look at"]}, **fields)
        for name, fields in (
            ("plain", {}),
            ("mask", {"leak_action": "mask"}),
            ("push", {"leak_action": "unlikelihood", "leak_unlikelihood_weight": 50.0}),
        )
    )
    logs = {}
    for name, trainer in (("plain", plain), ("mask", mask), ("push", push)):
        trainer.train()
        logs[name] = read_metrics(trainer)[0]
        assert logs[name]["leak_rate"] == 1.0
        assert logs[name]["leak_tokens"] == 8.0
    assert logs["mask"]["loss_tokens"] == logs["plain"]["loss_tokens"] - 8
    assert logs["push"]["loss_tokens"] == logs["plain"]["loss_tokens"]
    assert logs["push"]["loss"] > logs["plain"]["loss"] + 1.0
    rows = plain.train_dataset[:4]
    chance = {name: mean_look_logprob(trainer, rows) for name, trainer in (("plain", plain), ("push", push))}
    assert chance["push"] < chance["plain"] - 1e-3


def mean_look_logprob(trainer, rows) -> float:
    from imagine_opd.kernels import linear_token_stats
    from imagine_opd.models.access import get_head
    from imagine_opd.scoring import score_side
    from imagine_opd.teacher.probe import put_answers

    prompts = [pair.student for pair in trainer.builder.build_pairs(rows)]
    words = put_answers(["look at left"] * len(rows), ["7"] * len(rows), trainer.processor, trainer.token_ids.pad)
    first_BT = torch.zeros_like(words.completion_mask_BT)
    first_BT[:, 0] = True
    with torch.no_grad():
        hidden_ND = score_side(trainer.model.eval(), prompts, words, first_BT, trainer.token_ids.pad)
        ids_N = words.completion_ids_BT[first_BT]
        stats = linear_token_stats(hidden_ND, get_head(trainer.model), None, None, ids_N)
    return float(stats.student_logprob_N.mean())


def test_a_batch_with_the_crops_of_another_row_stops_the_run(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1, prefetch_views=False)
    exact = trainer.builder.build_pairs

    def shuffle(rows):
        pairs = exact(rows)
        if len(rows) < 4:  # the check's own builds, and the start's three rows
            return pairs
        views = [pair.teacher.view for pair in pairs]
        return [
            dataclasses.replace(pair, teacher=dataclasses.replace(pair.teacher, view=views[index - 1]))
            for index, pair in enumerate(pairs)
        ]

    monkeypatch.setattr(trainer.builder, "build_pairs", shuffle)
    with pytest.raises(TeacherError, match="image 0 of the teacher is not its own but"):
        trainer.train()


def test_a_frozen_teacher_that_moves_on_the_way_stops_the_run(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=4, teacher_check_steps=2)
    exact = trainer.guards.settle_step

    def settle(*args):
        exact(*args)
        with trainer.teacher.loaded(trainer.model) as module, torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.95)

    monkeypatch.setattr(trainer.guards, "settle_step", settle)
    with pytest.raises(TeacherError, match="at step 2 the frozen teacher's log-probs differ"):
        trainer.train()


def test_stop_on_collapse_leaves_a_checkpoint_and_says_why(make_trainer, capsys):
    limits = {"collapse_truncation": 0.0, "collapse_window": 1, "collapse_patience": 2, "max_completion_length": 4}
    trainer = make_trainer(**QUIET, **limits, stop_on_collapse=True, max_steps=6)
    result = trainer.train()
    assert result.global_step == 2
    assert Path(trainer.args.output_dir, "checkpoint-2", "model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "collapse: completions are cut by the length cap: completions/clipped_ratio is 1, above 0" in said
    assert "saved and stopped (stop_on_collapse)" in said


def test_memory_that_runs_out_is_explained_with_the_batchs_numbers(make_trainer, monkeypatch):
    from imagine_opd import trainer as trainer_module

    trainer = make_trainer(**QUIET, max_steps=1)

    def refuse(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer_module, "score_student", refuse)
    with pytest.raises(DeviceMemoryError) as caught:
        trainer.train()
    assert "out of memory in a micro-batch of 4 completions (4 rows)" in str(caught.value)
    assert "image tokens up to 9 and 13" in str(caught.value)
    advice = trainer.run_plan.advise()
    assert f"(1) {advice[0]}" in str(caught.value)
    assert any(line.startswith("micro-batch 4 -> 2") or "per_device_train_batch_size" in line for line in advice)


def test_completions_with_thumbnails_reach_tensorboard(make_trainer, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = make_trainer(**QUIET, max_steps=1, report_to=["tensorboard"], num_completions_to_log=2)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["completions/0/image_0", "completions/1/image_0"]
    assert (events.Images("completions/0/image_0")[0].width, events.Images("completions/0/image_0")[0].step) == (48, 1)
    assert "train/kl/answer" in tags["scalars"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"leak_phrases": "crop"}, "leak_phrases='crop': expected a list of phrases"),
        ({"leak_phrases": ["..."]}, "leak_phrases: '...' is no phrase"),
        ({"leak_action": "drop"}, "leak_action='drop': expected one of none, mask, unlikelihood"),
        ({"max_nonfinite_steps": 0}, "max_nonfinite_steps=0: expected at least 1"),
        ({"collapse_length_high": 0.5}, "collapse_length_high=0.5: expected at least 1.0"),
        ({"collapse_tag_share": 1.5}, "collapse_tag_share=1.5: expected at least 0.0 and at most 1.0"),
    ],
)
def test_bad_guard_field_is_refused(tmp_path, fields, message):
    with pytest.raises(ConfigError) as caught:
        build_config(tmp_path, fields)
    assert message in str(caught.value)
