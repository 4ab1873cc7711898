"""Views back to pictures: what is shown is what the model is given, in every family and output."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pictures import draw_image, encode, make_one
from PIL import Image
from references import FAMILIES, build_processor, read_config

from imagine_opd.pictures import restore_pictures

# Sizes that the family's rule leaves as they are: (width, height), and the rows and columns it is cut into.
UNRESIZED = {
    "qwen": ((84, 56), None),
    "internvl": ((80, 40), (1, 2)),
    "llava_next": ((56, 56), (2, 2)),
    "llava_onevision": ((28, 56), (2, 1)),
    "gemma3": ((72, 36), (1, 2)),
}


def make_teacher(family, size, **changes):
    config = read_config(build_processor(family), **changes)
    image = draw_image(*size, 5)
    return image, make_one({"image": encode(image), "boxes": [(0, 0, size[0] // 2, size[1])]}, config).teacher, config


@pytest.mark.parametrize("family", ["qwen", "internvl", "llava_next", "llava_onevision", "gemma3"])
def test_picture_of_an_image_that_needs_no_resize_is_that_image(family):
    size, grid = UNRESIZED[family]
    image, view, config = make_teacher(family, size)
    if family == "llava_onevision":  # tiles only a row's single image: no crop beside it
        view = make_one({"image": encode(image)}, config).student
    found = restore_pictures(view, 0, config)
    laid_out = found[0] if grid is None else found[1]
    assert [picture.kind for picture in found] == (["whole"] if grid is None else ["whole", "tiles"])
    assert laid_out.frames == (1 if grid is None else grid[0] * grid[1])
    np.testing.assert_array_equal(laid_out.pixels_HWC, np.asarray(image))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_undone_normalisation_gives_the_bytes_before_it(family, output):
    _, view, config = make_teacher(family, (150, 61), output=output)
    _, plain, plain_config = make_teacher(family, (150, 61), output="uint8")
    assert plain.frame_counts == view.frame_counts
    for index in range(2):
        pairs = zip(restore_pictures(view, index, config), restore_pictures(plain, index, plain_config), strict=True)
        for restored, expected in pairs:
            off = np.abs(restored.pixels_HWC.astype(int) - expected.pixels_HWC)
            # A bfloat16 holds 8 bits of a value that may be 2.6 deviations off its mean.
            assert off.max() <= (0 if output == "float32" else 1)


@pytest.mark.parametrize("family", ["internvl", "llava_next", "idefics3", "gemma3"])
def test_whole_picture_shows_the_whole_and_tiles_show_its_parts(family):
    config = read_config(build_processor(family))
    half = np.zeros((60, 200, 3), dtype=np.uint8)
    half[:, :100], half[:, 100:] = (250, 10, 10), (10, 10, 250)
    view = make_one({"image": encode(Image.fromarray(half))}, config).student
    for picture in restore_pictures(view, 0, config):
        left, right = np.array_split(picture.pixels_HWC, 2, axis=1)
        middle = slice(left.shape[0] // 2, left.shape[0] // 2 + 1)  # LLaVA's tiles have black bars above and below
        assert left[middle, : left.shape[1] - 8, 0].mean() > 200, picture.kind
        assert right[middle, 8:, 2].mean() > 200, picture.kind


def test_each_image_of_a_view_is_its_own_picture():
    config = read_config(build_processor("qwen"))
    assert config.temporal_patch_size == 2
    image = draw_image(84, 56, 5)
    view = make_one({"image": encode(image), "boxes": [(28, 0, 84, 56)]}, config).teacher
    np.testing.assert_array_equal(restore_pictures(view, 1, config)[0].pixels_HWC, np.asarray(image)[:, 28:])
    blind = dataclasses.replace(view, pixel_values=view.pixel_values.copy())
    blind.pixel_values[: view.frame_counts[0]] = 0.0
    mean_colour = np.round(np.array(config.image_mean) * 255)
    assert (restore_pictures(blind, 0, config)[0].pixels_HWC == mean_colour).all()
    np.testing.assert_array_equal(restore_pictures(blind, 1, config)[0].pixels_HWC, np.asarray(image)[:, 28:])
