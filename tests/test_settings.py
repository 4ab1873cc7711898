"""What the config says reaches each step; what a step cannot do is refused by name."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from transformers import Gemma3ImageProcessor, GotOcr2ImageProcessor, Qwen2VLImageProcessor

from imagine_opd import ImagineOPDConfig
from imagine_opd.errors import ConfigError
from imagine_opd.settings import make_view_config
from imagine_opd.views import view_config_from


def name_processor(kind, image_processor):
    """As much of a processor as settings read: its class's name and its image processor."""
    return type(kind, (SimpleNamespace,), {})(image_processor=image_processor)


def make_args(tmp_path, **fields):
    return ImagineOPDConfig(output_dir=str(tmp_path), **fields)


def test_view_fields_reach_the_views(tmp_path):
    fields = {
        "merge_overlap": 0.5,
        "reading_order": True,
        "highlight": "teacher",
        "scaled_decode": True,
        "box_margin": 0.3,
        "min_crop_px": 5,
        "crop_max_pixels": 99_000,
    }
    processor = name_processor("Qwen3VLProcessor", Qwen2VLImageProcessor())
    config = make_view_config(processor, make_args(tmp_path, view_threads=3, **fields))
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.num_threads == 3


def test_student_is_degraded_in_training_only(tmp_path):
    processor = name_processor("Qwen3VLProcessor", Qwen2VLImageProcessor())
    args = make_args(tmp_path, student_scale=0.25, student_blur_px=2.0)
    trained, asked = (make_view_config(processor, args, training=training) for training in (True, False))
    assert (trained.student_scale, trained.student_blur_px) == (0.25, 2.0)
    assert (asked.student_scale, asked.student_blur_px) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "image_processor", "split"),
    [
        ("InternVLProcessor", GotOcr2ImageProcessor(size=64, crop_to_patches=False), True),
        ("Gemma3Processor", Gemma3ImageProcessor(size={"height": 64, "width": 64}, do_pan_and_scan=True), False),
    ],
)
def test_tiling_is_what_the_models_processor_asks_for_at_each_call(tmp_path, kind, image_processor, split):
    config = make_view_config(name_processor(kind, image_processor), make_args(tmp_path))
    assert config.tiling.split is split
    own = view_config_from(image_processor)
    assert dataclasses.replace(own.tiling, split=split) == config.tiling
    assert own.tiling.split is not split


@pytest.mark.parametrize("field", ["min_pixels", "max_pixels", "crop_min_pixels", "crop_max_pixels"])
def test_budget_that_would_do_nothing_is_refused(tmp_path, field):
    processor = name_processor("Gemma3Processor", Gemma3ImageProcessor(size={"height": 64, "width": 64}))
    with pytest.raises(ConfigError, match=f"{field}=99000: Gemma3ImageProcessor cuts images into frames of 64"):
        make_view_config(processor, make_args(tmp_path, **{field: 99_000}))
