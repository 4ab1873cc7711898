"""`ImagineOPDConfig` to what each step of the path is told: views, prompts, sampling."""

from __future__ import annotations

from typing import Any

from imagine_opd.adapters import find_adapter
from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import ConfigError
from imagine_opd.prompts import PromptConfig
from imagine_opd.rollout import SamplingConfig
from imagine_opd.types import ViewConfig
from imagine_opd.views import view_config_from

_BUDGETS = ("min_pixels", "max_pixels", "crop_min_pixels", "crop_max_pixels")

_CROPS = ("box_margin", "min_crop_px", "merge_overlap", "reading_order", "highlight")


def make_view_config(processor: Any, args: ImagineOPDConfig, *, training: bool = False) -> ViewConfig:
    """The processor's image settings with the config's own where it has some; the student's image is degraded in
    `training` only."""
    overrides = {name: getattr(args, name) for name in _BUDGETS if getattr(args, name) is not None}
    if training:
        overrides |= {"student_scale": args.student_scale, "student_blur_px": args.student_blur_px}
    config = view_config_from(
        processor.image_processor,
        split=find_adapter(processor).split,
        **overrides,
        **{name: getattr(args, name) for name in _CROPS},
        scaled_decode=args.scaled_decode,
        max_image_pixels=args.max_image_pixels,
        num_threads=args.view_threads,
    )
    if config.tiling is not None and (ignored := [name for name in _BUDGETS if name in overrides]):
        raise ConfigError(
            f"{ignored[0]}={overrides[ignored[0]]}: {type(processor.image_processor).__name__} cuts images into frames "
            f"of {config.tiling.frame_px} pixels, for which a budget does nothing; leave it out"
        )
    return config


def make_prompt_config(args: ImagineOPDConfig) -> PromptConfig:
    """The prompt fields of the config."""
    return PromptConfig(
        student_template=args.student_prompt_template,
        teacher_template=args.teacher_prompt_template,
        answer_hint_template=args.answer_hint_template if args.answer_hint else None,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def make_sampling_config(args: ImagineOPDConfig) -> SamplingConfig:
    """The rollout fields of the config."""
    return SamplingConfig(
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generation_kwargs=args.generation_kwargs or {},
    )
