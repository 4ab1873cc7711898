"""A thumbnail is the picture that the student sees, in every layout and output."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from imagine_opd.metrics.thumbnails import make_thumbnails
from imagine_opd.types import Row, Tiling, ViewConfig
from imagine_opd.views import make_views


def make_row(width: int, height: int) -> tuple[Row, np.ndarray]:
    """A smooth picture: red falls to the right, green down, blue is a bright corner."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 255 // width, y * 255 // height, 200 * ((x < width // 2) & (y < height // 2))], -1)
    picture = picture.astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return Row((file.getvalue(),), "?"), picture


def difference(found: np.ndarray, picture: np.ndarray) -> float:
    resized = Image.fromarray(picture).resize((found.shape[1], found.shape[0]), Image.Resampling.BICUBIC)
    return float(np.abs(found.astype(int) - np.asarray(resized).astype(int)).mean())


@pytest.mark.parametrize("output", ["float32", "bfloat16", "uint8"])
def test_patches_become_the_picture_again(output):
    row, picture = make_row(96, 64)
    config = ViewConfig(
        patch_size=8,
        min_pixels=1,
        max_pixels=96 * 64,
        output=output,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.4),
    )
    (found,) = make_thumbnails(make_views([row], config)[0].student, config)
    assert found.shape == picture.shape
    assert np.abs(found.astype(int) - picture.astype(int)).max() <= (2 if output == "bfloat16" else 1)


def test_long_side_is_bounded_and_each_image_has_its_own():
    rows = [make_row(320, 160), make_row(64, 192)]
    row = Row((rows[0][0].images[0], rows[1][0].images[0]), "?")
    config = ViewConfig(patch_size=8, min_pixels=1, max_pixels=320 * 160)
    found = make_thumbnails(make_views([row], config)[0].student, config, max_side_px=96)
    assert [picture.shape for picture in found] == [(48, 96, 3), (96, 32, 3)]
    assert all(difference(picture, original) < 4 for picture, (_, original) in zip(found, rows, strict=True))


@pytest.mark.parametrize("family", ["internvl", "llava_next", "llava_onevision", "idefics3", "gemma3"])
def test_frame_of_the_whole_image_is_shown_in_its_aspect(family):
    row, picture = make_row(200, 100)
    tiling = Tiling(family, 64, pinpoints=((64, 128), (128, 64)), longest_edge_px=128, min_crop_px=8, max_tiles=4)
    config = ViewConfig(tiling=tiling)
    view = make_views([row], config)[0].student
    assert view.frame_counts[0] > 1
    (found,) = make_thumbnails(view, config)
    assert found.shape == (32, 64, 3)
    assert difference(found, picture) < 6


def test_degraded_student_is_shown_degraded():
    row, picture = make_row(96, 96)
    noise = np.random.default_rng(0).integers(0, 255, picture.shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    row = dataclasses.replace(row, images=(file.getvalue(),))
    config = ViewConfig(patch_size=8, min_pixels=1, max_pixels=96 * 96, student_blur_px=4.0)
    views = make_views([row], config)[0]
    student, teacher = (make_thumbnails(view, config)[0] for view in (views.student, views.teacher))
    assert difference(teacher, noise) < 1
    assert difference(student, noise) > 30
