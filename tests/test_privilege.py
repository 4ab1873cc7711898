"""The privilege menu: what only the teacher sees and is told, by config and by functions of one's own."""

from __future__ import annotations

import copy
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

import imagine_opd
from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError
from imagine_opd.privilege import PrivilegeConfig, build_pairs, format_regions
from imagine_opd.settings import make_view_config
from imagine_opd.types import Box, SideView, ViewError
from imagine_opd.views import make_views

PLAIN = PrivilegeConfig("{question}", "see {question}")


def pair_of(tiny, row, config=PLAIN, view_config=None, **functions):
    (pair,) = build_pairs([row], tiny.processor, view_config or tiny.view_config, config, **functions)
    return pair


def views_of(tiny, row, **changes):
    return make_views([row], dataclasses.replace(tiny.view_config, **changes))[0]


def test_crops_come_after_the_whole_image_and_bring_the_teachers_instruction(tiny, make_rows):
    (row,) = make_rows(1)
    pair = pair_of(tiny, row)
    expected = views_of(tiny, row)
    np.testing.assert_array_equal(pair.teacher.view.pixel_values, expected.teacher.pixel_values)
    np.testing.assert_array_equal(pair.student.view.pixel_values, expected.student.pixel_values)
    assert (pair.student.image_tokens, pair.teacher.image_tokens) == ((9,), (9, 4))
    assert f"see {row.question}" in pair.teacher.text
    assert "see" not in pair.student.text
    assert pair.neutral is None


def test_crops_only_replaces_the_image_and_keeps_it_where_there_is_no_box(tiny, make_rows):
    (row,) = make_rows(1)
    config = dataclasses.replace(PLAIN, teacher_view="crops_only")
    pair = pair_of(tiny, row, config)
    assert (pair.student.image_tokens, pair.teacher.image_tokens) == ((9,), (4,))
    np.testing.assert_array_equal(pair.teacher.view.pixel_values, views_of(tiny, row).teacher.pixel_values[36:])
    bare = pair_of(tiny, dataclasses.replace(row, boxes=()), config)
    assert bare.teacher.image_tokens == (9,)


def test_whole_gives_the_teacher_a_clear_view_of_what_the_student_sees_degraded(tiny, make_rows):
    (row,) = make_rows(1)
    degraded = dataclasses.replace(tiny.view_config, student_scale=0.2)
    pair = pair_of(tiny, row, dataclasses.replace(PLAIN, teacher_view="whole"), degraded)
    clear = views_of(tiny, row).student.pixel_values
    np.testing.assert_array_equal(pair.teacher.view.pixel_values, clear)
    assert np.abs(pair.student.view.pixel_values - clear).mean() > 0.01
    assert pair.student.input_ids == pair.teacher.input_ids


def test_full_resolution_shows_the_teacher_the_same_image_in_more_tokens(tiny, make_rows, tmp_path):
    rows = make_rows(2)
    fields = {"teacher_view": "full_resolution", "min_pixels": 32**2, "max_pixels": 32**2}
    args = build_config(tmp_path, {**TINY_RECIPE, **fields, "crop_min_pixels": None, "crop_max_pixels": None})
    view_config = make_view_config(tiny.processor, args, training=True)
    pairs = build_pairs(rows, tiny.processor, view_config, dataclasses.replace(PLAIN, teacher_view="full_resolution"))
    full = make_views(rows, dataclasses.replace(tiny.view_config, output="uint8"))  # 48x48, the processor's own size
    for pair, views in zip(pairs, full, strict=True):
        assert (pair.student.image_tokens, pair.teacher.image_tokens) == ((4,), (9,))
        np.testing.assert_array_equal(pair.teacher.view.pixel_values, views.student.pixel_values)


