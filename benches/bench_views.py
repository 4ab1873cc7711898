"""Views against transformers' Qwen2VLImageProcessor, same bytes, same run, equal pixels asserted before timing.

The peer decodes with Pillow, as a trainer that loads a path does. Both sides use one thread.
"""

from __future__ import annotations

import io
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from imagine_opd.types import ViewConfig
from imagine_opd.views import make_views

CONFIG = ViewConfig(max_pixels=1_048_576, crop_max_pixels=262_144, box_margin=0.0, min_crop_px=1, num_threads=1)
CROPS = [(200, 150, 520, 400), (900, 300, 1500, 900), (1600, 800, 1900, 1060)]
PEER_ROUNDS = 7


def make_jpeg() -> bytes:
    """A photograph at 1920x1080, 4:2:0."""
    path = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
    buffer = io.BytesIO()
    Image.open(path).resize((1920, 1080), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_processor(max_pixels: int) -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(
        patch_size=CONFIG.patch_size,
        image_mean=list(CONFIG.image_mean),
        image_std=list(CONFIG.image_std),
        size={"shortest_edge": CONFIG.min_pixels, "longest_edge": max_pixels},
    )


# "two prompts": the peer is called for the student's prompt and again for the teacher's, as trainers do.
# "shared" is kind to it: one call for the global image serves both, as it does in views.
@pytest.mark.parametrize(
    ("boxes", "shared"),
    [([], True), (CROPS, True), (CROPS, False)],
    ids=["global", "global+3crops, shared", "global+3crops, two prompts"],
)
def test_views_against_transformers(benchmark, boxes, shared):
    torch.set_num_threads(1)
    data = make_jpeg()
    whole, crop = make_processor(CONFIG.max_pixels), make_processor(CONFIG.crop_max_pixels)

    def run_peer():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        student = whole(images=[image], return_tensors="np")["pixel_values"]
        if not boxes:
            return student, student
        crops = crop(images=[image.crop(box) for box in boxes], return_tensors="np")["pixel_values"]
        again = student if shared else whole(images=[image], return_tensors="np")["pixel_values"]
        return student, np.concatenate([again, crops])

    def run_views():
        return make_views([{"image": data, "boxes": boxes}], CONFIG)

    (views,) = run_views()
    student, teacher = run_peer()
    np.testing.assert_array_equal(views.student.pixel_values, student)
    np.testing.assert_array_equal(views.teacher.pixel_values, teacher)

    benchmark(run_views)
    seconds = []
    for _ in range(PEER_ROUNDS):
        start = time.perf_counter()
        run_peer()
        seconds.append(time.perf_counter() - start)
    peer = statistics.median(seconds)
    benchmark.extra_info["peer_median_s"] = round(peer, 5)
    benchmark.extra_info["times_faster"] = round(peer / benchmark.stats.stats.median, 2)
