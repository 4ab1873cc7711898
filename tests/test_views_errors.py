"""Views of bad input: each fault an error value with its reason and the fix; hostile bytes never an abort."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import re

import numpy as np
import pytest
from pictures import (
    CONFIG,
    GOOD,
    JPEG,
    draw_image,
    encode,
    jpeg_of_scans,
    png_header,
    riff,
)
from PIL import Image

from imagine_opd.errors import ConfigError, ImageError
from imagine_opd.types import Box, Row, RowViews, Tiling, ViewError
from imagine_opd.views import check_images, make_views, process_images

ERRORS = [
    ({"image": "no/such.jpg"}, "missing", "no/such.jpg does not exist"),
    ({"image": "."}, "unreadable", "image . cannot be read (it is a directory)"),
    ({"image": os.devnull}, "unreadable", "it is not a regular file"),
    ({"image": 7}, "unreadable", "image 0 is a int; expected bytes, a path, an array or a PIL image"),
    ({"image": png_header(100_000, 100_000)}, "too_large", "100000x100000 pixels, over max_image_pixels=178956970"),
    ({"image": png_header(1_000_001, 1)}, "too_large", "1000001x1 pixels, a side over 1000000; cut the image up"),
    ({"image": GOOD + bytes(1 << 20)}, "too_large", "over max_image_bytes=1048576"),
    ({"image": Image.new("1", (20_000, 9_000))}, "too_large", "image 0 is 20000x9000 pixels, over max_image_pixels="),
    ({"image": "\ud800.png"}, "unreadable", "image 0 is the path '\\ud800.png', which no file can have"),
    ({"image": GOOD, "boxes": [(1, 1, 9, 9)] * 257}, "too_large", "the row has 257 boxes, over the 256 of one row"),
    ({"images": [GOOD, GOOD], "boxes": [(1, 1, 9, 9)]}, "box_image", "2 images and no box_images; expected the index"),
    ({"image": GOOD, "boxes": [(1, 1, 9, 9)], "box_images": [0, 0]}, "box_image", "1 boxes, but box_images has 2"),
    ({"image": GOOD, "boxes": [(1, 1, 9, 9)], "box_images": ["0"]}, "box_image", "box_images ['0']; expected whole"),
    ({"image": encode(draw_image(1005, 5))}, "aspect", "is 1005x5 pixels, sides more than 200 to 1"),
    ({"image": GOOD, "boxes": [(0, 0, 200, 0.5)]}, None, ""),
    ({"image": encode(draw_image(1000, 10)), "boxes": [(0, 0, 1000, 1)]}, "aspect", "a crop of 1000x1 pixels"),
    ({"image": JPEG[: len(JPEG) // 2]}, "truncated", "is truncated"),
    ({"image": GOOD[: len(GOOD) // 2]}, "truncated", "is truncated (the data ends early)"),
    ({"image": b""}, "truncated", "the file is empty"),
    ({"image": b"BM6\0\0\0"}, "undecodable", "expected an intact JPEG, PNG, WebP or GIF"),
    ({"image": GOOD, "boxes": [(-1.5, 0, 10, 10)]}, "box_outside", "outside its image of 200x100 pixels"),
    ({"image": GOOD, "boxes": [(0, 0, 10, 101.5)]}, "box_outside", "expected 0 <= x0 < x1 <= 200 and 0 <= y0"),
    ({"image": GOOD, "boxes": [(9, 4, 9, 20)]}, "box_empty", "box (9, 4, 9, 20) has no width; expected x0 < x1"),
    ({"image": GOOD, "boxes": [(9, 4, 19, 4)]}, "box_empty", "has no height"),
    (
        {"image": GOOD, "boxes": [(1, 1, 9, 9), (10, 4, 9, 20)]},
        "box_reversed",
        "box (10, 4, 9, 20) is reversed; expected x0 < x1 and y0 < y1",
    ),
    ({"image": GOOD, "boxes": [(0, 0, float("nan"), 9)]}, "box_not_finite", "box (0, 0, NaN, 9) has a side"),
    ({"image": GOOD, "boxes": [(0, 0, 9)]}, "box_not_finite", "box (0, 0, 9) is not four numbers"),
    ({"image": GOOD, "boxes": [1, 2, 3, 4]}, "box_not_finite", "box 1 is not four numbers"),
    ({"image": GOOD, "boxes": [Box(0, 0, 9, 9, image=1)]}, "box_image", "lies on image 1, but the row has 1"),
    ({"image": GOOD, "boxes": [Box(0, 0, 9, 9, image=-1)]}, "box_image", "lies on image -1"),
    ({"images": []}, "no_image", "the row has no image"),
    ({}, "no_image", "give it `image` or `images`"),
    (None, "no_image", "the row is a NoneType"),
]


class TestErrors:
    @pytest.mark.parametrize(("row", "reason", "text"), ERRORS, ids=[str(case[1]) for case in ERRORS])
    def test_bad_row_names_reason_and_fix(self, row, reason, text):
        config = dataclasses.replace(CONFIG, max_image_bytes=1 << 20)
        fine = {"image": GOOD}
        before, found, after = make_views([fine, row, fine], config)
        assert isinstance(before, RowViews)
        assert isinstance(after, RowViews)
        assert after.row == 2
        if reason is None:
            assert isinstance(found, RowViews)
            return
        assert isinstance(found, ViewError)
        assert (found.row, found.reason) == (1, reason)
        assert found.message.startswith("row 1: ")
        assert text in found.message

    @pytest.mark.parametrize(("row", "reason", "text"), ERRORS, ids=[str(case[1]) for case in ERRORS])
    def test_check_finds_what_the_header_tells(self, row, reason, text):
        config = dataclasses.replace(CONFIG, max_image_bytes=1 << 20)
        found = check_images([row], config)[0]
        if reason is None or row == {"image": JPEG[: len(JPEG) // 2]}:
            assert found is None  # a JPEG's pixels end early where no header tells
        else:
            assert found == make_views([row], config)[0]
            assert text in found.message

    def test_message_opens_with_the_source(self):
        row = Row(images=(GOOD,), question="?", boxes=(Box(10, 4, 9, 20),), source="rows.jsonl:17")
        expected = "rows.jsonl:17: box (10, 4, 9, 20) is reversed; expected x0 < x1 and y0 < y1"
        assert make_views([row]) == [ViewError(0, "box_reversed", expected)]
        assert (
            make_views([{"image": GOOD, "boxes": [(10, 4, 9, 20)], "source": "rows.jsonl:17"}])[0].message == expected
        )

    def test_row_that_asks_for_too_much_memory_is_refused_from_its_headers(self):
        # 100 views of 4 million pixels, 3 channels, 2 temporal copies, 4 bytes each.
        config = dataclasses.replace(CONFIG, crop_min_pixels=4_000_000, crop_max_pixels=5_000_000)
        row = {"image": GOOD, "boxes": [(1, 1, 90, 90)] * 100}
        (found,) = check_images([row], config)
        assert found == make_views([row], config)[0]
        assert found.reason == "too_large"
        assert "the views of 1 images and 100 boxes have 4" in found.message
        assert (
            "over the 2147483648 of one row; give fewer boxes or lower max_pixels and crop_min_pixels" in found.message
        )

    def test_unreadable_file_is_named(self, tmp_path):
        path = tmp_path / "pipe.png"
        os.mkfifo(path)  # must not wait for a writer
        (found,) = make_views([{"image": path}])
        assert (found.reason, str(path) in found.message) == ("unreadable", True)

    def test_broken_pil_image_is_an_error_value(self):
        lazy = Image.open(io.BytesIO(JPEG[: len(JPEG) // 2]))
        (found,) = make_views([{"image": lazy}])
        assert found.reason == "unreadable"
        assert "PIL image that cannot be read" in found.message


class TestHostile:
    SAMPLES = (
        JPEG,
        encode(draw_image(120, 90), "JPEG", progressive=True),
        GOOD,
        encode(draw_image(120, 90, mode="P")),
        encode(draw_image(120, 90), "WEBP", lossless=True),
        encode(draw_image(120, 90), "WEBP", quality=80),
        encode(draw_image(120, 90, mode="P"), "GIF"),
    )
    NAMES = ("jpeg", "progressive", "png", "palette", "lossless", "lossy", "gif")

    @pytest.mark.parametrize("data", SAMPLES, ids=NAMES)
    def test_truncated_file_is_an_error_at_every_cut(self, data):
        cuts = [len(data) * step // 20 for step in range(20)] + [len(data) - 9, len(data) - 1]
        for found in make_views([{"image": data[:cut]} for cut in cuts], CONFIG):
            assert isinstance(found, ViewError)
            assert found.reason in {"truncated", "undecodable"}, found

    @pytest.mark.parametrize("data", SAMPLES, ids=NAMES)
    def test_flipped_bytes_give_pixels_or_an_error(self, data):
        rng = random.Random(11)
        rows = []
        for _ in range(60):
            bad = bytearray(data)
            for _ in range(rng.randint(1, 6)):
                # Half of the flips in the header, where sizes and tables are.
                place = rng.randrange(min(700, len(bad))) if rng.random() < 0.5 else rng.randrange(len(bad))
                bad[place] = rng.randrange(256)
            rows.append({"image": bytes(bad)})
        config = dataclasses.replace(CONFIG, max_image_pixels=1 << 20)
        for found in make_views(rows, config):
            if isinstance(found, ViewError):
                assert found.reason in {"truncated", "undecodable", "too_large", "aspect"}, found
            else:
                assert np.isfinite(found.teacher.pixel_values).all()

    @pytest.mark.parametrize(("side", "scans", "limit"), [(1032, 504, 500), (5000, 100, 85)])
    def test_more_scans_than_the_size_allows_are_refused(self, side, scans, limit):
        bomb = jpeg_of_scans(side, scans)
        (found,) = make_views([{"image": bomb}], CONFIG)
        assert isinstance(found, ViewError)
        assert found.reason == "undecodable"
        assert f"more than {limit} scans, the limit at {side}x{side} pixels" in found.message

    def test_scans_within_the_limit_are_decoded(self):
        assert isinstance(make_views([{"image": jpeg_of_scans(1032, 60)}], CONFIG)[0], RowViews)

    @pytest.mark.parametrize("stray", [b"", bytes(9), bytes(40)], ids=len)
    def test_stray_bytes_do_not_hide_a_cut_file(self, stray):
        data = encode(draw_image(400, 300), "JPEG", restart_marker_blocks=4)
        restarts = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
        cut = data[: restarts[len(restarts) // 4]] + stray + b"\xff\xd9"
        (found,) = make_views([{"image": cut}], CONFIG)
        assert isinstance(found, ViewError)
        assert found.reason in {"truncated", "undecodable"}

    @pytest.mark.parametrize("lossless", [False, True], ids=["lossy", "lossless"])
    @pytest.mark.parametrize("animated", [False, True], ids=["still", "animated"])
    def test_webp_frame_of_another_size_is_refused_from_the_header(self, animated, lossless):
        file = encode(draw_image(640, 480), "WEBP", lossless=lossless)
        frame = (file[12:16], file[20:])
        canvas = bytes([2 if animated else 0, 0, 0, 0]) + bytes([31, 0, 0, 31, 0, 0])
        if animated:
            body = frame[0] + len(frame[1]).to_bytes(4, "little") + frame[1]
            still = bytes(6) + bytes([31, 0, 0, 31, 0, 0]) + bytes(4)
            data = riff((b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", still + body))
        else:
            data = riff((b"VP8X", canvas), frame)
        (found,) = check_images([{"image": data}], CONFIG)
        assert isinstance(found, ViewError)
        assert "holds a frame of 640x480 pixels where its header says 32x32" in found.message
        assert make_views([{"image": data}], CONFIG) == [found]


@pytest.mark.parametrize(
    ("family", "pinpoints"),
    [
        ("llava_next", (336, 672)),
        ("llava_next", None),
        ("llava_next", ((336 * 2**40, 336),)),
        ("llava_next", ()),
        ("internvl", None),
        ("internvl", ((1, -1),)),
    ],
)
def test_pinpoints_that_are_no_sizes_are_named(family, pinpoints):
    config = dataclasses.replace(CONFIG, tiling=Tiling(family, 336, pinpoints=pinpoints))
    with pytest.raises(ConfigError, match=r"^Tiling\.pinpoints is .*; expected \(height, width\) pairs"):
        make_views([], config)


def test_config_of_another_type_is_named():
    with pytest.raises(ConfigError, match=r"^the config is \{'max_pixels': 9\}; expected a ViewConfig"):
        make_views([], {"max_pixels": 9})


def test_crop_that_cannot_be_cut_is_named_by_its_box():
    tiling = Tiling("gemma3", 32, min_crop_px=1, max_crops=4, min_ratio=1.2)
    config = dataclasses.replace(CONFIG, tiling=tiling, teacher_global=False)
    (found,) = make_views([{"image": GOOD, "boxes": [(1, 1, 6, 2)]}], config, sides=("teacher",))
    expected = (
        "row 0: box (1, 1, 6, 2) gives a crop that is 5x1 pixels, too few for 4 crops; raise min_crop_px or lower"
    )
    assert (found.reason, found.message[: len(expected)]) == ("aspect", expected)


def test_array_with_too_long_a_side_is_refused():
    (found,) = make_views([{"image": np.zeros((1_000_001, 1, 3), np.uint8)}], CONFIG)
    assert found.reason == "too_large"
    assert "is 1x1000001 pixels, a side over 1000000; cut the image up" in found.message


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), 7, "bad\0path"]
)
def test_image_that_cannot_be_processed_is_named_by_its_sample(image):
    with pytest.raises(ImageError, match=r"^sample 1: image 1 |^sample 1: image bad"):
        process_images([[GOOD], [GOOD, image]], CONFIG)
