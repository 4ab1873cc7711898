"""What several view tests compare with: image processors of every family at small sizes, a batch, equal views."""

from __future__ import annotations

import numpy as np
import transformers
from pictures import PHOTOS, draw_image, encode

from imagine_opd.types import Box, ViewConfig
from imagine_opd.views import view_config_from

# Every mean and deviation differs, so that swapped channels and wrong fills show.
PIXELS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]

# Class and arguments: frames of few pixels, so that most images are cut.
FAMILIES = {
    "qwen": ("Qwen2VLImageProcessor", {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 20_000}}),
    "internvl": ("GotOcr2ImageProcessor", {"size": {"height": 40, "width": 40}, "crop_to_patches": True}),
    "internvl-whole": ("GotOcr2ImageProcessor", {"size": {"height": 40, "width": 40}}),
    "llava_next": (
        "LlavaNextImageProcessor",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": PINPOINTS,
        },
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": PINPOINTS},
    ),
    "idefics3": (
        "Idefics3ImageProcessor",
        {"size": {"longest_edge": 110}, "max_image_size": {"longest_edge": 28}, "return_row_col_info": True},
    ),
    "smolvlm": (
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 32}, "return_row_col_info": True},
    ),
    "smolvlm-whole": (
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 90}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False},
    ),
    "gemma3": (
        "Gemma3ImageProcessor",
        {
            "size": {"height": 36, "width": 36},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 12,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
    "gemma3-whole": ("Gemma3ImageProcessor", {"size": {"height": 36, "width": 36}}),
}
# (family, its Pillow twin).
BACKENDS = [(family, pil) for family in FAMILIES for pil in (False, True)]
BACKEND_IDS = [f"{family}-{'pil' if pil else 'torchvision'}" for family, pil in BACKENDS]

# One pixel a patch, as bytes, no resize below a million pixels: the picture itself.
BARE = ViewConfig(
    patch_size=1, merge_size=1, temporal_patch_size=1, min_pixels=1, max_pixels=1 << 20, output="uint8",
    box_margin=0.0, min_crop_px=1, parity="pillow",
)  # fmt: skip


def build_processor(family, pil=False, **changes):
    name, arguments = FAMILIES[family]
    return getattr(transformers, name + "Pil" * pil)(**{**PIXELS, **arguments, **changes})


def read_config(processor, **overrides) -> ViewConfig:
    """The processor's views, with crops exactly where their boxes are."""
    return view_config_from(processor, **{"box_margin": 0.0, "min_crop_px": 1, **overrides})


def process(processor, images):
    """The pixels of each of one sample's images: patches, or frames `[frames, 3, side, side]`."""
    name = type(processor).__name__
    if name.startswith("LlavaNext"):  # one by one: together they are padded to as many frames
        return [processor(images=[image], return_tensors="np")["pixel_values"][0] for image in images]
    if name.startswith("LlavaOnevision"):
        return list(processor(images=[images], return_tensors="np")["pixel_values"])
    if name.startswith(("Idefics3", "SmolVLM")):
        found = processor(images=[images], return_row_col_info=True, return_tensors="np")
        counts = [
            rows * columns + (rows * columns > 0) or 1
            for rows, columns in zip(found["rows"][0], found["cols"][0], strict=True)
        ]
        return split(found["pixel_values"][0], counts)
    found = processor(images=images, return_tensors="np")
    if name.startswith("Qwen2VL"):
        return split(found["pixel_values"], found["image_grid_thw"].prod(axis=1))
    if name.startswith("GotOcr2"):
        return split(found["pixel_values"], found["num_patches"])
    return split(found["pixel_values"], found["num_crops"] + 1)


def split(pixels, counts):
    assert len(pixels) == sum(counts)
    return np.split(pixels, np.cumsum(counts)[:-1])


def assert_view_equals(view, images, processor):
    """Exact, not close: the same roundings and the same float operations in the same order."""
    expected = process(processor, images)
    assert view.frame_counts == tuple(map(len, expected))
    assert view.source_sizes == tuple(image.size for image in images)
    np.testing.assert_array_equal(view.pixel_values, np.concatenate(expected))


def pictures(view):
    """Of a view under a bare config: one array `[height, width, 3]` an image."""
    ends = np.cumsum(view.frame_counts)
    return [
        view.pixel_values[end - height * width : end].reshape(height, width, 3)
        for end, (height, width) in zip(ends, view.tile_grids, strict=True)
    ]


def make_mixed_rows(folder):
    """Two that share a file, two that share bytes, several images, no box, many boxes; JPEG, PNG and WebP."""
    shared = folder / "shared.jpg"
    shared.write_bytes(encode(draw_image(180, 140, 1), "JPEG"))
    same = encode(draw_image(90, 120, 2))
    other = encode(draw_image(70, 50, 3), "WEBP", lossless=True)
    return [
        {"image": shared, "boxes": [(1, 1, 80, 60), (50, 40, 180, 140)]},
        {"image": same},
        {"images": [same, other], "boxes": [Box(1, 1, 60, 40, image=1), Box(5, 5, 50, 100)]},
        {"image": shared, "boxes": [(100, 20, 130, 120)]},
        {"image": encode(draw_image(31, 200, 4)), "boxes": [(0, y, 31, y + 20) for y in range(0, 160, 40)]},
        {"image": PHOTOS / "flower.jpg", "boxes": [(300, 100, 500, 400)]},
    ]


def assert_views_equal(left, right):
    assert left.frame_counts == right.frame_counts
    assert left.tile_grids == right.tile_grids
    assert left.source_sizes == right.source_sizes
    np.testing.assert_array_equal(left.pixel_values, right.pixel_values)


def assert_same_views(left, right):
    for side in ("student", "teacher", "neutral"):
        a, b = getattr(left, side), getattr(right, side)
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert (a.frame_counts, a.tile_grids, a.source_sizes) == (b.frame_counts, b.tile_grids, b.source_sizes)
        assert a.pixel_values.dtype == b.pixel_values.dtype
        np.testing.assert_array_equal(a.pixel_values, b.pixel_values)
        np.testing.assert_array_equal(a.image_grid_thw, b.image_grid_thw)
    assert (left.crop_boxes, left.crop_of_box, left.image_sizes) == (
        right.crop_boxes,
        right.crop_of_box,
        right.image_sizes,
    )
