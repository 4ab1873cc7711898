"""The part of a JPEG that crops need is decoded to the very pixels of the whole."""

from __future__ import annotations

import dataclasses
import io
import struct

import numpy as np
import pytest
from pictures import CONFIG, draw_image, encode, make_one
from PIL import Image

from imagine_opd.views import make_views, measure_views


def relabel_sampling(data, size, factors):
    """A JPEG whose blocks are taken as of another size and luma sampling: as many of each component in a unit."""
    at = data.index(b"\xff\xc0")
    width, height = size
    head = bytearray(data)
    head[at + 5 : at + 9] = struct.pack(">HH", height, width)
    head[at + 11] = factors
    return bytes(head)


def jpegs_of_every_sampling():
    image = draw_image(256, 192, 3).resize((256, 192))
    found = {
        name: encode(image, "JPEG", subsampling=sampling, **options)
        for name, sampling, options in [
            ("444", "4:4:4", {}),
            ("422", "4:2:2", {}),
            ("420", "4:2:0", {}),
            ("420-progressive", "4:2:0", {"progressive": True}),
            ("422-progressive", "4:2:2", {"progressive": True}),
            ("420-restarts", "4:2:0", {"restart_marker_blocks": 5}),
            ("420-coarse", "4:2:0", {"quality": 20}),
        ]
    }
    found["grey"] = encode(image.convert("L"), "JPEG")
    found["cmyk"] = encode(image.convert("CMYK"), "JPEG")
    # Pillow writes neither of these: two luma blocks one over the other, and four beside each other.
    found["440"] = relabel_sampling(encode(image, "JPEG", subsampling="4:2:2"), (128, 384), 0x12)
    found["411"] = relabel_sampling(encode(image, "JPEG", subsampling="4:2:0"), (512, 96), 0x41)
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"420-turned-{orientation}"] = encode(image, "JPEG", subsampling="4:2:0", exif=exif)
    return found


JPEGS = jpegs_of_every_sampling()


class TestRegions:
    """Crops alone decode no more of a JPEG than they need, and not one pixel differently."""

    @pytest.mark.parametrize("name", JPEGS)
    def test_crops_alone_equal_crops_with_the_global_image(self, name):
        data = JPEGS[name]
        config = dataclasses.replace(CONFIG, min_pixels=1024, max_pixels=4096, output="uint8")
        (sizes,) = measure_views([{"image": data}], config)
        ((width, height),) = sizes.image_sizes
        rng = np.random.default_rng(1)
        edges = [(0, 0, 9, 9), (width - 9, height - 9, width, height), (0, height - 2, 90, height), (15, 15, 17, 18)]
        for boxes in [*([edge] for edge in edges), *(random_boxes(rng, width, height) for _ in range(25))]:
            row = {"image": data, "boxes": boxes}
            with_global = make_one(row, config)
            (alone,) = make_views([row], dataclasses.replace(config, teacher_global=False), sides=("teacher",))
            first = len(with_global.student.pixel_values)
            np.testing.assert_array_equal(alone.teacher.pixel_values, with_global.teacher.pixel_values[first:])

    @pytest.mark.parametrize("name", [name for name in JPEGS if name != "cmyk" and "turned" not in name])
    def test_crops_alone_equal_pillows(self, name):
        image = Image.open(io.BytesIO(JPEGS[name])).convert("RGB")
        config = dataclasses.replace(
            CONFIG,
            patch_size=1,
            merge_size=1,
            temporal_patch_size=1,
            min_pixels=1,
            output="uint8",
            teacher_global=False,
        )
        rng = np.random.default_rng(2)
        for _ in range(20):
            (box,) = random_boxes(rng, *image.size, count=1)
            views = make_one({"image": JPEGS[name], "boxes": [box]}, config)
            found = views.teacher.pixel_values.reshape(box[3] - box[1], box[2] - box[0], 3)
            np.testing.assert_array_equal(found, np.array(image.crop(box)))


def random_boxes(rng, width, height, count=None):
    boxes = []
    for _ in range(count or rng.integers(1, 4)):
        x0, y0 = int(rng.integers(0, width - 1)), int(rng.integers(0, height - 1))
        boxes.append((x0, y0, int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))))
    return [box for box in boxes if max(box[2] - box[0], box[3] - box[1]) < 199] or [(0, 0, 9, 9)]
