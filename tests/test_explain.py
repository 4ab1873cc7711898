"""`explain` and `dry_run`: what is said of a row is what training does with it, number by number."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import numpy as np
import pytest
import test_models
import torch
from model_families import BUILDERS, build_family
from PIL import Image
from test_trainer import make_trainer

from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import RowError, TeacherError
from imagine_opd.explain import check_and_explain, count_steps, explain_run, list_settings, spell_tokens
from imagine_opd.report import format_page, format_text
from imagine_opd.scoring import join_sequences
from imagine_opd.types import Row
from imagine_opd.views import make_views

RUN = {**TINY_RECIPE, "use_cpu": True, "disable_tqdm": True, "teacher_check_rows": 2, "max_steps": 2}


def test_counts_and_starts_are_those_of_the_prompts(tiny, make_rows, tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(tiny, rows, tmp_path)
    found = explain_run(trainer, 2)
    (pair,) = trainer.builder.build_pairs([rows[2]])
    assert (found.question, found.answer, found.boxes) == (rows[2].question, rows[2].answer, rows[2].boxes)
    for side, prompt in ((found.student, pair.student), (found.teacher, pair.teacher)):
        assert side.tokens == side.response_start == len(prompt.input_ids)
        assert side.image_tokens == sum(prompt.mm_token_type_ids)
        assert side.text_tokens == len(prompt.input_ids) - sum(prompt.mm_token_type_ids)
        assert sum(image.tokens for image in side.images) == side.image_tokens
    assert [image.tokens for image in found.teacher.images] == [9, 4]
    assert "[image 2: 32x32 px, 4 tokens]" in found.teacher.text
    assert found.student.text == pair.student.text.replace("<|image_pad|>", "[image 1: 48x48 px, 9 tokens]")
    assert found.privilege == ("1 more image",)


def test_positions_are_those_the_forward_computes_for_each_view(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path)
    found = explain_run(trainer, 0)
    batch = trainer.builder.build(trainer.model, [[trainer.train_dataset[0]]], 0)[0][0]
    for side, prompt in ((found.student, batch.prompts[0].student), (found.teacher, batch.prompts[0].teacher)):
        inputs = join_sequences([prompt], batch.rollouts, trainer.token_ids.pad, torch.device("cpu"))
        positions, _ = trainer.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        assert side.response_position == tuple(positions[:, 0, side.response_start].tolist())
    assert found.student.response_position != found.teacher.response_position


def test_figures_of_each_token_equal_the_formulas_in_fp64(tiny, make_rows, tmp_path):
    temperature = 1.3
    trainer = make_trainer(tiny, make_rows(4), tmp_path, temperature=temperature)
    with torch.no_grad():  # not the teacher's weights: another number on each side
        for parameter in trainer.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = explain_run(trainer, 1)
    batch = trainer.builder.build(trainer.model, [[trainer.train_dataset[1]]], 0)[0][0]
    ids = batch.rollouts.completion_ids_BT[0][batch.rollouts.completion_mask_BT[0]]
    assert [token.token_id for token in found.tokens] == ids.tolist()
    logprobs = []
    models = ((trainer.model, batch.prompts[0].student), (trainer.teacher.module, batch.prompts[0].teacher))
    for model, prompt in models:
        model = copy.deepcopy(model).double().eval()
        inputs = join_sequences([prompt], batch.rollouts, trainer.token_ids.pad, torch.device("cpu"))
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            hidden_LD = model.model(**inputs, use_cache=False).last_hidden_state[0]
        start = len(prompt.input_ids) - 1
        logits_NV = model.lm_head(hidden_LD[start : start + len(ids)])
        logprobs.append((logits_NV / temperature).log_softmax(dim=1).detach())
    student_NV, teacher_NV = logprobs
    expected = {
        "reverse_kl": (student_NV.exp() * (student_NV - teacher_NV)).sum(dim=1),
        "student_logprob": student_NV.gather(1, ids[:, None])[:, 0],
        "teacher_logprob": teacher_NV.gather(1, ids[:, None])[:, 0],
        "entropy": -(student_NV.exp() * student_NV).sum(dim=1),
    }
    assert float(expected["reverse_kl"].max()) > 0.01
    for name, values_N in expected.items():
        shown_N = torch.tensor([getattr(token, name) for token in found.tokens], dtype=torch.float64)
        torch.testing.assert_close(shown_N, values_N, rtol=1e-3, atol=2e-5)


def test_weights_are_those_of_the_loss(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, num_loss_tokens_to_skip=2)
    weights = [token.weight for token in explain_run(trainer, 0).tokens]
    assert weights[:2] == [0.0, 0.0]
    assert set(weights[2:]) == {1.0}


def test_pictures_are_the_pixels_of_the_views(tiny, make_rows, tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(tiny, rows, tmp_path)
    found = explain_run(trainer, 0)
    plain = dataclasses.replace(trainer.view_config, output="uint8", patch_size=16, merge_size=1)
    (views,) = make_views([rows[0]], plain)
    for side, view in ((found.student, views.student), (found.teacher, views.teacher)):
        starts = np.cumsum([0, *view.frame_counts])
        for image, start, (high, wide) in zip(side.images, starts, view.tile_grids, strict=False):
            patches = view.pixel_values[start : start + high * wide].reshape(high, wide, 3, 16, 16)
            expected = patches.transpose(0, 3, 1, 4, 2).reshape(high * 16, wide * 16, 3)
            np.testing.assert_array_equal(image.pictures[0].pixels_HWC, expected)
    assert (found.teacher.images[1].source_width_px, found.teacher.images[1].source_height_px) == (32, 32)


def test_original_is_shown_with_its_boxes_and_what_was_cut(tiny, make_rows, tmp_path):
    row = make_rows(1)[0]
    (original,) = explain_run(make_trainer(tiny, [row], tmp_path)).originals
    with Image.open(io.BytesIO(row.images[0])) as picture:
        np.testing.assert_array_equal(original.pixels_HWC, np.asarray(picture.convert("RGB")))
    assert original.boxes == row.boxes
    (crop,) = original.crops
    assert (crop.x1 - crop.x0, crop.y1 - crop.y0) == (32, 32)


def test_nothing_of_the_run_is_changed(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path)
    trainer.model.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    random = torch.random.get_rng_state()
    first = explain_run(trainer, 0)
    assert trainer.model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not trainer.model.model.language_model._forward_pre_hooks
    assert explain_run(trainer, 0).tokens == first.tokens


@pytest.mark.parametrize(
    ("change", "privilege"),
    [
        ({}, ("1 more image",)),
        ({"answer_hint": True}, ("1 more image", "the answer")),
        ({"teacher_prompt_template": "look . {question}"}, ("1 more image", "other words")),
        ({"student_scale": 0.5}, ("1 more image", "other pixels in image 1")),
    ],
)
def test_privilege_is_found_by_comparing_the_prompts(tiny, make_rows, tmp_path, change, privilege):
    assert explain_run(make_trainer(tiny, make_rows(2), tmp_path, **change)).privilege == privilege


def test_no_box_is_no_privilege(tiny, make_rows, tmp_path):
    rows = [Row(row.images, row.question) for row in make_rows(2)]
    found = explain_run(make_trainer(tiny, rows, tmp_path))
    assert found.privilege == ()
    assert "privilege  none: both sides are given the same" in format_text(found)
    assert max(token.reverse_kl for token in found.tokens) < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"max_steps": -1, "num_train_epochs": 1.5},
        {"max_steps": -1, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
        {"max_steps": -1, "dataloader_drop_last": True},
        {"max_steps": 2},
    ],
)
def test_steps_are_those_the_trainer_takes(tiny, make_rows, tmp_path, fields):
    fields = {"per_device_train_batch_size": 2, "max_completion_length": 2, **fields}
    trainer = make_trainer(tiny, make_rows(5), tmp_path, **fields)
    assert explain_run(trainer).size.steps == count_steps(trainer.args, 5)[0] == trainer.train().global_step


def test_size_of_the_run_counts_prompts_and_completions(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(8), tmp_path, max_steps=-1, num_train_epochs=2)
    size = explain_run(trainer).size
    pairs = trainer.builder.build_pairs(make_rows(8))
    assert (size.rows, size.rows_per_step, size.steps, size.sampled_rows) == (8, 4, 4, 8)
    assert size.student_tokens == sum(len(pair.student.input_ids) for pair in pairs) / 8
    assert size.teacher_tokens == sum(len(pair.teacher.input_ids) for pair in pairs) / 8
    assert size.total_tokens == 16 * (size.student_tokens + size.teacher_tokens + 2 * 18)


def test_settings_are_those_that_were_changed(tmp_path):
    fields = {"use_cpu": True, "learning_rate": 3e-5, "lr_scheduler_type": "cosine", "max_pixels": 4096}
    found = list_settings(build_config(tmp_path, fields))
    assert {item.name: (item.value, item.default) for item in found} == {
        "use_cpu": ("True", "False"),
        "learning_rate": ("3e-05", "1e-06"),
        "lr_scheduler_type": ("cosine", "constant"),
        "max_pixels": ("4096", "None"),
    }


def test_spelt_tokens_join_to_the_text(tiny):
    tokenizer = tiny.processor.tokenizer
    ids = tokenizer("look at top . zoom <answer> 3 </answer>", add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.eos_token_id)
    assert "".join(spell_tokens(ids, tokenizer)) == tokenizer.decode(ids)


class Bytes:
    """A tokenizer one of whose letters takes two tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


