"""Drawn pictures, their encodings, and equality with transformers' own image processor: shared by the view tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import sklearn.datasets
from PIL import Image
from transformers import Qwen2VLImageProcessor

from imagine_opd.types import RowViews, ViewConfig
from imagine_opd.views import make_views

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
# Small budgets: many sizes in little time. Both scale up and down.
CONFIG = ViewConfig(min_pixels=16_384, max_pixels=65_536, box_margin=0.0, min_crop_px=1)
QWEN3 = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_processor(config=CONFIG):
    return Qwen2VLImageProcessor(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=config.temporal_patch_size,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    )


def draw_image(width, height, seed=0, mode="RGB"):
    """Noise over a gradient: sharp edges and smooth parts in every image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) * 3 % 256], axis=-1)
    pixels = (smooth + rng.integers(0, 120, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def open_rgb(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def make_one(row, config=CONFIG):
    (views,) = make_views([row], config)
    assert isinstance(views, RowViews), views
    return views


def assert_equals_reference(view, images, config=CONFIG):
    expected = make_processor(config)(images=images, return_tensors="np")
    np.testing.assert_array_equal(view.image_grid_thw, expected["image_grid_thw"])
    assert view.pixel_values.dtype == np.float32
    # Exact, not close: the same fixed-point resize and the same float operations in the same order.
    np.testing.assert_array_equal(view.pixel_values, expected["pixel_values"])


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


GOOD = encode(draw_image(200, 100))
JPEG = encode(draw_image(200, 100), "JPEG")
