"""A `ViewConfig` before it is used: every field checked, the first bad one named with what it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from imagine_opd.errors import ConfigError
from imagine_opd.types import Tiling, ViewConfig

MAX_THREADS = 1024
MAX_TILES = 1024  # of one image, as in rust/tile.rs

# Configs found good, so that a call for one small image does not spend its time here. They are frozen.
_checked: dict[int, ViewConfig] = {}
_MAX_CHECKED = 64

_CHOICES = {
    "resample": ("bilinear", "bicubic", "lanczos"),
    "parity": ("torchvision", "pillow", "pillow12"),
    "output": ("float32", "bfloat16", "uint8"),
    "highlight": ("none", "teacher", "both"),
    "neutral": ("none", "mean", "blur", "low_resolution"),
    "alpha": ("drop", "white"),
}
_FAMILIES = ("internvl", "llava_next", "llava_onevision", "idefics3", "gemma3")
_TILING_BOUNDS = (
    ("min_tiles", 1, MAX_TILES),
    ("max_tiles", 1, MAX_TILES),
    ("max_crops", 1, MAX_TILES),
    ("min_crop_px", 1, 2**31 - 1),
    ("longest_edge_px", 0, 2**31 - 1),
)
_FLAGS = ("reading_order", "teacher_global", "exif", "scaled_decode")
_SMALLEST = {
    "patch_size": 1,
    "merge_size": 1,
    "temporal_patch_size": 1,
    "min_pixels": 1,
    "max_pixels": 1,
    "crop_min_pixels": 1,
    "crop_max_pixels": 1,
    "min_crop_px": 1,
    "max_image_pixels": 1,
    "max_image_bytes": 1,
    "num_threads": 0,
    "cache_bytes": 0,
}
_LARGEST = {
    "patch_size": 1024,
    "merge_size": 64,
    "temporal_patch_size": 64,
    "max_image_pixels": 2**40,
    "max_image_bytes": 2**40,
    "num_threads": MAX_THREADS,
    "cache_bytes": 2**50,
}


def check_view_config(config: ViewConfig) -> ViewConfig:
    """The same config. Raises `ConfigError` for the first field with a bad value."""
    # By identity: equal is not enough, 1.0 is equal to 1.
    if _checked.get(id(config)) is not config:
        _check_fields(config)
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        _checked[id(config)] = config
    return config


def _check_fields(config: ViewConfig) -> None:
    if not isinstance(config, ViewConfig):
        raise ConfigError(f"the config is {config!r}; expected a ViewConfig")
    for name, low in _SMALLEST.items():
        value = getattr(config, name)
        if value is None and name.startswith("crop_"):
            continue
        _check_whole("ViewConfig", name, value, low, _LARGEST.get(name, 2**31 - 1))
    for name, choices in _CHOICES.items():
        _check_choice("ViewConfig", name, getattr(config, name), choices)
    for name in _FLAGS:
        _check_flag("ViewConfig", name, getattr(config, name))
    _check_budget("min_pixels", config.min_pixels, "max_pixels", config.max_pixels)
    crop_min = config.min_pixels if config.crop_min_pixels is None else config.crop_min_pixels
    crop_max = config.max_pixels if config.crop_max_pixels is None else config.crop_max_pixels
    _check_budget("crop_min_pixels", crop_min, "crop_max_pixels", crop_max)
    _check_number("box_margin", config.box_margin, 0)
    _check_number("student_blur_px", config.student_blur_px, 0, 1000)
    _check_number("highlight_width", config.highlight_width, 0, 1)
    _check_number("student_scale", config.student_scale, 1e-4, 1)
    if config.merge_overlap is not None:
        _check_number("merge_overlap", config.merge_overlap, 0, 1)
    colour: Any = config.highlight_colour
    if not isinstance(colour, Sequence) or len(colour) != 3 or not all(is_whole(v) and 0 <= v <= 255 for v in colour):
        raise ConfigError(f"ViewConfig.highlight_colour is {colour!r}; expected three whole numbers from 0 to 255")
    _check_scaling(config)
    if config.tiling is not None:
        _check_tiling(config.tiling)
        if config.tiling.family == "llava_onevision" and not all(0 <= mean <= 1 for mean in config.image_mean):
            raise ConfigError(
                f"ViewConfig.image_mean is {config.image_mean!r}; expected numbers from 0 to 1: they are the colour "
                "that llava_onevision pads with"
            )


def _check_tiling(tiling: Tiling) -> None:
    if not isinstance(tiling, Tiling):
        raise ConfigError(f"ViewConfig.tiling is {tiling!r}; expected None or a Tiling")
    _check_choice("Tiling", "family", tiling.family, _FAMILIES)
    _check_flag("Tiling", "split", tiling.split)
    _check_whole("Tiling", "frame_px", tiling.frame_px, 1, 4096)
    for name, low, high in _TILING_BOUNDS:
        _check_whole("Tiling", name, getattr(tiling, name), low, high)
    if not is_finite(tiling.min_ratio) or tiling.min_ratio < 0:
        raise ConfigError(f"Tiling.min_ratio is {tiling.min_ratio!r}; expected a finite number of at least 0")
    if tiling.family == "idefics3" and tiling.longest_edge_px < 1:
        raise ConfigError("Tiling.longest_edge_px is 0; expected the longest side an idefics3 image is resized to")
    pairs: Any = tiling.pinpoints
    side, most = (tiling.frame_px, MAX_TILES * tiling.frame_px) if tiling.family.startswith("llava") else (1, 2**31 - 1)
    good = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    )
    good = good and all(
        is_whole(value) and side <= value <= most and value % side == 0 for pair in pairs for value in pair
    )
    if not good or (not pairs and tiling.family.startswith("llava")):
        raise ConfigError(
            f"Tiling.pinpoints is {pairs!r}; expected (height, width) pairs of multiples of {side} up to {most} pixels"
        )


def _check_scaling(config: ViewConfig) -> None:
    for name in ("image_mean", "image_std"):
        values = getattr(config, name)
        if not isinstance(values, Sequence) or len(values) != 3 or not all(map(is_finite, values)):
            raise ConfigError(f"ViewConfig.{name} is {values!r}; expected three finite numbers")
    if not all(value > 0 for value in config.image_std):
        raise ConfigError(f"ViewConfig.image_std is {config.image_std!r}; expected numbers above 0")
    factor = config.rescale_factor
    if not is_finite(factor) or not 1e-30 < factor < 1e30:
        raise ConfigError(f"ViewConfig.rescale_factor is {factor!r}; expected a positive number, such as 1/255")
    with np.errstate(all="ignore"):  # the darkest and brightest value of a channel, as Rust computes them
        unit = np.float32(1 / factor)
        mean, std = np.array([config.image_mean, config.image_std], np.float64).astype(np.float32) * unit
        extremes = np.stack([(np.float32(byte) - mean) / std for byte in (0, 255)])
    for name, held in (("image_mean", np.isfinite(mean)), ("image_std", np.isfinite(std) & np.isfinite(extremes))):
        if not held.all():
            raise ConfigError(f"ViewConfig.{name} is {getattr(config, name)!r}; expected numbers that float32 holds")


def _check_budget(low_name: str, low: int, high_name: str, high: int) -> None:
    if low > high:
        raise ConfigError(f"ViewConfig.{low_name} is {low}, over {high_name}={high}; expected it to be at most that")


def _check_whole(owner: str, name: str, value: Any, low: int, high: int) -> None:
    if not is_whole(value) or not low <= value <= high:
        raise ConfigError(f"{owner}.{name} is {value!r}; expected a whole number from {low} to {high}")


def _check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{owner}.{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_flag(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}.{name} is {value!r}; expected True or False")


def _check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    if not is_finite(value) or not low <= value <= high:
        span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"ViewConfig.{name} is {value!r}; expected a finite number {span}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a number that a float holds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