def test_half_a_letter_is_spelt_as_such():
    assert spell_tokens([97, 0xC3, 0xA9, 98], Bytes()) == ["a", "\ufffd", "\ufffd", "b"]


@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_is_explained(name, tmp_path):
    """Both images of the row and its crop, whole and in tiles; parted positions where the family has them."""
    family = build_family(name)
    trainer = test_models.make_trainer(family, test_models.make_rows(), tmp_path)
    found = explain_run(trainer, 1)
    (pair,) = trainer.builder.build_pairs([trainer.train_dataset[1]])
    for side, prompt in ((found.student, pair.student), (found.teacher, pair.teacher)):
        assert side.response_start == len(prompt.input_ids)
        assert tuple(image.tokens for image in side.images) == prompt.image_tokens
        frames = [sum(picture.frames for picture in image.pictures) for image in side.images]
        if trainer.view_config.tiling is not None:
            assert frames == list(prompt.view.frame_counts)
        assert all(f"[image {image.number}: {image.describe_size()}, " in side.text for image in side.images)
        assert (side.response_position is not None) == name.startswith("qwen")
    assert len(found.teacher.images) > len(found.student.images) == 2
    assert "Row 1 (of" in format_page(found)
    assert all(math.isfinite(token.reverse_kl) for token in found.tokens)


