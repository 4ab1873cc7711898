"""`process_images`: a sample's images as a model's processor makes them, whatever the config says of evidence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pictures import (
    CONFIG,
    draw_image,
    encode,
)

from imagine_opd import _rust
from imagine_opd.views import process_images


class TestProcessedImages:
    def test_array_that_goes_by_columns_gives_the_same_pixels(self):
        pixels = np.asarray(draw_image(60, 40))
        found = process_images([[np.asfortranarray(pixels)], [pixels[:, ::-1][:, ::-1]]], CONFIG)
        assert found.sizes == ((60, 40), (60, 40))
        expected = process_images([[pixels]], CONFIG).pixel_values
        np.testing.assert_array_equal(found.pixel_values, np.concatenate([expected, expected]))

    def test_native_array_that_goes_by_columns_is_refused(self):
        pixels = np.asfortranarray(np.asarray(draw_image(60, 40)))
        with pytest.raises(
            ValueError, match=r"shape \[40, 60, 3\], but its rows are not one after the other; pass numpy"
        ):
            _rust.read_size(pixels)

    @pytest.mark.parametrize(
        "change",
        [{"student_scale": 0.5}, {"neutral": "mean"}, {"teacher_global": False}, {"highlight": "both"}],
        ids=str,
    )
    def test_images_are_made_once_and_as_they_are(self, change):
        images = [[encode(draw_image(120, 80, 1))], [encode(draw_image(90, 150, 2))]]
        expected = process_images(images, CONFIG)
        found = process_images(images, dataclasses.replace(CONFIG, **change))
        np.testing.assert_array_equal(found.pixel_values, expected.pixel_values)
        assert (found.frames, found.grids, found.sizes) == (expected.frames, expected.grids, expected.sizes)
