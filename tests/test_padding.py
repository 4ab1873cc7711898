"""The tokenizer's padding side is no setting of a run: prompts are padded where sampling and scoring need it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_trainer import RUN, largest_difference, read_metrics, weights_of

from imagine_opd.config import build_config
from imagine_opd.errors import TeacherError
from imagine_opd.rollout import hf
from imagine_opd.trainer import ImagineOPDTrainer


@pytest.fixture
def train_step(tiny, make_rows, tmp_path):
    """One step on rows whose prompts differ in length on both sides, with the teacher checked before."""
    rows = make_rows(4)
    rows[1] = dataclasses.replace(rows[1], boxes=(), question=rows[1].question + " what digit ?")
    rows[2] = dataclasses.replace(rows[2], boxes=rows[2].boxes * 2)

    def train(side: str) -> ImagineOPDTrainer:
        processor = copy.deepcopy(tiny.processor)
        processor.tokenizer.padding_side = side
        fields = {**RUN, "max_steps": 1, "teacher_checks": True, "teacher_check_rows": 4, "merge_overlap": 1.0}
        args = build_config(tmp_path / side, fields)
        trainer = ImagineOPDTrainer(copy.deepcopy(tiny.model), args, rows, processor=processor)
        pairs = trainer.builder.build_pairs(rows)
        assert len({len(pair.student.input_ids) for pair in pairs}) > 1
        assert len({len(pair.teacher.input_ids) for pair in pairs}) > 1
        trainer.train()
        assert trainer.processor.tokenizer.padding_side == side  # what is saved is the user's
        return trainer

    return train


def test_step_is_the_same_with_a_left_and_a_right_padding_tokenizer(train_step):
    left, right = train_step("left"), train_step("right")
    assert read_metrics(left)[0]["loss"] == read_metrics(right)[0]["loss"] > 0.0
    assert left.teacher_report == right.teacher_report
    assert largest_difference(weights_of(left.model), weights_of(right.model)) == 0.0


def test_prompts_of_a_rollout_padded_on_the_right_would_be_told(train_step, monkeypatch):
    exact = hf.pad_prompts

    def pad_right(prompts, *args):
        inputs = exact(prompts, *args)
        gaps = [inputs["input_ids"].shape[1] - len(prompt.input_ids) for prompt in prompts]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = torch.stack([ids_L.roll(-gap) for ids_L, gap in zip(inputs[name], gaps, strict=True)])
        return inputs

    monkeypatch.setattr(hf, "pad_prompts", pad_right)
    with pytest.raises(TeacherError, match="nats per token away from how they were sampled"):
        train_step("right")
