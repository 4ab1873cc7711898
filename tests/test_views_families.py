"""Views of every family equal transformers' image processors bit for bit, under both of their backends."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import draw_image, encode, make_one, open_rgb
from PIL import Image
from references import BACKEND_IDS, BACKENDS, FAMILIES, assert_view_equals, build_processor, read_config
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF  # noqa: N812

from imagine_opd.types import RowViews, ViewConfig
from imagine_opd.views import make_views

HARD_SIZES = [
    (1, 1), (1, 2), (2, 1), (1, 199), (199, 1), (2, 398), (398, 2), (3, 597), (5, 1), (1, 5), (3, 3), (7, 31),
    # Sides of the frames and of their multiples, and one beside them.
    (28, 28), (40, 40), (32, 32), (36, 36), (56, 28), (28, 84), (80, 40), (120, 80), (110, 110), (112, 64), (64, 112),
    (29, 27), (55, 57), (81, 39), (111, 109), (113, 63),
    # Halves: of the Qwen grid (14 and 28), of aspects (1.5, 2.5, 1.2), of odd longest edges.
    (42, 70), (70, 42), (126, 98), (90, 60), (60, 90), (150, 60), (60, 150), (120, 100), (100, 120), (121, 100),
    (257, 255), (333, 222), (300, 400), (500, 333),
]  # fmt: skip


def random_sizes(count, seed):
    rng = random.Random(seed)
    found = []
    while len(found) < count:
        long, short = int(2 ** rng.uniform(0, 9)), int(2 ** rng.uniform(0, 9))
        if max(long, short) <= 199 * min(long, short):
            found.append((long, short))
    return found


def random_boxes(rng, width, height, count):
    boxes = []
    while len(boxes) < count:
        x0, y0 = rng.randrange(width), rng.randrange(height)
        x1, y1 = rng.randint(x0 + 1, width), rng.randint(y0 + 1, height)
        if max(x1 - x0, y1 - y0) <= 199 * min(x1 - x0, y1 - y0):
            boxes.append((x0, y0, x1, y1))
    return boxes


# Folder and names of the photographs in packages of the dev extra.
SAMPLE_PHOTOS = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
}


def find_photographs():
    found = []
    for package, (folder, names) in SAMPLE_PHOTOS.items():
        spec = importlib.util.find_spec(package)
        for place in spec.submodule_search_locations or () if spec else ():
            found += [path for path in (Path(place) / folder / name for name in names) if path.exists()]
    assert len(found) == 7, f"found {found}; the dev extra brings all packages of SAMPLE_PHOTOS"
    return found


@pytest.mark.parametrize(("family", "pil"), BACKENDS, ids=BACKEND_IDS)
class TestFamilies:
    def test_pixels_equal_reference_at_hard_sizes(self, family, pil):
        processor = build_processor(family, pil)
        config = read_config(processor)
        images = [draw_image(*size, seed) for seed, size in enumerate(HARD_SIZES)]
        found = make_views([{"image": encode(image)} for image in images], config)
        for image, views in zip(images, found, strict=True):
            assert isinstance(views, RowViews), views
            assert_view_equals(views.student, [image], processor)

    def test_pixels_equal_reference_at_random_sizes(self, family, pil):
        processor = build_processor(family, pil)
        config = read_config(processor)
        images = [draw_image(*size, seed) for seed, size in enumerate(random_sizes(30, seed=family))]
        kinds = ["PNG", "JPEG"]
        files = [encode(image, kinds[index % 2]) for index, image in enumerate(images)]
        for data, views in zip(files, make_views([{"image": data} for data in files], config), strict=True):
            assert isinstance(views, RowViews), views
            assert_view_equals(views.student, [open_rgb(data)], processor)

    def test_teacher_equals_reference_on_images_and_crops(self, family, pil):
        processor = build_processor(family, pil)
        config = read_config(processor)
        rng = random.Random(11)
        for case, sizes in enumerate([[(200, 120)], [(90, 150), (61, 60)], [(300, 40)]]):
            images = [draw_image(*size, case) for size in sizes]
            places = [(place, box) for place, size in enumerate(sizes) for box in random_boxes(rng, *size, 4)]
            rng.shuffle(places)
            row = {
                "images": [encode(image) for image in images],
                "boxes": [box for _, box in places],
                "box_images": [place for place, _ in places],
            }
            views = make_one(row, config)
            assert_view_equals(views.student, images, processor)
            crops = [images[place].crop(box) for place, box in places]
            assert_view_equals(views.teacher, [*images, *crops], processor)

    def test_upscales_equal_reference(self, family, pil):
        """Frames larger than the image: every filter blows up."""
        larger = {
            "Qwen": {"size": {"shortest_edge": 200_000, "longest_edge": 300_000}},
            "Idefics3": {"size": {"longest_edge": 300}, "max_image_size": {"longest_edge": 100}},
            "SmolVLM": {"size": {"longest_edge": 300}, "max_image_size": {"longest_edge": 100}},
            "LlavaNext": {
                "size": {"shortest_edge": 150},
                "crop_size": {"height": 150, "width": 150},
                "image_grid_pinpoints": [[150, 300], [300, 150], [300, 300]],
            },
            "LlavaOnevision": {
                "size": {"height": 150, "width": 150},
                "image_grid_pinpoints": [[150, 300], [300, 150], [300, 300]],
            },
        }
        name = FAMILIES[family][0]
        change = next((value for start, value in larger.items() if name.startswith(start)), None)
        processor = build_processor(family, pil, **(change or {"size": {"height": 150, "width": 150}}))
        config = read_config(processor)
        for seed, size in enumerate([(9, 7), (31, 60), (60, 12), (75, 75)]):
            image = draw_image(*size, seed)
            views = make_one({"image": encode(image), "boxes": [(1, 1, 6, 7)]}, config)
            assert_view_equals(views.teacher, [image, image.crop((1, 1, 6, 7))], processor)


@pytest.mark.parametrize(("family", "pil"), BACKENDS, ids=BACKEND_IDS)
def test_photographs_equal_reference(family, pil):
    processor = build_processor(family, pil, **AS_RELEASED[family])
    config = read_config(processor)
    paths = find_photographs()
    assert len(paths) >= 2
    for path in paths:
        image = Image.open(path).convert("RGB")
        width, height = image.size
        boxes = [(width // 9, 0, width, height // 3), (0, height // 2, width // 3, height)]
        views = make_one({"image": path, "boxes": boxes}, config)
        assert_view_equals(views.student, [image], processor)
        assert_view_equals(views.teacher, [image, *(image.crop(box) for box in boxes)], processor)


# Near the sizes of published checkpoints, with fewer tiles.
_ANYRES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_EDGES = {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 256}}
AS_RELEASED = {
    "qwen": {"size": {"shortest_edge": 65_536, "longest_edge": 200_000}, "patch_size": 16},
    "internvl": {"size": {"height": 448, "width": 448}, "max_patches": 4},
    "internvl-whole": {"size": {"height": 448, "width": 448}},
    "llava_next": {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
        "image_grid_pinpoints": _ANYRES,
    },
    "llava_onevision": {
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384], [768, 768]],
    },
    "idefics3": {"size": {"longest_edge": 728}, "max_image_size": {"longest_edge": 364}},
    "smolvlm": _EDGES,
    "smolvlm-whole": _EDGES,
    "gemma3": {"size": {"height": 448, "width": 448}, "pan_and_scan_min_crop_size": 128},
    "gemma3-whole": {"size": {"height": 896, "width": 896}},
}


class TestSamples:
    """What a family does to an image may depend on whether it is the only one."""

    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    def test_onevision_cuts_an_only_image_and_pads_several(self, pil):
        processor = build_processor("llava_onevision", pil)
        config = read_config(processor)
        image, other = draw_image(100, 40, 1), draw_image(30, 90, 2)
        box = (10, 5, 70, 25)
        alone = make_one({"image": encode(image), "boxes": [box]}, config)
        assert alone.student.frame_counts[0] > 1
        assert alone.teacher.frame_counts == (1, 1)
        assert not np.shares_memory(alone.student.pixel_values, alone.teacher.pixel_values)
        assert_view_equals(alone.student, [image], processor)
        assert_view_equals(alone.teacher, [image, image.crop(box)], processor)
        both = make_one({"images": [encode(image), encode(other)]}, config)
        assert both.student.frame_counts == (1, 1)
        assert_view_equals(both.student, [image, other], processor)
        assert np.shares_memory(both.student.pixel_values, both.teacher.pixel_values)

    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    def test_an_only_crop_is_alone(self, pil):
        processor = build_processor("llava_onevision", pil)
        config = read_config(processor, teacher_global=False)
        image, box = draw_image(200, 90), (10, 5, 110, 45)
        views = make_one({"image": encode(image), "boxes": [box]}, config)
        assert views.teacher.frame_counts[0] > 1
        assert_view_equals(views.teacher, [image.crop(box)], processor)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_tile_grids_count_rows_and_columns(self, family):
        processor = build_processor(family)
        config = read_config(processor)
        for seed, size in enumerate([(200, 60), (60, 200), (150, 100), (75, 33)]):
            image = draw_image(*size, seed)
            view = make_one({"image": encode(image)}, config).student
            ((rows, columns),), (frames,) = view.tile_grids, view.frame_counts
            if family == "qwen":
                assert rows * columns == frames
                assert view.image_grid_thw.tolist() == [[1, rows, columns]]
                continue
            assert view.image_grid_thw.shape == (0, 3)
            if family.endswith("whole"):
                assert (rows, columns, frames) == (0, 0, 1)
                continue
            assert rows * columns + 1 == frames > 2
            assert (rows > columns) == (size == (60, 200))
            if family in ("idefics3", "smolvlm"):
                found = processor(images=[[image]], return_row_col_info=True)
                assert (rows, columns) == (found["rows"][0][0], found["cols"][0][0])


FILTERS = {"bilinear": 2, "bicubic": 3, "lanczos": 1}
SIZES = [(1, 1), (1, 90), (90, 1), (3, 500), (500, 3), (100, 100), (250, 31), (31, 250), (97, 61), (400, 300), (30, 41)]
# One pixel a patch, as bytes: the resized picture itself.
BARE = ViewConfig(
    patch_size=1, merge_size=1, temporal_patch_size=1, min_pixels=900, max_pixels=6_000, output="uint8",
    box_margin=0.0, min_crop_px=1,
)  # fmt: skip


@pytest.mark.parametrize("resample", FILTERS)
class TestResize:
    @pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pil"])
    def test_filter_equals_reference(self, resample, pil):
        processor = build_processor("qwen", pil, resample=FILTERS[resample])
        config = read_config(processor)
        assert config.resample == resample
        for seed, size in enumerate(HARD_SIZES[:12] + SIZES + random_sizes(10, seed=resample)):
            image = draw_image(*size, seed)
            assert_view_equals(make_one({"image": encode(image)}, config).student, [image], processor)

    @pytest.mark.parametrize("parity", ["torchvision", "pillow", "pillow12"])
    def test_resized_bytes_equal_the_library(self, resample, parity):
        config = dataclasses.replace(BARE, resample=resample, parity=parity)
        for seed, size in enumerate(SIZES + random_sizes(25, seed=parity)):
            image = draw_image(*size, seed)
            view = make_one({"image": encode(image)}, config).student
            _, height, width = view.image_grid_thw[0]
            expected = resize_by_library(image, (int(width), int(height)), resample, parity)
            np.testing.assert_array_equal(view.pixel_values.reshape(height, width, 3), expected)

    def test_pillow_13_shrinks_tall_images_downwards_first(self, resample):
        image = encode(draw_image(60, 900))
        found = {}
        for parity in ("torchvision", "pillow", "pillow12"):
            config = dataclasses.replace(BARE, resample=resample, parity=parity)
            found[parity] = make_one({"image": image}, config).student.pixel_values.astype(int)
        assert np.abs(found["pillow"] - found["pillow12"]).max() > 0
        assert np.abs(found["torchvision"] - found["pillow12"]).max() <= 1


def resize_by_library(image, size, resample, parity):
    if parity == "torchvision":
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        mode = InterpolationMode(resample)
        return tvF.resize(pixels, [size[1], size[0]], interpolation=mode, antialias=True).permute(1, 2, 0).numpy()
    if parity == "pillow12":  # across, then down, whatever the size: Pillow 13 is asked for one at a time
        image = image.resize((size[0], image.height), FILTERS[resample])
    return np.array(image.resize(size, FILTERS[resample]))
