"""Files are read as options say: alpha, orientation, scaled decoding, and measuring without decoding."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from pictures import CONFIG, PHOTOS, draw_image, encode, make_one, make_processor
from PIL import Image, ImageOps
from references import BARE, FAMILIES, assert_views_equal, build_processor, pictures, read_config

from imagine_opd.errors import ConfigError
from imagine_opd.types import Box, RowViews, ViewConfig, ViewError
from imagine_opd.views import check_images, make_views, measure_views


class TestFiles:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_white_alpha_is_what_a_pil_image_means(self, kind):
        image = draw_image(97, 61, mode="RGBA")
        image.putalpha(draw_image(97, 61, 5, mode="L"))
        data = encode(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        box = (3, 4, 80, 50)
        config = dataclasses.replace(CONFIG, alpha="white")
        views = make_one({"image": data, "boxes": [box]}, config)
        opened = Image.open(io.BytesIO(data))
        white = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), opened).convert("RGB")
        expected = make_processor()(images=[white, white.crop(box)], return_tensors="np")
        np.testing.assert_array_equal(views.teacher.pixel_values, expected["pixel_values"])
        assert_views_equal(views.teacher, make_one({"image": image, "boxes": [box]}).teacher)
        dropped = make_one({"image": data}).student.pixel_values
        assert not np.array_equal(views.student.pixel_values, dropped)

    def test_white_alpha_as_the_processor_blends_it(self):
        image = draw_image(97, 61, mode="RGBA")
        image.putalpha(draw_image(97, 61, 5, mode="L"))
        blends = make_processor()(images=[image], return_tensors="np")["pixel_values"]
        if np.array_equal(blends, make_processor()(images=[Image.fromarray(np.array(image)[..., :3])])["pixel_values"]):
            pytest.skip("this transformers drops the alpha of PIL images")
        views = make_one({"image": encode(image)}, dataclasses.replace(CONFIG, alpha="white"))
        np.testing.assert_array_equal(views.student.pixel_values, blends)

    def test_white_leaves_opaque_images_alone(self):
        for kind in ("PNG", "JPEG"):
            row = {"image": encode(draw_image(97, 61), kind)}
            assert_views_equal(make_one(row, dataclasses.replace(CONFIG, alpha="white")).student, make_one(row).student)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("orientation", [2, 5, 6, 8])
    def test_images_stay_as_stored_without_exif(self, kind, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(draw_image(150, 90), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        stored, box = Image.open(io.BytesIO(data)), (5, 7, 60, 85)
        views = make_one({"image": data, "boxes": [box]}, dataclasses.replace(BARE, exif=False))
        assert views.image_sizes == ((150, 90),)
        stored = stored.convert("RGB")
        for found, expected in zip(pictures(views.teacher), [stored, stored.crop(box)], strict=True):
            np.testing.assert_array_equal(found, np.array(expected))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(pictures(make_one({"image": data}, BARE).student)[0], np.array(upright))


class TestScaledDecode:
    def make(self, row, **changes):
        config = dataclasses.replace(CONFIG, **{"min_pixels": 1024, "max_pixels": 60_000, **changes})
        return make_one(row, config), make_one(row, dataclasses.replace(config, scaled_decode=True))

    def test_it_is_off_by_default(self):
        assert ViewConfig().scaled_decode is False

    @pytest.mark.parametrize(
        ("max_pixels", "orientation", "student_bound", "teacher_bound"),
        [
            (30_000, 1, 4.0, 5.0),
            (16_000, 1, 3.0, 3.0),
            (3_000, 1, 5.0, 6.0),
            (16_000, 6, 3.0, 5.0),
            (16_000, 3, 3.0, 5.0),
        ],
    )
    def test_sizes_are_equal_and_pixels_near(self, max_pixels, orientation, student_bound, teacher_bound):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo = encode(Image.open(PHOTOS / "china.jpg"), "JPEG", quality=92, exif=exif)
        row = {"image": photo, "boxes": [(0, 0, 420, 410), (13, 5, 427, 404)]}
        plain, scaled = self.make(row, max_pixels=max_pixels)
        for side, bound in (("student", student_bound), ("teacher", teacher_bound)):
            a, b = getattr(plain, side), getattr(scaled, side)
            assert (a.frame_counts, a.tile_grids, a.source_sizes) == (b.frame_counts, b.tile_grids, b.source_sizes)
            difference = np.abs(a.pixel_values - b.pixel_values) * 127.5
            assert difference.max() > 0  # it was used
            # In levels of 255. Of crops the scaled picture's pixels begin beside theirs, by up to half of one.
            assert difference.mean() < bound

    @pytest.mark.parametrize(("max_pixels", "denominator"), [(100_000, 1), (60_000, 2), (16_000, 4), (4_000, 8)])
    def test_scaled_pixels_are_those_of_pillows_draft(self, max_pixels, denominator):
        photo = Image.open(PHOTOS / "china.jpg")
        config = dataclasses.replace(BARE, max_pixels=max_pixels, scaled_decode=True)
        found = pictures(make_one({"image": encode(photo, "JPEG")}, config).student)[0]
        drafted = Image.open(io.BytesIO(encode(photo, "JPEG")))
        drafted.draft("RGB", (640 // denominator, 427 // denominator))
        assert drafted.size == (640 // denominator, -(-427 // denominator))
        expected = drafted.resize(found.shape[1::-1], Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, np.array(expected))

    def test_it_does_not_depend_on_threads(self):
        row = {"image": PHOTOS / "china.jpg", "boxes": [(0, 0, 420, 410)]}
        _, one = self.make(row, max_pixels=16_000, num_threads=1)
        plain, two = self.make(row, max_pixels=16_000, num_threads=2)
        assert_views_equal(one.teacher, two.teacher)
        assert not np.array_equal(one.teacher.pixel_values, plain.teacher.pixel_values)

    def test_it_is_not_used_where_a_view_shrinks_by_less_than_two(self):
        row = {"image": PHOTOS / "china.jpg", "boxes": [(0, 0, 600, 400)]}
        # 640x427 to 448x288: by 1.4. The global image alone would be shrunk by more.
        for changes in ({"max_pixels": 140_000}, {"max_pixels": 16_000, "crop_max_pixels": 140_000}):
            plain, scaled = self.make(row, **changes)
            assert_views_equal(plain.teacher, scaled.teacher)
        plain, scaled = self.make({**row, "boxes": [(10, 10, 90, 90)]}, max_pixels=16_000)
        assert_views_equal(plain.teacher, scaled.teacher)

    def test_other_formats_are_decoded_in_full(self):
        photo = Image.open(PHOTOS / "china.jpg")
        for kind in ("PNG", "WEBP"):
            plain, scaled = self.make({"image": encode(photo, kind)}, max_pixels=16_000)
            assert_views_equal(plain.student, scaled.student)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_takes_it(self, family):
        config = read_config(build_processor(family))
        row = {"image": PHOTOS / "china.jpg", "boxes": [(5, 6, 500, 400)]}
        plain, scaled = make_one(row, config), make_one(row, dataclasses.replace(config, scaled_decode=True))
        assert scaled.teacher.frame_counts == plain.teacher.frame_counts
        assert np.abs(scaled.teacher.pixel_values - plain.teacher.pixel_values).mean() < 0.15


class TestMeasuring:
    OPTIONS = (
        {},
        {"teacher_global": False},
        {"highlight": "both", "student_scale": 0.5},
        {"merge_overlap": 0.0, "reading_order": True},
        {"neutral": "mean", "output": "uint8"},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_measured_sizes_are_those_of_the_views(self, family, options):
        config = read_config(build_processor(family), **options)
        rows = [
            {"image": encode(draw_image(130, 90), "JPEG")},
            {"image": encode(draw_image(130, 90)), "boxes": [(5, 6, 100, 70), (20, 10, 61, 90)]},
            {"image": b"bad"},
            {"images": [encode(draw_image(130, 30)), encode(draw_image(30, 90))], "boxes": [Box(1, 1, 9, 9, image=1)]},
            {"image": encode(draw_image(30, 20)), "boxes": [(5, 6, 5, 20)]},
        ]
        measured, made = measure_views(rows, config), make_views(rows, config)
        for index, (sizes, views) in enumerate(zip(measured, made, strict=True)):
            if isinstance(views, ViewError):
                assert sizes == views
                continue
            assert sizes.row == index
            assert sizes.student == views.student.frame_counts
            assert sizes.teacher == views.teacher.frame_counts
            assert sizes.image_sizes == views.image_sizes
            assert sum(sizes.teacher) == len(views.teacher.pixel_values)
        assert [type(views) for views in made] == [RowViews, RowViews, ViewError, RowViews, ViewError]

    def test_checked_images_are_named_as_in_make_views(self):
        data = encode(draw_image(130, 90), "JPEG")
        rows = [{"image": data}, {"image": b"bad"}, {"image": data, "boxes": [(0, 0, 131.5, 9)]}, {"images": []}]
        assert check_images(rows, CONFIG) == [
            None if isinstance(views, RowViews) else views for views in make_views(rows, CONFIG)
        ]
        assert [found and found.reason for found in check_images(rows)] == [
            None, "undecodable", "box_outside", "no_image",
        ]  # fmt: skip

    def test_damage_behind_the_header_is_found_by_make_views_alone(self):
        data = encode(draw_image(130, 90), "JPEG")
        row = {"image": data[: len(data) // 2]}
        assert check_images([row]) == [None]
        assert make_views([row])[0].reason == "truncated"


def test_measured_sides_are_those_that_are_made():
    row = {"image": encode(draw_image(90, 70)), "boxes": [(5, 5, 40, 40)]}
    config = dataclasses.replace(CONFIG, teacher_global=False)
    (measured,) = measure_views([row], config, sides=("teacher",))
    (made,) = make_views([row], config, sides=("teacher",))
    assert measured.student == made.student.frame_counts == ()
    assert measured.teacher == made.teacher.frame_counts
    with pytest.raises(ConfigError, match="sides is 'teacher'; expected"):
        measure_views([row], config, sides="teacher")