def test_contrast_shows_the_neutral_evidence(tiny, make_rows, tmp_path):
    fields = {"contrast": "mean", "contrast_beta": 0.5}
    found = explain_run(make_trainer(tiny, make_rows(2), tmp_path, **fields))
    crop = found.neutral.images[1].pictures[0].pixels_HWC
    assert np.ptp(crop.reshape(-1, 3), axis=0).max() <= 1
    assert np.ptp(found.teacher.images[1].pictures[0].pixels_HWC.reshape(-1, 3), axis=0).max() > 50
    assert "Contrast: the same prompt" in format_page(found)
    assert "contrast   the teacher is also asked" in format_text(found)


def test_hint_in_words_and_no_crops_are_told(tiny, make_rows, tmp_path):
    fields = {"teacher_view": "whole", "text_hint": "relative_1000"}
    found = explain_run(make_trainer(tiny, make_rows(2), tmp_path, **fields))
    assert found.privilege == ("a hint in words",)
    assert found.originals[0].crops == ()
    assert found.originals[0].boxes == found.boxes != ()


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_is_not_there_is_named(tiny, make_rows, tmp_path, row):
    with pytest.raises(RowError, match=f"there is no row {row}: the data has 4, numbered from 0"):
        explain_run(make_trainer(tiny, make_rows(4), tmp_path), row)


def test_a_row_that_cannot_be_used_is_named(tiny, make_rows, tmp_path):
    rows = [*make_rows(2), Row((b"no image",), "what ?")]
    with pytest.raises(RowError, match="row 2 cannot be used: "):
        explain_run(make_trainer(tiny, rows, tmp_path), 2)


def test_a_failed_check_is_shown_beside_its_explanation(tiny, make_rows, tmp_path):
    teacher = copy.deepcopy(tiny.model)
    with torch.no_grad():
        teacher.model.language_model.norm.weight.zero_()  # every logit 0: uniform
    trainer = make_trainer(tiny, make_rows(4), tmp_path, teacher=teacher, teacher_checks=True, teacher_check_rows=2)
    found, fault = check_and_explain(trainer)
    assert isinstance(fault, TeacherError)
    assert found.teacher_fault == str(fault)
    assert "the teacher is uniform" in found.teacher_fault
    uniform = -math.log(teacher.lm_head.out_features)
    assert all(abs(token.teacher_logprob - uniform) < 1e-5 for token in found.tokens)


def test_checks_and_memory_plan_are_shown(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, teacher_checks=True, teacher_check_rows=2)
    found, fault = check_and_explain(trainer, 0, "weights 2 MiB\noptimizer 4 MiB")
    assert fault is None
    assert dict(found.teacher_checks) == trainer.teacher_report.as_metrics()
    assert found.memory == ("weights 2 MiB", "optimizer 4 MiB")
    assert explain_run(trainer, 0, ["a", "b"]).memory == ("a", "b")
    assert "memory     weights 2 MiB\n           optimizer 4 MiB" in format_text(found)
