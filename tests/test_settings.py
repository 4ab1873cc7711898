"""What the config says reaches each step; what a step cannot do is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import Gemma3ImageProcessor, Qwen2VLImageProcessor

from imagine_opd import ImagineOPDConfig
from imagine_opd.errors import ConfigError
from imagine_opd.settings import make_view_config


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
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessor())
    config = make_view_config(processor, make_args(tmp_path, view_threads=3, **fields))
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.num_threads == 3


def test_student_is_degraded_in_training_only(tmp_path):
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessor())
    args = make_args(tmp_path, student_scale=0.25, student_blur_px=2.0)
    trained, asked = (make_view_config(processor, args, training=training) for training in (True, False))
    assert (trained.student_scale, trained.student_blur_px) == (0.25, 2.0)
    assert (asked.student_scale, asked.student_blur_px) == (1.0, 0.0)


def test_families_of_frames_are_refused_by_name(tmp_path):
    processor = SimpleNamespace(image_processor=Gemma3ImageProcessor(size={"height": 64, "width": 64}))
    with pytest.raises(ConfigError, match=r"Gemma3ImageProcessor cuts images into frames \(gemma3\)"):
        make_view_config(processor, make_args(tmp_path))