def test_ready_made_images_are_appended_replace_or_are_the_whole_list(tiny, make_rows):
    row, other = make_rows(2)
    row = dataclasses.replace(row, teacher_images=other.images)
    own, theirs = views_of(tiny, row).student.pixel_values, views_of(tiny, other).student.pixel_values
    expected = {"append": np.concatenate([own, theirs]), "replace": theirs, "full": theirs}
    for mode, pixels in expected.items():
        pair = pair_of(tiny, row, dataclasses.replace(PLAIN, teacher_view="images", teacher_images_mode=mode))
        np.testing.assert_array_equal(pair.teacher.view.pixel_values, pixels)
        np.testing.assert_array_equal(pair.student.view.pixel_values, own)
    two = dataclasses.replace(row, images=row.images * 2)
    fault = pair_of(tiny, two, dataclasses.replace(PLAIN, teacher_view="images", teacher_images_mode="full"))
    assert isinstance(fault, ViewError)
    assert "teacher_images has 1 images, the row 2" in fault.message


def test_hints_reach_the_teacher_alone(tiny, make_rows):
    (row,) = make_rows(1)
    row = dataclasses.replace(row, boxes=(Box(36, 72, 72, 144),), hint="top-left")
    for form, words in (
        ("relative_1000", "(250, 500, 500, 1000)"),
        ("pixels", "(36, 72, 72, 144)"),
        ("row", "top-left"),
    ):
        config = dataclasses.replace(
            PLAIN,
            text_hint=form,
            text_hint_template=" at {hint}",
            answer_hint=True,
            answer_hint_template=" is {answer}",
        )
        pair = pair_of(tiny, row, config)
        assert f"{row.question} at {words} is {row.answer}" in pair.teacher.text
        assert words not in pair.student.text
        assert f" is {row.answer}" not in pair.student.text


def test_regions_are_said_per_box_in_its_own_image():
    boxes = [Box(0, 0, 50, 25), Box(10, 10, 20, 30, image=1)]
    assert format_regions(boxes, [(100, 100), (20, 40)], "relative_1000") == "(0, 0, 500, 250), (500, 250, 1000, 750)"


@pytest.mark.parametrize("contrast", ["mean", "blur", "low_resolution"])
def test_neutral_pass_lies_on_the_teachers_tokens_and_differs_in_the_evidence_alone(tiny, make_rows, contrast):
    (row,) = make_rows(1)
    pair = pair_of(tiny, row, view_config=dataclasses.replace(tiny.view_config, neutral=contrast))
    assert pair.neutral.input_ids == pair.teacher.input_ids
    assert pair.neutral.view.frame_counts == pair.teacher.view.frame_counts
    difference = np.abs(pair.neutral.view.pixel_values[36:] - pair.teacher.view.pixel_values[36:])
    assert difference.mean() > 0.02


def test_neutral_pass_with_another_layout_is_an_assertion(tiny, make_rows):
    from imagine_opd.privilege import refuse_other_layout

    pair = pair_of(tiny, make_rows(1)[0])
    with pytest.raises(AssertionError, match="another layout"):
        refuse_other_layout(pair.teacher, pair.student)


def test_functions_of_ones_own_decide_both_sides(tiny, make_rows):
    row, clue = make_rows(2)
    pair = pair_of(
        tiny,
        row,
        student_view=lambda row: SideView(row.images, hint=" look"),
        teacher_view=lambda row: SideView((*row.images, *clue.images), template="{question} zoom", hint=" here"),
    )
    assert pair.teacher.image_tokens == (9, 9)
    assert f"{row.question} zoom here" in pair.teacher.text
    assert f"{row.question} look" in pair.student.text
    with pytest.raises(ConfigError, match="the student sees whole images only"):
        pair_of(tiny, row, student_view=lambda row: SideView(row.images, row.boxes))


