"""Views equal transformers' Qwen2VLImageProcessor bit for bit; bad input is an error value, never a crash."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import signal
import time

import numpy as np
import pytest
from pictures import (
    CONFIG,
    PHOTOS,
    assert_equals_reference,
    draw_image,
    encode,
    make_one,
    make_processor,
    open_rgb,
    png_adam7,
    png_chunk,
    png_rgb16,
)
from PIL import Image, ImageOps

from imagine_opd.errors import ConfigError
from imagine_opd.types import Box, Row, RowViews, ViewConfig
from imagine_opd.views import check_images, make_views, view_config_from


def random_sizes(count):
    rng = random.Random(7)
    return [(rng.randint(1, 700), rng.randint(1, 500)) for _ in range(count)]


HARD_SIZES = [
    (1, 1), (1, 200), (200, 1), (3, 600), (199, 1), (32, 32), (256, 256), (48, 80), (80, 48), (16, 16),
    (176, 144), (272, 240), (1000, 6), (6, 1000), (33, 31), (257, 255), (640, 480), (1200, 37), (31, 900),
]  # fmt: skip


class TestEquality:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_pixels_equal_reference_at_many_sizes(self, kind):
        for index, (width, height) in enumerate(HARD_SIZES + random_sizes(60)):
            if max(width, height) > 200 * min(width, height):
                continue
            data = encode(draw_image(width, height, index), kind)
            assert_equals_reference(make_one({"image": data}).student, [open_rgb(data)])

    @pytest.mark.parametrize(
        "config",
        [
            ViewConfig(
                patch_size=14,
                min_pixels=3136,
                max_pixels=200_000,
                image_mean=(0.48145466, 0.4578275, 0.40821073),
                image_std=(0.26862954, 0.26130258, 0.27577711),
            ),
            ViewConfig(),
            ViewConfig(patch_size=8, merge_size=3, temporal_patch_size=3, min_pixels=1, max_pixels=90_000),
            ViewConfig(patch_size=16, merge_size=1, temporal_patch_size=1, min_pixels=100, max_pixels=50_000),
        ],
        ids=["qwen2", "qwen3", "odd", "flat"],
    )
    def test_pixels_equal_reference_in_each_layout(self, config):
        for index, size in enumerate([(100, 1), (42, 70), (333, 257), (640, 427), *random_sizes(8)]):
            data = encode(draw_image(*size, index))
            assert_equals_reference(make_one({"image": data}, config).student, [open_rgb(data)], config)

    @pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
    def test_photographs_equal_reference(self, name):
        config = ViewConfig(max_pixels=150_000, box_margin=0.0, min_crop_px=1)
        image = Image.open(PHOTOS / name).convert("RGB")
        boxes = [(10, 20, 110, 95), (0, 0, 640, 427), (300, 400, 640, 427), (5, 5, 6, 90)]
        views = make_one({"image": str(PHOTOS / name), "boxes": boxes}, config)
        assert_equals_reference(views.student, [image], config)
        assert_equals_reference(views.teacher, [image, *(image.crop(box) for box in boxes)], config)
        assert views.image_sizes == ((640, 427),)

    def test_crops_equal_reference_on_the_cropped_image(self):
        rng = random.Random(3)
        image = draw_image(300, 200, 1)
        boxes = []
        while len(boxes) < 40:
            x0, y0 = rng.randint(0, 299), rng.randint(0, 199)
            boxes.append((x0, y0, rng.randint(x0 + 1, 300), rng.randint(y0 + 1, 200)))
        views = make_one({"image": encode(image), "boxes": boxes})
        crops = [image.crop(box) for box in boxes]
        assert_equals_reference(views.teacher, [image, *crops])
        assert views.crop_boxes == tuple(Box(*box) for box in boxes)

    def test_crops_have_their_own_budget(self):
        config = dataclasses.replace(CONFIG, crop_min_pixels=100_000, crop_max_pixels=200_000)
        image = draw_image(300, 200)
        views = make_one({"image": encode(image), "boxes": [(10, 10, 60, 50)]}, config)
        crop = dataclasses.replace(config, min_pixels=100_000, max_pixels=200_000)
        expected = make_processor(crop)(images=[image.crop((10, 10, 60, 50))], return_tensors="np")
        np.testing.assert_array_equal(views.teacher.image_grid_thw[1:], expected["image_grid_thw"])
        student_patches = len(views.student.pixel_values)
        np.testing.assert_array_equal(views.teacher.pixel_values[student_patches:], expected["pixel_values"])


class TestFormats:
    @pytest.mark.parametrize(
        ("kind", "mode", "options"),
        [
            ("JPEG", "RGB", {"subsampling": "4:2:0"}),
            ("JPEG", "RGB", {"subsampling": "4:2:2"}),
            ("JPEG", "RGB", {"subsampling": "4:4:4", "quality": 97}),
            ("JPEG", "RGB", {"progressive": True}),
            ("JPEG", "RGB", {"restart_marker_blocks": 4}),
            ("JPEG", "L", {}),
            ("JPEG", "CMYK", {}),
            ("PNG", "RGB", {}),
            ("PNG", "P", {}),
            ("PNG", "L", {}),
            ("PNG", "1", {}),
            ("WEBP", "RGB", {"lossless": True}),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
    )
    def test_format_equals_reference(self, kind, mode, options):
        for size in [(97, 61), (200, 133)]:
            data = encode(draw_image(*size, mode=mode), kind, **options)
            assert_equals_reference(make_one({"image": data}).student, [open_rgb(data)])

    @pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
    def test_alpha_is_dropped(self, kind, mode):
        image = draw_image(97, 61, mode=mode)
        image.putalpha(draw_image(97, 61, 5, mode="L"))
        data = encode(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        colours = Image.fromarray(np.array(image.convert("RGBA"))[..., :3])
        assert_equals_reference(make_one({"image": data}).student, [colours])

    def test_palette_transparency_is_dropped(self):
        image = draw_image(97, 61, mode="P")
        data = encode(image, "PNG", transparency=bytes(range(256)))
        assert_equals_reference(make_one({"image": data}).student, [image.convert("RGB")])

    def test_sixteen_bits_become_their_high_eight(self):
        grey = np.arange(97 * 61, dtype=np.uint16).reshape(61, 97) * 11
        high = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        expected = [Image.fromarray(high)]
        assert_equals_reference(make_one({"image": encode(Image.fromarray(grey))}).student, expected)
        assert_equals_reference(make_one({"image": Image.fromarray(grey)}).student, expected)

    def test_sixteen_bit_colours_become_their_high_eight(self):
        samples = np.random.default_rng(5).integers(0, 1 << 16, (61, 97, 3))
        expected = [Image.fromarray((samples >> 8).astype(np.uint8))]
        assert_equals_reference(make_one({"image": png_rgb16(samples)}).student, expected)

    def test_interlaced_png_equals_reference(self):
        image = draw_image(97, 61)
        data = png_adam7(np.array(image))
        assert open_rgb(data).tobytes() == image.tobytes()
        assert_equals_reference(make_one({"image": data}).student, [image])

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_animation_is_its_first_frame(self, kind):
        frames = [draw_image(97, 61, seed) for seed in range(3)]
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert_equals_reference(make_one({"image": data}).student, frames[:1])

    def test_lossy_webp_equals_reference(self):
        data = encode(Image.open(PHOTOS / "china.jpg"), "WEBP", quality=90)
        assert_equals_reference(make_one({"image": data}).student, [open_rgb(data)])

    def test_first_frame_of_a_gif_equals_reference(self):
        frames = [draw_image(120, 90, mode="P"), draw_image(120, 90, mode="P").rotate(180)]
        data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert_equals_reference(make_one({"image": data}).student, [open_rgb(data)])

    def test_pil_images_equal_files(self):
        for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr"):
            image = draw_image(97, 61, mode=mode)
            assert_equals_reference(make_one({"image": image}).student, [image.convert("RGB")])

    def test_pil_alpha_is_blended_on_white(self):
        image = draw_image(97, 61, mode="RGBA")
        image.putalpha(draw_image(97, 61, 5, mode="L"))
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        # Blended here: what transformers does with such an image has changed between its releases.
        blended = Image.alpha_composite(white, image).convert("RGB")
        assert_equals_reference(make_one({"image": image}).student, [blended])

    def test_stray_bytes_before_the_end_marker_are_tolerated(self):
        data = encode(draw_image(97, 61), "JPEG")
        assert_equals_reference(make_one({"image": data[:-2] + b"\0\0\0\xff\xd9 tail"}).student, [open_rgb(data)])


class TestExif:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_orientation_is_applied_before_boxes(self, kind, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(draw_image(150, 90), kind, exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        box = (5, 7, 60, 85)
        views = make_one({"image": data, "boxes": [box]})
        assert views.image_sizes == (upright.size,)
        assert_equals_reference(views.teacher, [upright, upright.crop(box)])

    def test_png_exif_may_open_as_a_jpegs(self):
        data = encode(draw_image(150, 90))
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        data = data[:33] + png_chunk(b"eXIf", exif) + data[33:]
        assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
        assert make_one({"image": data}).image_sizes == ((90, 150),)

    def test_orientation_in_xmp_alone_is_not_applied(self):
        # Pillow reads it there too; docs/data.md says that we do not.
        xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
        segment = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp
        data = encode(draw_image(150, 90), "JPEG")
        data = data[:20] + segment + data[20:]
        assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6
        assert make_one({"image": data}).image_sizes == ((150, 90),)


class TestRows:
    def test_crops_of_an_image_too_thin_for_a_view_are_made_alone(self):
        config = dataclasses.replace(CONFIG, teacher_global=False)
        image = draw_image(1010, 5)
        (views,) = make_views([{"image": image, "boxes": [(0, 0, 50, 5)]}], config, sides=("teacher",))
        assert_equals_reference(views.teacher, [image.crop((0, 0, 50, 5))])
        assert views.student.pixel_values.size == 0

    def test_teacher_sees_images_then_crops_in_box_order(self):
        first, second = draw_image(120, 80, 1), draw_image(90, 150, 2)
        boxes = (Box(0, 100, 80, 150, image=1), Box(10, 10, 60, 70), Box(1, 2, 30, 40, image=1))
        row = Row(images=(encode(first), encode(second)), question="?", boxes=boxes)
        views = make_one(row)
        crops = [second.crop((0, 100, 80, 150)), first.crop((10, 10, 60, 70)), second.crop((1, 2, 30, 40))]
        assert_equals_reference(views.teacher, [first, second, *crops])
        assert_equals_reference(views.student, [first, second])
        assert [box.image for box in views.crop_boxes] == [1, 0, 1]
        assert views.image_sizes == ((120, 80), (90, 150))

    def test_student_shares_the_teachers_memory(self):
        views = make_one({"image": encode(draw_image(120, 80)), "boxes": [(1, 2, 30, 40)]})
        assert np.shares_memory(views.student.pixel_values, views.teacher.pixel_values)
        assert len(views.student.pixel_values) < len(views.teacher.pixel_values)
        assert views.teacher.pixel_values.flags.c_contiguous
        assert views.student.pixel_values.flags.c_contiguous

    def test_crop_is_grown_by_margin_and_minimum_side_inside_the_image(self):
        config = dataclasses.replace(CONFIG, box_margin=0.1, min_crop_px=28)
        boxes = [(50, 20, 100, 70), (0, 0, 4, 4), (118, 78, 120, 80), (10, 5, 110, 15), (60, 40, 61, 41)]
        expected = [(45, 15, 105, 75), (0, 0, 28, 28), (92, 52, 120, 80), (0, 0, 120, 28), (47, 27, 75, 55)]
        views = make_one({"image": encode(draw_image(120, 80)), "boxes": boxes}, config)
        assert views.crop_boxes == tuple(Box(*box) for box in expected)

    def test_box_over_the_edge_by_one_pixel_is_clamped(self):
        views = make_one({"image": encode(draw_image(120, 80)), "boxes": [(-1, -0.5, 121, 80.5)]})
        assert views.crop_boxes == (Box(0, 0, 120, 80),)

    def test_order_and_pixels_do_not_depend_on_threads(self, tmp_path):
        shared = tmp_path / "shared.jpg"
        shared.write_bytes(encode(draw_image(200, 160), "JPEG"))
        rows = []
        for index in range(24):
            image = shared if index % 3 == 0 else encode(draw_image(40 + 9 * index, 150, index))
            rows.append({"image": b"bad" if index % 7 == 3 else image, "boxes": [(1, 1, 20 + index, 60)]})
        one, four, every = (make_views(rows, dataclasses.replace(CONFIG, num_threads=threads)) for threads in (1, 4, 0))
        for index, (left, right, third) in enumerate(zip(one, four, every, strict=True)):
            assert left.row == right.row == index
            if index % 7 == 3:
                assert left == right == third
                assert left.reason == "undecodable"
                continue
            for other in (right, third):
                np.testing.assert_array_equal(left.teacher.pixel_values, other.teacher.pixel_values)
                np.testing.assert_array_equal(left.teacher.image_grid_thw, other.teacher.image_grid_thw)

    def test_no_rows_make_no_views(self):
        assert make_views([]) == []
        assert check_images([]) == []

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on; data loaders do fork
    def test_forked_child_makes_views(self):
        row = {"image": encode(draw_image(60, 40))}
        config = dataclasses.replace(CONFIG, num_threads=2)
        make_one(row, config)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if isinstance(make_views([row], config)[0], RowViews) else 1
            finally:
                os._exit(status)  # never back into pytest, whatever was raised
        deadline = time.monotonic() + 30
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the forked child hangs")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(found[1]) == 0

    def test_plain_boxes_lie_on_the_images_that_box_images_names(self):
        first, second = draw_image(120, 80, 1), draw_image(90, 150, 2)
        boxes = [(0, 100, 80, 150), (10, 10, 60, 70)]
        views = make_one({"images": [encode(first), encode(second)], "boxes": boxes, "box_images": [1, 0]})
        assert_equals_reference(views.teacher, [first, second, second.crop(boxes[0]), first.crop(boxes[1])])


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value", "text"),
        [
            ("patch_size", 0, "patch_size is 0; expected a whole number from 1"),
            ("merge_size", 2.0, "merge_size is 2.0; expected a whole number"),
            ("num_threads", -1, "num_threads is -1; expected a whole number from 0 to 1024"),
            ("min_pixels", True, "min_pixels is True"),
            ("max_pixels", 100, "min_pixels is 16384, over max_pixels=100"),
            ("crop_max_pixels", 100, "crop_min_pixels is 16384, over crop_max_pixels=100"),
            ("box_margin", -0.1, "box_margin is -0.1; expected a finite number of at least 0"),
            ("box_margin", float("nan"), "box_margin is nan"),
            ("image_mean", (0.5, 0.5), "image_mean is (0.5, 0.5); expected three finite numbers"),
            ("image_std", (0.5, 0.0, 0.5), "image_std is (0.5, 0.0, 0.5); expected numbers above 0"),
            ("image_std", (0.5, 1e-50, 0.5), "image_std is (0.5, 1e-50, 0.5); expected numbers that float32 holds"),
            ("image_std", (0.5, 1e39, 0.5), "image_std is (0.5, 1e+39, 0.5); expected numbers that float32 holds"),
            ("image_std", (0.5, 1e-42, 0.5), "image_std is (0.5, 1e-42, 0.5); expected numbers that float32 holds"),
            ("image_std", (0.5, 10**400, 0.5), "image_std is"),
            ("image_mean", (1e39, 0.5, 0.5), "image_mean is (1e+39, 0.5, 0.5); expected numbers that float32 holds"),
            ("box_margin", 10**400, "box_margin is"),
        ],
    )
    def test_bad_value_is_named(self, field, value, text):
        with pytest.raises(ConfigError) as found:
            make_views([], dataclasses.replace(CONFIG, **{field: value}))
        assert str(found.value).startswith(f"ViewConfig.{text}")

    def test_config_is_read_from_a_processor(self):
        config = ViewConfig(patch_size=14, min_pixels=3136, max_pixels=50_000, image_mean=(0.4, 0.5, 0.6))
        assert view_config_from(make_processor(config)) == config
        assert view_config_from(make_processor(config), box_margin=0.3).box_margin == 0.3

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"do_resize": False}, "do_resize is False; expected True"),
            ({"do_rescale": False}, "do_rescale is False"),
            ({"do_normalize": False}, "do_normalize is False"),
            ({"resample": 0}, "resample is 0"),
            ({"merge_size": None}, "has no merge_size"),
        ],
    )
    def test_other_processors_are_refused(self, change, text):
        processor = make_processor()
        for name, value in change.items():
            setattr(processor, name, value)
        with pytest.raises(ConfigError) as found:
            view_config_from(processor)
        assert text in str(found.value)

    def test_unknown_override_is_refused(self):
        with pytest.raises(ConfigError, match="no field 'margin'"):
            view_config_from(make_processor(), margin=1)


def test_other_threads_run_while_pixels_are_made():
    import threading
    import time

    data = encode(draw_image(4000, 3000), "JPEG")
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    started = time.perf_counter()
    make_one({"image": data}, dataclasses.replace(CONFIG, num_threads=1))
    ended = time.perf_counter()
    done.set()
    ticker.join()
    inside = [moment for moment in ticks if started + 0.01 < moment < ended - 0.01]
    assert len(inside) > 5  # a call that held the interpreter would leave none
