"""Each option of `ViewConfig` for crops, sides, contrasts and number formats does what Pillow or NumPy would."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from pictures import CONFIG, draw_image, encode, make_one
from PIL import Image, ImageDraw
from references import BARE, FAMILIES, assert_view_equals, assert_views_equal, build_processor, pictures, read_config
from scipy.ndimage import gaussian_filter

from imagine_opd.compact import expand_pixels
from imagine_opd.errors import ConfigError
from imagine_opd.types import Box
from imagine_opd.views import make_views


def boxes_of(views):
    return [(box.x0, box.y0, box.x1, box.y1) for box in views.crop_boxes]


class TestCrops:
    def test_margin_then_minimum_side(self):
        config = dataclasses.replace(BARE, box_margin=0.25, min_crop_px=20)
        views = make_one({"image": encode(draw_image(120, 80)), "boxes": [(40, 20, 80, 40), (0, 76, 4, 80)]}, config)
        assert boxes_of(views) == [(30, 15, 90, 45), (0, 60, 20, 80)]

    def test_overlapping_boxes_become_one_crop(self):
        image = draw_image(200, 100)
        boxes = [(100, 10, 120, 30), (0, 0, 40, 40), (10, 10, 30, 30), (150, 50, 199, 99), (115, 25, 130, 40)]
        row = {"image": encode(image), "boxes": boxes}
        assert make_one(row, BARE).crop_of_box == (0, 1, 2, 3, 4)
        views = make_one(row, dataclasses.replace(BARE, merge_overlap=0.5))
        assert boxes_of(views) == [boxes[0], boxes[1], boxes[3], boxes[4]]
        assert views.crop_of_box == (0, 1, 1, 2, 3)
        joined = make_one(row, dataclasses.replace(BARE, merge_overlap=0.0))
        assert boxes_of(joined) == [(100, 10, 130, 40), boxes[1], boxes[3]]
        assert joined.crop_of_box == (0, 1, 1, 2, 0)
        for found, box in zip(pictures(joined.teacher)[1:], boxes_of(joined), strict=True):
            np.testing.assert_array_equal(found, np.array(image.crop(box)))

    def test_boxes_of_other_images_are_not_joined(self):
        first, second = draw_image(60, 60, 1), draw_image(60, 60, 2)
        boxes = [Box(0, 0, 30, 30, image=1), Box(5, 5, 25, 25), Box(1, 1, 29, 29, image=1)]
        row = {"images": [encode(first), encode(second)], "boxes": boxes}
        views = make_one(row, dataclasses.replace(BARE, merge_overlap=0.1))
        assert views.crop_boxes == (Box(5, 5, 25, 25), Box(0, 0, 30, 30, image=1))
        assert views.crop_of_box == (1, 0, 1)
        np.testing.assert_array_equal(pictures(views.teacher)[3], np.array(second.crop((0, 0, 30, 30))))

    def test_reading_order_is_line_by_line(self):
        boxes = [(60, 70, 80, 90), (50, 14, 70, 24), (0, 10, 40, 30), (0, 75, 20, 85)]
        row = {"image": encode(draw_image(100, 100)), "boxes": boxes}
        views = make_one(row, dataclasses.replace(BARE, reading_order=True))
        assert boxes_of(views) == [boxes[2], boxes[1], boxes[3], boxes[0]]
        assert views.crop_of_box == (3, 1, 0, 2)
        for found, box in zip(pictures(views.teacher)[1:], boxes_of(views), strict=True):
            assert found.shape[:2] == (box[3] - box[1], box[2] - box[0])

    def test_joined_crops_are_put_in_order_too(self):
        boxes = [(60, 60, 90, 90), (0, 0, 20, 20), (65, 65, 80, 80), (10, 0, 30, 20)]
        config = dataclasses.replace(BARE, reading_order=True, merge_overlap=0.3)
        views = make_one({"image": encode(draw_image(100, 100)), "boxes": boxes}, config)
        assert boxes_of(views) == [(0, 0, 30, 20), (60, 60, 90, 90)]
        assert views.crop_of_box == (1, 0, 1, 0)


class TestSides:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_teacher_without_global_sees_its_crops_alone(self, family):
        processor = build_processor(family)
        config = read_config(processor, teacher_global=False)
        image, boxes = draw_image(130, 90), [(5, 6, 100, 70), (40, 40, 61, 90)]
        views = make_one({"image": encode(image), "boxes": boxes}, config)
        assert_view_equals(views.student, [image], processor)
        teacher = dataclasses.replace(views.teacher, source_sizes=((95, 64), (21, 50)))
        assert_view_equals(teacher, [image.crop(box) for box in boxes], processor)
        assert views.teacher.source_sizes == teacher.source_sizes

    def test_teacher_without_global_and_boxes_sees_nothing(self):
        views = make_one({"image": encode(draw_image(130, 90))}, dataclasses.replace(CONFIG, teacher_global=False))
        assert views.teacher.pixel_values.shape == (0, views.student.pixel_values.shape[1])
        assert views.teacher.frame_counts == ()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_teacher_alone_is_the_teacher_of_both(self, family):
        config = read_config(build_processor(family))
        row = {"image": encode(draw_image(130, 90)), "boxes": [(5, 6, 100, 70)]}
        (alone,) = make_views([row], config, sides=("teacher",))
        assert_views_equal(alone.teacher, make_one(row, config).teacher)
        assert alone.student.frame_counts == ()

    def test_only_known_sides_are_made(self):
        for sides in [("student",), (), ("teacher", "parent")]:
            with pytest.raises(ConfigError, match="expected "):
                make_views([], sides=sides)


class TestHighlight:
    BOXES = ((5, 6, 60, 70), (0, 0, 130, 90), (100, 70, 110, 77))

    def draw(self, image, boxes, px, colour=(255, 0, 0)):
        image = image.copy()
        for x0, y0, x1, y1 in boxes:
            ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=px)
        return image

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("highlight", ["teacher", "both"])
    def test_borders_of_crops_are_drawn_on_global_images(self, family, highlight):
        processor = build_processor(family)
        config = read_config(processor, highlight=highlight, highlight_width=0.02, highlight_colour=(1, 200, 30))
        image = draw_image(130, 90)
        views = make_one({"image": encode(image), "boxes": self.BOXES}, config)
        drawn = self.draw(image, self.BOXES, px=3, colour=(1, 200, 30))
        assert_view_equals(views.teacher, [drawn, *(image.crop(box) for box in self.BOXES)], processor)
        assert_view_equals(views.student, [drawn if highlight == "both" else image], processor)

    def test_border_is_the_colour_and_the_inside_is_untouched(self):
        image = draw_image(130, 90)
        config = dataclasses.replace(BARE, highlight="teacher", highlight_width=0.03)
        found = pictures(make_one({"image": encode(image), "boxes": [(10, 20, 60, 70)]}, config).teacher)[0]
        border = np.zeros((90, 130), dtype=bool)
        border[20:70, 10:60] = True
        border[24:66, 14:56] = False
        assert (found[border] == (255, 0, 0)).all()
        np.testing.assert_array_equal(found[~border], np.array(image)[~border])

    def test_a_box_smaller_than_its_border_is_filled(self):
        image = draw_image(130, 90)
        config = dataclasses.replace(BARE, highlight="teacher", highlight_width=0.03)
        found = pictures(
            make_one({"image": encode(image), "boxes": [(10, 20, 12, 21), (30, 20, 60, 25)]}, config).teacher
        )
        expected = np.array(image)
        expected[20:21, 10:12] = expected[20:25, 30:60] = (255, 0, 0)
        np.testing.assert_array_equal(found[0], expected)

    def test_each_image_has_the_borders_of_its_own_boxes(self):
        first, second = draw_image(50, 40, 1), draw_image(60, 40, 2)
        row = {"images": [encode(first), encode(second)], "boxes": [Box(5, 5, 20, 30, image=1)]}
        views = make_one(row, dataclasses.replace(BARE, highlight="both"))
        left, right = pictures(views.student)
        np.testing.assert_array_equal(left, np.array(first))
        np.testing.assert_array_equal(right, np.array(self.draw(second, [(5, 5, 20, 30)], px=1)))

    def test_no_box_no_border(self):
        row = {"image": encode(draw_image(50, 40))}
        views = make_one(row, dataclasses.replace(CONFIG, highlight="teacher"))
        assert_views_equal(views.teacher, make_one(row).teacher)
        assert np.shares_memory(views.student.pixel_values, views.teacher.pixel_values)


class TestDegradedStudent:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("change", [{"student_scale": 0.1}, {"student_blur_px": 4.0}], ids=["scale", "blur"])
    def test_student_differs_and_teacher_is_plain(self, family, change):
        config = read_config(build_processor(family))
        row = {"image": encode(draw_image(130, 90)), "boxes": [(5, 6, 100, 70)]}
        plain, found = make_one(row, config), make_one(row, dataclasses.replace(config, **change))
        assert_views_equal(found.teacher, plain.teacher)
        assert found.student.frame_counts == plain.student.frame_counts
        assert found.student.tile_grids == plain.student.tile_grids
        difference = np.abs(found.student.pixel_values - plain.student.pixel_values)
        assert difference.mean() > 0.02
        assert roughness(found.student.pixel_values, config) < 0.8 * roughness(plain.student.pixel_values, config)

    @pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
    def test_scaled_student_is_shrunk_and_blown_up(self, resample):
        number = {"bilinear": 2, "bicubic": 3, "lanczos": 1}[resample]
        config = dataclasses.replace(BARE, max_pixels=5_000, resample=resample)
        for size, scale, small in [((130, 90), 0.25, (33, 23)), ((90, 201), 0.5, (45, 101)), ((200, 3), 0.01, (2, 1))]:
            image = draw_image(*size)
            found = make_one({"image": encode(image)}, dataclasses.replace(config, student_scale=scale)).student
            if image.width * image.height <= 5_000:  # not resized: blown up bilinearly
                expected = image.resize(small, number).resize(size, Image.Resampling.BILINEAR)
            else:
                height, width = found.tile_grids[0]
                expected = image.resize(small, number).resize((width, height), number)
            np.testing.assert_array_equal(pictures(found)[0], np.array(expected))

    @pytest.mark.parametrize("sigma", [0.7, 1.5, 3.0])
    def test_blur_is_gaussian(self, sigma):
        image = draw_image(130, 90)
        found = pictures(make_one({"image": encode(image)}, dataclasses.replace(BARE, student_blur_px=sigma)).student)
        expected = gaussian_filter(np.array(image, dtype=float), sigma=(sigma, sigma, 0), truncate=8)
        reach = int(4 * sigma) + 1  # at the borders SciPy mirrors, here weights are renormalised
        inside = (slice(reach, -reach), slice(reach, -reach))
        assert np.abs(found[0][inside] - expected[inside]).max() < 2.5

    def test_wide_blur_is_nearly_gaussian(self):
        image = draw_image(400, 300)
        found = pictures(make_one({"image": encode(image)}, dataclasses.replace(BARE, student_blur_px=16.0)).student)
        expected = gaussian_filter(np.array(image, dtype=float), sigma=(16, 16, 0), truncate=8)
        difference = np.abs(found[0] - expected)[64:-64, 64:-64]
        assert difference.mean() < 1.5
        assert difference.max() < 8

    @pytest.mark.parametrize("change", [{"student_scale": 0.1}, {"student_blur_px": 9.0}], ids=["scale", "blur"])
    def test_one_colour_stays_that_colour(self, change):
        image = Image.new("RGB", (77, 51), (3, 128, 251))
        found = pictures(make_one({"image": encode(image)}, dataclasses.replace(BARE, **change)).student)
        np.testing.assert_array_equal(found[0], np.array(image))


class TestNeutral:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("neutral", ["mean", "blur", "low_resolution"])
    def test_neutral_is_the_teacher_without_its_evidence(self, family, neutral):
        config = read_config(build_processor(family), neutral=neutral)
        images = [draw_image(130, 90, 1), draw_image(60, 100, 2)]
        boxes = [Box(5, 6, 100, 70), Box(1, 2, 50, 90, image=1)]
        views = make_one({"images": [encode(image) for image in images], "boxes": boxes}, config)
        teacher, found = views.teacher, views.neutral
        assert found.frame_counts == teacher.frame_counts
        assert found.tile_grids == teacher.tile_grids
        assert found.source_sizes == teacher.source_sizes
        np.testing.assert_array_equal(found.image_grid_thw, teacher.image_grid_thw)
        globals_ = sum(teacher.frame_counts[:2])
        np.testing.assert_array_equal(found.pixel_values[:globals_], teacher.pixel_values[:globals_])
        crops, plain = found.pixel_values[globals_:], teacher.pixel_values[globals_:]
        assert np.abs(crops - plain).mean() > 0.02
        assert roughness(crops, config) < 0.8 * roughness(plain, config)

    def test_no_neutral_unless_asked_for(self):
        assert make_one({"image": encode(draw_image(9, 9))}).neutral is None

    def test_mean_is_the_crops_mean_colour(self):
        image = draw_image(130, 90)
        boxes = [(5, 6, 100, 70), (0, 0, 1, 1), (129, 0, 130, 90), (3, 3, 6, 5)]
        views = make_one({"image": encode(image), "boxes": boxes}, dataclasses.replace(BARE, neutral="mean"))
        for found, box in zip(pictures(views.neutral)[1:], boxes, strict=True):
            assert (found == found[0, 0]).all()
            # Rounded to bytes twice: across, then down.
            assert np.abs(found[0, 0] - np.array(image.crop(box)).mean(axis=(0, 1))).max() <= 1

    def test_low_resolution_is_the_crop_at_an_eighth(self):
        image, box = draw_image(260, 200), (5, 6, 245, 186)
        config = dataclasses.replace(BARE, neutral="low_resolution", max_pixels=10_000)
        views = make_one({"image": encode(image), "boxes": [box]}, config)
        found = pictures(views.neutral)[1]
        small = image.crop(box).resize((30, 23), Image.Resampling.BICUBIC)  # 22.5 rounds up
        np.testing.assert_array_equal(found, np.array(small.resize(found.shape[1::-1], Image.Resampling.BICUBIC)))

    def test_neutral_keeps_the_borders_on_the_global_image(self):
        row = {"image": encode(draw_image(130, 90)), "boxes": [(5, 6, 100, 70)]}
        views = make_one(row, dataclasses.replace(BARE, neutral="mean", highlight="teacher"))
        np.testing.assert_array_equal(pictures(views.neutral)[0], pictures(views.teacher)[0])
        assert not np.array_equal(pictures(views.student)[0], pictures(views.teacher)[0])

    def test_neutral_without_global_is_crops_alone(self):
        row = {"image": encode(draw_image(130, 90)), "boxes": [(5, 6, 100, 70)]}
        views = make_one(row, dataclasses.replace(BARE, neutral="mean", teacher_global=False))
        assert views.neutral.tile_grids == views.teacher.tile_grids == ((64, 95),)
        assert len(np.unique(pictures(views.neutral)[0].reshape(-1, 3), axis=0)) == 1


class TestOutput:
    ROW_BOXES = ((5, 6, 100, 70), (40, 40, 61, 90))

    def make(self, family, pil=False, **changes):
        config = read_config(build_processor(family, pil), neutral="blur", **changes)
        return make_one({"image": encode(draw_image(130, 90)), "boxes": self.ROW_BOXES}, config), config

    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_bfloat16_is_float32_rounded_by_torch(self, family, pil):
        full, _ = self.make(family, pil)
        half, config = self.make(family, pil, output="bfloat16")
        for side in ("student", "teacher", "neutral"):
            expected = torch.from_numpy(getattr(full, side).pixel_values).to(torch.bfloat16)
            found = getattr(half, side).pixel_values
            assert found.dtype == np.uint16
            np.testing.assert_array_equal(found, expected.view(torch.uint16).numpy())
            assert torch.equal(expand_pixels(found, config, dtype=torch.bfloat16), expected)

    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_expanded_bytes_equal_float32(self, family, pil):
        full, _ = self.make(family, pil)
        raw, config = self.make(family, pil, output="uint8")
        for side in ("student", "teacher", "neutral"):
            expected, found = getattr(full, side).pixel_values, getattr(raw, side).pixel_values
            assert found.dtype == np.uint8
            assert found.nbytes * (8 if family == "qwen" else 4) == expected.nbytes
            np.testing.assert_array_equal(expand_pixels(found, config).numpy(), expected)

    @pytest.mark.parametrize("output", ["float32", "bfloat16", "uint8"])
    @pytest.mark.parametrize("family", ["qwen", "gemma3"])
    def test_a_view_without_images_expands_to_none(self, family, output):
        config = read_config(build_processor(family, False), output=output)
        (views,) = make_views([{"image": draw_image(130, 90)}], config, sides=("teacher",))
        found = expand_pixels(views.student.pixel_values, config)
        expected = expand_pixels(views.teacher.pixel_values, config)
        assert found.shape == (0, *expected.shape[1:])

    def test_bytes_are_the_pixels(self):
        image = draw_image(130, 90)
        views = make_one({"image": encode(image), "boxes": self.ROW_BOXES}, BARE)
        for found, expected in zip(pictures(views.teacher), [image, *map(image.crop, self.ROW_BOXES)], strict=True):
            np.testing.assert_array_equal(found, np.array(expected))


def roughness(pixel_values, config):
    """Mean step between neighbours in a line of a patch or frame."""
    side = config.patch_size if config.tiling is None else config.tiling.frame_px
    return np.abs(np.diff(pixel_values.reshape(-1, side).astype(float))).mean()
