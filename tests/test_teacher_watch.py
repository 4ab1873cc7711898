"""Each planted fault of a teacher, at the start or on the way, is named by its own sentence."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import TeacherError
from imagine_opd.guards.image_identity import refuse_foreign_images
from imagine_opd.models.access import read_token_ids
from imagine_opd.privilege import PrivilegeConfig, build_prompts
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.teacher.checks import check_teacher, measure_rollout_drift
from imagine_opd.teacher.watch import (
    TeacherWatchCallback,
    check_teacher_again,
    record_teacher,
    refuse_blind_batch,
    refuse_drift,
)
from imagine_opd.views import make_views


@dataclasses.dataclass
class World:
    """Student, teacher, engine, rows and their prompts; a fault spoils one of them."""

    student: torch.nn.Module
    teacher: torch.nn.Module
    engine: HFEngine
    rows: list
    pairs: list
    build: object


@pytest.fixture
def world(tiny, make_rows) -> World:
    config = PrivilegeConfig(TINY_RECIPE["student_prompt_template"], TINY_RECIPE["teacher_prompt_template"])

    def build(rows):
        views = make_views(rows, tiny.view_config)
        return [build_prompts(row, view, tiny.processor, config) for row, view in zip(rows, views, strict=True)]

    rows = make_rows(4)
    engine = HFEngine(read_token_ids(tiny.model, tiny.processor))
    return World(tiny.model, copy.deepcopy(tiny.model), engine, rows, build(rows), build)


def check_start(world: World):
    """What the trainer runs before step 0 and on the first batch."""
    report = check_teacher(world.student, world.teacher, world.pairs, world.engine, SamplingConfig(18), 0, True)
    record = record_teacher(world.teacher, world.pairs, world.engine, 18)
    check_batch(world)
    return record, report


def check_batch(world: World) -> None:
    refuse_blind_batch(world.pairs)
    refuse_foreign_images(world.rows, world.pairs, world.build)


def check_later(world: World, record, is_frozen: bool = True) -> dict[str, float]:
    """What the trainer runs every `teacher_check_steps`, and at each log on the figure of the steps."""
    check_batch(world)
    refuse_drift(
        measure_rollout_drift(
            world.student, [pair.student for pair in world.pairs], world.engine, SamplingConfig(18), 0
        ),
        200,
    )
    return check_teacher_again(
        record,
        lambda function: function(world.student),
        lambda function: function(world.teacher),
        world.engine.token_ids.pad,
        60,
        200,
        is_frozen=is_frozen,
    )


def kill_teacher(world: World, monkeypatch) -> None:
    torch.nn.init.zeros_(world.teacher.get_output_embeddings().weight)


def blind_teacher(world: World, monkeypatch) -> None:
    for index, pair in enumerate(world.pairs):
        black = dataclasses.replace(pair.teacher.view, pixel_values=np.zeros_like(pair.teacher.view.pixel_values))
        world.pairs[index] = dataclasses.replace(pair, teacher=dataclasses.replace(pair.teacher, view=black))
    world.build = lambda rows: [None for _ in rows]  # blind in every build: the rebuilt rows are black as well


def misalign_teacher(world: World, monkeypatch) -> None:
    """The teacher's scoring reads one token too late; the student's is sound."""
    from imagine_opd.teacher import checks as teacher_checks
    from imagine_opd.teacher import watch as teacher_watch

    exact = teacher_checks.score_side

    def shifted(model, *args):
        hidden_ND = exact(model, *args)
        return hidden_ND.roll(1, 0) if model is world.teacher else hidden_ND

    monkeypatch.setattr(teacher_watch, "score_side", shifted)


def misalign_student(world: World, monkeypatch) -> None:
    from imagine_opd.teacher import checks as teacher_checks

    exact = teacher_checks.score_side
    monkeypatch.setattr(teacher_checks, "score_side", lambda *args: exact(*args).roll(1, 0))


def give_wrong_crops(world: World, monkeypatch) -> None:
    views = [pair.teacher.view for pair in world.pairs]
    for index, pair in enumerate(list(world.pairs)):
        other = dataclasses.replace(pair.teacher, view=views[index - 1])
        world.pairs[index] = dataclasses.replace(pair, teacher=other)


FAULTS = [
    (kill_teacher, "the teacher is uniform: entropy"),
    (blind_teacher, "the teacher's pixels of image 0 are all zero: it would learn blind"),
    (misalign_teacher, "it is misaligned, its scores belong to other positions or another prompt"),
    (misalign_student, "the model does not see the same prompt in both"),
    (give_wrong_crops, "image 0 of the teacher is not its own but that of"),
]


@pytest.mark.parametrize(("fault", "sentence"), FAULTS, ids=lambda item: getattr(item, "__name__", ""))
def test_planted_fault_is_named_before_step_0(world, monkeypatch, fault, sentence):
    fault(world, monkeypatch)
    with pytest.raises(TeacherError, match=sentence):
        check_start(world)


LATER = [
    (kill_teacher, "at step 200 the teacher is uniform: entropy"),
    (blind_teacher, "the teacher's pixels of image 0 are all zero: it would learn blind"),
    (misalign_teacher, "at step 200 the frozen teacher's log-probs differ from those before step 0"),
    (misalign_student, "at step 200 the student's completions are scored .* sampling and scoring do not see the same"),
    (give_wrong_crops, "image 0 of the teacher is not its own but that of"),
]


@pytest.mark.parametrize(("fault", "sentence"), LATER, ids=lambda item: getattr(item, "__name__", ""))
def test_planted_fault_is_named_by_the_periodic_check(world, monkeypatch, fault, sentence):
    record, _ = check_start(world)
    with torch.no_grad():  # the student has moved; that alone is no fault
        world.student.get_output_embeddings().weight.mul_(1.05)
    check_later(world, record)
    fault(world, monkeypatch)
    with pytest.raises(TeacherError, match=sentence):
        check_later(world, record)


def test_sound_teacher_is_scored_as_it_wrote_and_does_not_change(world):
    record, report = check_start(world)
    assert record.drift < 1e-4
    figures = check_later(world, record)
    assert figures["teacher/change"] == 0.0
    assert figures["teacher/privilege_gap"] == pytest.approx(report.privilege_gap, abs=1e-5)
    assert figures["teacher/teacher_entropy"] == pytest.approx(report.teacher_entropy, abs=1e-5)


def test_later_check_leaves_modes_and_random_state_alone(world):
    record, _ = check_start(world)
    world.student.train()
    state = torch.random.get_rng_state()
    check_later(world, record)
    assert world.student.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_frozen_teacher_whose_weights_move_is_named_and_a_moving_one_is_not(world):
    record, _ = check_start(world)
    with torch.no_grad():
        for parameter in world.teacher.parameters():
            parameter.mul_(0.9)
    with pytest.raises(TeacherError, match=r"by .* \(limit 0.02\): its weights or its view have changed"):
        check_later(world, record)
    assert check_later(world, record, is_frozen=False)["teacher/change"] > 0.02


def test_teacher_that_turned_to_nan_is_named_with_the_step(world):
    record, _ = check_start(world)
    world.teacher.get_output_embeddings().weight.data[0, 0] = float("nan")
    with pytest.raises(TeacherError, match="at step 200 the teacher's entropy is nan: its weights hold NaN"):
        check_later(world, record)


def test_teacher_of_nan_weights_is_refused_when_recorded(world):
    world.teacher.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(TeacherError, match="nan nats per token away|wrote nothing"):
        record_teacher(world.teacher, world.pairs, world.engine, 18)


def test_each_check_comes_every_so_many_steps():
    never, thirds, fourths = [], [], []
    callback = TeacherWatchCallback((0, never.append), (3, thirds.append), (4, fourths.append))
    state, control = TrainerState(), TrainerControl()
    for state.global_step in range(1, 11):
        callback.on_step_end(None, state, control)
    assert (never, thirds, fourths) == ([], [3, 6, 9], [4, 8])


def test_drift_in_the_log_is_looked_at_and_nan_is_left_to_its_own_guard():
    callback = TeacherWatchCallback()
    state, control = TrainerState(global_step=9), TrainerControl()
    for sound in ({"rollout_drift": 0.02}, {"loss": 1.0}, {"rollout_drift": float("nan")}):
        callback.on_log(None, state, control, logs=sound)
    with pytest.raises(TeacherError, match="at step 9 the student's completions are scored 0.5 nats per token away"):
        callback.on_log(None, state, control, logs={"rollout_drift": 0.5})
