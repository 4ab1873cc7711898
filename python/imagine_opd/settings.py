"""`ImagineOPDConfig` to what each step of the path is told: views, prompts, sampling."""

from __future__ import annotations

import dataclasses
from typing import Any

from imagine_opd.adapters import find_adapter
from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import ConfigError
from imagine_opd.privilege import PrivilegeConfig
from imagine_opd.rollout import SamplingConfig
from imagine_opd.types import ViewConfig
from imagine_opd.views import view_config_from

_BUDGETS = ("min_pixels", "max_pixels", "crop_min_pixels", "crop_max_pixels")

_CROPS = ("box_margin", "min_crop_px", "merge_overlap", "reading_order", "highlight")


def make_view_config(processor: Any, args: ImagineOPDConfig, *, training: bool = False) -> ViewConfig:
    """The processor's image settings with the config's own where it has some; the student's image is degraded in
    `training` only, and there the patches of the Qwen-VL layout are bytes, which the device normalises."""
    overrides = {name: getattr(args, name) for name in _BUDGETS if getattr(args, name) is not None}
    if training:
        overrides |= {"student_scale": args.student_scale, "student_blur_px": args.student_blur_px}
        overrides |= {"neutral": args.contrast}
    crops = {name: getattr(args, name) for name in _CROPS}
    if args.teacher_view == "full_resolution":
        own = view_config_from(processor.image_processor, split=find_adapter(processor).split)
        if own.tiling is not None:
            raise ConfigError(
                f"teacher_view='full_resolution': {type(processor.image_processor).__name__} gives every image the "
                "resolution of its frames; degrade the student by student_scale and set teacher_view='whole'"
            )
        overrides |= {"crop_min_pixels": args.teacher_min_pixels or own.min_pixels}
        overrides |= {"crop_max_pixels": args.teacher_max_pixels or own.max_pixels}
        crops |= {"box_margin": 0.0, "min_crop_px": 1, "merge_overlap": None, "reading_order": False}
    config = view_config_from(
        processor.image_processor,
        split=find_adapter(processor).split,
        **overrides,
        **crops,
        scaled_decode=args.scaled_decode,
        max_image_pixels=args.max_image_pixels,
        num_threads=args.view_threads,
    )
    if training and config.tiling is None:  # other families fill up with frames of normalised zeros
        config = dataclasses.replace(config, output="uint8")
    if config.tiling is not None and (ignored := [name for name in _BUDGETS if name in overrides]):
        raise ConfigError(
            f"{ignored[0]}={overrides[ignored[0]]}: {type(processor.image_processor).__name__} cuts images into frames "
            f"of {config.tiling.frame_px} pixels, for which a budget does nothing; leave it out"
        )
    return config


def make_privilege_config(args: ImagineOPDConfig) -> PrivilegeConfig:
    """What each side is shown and told."""
    return PrivilegeConfig(**{name: getattr(args, name) for name in PrivilegeConfig.__dataclass_fields__})


def make_sampling_config(args: ImagineOPDConfig) -> SamplingConfig:
    """The rollout fields of the config."""
    return SamplingConfig(
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generation_kwargs={**_make_cache_kwargs(args), **(args.generation_kwargs or {})},
    )


def _make_cache_kwargs(args: ImagineOPDConfig) -> dict[str, Any]:
    """How `generate` holds keys and values. With a static cache on CUDA it compiles by itself, unless told not to."""
    if args.rollout_cache_implementation == "dynamic":
        return {}
    return {
        "cache_implementation": args.rollout_cache_implementation,
        "disable_compile": not args.rollout_compile,
    }
