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


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_adam7(pixels):
    """An interlaced RGB8 PNG of `pixels` `[height, width, 3]`; Pillow writes none."""
    height, width, _ = pixels.shape
    lines = b""
    for x, y, step_x, step_y in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
                                 (0, 1, 1, 2)):  # fmt: skip
        part = pixels[y::step_y, x::step_x]
        lines += b"".join(b"\0" + line.tobytes() for line in part if line.size)
    return _png(width, height, 8, 1, lines)


def png_rgb16(samples):
    """A PNG of 16-bit RGB `samples` `[height, width, 3]`."""
    height, width, _ = samples.shape
    return _png(width, height, 16, 0, b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples))


def _png(width, height, depth, interlace, lines):
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")


def riff(*chunks):
    """A WebP container of (kind, body) chunks."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_scans(side, scans):
    """A grey progressive JPEG whose `scans` scans all obey the standard, one bit of one coefficient each."""
    blocks = (side // 8) ** 2

    def segment(marker, body):
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    def pack(bits):
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    # One symbol a table, so its code is "0": DC category 0; AC a run of 2**14 and more ended blocks.
    lengths = bytes([1] + [0] * 15)
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    data += segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    data += segment(0xC4, b"\x00" + lengths + b"\x00" + b"\x10" + lengths + b"\xe0")
    data += segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + pack("0" * blocks)
    assert blocks >= 1 << 14
    runs = [32_767] * (blocks // 32_767) + [blocks % 32_767]
    assert runs[-1] >= 1 << 14
    ends = pack("".join("0" + f"{run - (1 << 14):014b}" for run in runs))
    steps = [(k, high, high - 1) for k in range(1, 64) for high in range(8, 0, -1)]
    for k, high, low in steps[: scans - 1]:
        data += segment(0xDA, bytes([1, 1, 0, k, k, (0 if high == 8 else high) << 4 | low])) + ends
    return data + b"\xff\xd9"


GOOD = encode(draw_image(200, 100))
JPEG = encode(draw_image(200, 100), "JPEG")
