"""Pairs of an image processor of transformers and ours, what they are given, and that both make the same of it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import transformers
from pictures import draw_image, encode
from PIL import Image

from imagine_opd import image_layouts
from imagine_opd.image_processors import use_rust_images

# Small frames: many sizes in little time. Each family splits some of the pictures below and not others.
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SPLIT = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}, "return_row_col_info": True}
SETTINGS = {
    "Qwen2VLImageProcessor": {"size": {"shortest_edge": 4_096, "longest_edge": 20_000}},
    "GotOcr2ImageProcessor": {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "max_patches": 6},
    "Gemma3ImageProcessor": {
        "size": {"height": 32, "width": 32},
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    "LlavaNextImageProcessor": {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_grid_pinpoints": PINPOINTS,
    },
    "LlavaOnevisionImageProcessor": {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": PINPOINTS},
    "Idefics3ImageProcessor": SPLIT,
    "SmolVLMImageProcessor": SPLIT,
}
NAMES = [name + backend for name in SETTINGS for backend in ("", "Pil")]
SIZES = [(90, 60), (40, 41), (33, 120), (200, 50), (64, 64), (31, 7), (96, 32)]
MEAN_STD = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}


def build(name):
    original = getattr(transformers, name)(**SETTINGS[name.removesuffix("Pil")])
    return original, use_rust_images(original)


def record_warnings(monkeypatch):
    """What our processors warned of: empty means that Rust made the pixels."""
    said = []
    monkeypatch.setattr(image_layouts._logger, "warning", said.append)
    monkeypatch.setattr(image_layouts, "_warned", set())
    return said


def pictures(count=None):
    return [draw_image(*size, seed) for seed, size in enumerate(SIZES[:count])]


def assert_same(found, expected, path="output"):
    assert type(found) is type(expected), path
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}[{key}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(expected, (torch.Tensor, np.ndarray)):
        assert found.dtype == expected.dtype, path
        assert found.shape == expected.shape, path
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=path)
    else:
        assert found == expected, path


def assert_pair_agrees(pair, images, **options):
    original, rust = pair
    expected = original(images, **options)
    found = rust(images, **options)
    assert_same(found, expected)
    return found


def write_inputs(folder):
    """Files that say different things of the same picture: an orientation, transparency, grey, CMYK, a palette."""
    turned, upside_down = Image.Exif(), Image.Exif()
    turned[0x0112], upside_down[0x0112] = 6, 3
    rgba = draw_image(90, 60, mode="RGBA")
    rgba.putalpha(draw_image(90, 60, seed=5, mode="L"))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    twice = encode(draw_image(90, 60), "JPEG")
    for exif in (upside_down, Image.Exif()):  # the first block says nothing
        block = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
        twice = twice[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + twice[2:]
    files = {
        "plain.jpg": encode(draw_image(90, 60), "JPEG", quality=90),
        "turned.jpg": encode(draw_image(90, 60), "JPEG", exif=turned),
        "grey.jpg": encode(draw_image(90, 60, mode="L"), "JPEG"),
        "cmyk.jpg": encode(draw_image(90, 60, mode="CMYK"), "JPEG"),
        "progressive.jpg": encode(draw_image(200, 150), "JPEG", progressive=True),
        "upside_down.jpg": encode(draw_image(90, 60), "JPEG", exif=upside_down),
        "twice.jpg": twice,
        "xmp.jpg": encode(draw_image(90, 60), "JPEG", xmp=xmp),
        "xmp_and_exif.jpg": encode(draw_image(90, 60), "JPEG", xmp=xmp, exif=upside_down),
        "alpha.png": encode(rgba),
        "grey.png": encode(draw_image(90, 60, mode="L")),
        "palette.png": encode(draw_image(90, 60, mode="P")),
        "lossless.webp": encode(draw_image(90, 60), "WEBP", lossless=True),
        "plain.bmp": encode(draw_image(90, 60), "BMP"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in files]
