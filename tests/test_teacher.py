"""The start-up checks: a dead, blind, foreign or misplaced teacher is stopped with a sentence."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import TeacherError
from imagine_opd.models.access import read_token_ids
from imagine_opd.privilege import PrivilegeConfig, build_prompts
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.teacher.checks import TeacherReport, check_teacher, refuse_blind_prompt, refuse_blind_prompts
from imagine_opd.teacher.load import build_teacher
from imagine_opd.views import make_views


@pytest.fixture
def pairs(tiny, make_rows):
    rows = make_rows(8)
    template = TINY_RECIPE["student_prompt_template"]
    config = PrivilegeConfig(template, TINY_RECIPE["teacher_prompt_template"])
    views = make_views(rows, tiny.view_config)
    return [build_prompts(row, view, tiny.processor, config) for row, view in zip(rows, views, strict=True)]


def run_checks(tiny, student, teacher, pairs, identical=True) -> TeacherReport:
    teacher = getattr(teacher, "module", teacher)
    engine = HFEngine(read_token_ids(student, tiny.processor))
    return check_teacher(student, teacher, pairs, engine, SamplingConfig(18), 0, identical)


def test_sound_teacher_has_no_drift_low_entropy_and_a_gap(tiny, pairs):
    report = run_checks(tiny, tiny.model, build_teacher(tiny.model, tiny.processor), pairs)
    assert report.identical_view_drift < 1e-4
    assert report.rollout_drift < 1e-4
    assert 0.0 < report.teacher_entropy < 1.0
    assert report.privilege_gap > 0.1
    assert report.image_tokens_teacher > report.image_tokens_student
    assert report.as_metrics()["teacher/privilege_gap"] == report.privilege_gap


def test_teacher_is_a_frozen_copy_in_eval_mode(tiny):
    student = copy.deepcopy(tiny.model).train()
    teacher = build_teacher(student, tiny.processor).module
    assert student.training
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))


def test_dead_teacher_is_stopped(tiny, pairs):
    dead = build_teacher(tiny.model, tiny.processor).module
    torch.nn.init.zeros_(dead.get_output_embeddings().weight)
    with pytest.raises(TeacherError, match="the teacher is uniform"):
        run_checks(tiny, tiny.model, dead, pairs)


def test_teacher_with_nan_weights_is_stopped(tiny, pairs):
    broken = build_teacher(tiny.model, tiny.processor).module
    broken.model.language_model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(TeacherError, match="NaN or infinity"):
        run_checks(tiny, tiny.model, broken, pairs)


def test_copy_that_disagrees_under_one_view_is_stopped(tiny, pairs):
    other = build_teacher(tiny.model, tiny.processor).module
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    with pytest.raises(TeacherError, match="saw the same view, yet their log-probs differ"):
        run_checks(tiny, tiny.model, other, pairs)
    assert run_checks(tiny, tiny.model, other, pairs, identical=False).identical_view_drift > 0.05


def test_blind_prompt_is_stopped(pairs):
    prompt = pairs[0].student
    black = dataclasses.replace(prompt.view, pixel_values=np.zeros_like(prompt.view.pixel_values))
    with pytest.raises(TeacherError, match="student's pixels of image 0 are all zero"):
        refuse_blind_prompt(dataclasses.replace(prompt, view=black), "student")
    short = dataclasses.replace(prompt.view, pixel_values=prompt.view.pixel_values[:-1])
    with pytest.raises(TeacherError, match="grid says 36 patches, its pixels hold 35"):
        refuse_blind_prompt(dataclasses.replace(prompt, view=short), "teacher")
    crop = pairs[0].teacher
    half = crop.view.pixel_values.copy()
    half[36:] = 0.0
    dark = dataclasses.replace(crop.view, pixel_values=half)
    with pytest.raises(TeacherError, match="teacher's pixels of image 1 are all zero"):
        refuse_blind_prompt(dataclasses.replace(crop, view=dark), "teacher")
    levels = np.zeros((36, 192), dtype=np.uint8)  # a black image is one; nothing but black is not
    night = dataclasses.replace(prompt, view=dataclasses.replace(prompt.view, pixel_values=levels))
    day = dataclasses.replace(prompt, view=dataclasses.replace(prompt.view, pixel_values=levels + np.uint8(1)))
    refuse_blind_prompts([night, day], "student")
    with pytest.raises(TeacherError, match="student's pixels of all 2 prompts are all zero"):
        refuse_blind_prompts([night, night], "student")
    lost = (0,) * len(prompt.mm_token_type_ids)
    with pytest.raises(TeacherError, match="holds 0 image tokens"):
        refuse_blind_prompt(dataclasses.replace(prompt, mm_token_type_ids=lost), "teacher")
    fewer = (1,) * 4 + lost[4:]  # a divisor of the patch count is not enough
    with pytest.raises(TeacherError, match="holds 4 image tokens where its pixels give 9"):
        refuse_blind_prompt(dataclasses.replace(prompt, mm_token_type_ids=fewer), "teacher")


def test_scoring_that_reads_another_position_than_was_sampled_is_stopped(tiny, pairs, monkeypatch):
    from imagine_opd.teacher import checks as teacher_module

    exact = teacher_module.score_side
    shifted = lambda *args: exact(*args).roll(1, 0)  # noqa: E731
    monkeypatch.setattr(teacher_module, "score_side", shifted)
    with pytest.raises(TeacherError, match="nats per token away from how they were sampled"):
        run_checks(tiny, tiny.model, build_teacher(tiny.model, tiny.processor), pairs)


def test_checkpoint_of_another_teacher_is_refused(tiny, tmp_path):
    build_teacher(tiny.model, tiny.processor).save(tmp_path)
    build_teacher(tiny.model, tiny.processor).load(tmp_path)
    with torch.no_grad():
        tiny.model.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(TeacherError, match="was trained with another teacher"):
        build_teacher(tiny.model, tiny.processor).load(tmp_path)


def test_teacher_of_another_vocabulary_is_refused(tiny, tmp_path):
    config = copy.deepcopy(tiny.model.config)
    config.text_config.vocab_size += 5
    config.vocab_size = config.text_config.vocab_size
    bigger = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(TeacherError, match="the teacher's vocabulary has"):
        build_teacher(tiny.model, tiny.processor, bigger)
    bigger.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="the teacher's vocabulary has"):
        build_teacher(tiny.model, tiny.processor, tmp_path)


def test_padding_behind_the_words_is_cut_as_the_refusal_says_and_the_teacher_is_taken(tiny, pairs):
    size = len(tiny.model.lm_head.weight)
    padded = copy.deepcopy(tiny.model)
    padded.resize_token_embeddings(size + 7)
    with pytest.raises(TeacherError, match=rf"are padding: cut them with teacher.resize_token_embeddings\({size}\)"):
        build_teacher(tiny.model, tiny.processor, padded)
    padded.resize_token_embeddings(size)
    report = run_checks(tiny, tiny.model, build_teacher(tiny.model, tiny.processor, padded), pairs)
    assert report.identical_view_drift == 0.0


def test_teacher_of_fewer_entries_than_there_are_words_is_not_told_to_be_cut(tiny):
    shorter = copy.deepcopy(tiny.model)
    shorter.resize_token_embeddings(len(tiny.processor.tokenizer) - 1)
    with pytest.raises(TeacherError, match="words; use a teacher of the same family") as caught:
        build_teacher(tiny.model, tiny.processor, shorter)
    assert "resize_token_embeddings" not in str(caught.value)


def test_teacher_with_another_tokenizer_of_the_same_size_is_refused(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text()
    assert '"circle"' in text
    path.write_text(text.replace('"circle"', '"cercle"'))
    with pytest.raises(TeacherError, match="tokenizer differs from the student's in 2 tokens"):
        build_teacher(tiny.model, tiny.processor, tmp_path)


def test_student_as_its_own_teacher_is_refused(tiny):
    with pytest.raises(TeacherError, match="is the student itself"):
        build_teacher(tiny.model, tiny.processor, tiny.model)
