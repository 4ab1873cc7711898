"""Images that have come apart from their rows are found, and the row they belong to is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import TeacherError
from imagine_opd.guards.image_identity import hash_images, refuse_foreign_images, split_images
from imagine_opd.privilege import PrivilegeConfig, build_prompts
from imagine_opd.types import PromptPair
from imagine_opd.views import make_views


@pytest.fixture
def build_pairs(tiny):
    config = PrivilegeConfig(TINY_RECIPE["student_prompt_template"], TINY_RECIPE["teacher_prompt_template"])

    def build(rows) -> list[PromptPair]:
        views = make_views(rows, tiny.view_config)
        return [build_prompts(row, view, tiny.processor, config) for row, view in zip(rows, views, strict=True)]

    return build


def with_image(prompt, index: int, pixels):
    """The prompt with image `index` replaced."""
    images = split_images(prompt.view)
    images[index] = pixels
    return dataclasses.replace(prompt, view=dataclasses.replace(prompt.view, pixel_values=np.concatenate(images)))


def test_key_is_of_the_pixels_alone(build_pairs, make_rows):
    first, second = build_pairs(make_rows(2))
    assert hash_images(first.student.view) == hash_images(first.teacher.view)[:1]
    assert len(set(hash_images(first.teacher.view) + hash_images(second.teacher.view))) == 4
    assert [len(image) for image in split_images(first.teacher.view)] == list(first.teacher.view.frame_counts)


def test_sound_batch_passes_with_repeated_rows(build_pairs, make_rows):
    rows = [row for row in make_rows(3) for _ in range(2)]
    refuse_foreign_images(rows, build_pairs(rows), build_pairs)


def test_rows_that_cannot_be_made_again_are_left_out(build_pairs, make_rows):
    rows = make_rows(2)
    refuse_foreign_images(rows, build_pairs(rows), lambda asked: [None])


@pytest.mark.parametrize(("side", "index"), [("teacher", 1), ("teacher", 0), ("student", 0)])
def test_image_of_another_row_is_named_with_its_owner(build_pairs, make_rows, side, index):
    rows = make_rows(3)
    pairs = build_pairs(rows)
    foreign = split_images(getattr(pairs[2], side).view)[index]
    spoilt = with_image(getattr(pairs[0], side), index, foreign)
    pairs[0] = dataclasses.replace(pairs[0], **{side: spoilt})
    with pytest.raises(TeacherError) as caught:
        refuse_foreign_images(rows, pairs, build_pairs)
    assert str(caught.value).startswith(
        f"{rows[0].source}: image {index} of the {side} is not its own but that of {rows[2].source}: images and rows"
    )


def test_image_of_no_row_a_missing_one_and_a_foreign_question(build_pairs, make_rows):
    rows = make_rows(2)
    pairs = build_pairs(rows)
    noise = np.random.default_rng(0).normal(size=split_images(pairs[1].teacher.view)[1].shape).astype(np.float32)
    spoilt = [pairs[0], dataclasses.replace(pairs[1], teacher=with_image(pairs[1].teacher, 1, noise))]
    for exact in (True, False):
        with pytest.raises(TeacherError, match="image 1 of the teacher is not its own but of no row of this batch"):
            refuse_foreign_images(rows, spoilt, build_pairs, exact=exact)
    blind = [dataclasses.replace(pairs[0], teacher=pairs[0].student), pairs[1]]
    with pytest.raises(TeacherError, match="teacher's prompt carries 1 images where the row gives 2"):
        refuse_foreign_images(rows, blind, build_pairs)
    other = dataclasses.replace(pairs[0].student, input_ids=pairs[1].student.input_ids)
    assert pairs[0].student.input_ids != pairs[1].student.input_ids
    with pytest.raises(TeacherError, match="questions and rows have come apart"):
        refuse_foreign_images(rows, [dataclasses.replace(pairs[0], student=other), pairs[1]], build_pairs)


def test_small_differences_pass_where_decoding_is_not_exact(build_pairs, make_rows):
    rows = make_rows(2)
    pairs = build_pairs(rows)
    image = split_images(pairs[0].student.view)[0]
    near = dataclasses.replace(pairs[0], student=with_image(pairs[0].student, 0, image + np.float32(0.01)))
    refuse_foreign_images(rows, [near, pairs[1]], build_pairs, exact=False)
    with pytest.raises(TeacherError, match="image 0 of the student is not its own"):
        refuse_foreign_images(rows, [near, pairs[1]], build_pairs)
