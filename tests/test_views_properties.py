"""What holds of views whatever the row: sizes, memory, crops, order; rows are drawn by Hypothesis."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import CONFIG, draw_image, encode
from references import FAMILIES, assert_view_equals, build_processor, read_config

from imagine_opd.types import Box, RowViews, ViewConfig, ViewError
from imagine_opd.views import check_images, make_views, measure_views

# Drawn anew, the same way, in every run: a failure is found again.
PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
# One pixel a patch, as bytes, never resized: the picture itself.
BARE = ViewConfig(
    patch_size=1, merge_size=1, temporal_patch_size=1, min_pixels=1, output="uint8", box_margin=0.0, min_crop_px=1
)
SIDE = st.one_of(st.integers(1, 40), st.integers(1, 300))
sizes = st.tuples(SIDE, SIDE).filter(lambda size: max(size) <= 200 * min(size))
kinds = st.sampled_from(["PNG", "JPEG", "WEBP"])


@functools.cache
def draw_file(width, height, seed, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    return encode(draw_image(width, height, seed), kind, **options)


@st.composite
def rows(draw, max_images=3, max_boxes=5, fractions=False):
    images = draw(st.lists(st.tuples(sizes, kinds, st.integers(0, 3)), min_size=1, max_size=max_images))
    boxes = []
    for _ in range(draw(st.integers(0, max_boxes))):
        place = draw(st.integers(0, len(images) - 1))
        width, height = images[place][0]
        if fractions:
            x0, x1 = sorted(draw(st.tuples(*[st.floats(-1, width + 1)] * 2)))
            y0, y1 = sorted(draw(st.tuples(*[st.floats(-1, height + 1)] * 2)))
        else:
            x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
        boxes.append(Box(x0, y0, x1, y1, image=place))
    files = [draw_file(*size, seed, kind) for size, kind, seed in images]
    return {"images": files, "boxes": boxes}, images


@functools.cache
def processor_of(family, pil):
    return build_processor(family, pil)


class TestEveryFamily:
    @PROPERTY
    @given(rows(), st.sampled_from(list(FAMILIES)), st.booleans())
    def test_views_equal_reference(self, drawn, family, pil):
        row, images = drawn
        row = {**row, "images": [draw_file(*size, seed, "PNG") for size, _, seed in images]}
        processor = processor_of(family, pil)
        (views,) = make_views([row], read_config(processor))
        pictures = [draw_image(*size, seed) for size, _, seed in images]
        crops = [pictures[box.image].crop((box.x0, box.y0, box.x1, box.y1)) for box in row["boxes"]]
        if isinstance(views, ViewError):
            assert family == "qwen"
            assert views.reason == "aspect"
            assert any(max(crop.size) > 200 * min(crop.size) for crop in crops)
            return
        assert_view_equals(views.student, pictures, processor)
        assert_view_equals(views.teacher, [*pictures, *crops], processor)

    @PROPERTY
    @given(st.lists(rows(fractions=True), max_size=4), st.sampled_from(list(FAMILIES)), st.data())
    def test_sizes_measured_are_sizes_made(self, drawn, family, data):
        config = read_config(
            processor_of(family, False),
            teacher_global=data.draw(st.booleans()),
            merge_overlap=data.draw(st.sampled_from([None, 0.0, 0.5])),
            reading_order=data.draw(st.booleans()),
            highlight=data.draw(st.sampled_from(["none", "teacher", "both"])),
            neutral=data.draw(st.sampled_from(["none", "mean", "blur", "low_resolution"])),
            student_scale=data.draw(st.sampled_from([1.0, 0.3])),
            student_blur_px=data.draw(st.sampled_from([0.0, 2.5])),
            output=data.draw(st.sampled_from(["float32", "bfloat16", "uint8"])),
            box_margin=data.draw(st.sampled_from([0.0, 0.3])),
        )
        batch = [row for row, _ in drawn]
        made, measured, checked = make_views(batch, config), measure_views(batch, config), check_images(batch, config)
        assert len(made) == len(measured) == len(checked) == len(batch)
        for (row, images), views, sizes, error in zip(drawn, made, measured, checked, strict=True):
            if isinstance(views, ViewError):
                assert sizes == error == views
                continue
            assert error is None
            assert (sizes.student, sizes.teacher) == (views.student.frame_counts, views.teacher.frame_counts)
            assert views.image_sizes == sizes.image_sizes == tuple(size for size, _, _ in images)
            assert len(views.crop_of_box) == len(row["boxes"])
            assert set(views.crop_of_box) == set(range(len(views.crop_boxes)))
            globals_ = len(images) if config.teacher_global else 0
            assert len(views.teacher.frame_counts) == globals_ + len(views.crop_boxes)
            assert (views.neutral is None) == (config.neutral == "none")
            for view in filter(None, (views.student, views.teacher, views.neutral)):
                assert len(view.pixel_values) == sum(view.frame_counts)
                assert len(view.tile_grids) == len(view.source_sizes) == len(view.frame_counts)
                if config.output == "float32":
                    assert np.isfinite(view.pixel_values).all()


class TestCrops:
    @PROPERTY
    @given(rows(fractions=True), st.sampled_from([0.0, 0.1, 2.0]), st.sampled_from([1, 28, 500]))
    def test_crops_cover_their_boxes_and_stay_inside(self, drawn, margin, min_side):
        row, images = drawn
        (views,) = make_views([row], dataclasses.replace(CONFIG, box_margin=margin, min_crop_px=min_side))
        if isinstance(views, ViewError):
            assert views.reason in ("box_empty", "box_outside", "aspect")
            return
        for box, crop in zip(row["boxes"], views.crop_boxes, strict=True):
            width, height = images[box.image][0]
            for start, end, first, last, side in (
                (box.x0, box.x1, crop.x0, crop.x1, width),
                (box.y0, box.y1, crop.y0, crop.y1, height),
            ):
                grown = margin * (min(end, side) - max(start, 0))
                assert 0 <= first <= max(0, math.floor(max(start, 0)))
                assert math.ceil(min(end, side)) <= last <= side
                assert last - first >= min(min_side, side)
                # No larger than the margin and the minimum ask for, but for rounding.
                assert last - first <= max(min_side, min(end, side) - max(start, 0) + 2 * grown + 2)

    @PROPERTY
    @given(rows(), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans())
    def test_joined_crops_are_what_is_around_their_boxes(self, drawn, overlap, ordered):
        row, _ = drawn
        config = dataclasses.replace(BARE, merge_overlap=overlap, reading_order=ordered)
        (views,) = make_views([row], config)
        if isinstance(views, ViewError):
            assert views.reason == "aspect"
            return
        for place, crop in enumerate(views.crop_boxes):
            parts = [box for box, at in zip(row["boxes"], views.crop_of_box, strict=True) if at == place]
            assert {part.image for part in parts} == {crop.image}
            around = (
                min(part.x0 for part in parts), min(part.y0 for part in parts),
                max(part.x1 for part in parts), max(part.y1 for part in parts),
            )  # fmt: skip
            assert (crop.x0, crop.y0, crop.x1, crop.y1) == around
        for index, a in enumerate(views.crop_boxes):
            for b in views.crop_boxes[index + 1 :]:
                width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
                shared = max(0, width) * max(0, height) if a.image == b.image else 0
                smaller = min((box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b))
                assert shared <= overlap * smaller

    @PROPERTY
    @given(rows(max_images=1, max_boxes=4))
    def test_crops_of_bytes_are_slices(self, drawn):
        row, (((width, height), _, _),) = drawn
        (views,) = make_views([row], BARE)
        if isinstance(views, ViewError):
            assert views.reason == "aspect"
            return
        whole = views.student.pixel_values.reshape(height, width, 3)
        ends = np.cumsum(views.teacher.frame_counts)
        for box, start, end in zip(row["boxes"], ends[:-1], ends[1:], strict=True):
            crop = views.teacher.pixel_values[start:end].reshape(box.y1 - box.y0, box.x1 - box.x0, 3)
            np.testing.assert_array_equal(crop, whole[box.y0 : box.y1, box.x0 : box.x1])


class TestBatches:
    @PROPERTY
    @given(st.lists(rows(max_images=2, max_boxes=3), max_size=5), st.sampled_from([1, 2, 5]), st.data())
    def test_a_row_is_the_same_in_any_batch(self, drawn, num_threads, data):
        batch = [row for row, _ in drawn] + [{"image": b"bad"}]
        order = data.draw(st.permutations(range(len(batch))))
        config = dataclasses.replace(CONFIG, min_pixels=1024, max_pixels=9216, num_threads=num_threads)
        made = make_views([batch[index] for index in order], config)
        for place, index in enumerate(order):
            (alone,) = make_views([batch[index]], dataclasses.replace(config, num_threads=1))
            assert made[place].row == place
            if isinstance(alone, ViewError):
                assert made[place] == dataclasses.replace(
                    alone, row=place, message=alone.message.replace("row 0:", f"row {place}:")
                )
                continue
            assert isinstance(made[place], RowViews)
            np.testing.assert_array_equal(made[place].teacher.pixel_values, alone.teacher.pixel_values)
            np.testing.assert_array_equal(made[place].student.pixel_values, alone.student.pixel_values)
            assert made[place].crop_boxes == alone.crop_boxes