def test_student_view_of_ones_own_is_what_train_samples_checks_and_scores_by(tiny, make_rows, tmp_path, monkeypatch):
    from imagine_opd import batches, trainer

    rows = make_rows(4)
    shown = {row.id: invert(row.images[0]) for row in rows}
    scored, sampled = [], []
    score, sample = trainer.score_student, batches.BatchBuilder.sample

    def spy_score(student, teacher_hidden_ND, batch, *args, **options):
        scored.extend(zip(batch.rows, batch.prompts, strict=True))
        return score(student, teacher_hidden_ND, batch, *args, **options)

    def spy_sample(self, model, prompts, *args):
        sampled.extend(prompts)
        return sample(self, model, prompts, *args)

    monkeypatch.setattr(trainer, "score_student", spy_score)
    monkeypatch.setattr(batches.BatchBuilder, "sample", spy_sample)
    run = {**TINY_RECIPE, "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    result = imagine_opd.train(
        copy.deepcopy(tiny.model),
        rows,
        output_dir=tmp_path / "run",
        processor=tiny.processor,
        student_view=lambda row: SideView((shown[row.id],), hint=" look"),
        teacher_check_rows=2,
        disable_tqdm=True,
        use_cpu=True,
        **run,
    )
    assert result.global_step == 1
    assert len(scored) == 4
    for row, pair in scored:
        expected = views_of(tiny, dataclasses.replace(row, images=(shown[row.id],), boxes=()), output="uint8")
        np.testing.assert_array_equal(pair.student.view.pixel_values, expected.student.pixel_values)
        assert f"{row.question} look" in pair.student.text
        seen = views_of(tiny, row, output="uint8").teacher.pixel_values
        np.testing.assert_array_equal(pair.teacher.view.pixel_values, seen)
        assert "look" not in pair.teacher.text
    assert [prompt.text for prompt in sampled] == [pair.student.text for _, pair in scored]
    assert all(
        np.array_equal(prompt.view.pixel_values, pair.student.view.pixel_values)
        for prompt, (_, pair) in zip(sampled, scored, strict=True)
    )


def invert(image: bytes) -> bytes:
    """The picture in its opposite colours, as PNG."""
    found = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(image)).convert("RGB")).save(found, "PNG")
    return found.getvalue()


def test_bad_row_among_good_ones_keeps_its_place(tiny, make_rows):
    rows = make_rows(3)
    rows[1] = dataclasses.replace(rows[1], images=(b"no image",), source="data.jsonl:2")
    found = build_pairs(rows, tiny.processor, tiny.view_config, PLAIN)
    assert [isinstance(pair, ViewError) for pair in found] == [False, True, False]
    assert found[1].row == 1
    assert "data.jsonl:2" in found[1].message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"teacher_view": "zoom"}, "expected one of crops, crops_only, whole, full_resolution, images"),
        ({"teacher_max_pixels": 99}, "goes with teacher_view='full_resolution'; crops have crop_max_pixels"),
        ({"contrast": "mean", "teacher_view": "whole"}, "needs evidence cut from the image"),
        ({"text_hint_template": "no place"}, "expected the placeholder {hint}"),
    ],
)
def test_privileges_that_do_not_go_together_are_refused(tmp_path, fields, words):
    with pytest.raises(ConfigError) as found:
        build_config(tmp_path, fields)
    assert words in str(found.value)


def test_rows_without_what_a_privilege_needs_are_counted(make_rows, tmp_path, capsys):
    from imagine_opd.api import report_missing

    row = dataclasses.replace(make_rows(1)[0], hint="")
    bare = dataclasses.replace(row, boxes=(), answer=None)
    cases = [
        ({}, "1 of 2 rows have no 'boxes'"),
        ({"answer_hint": True}, "1 of 2 rows have no 'answer'"),
        ({"text_hint": "row", "teacher_view": "whole"}, "2 of 2 rows have no 'hint'"),
        ({"text_hint": "pixels", "teacher_view": "whole"}, "1 of 2 rows have no 'boxes': text_hint"),
        ({"teacher_view": "images"}, "2 of 2 rows have no 'teacher_images'"),
    ]
    for fields, words in cases:
        report_missing([row, bare], build_config(tmp_path, fields))
        assert words in capsys.readouterr().out
    report_missing([bare], build_config(tmp_path, {"teacher_view": "full_resolution"}))
    assert capsys.readouterr().out == ""


def test_ready_made_evidence_is_read_from_rows(tmp_path, make_rows):
    from imagine_opd.data import load_rows

    image = make_rows(1)[0].images[0]
    given = [{"image": image, "question": "what ?", "teacher_images": [image], "privileged_context": "top-left"}]
    (row,) = load_rows(given).rows
    assert (row.teacher_images, row.hint) == ((image,), "top-left")
