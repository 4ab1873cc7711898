"""Rows to views: decode each image once, keep it whole for the student, add the evidence crops for the teacher.

Rows come as `types.Row` or as mappings; each gives a `RowViews`, or a `ViewError` that says what to fix. The
pixels are made in Rust (`_rust`) and equal those of transformers' `Qwen2VLImageProcessor` given the same files.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagine_opd import _rust
from imagine_opd.data.rows import encode_image, place_boxes
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.types import Box, ImageRef, Row, RowViews, View, ViewConfig, ViewError

__all__ = ["RowViews", "View", "ViewConfig", "ViewError", "check_images", "make_views", "view_config_from"]

MAX_THREADS = 1024
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


def make_views(rows: Iterable[Row | Mapping[str, Any]], config: ViewConfig | None = None) -> list[RowViews | ViewError]:
    """Make student and teacher views of each row, in order.

    The teacher sees the row's images and then one crop per box, in box order; the student's `pixel_values` are
    the leading rows of the same memory. A row that cannot be made is a `ViewError`; the others are not held up.
    Rows that share an image (the same path, or the same bytes object) share its decoding.

    Raises:
        ConfigError: a field of `config` has a bad value.
    """
    config = _check_config(config or ViewConfig())
    entries = [_read_row(index, row, config) for index, row in enumerate(rows)]
    made = iter(_rust.make_views([row for row in entries if isinstance(row, Row)], config))
    return [
        row if isinstance(row, ViewError) else _build_views(index, row, next(made)) for index, row in enumerate(entries)
    ]


def check_images(rows: Iterable[Row | Mapping[str, Any]], config: ViewConfig | None = None) -> list[ViewError | None]:
    """Say which rows would fail, reading only the headers of their images and checking their boxes.

    A file that is damaged behind its header passes here and fails in `make_views`.

    Raises:
        ConfigError: a field of `config` has a bad value.
    """
    config = _check_config(config or ViewConfig())
    entries = [_read_row(index, row, config) for index, row in enumerate(rows)]
    found = iter(_rust.check_rows([row for row in entries if isinstance(row, Row)], config))
    errors: list[ViewError | None] = []
    for index, row in enumerate(entries):
        if isinstance(row, ViewError):
            errors.append(row)
        else:
            failure = next(found)
            errors.append(None if failure is None else _name_error(index, row.source, *failure))
    return errors


def view_config_from(image_processor: Any, **overrides: Any) -> ViewConfig:
    """Read the `ViewConfig` under which views equal those of a transformers `Qwen2VLImageProcessor`.

    `overrides` are further fields of `ViewConfig` (crop budget, margins, limits, threads).

    Raises:
        ConfigError: the processor is of another kind, or does something that views do not.
    """
    kind = type(image_processor).__name__
    fields: dict[str, Any] = {}
    for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "size"):
        fields[name] = getattr(image_processor, name, None)
        if fields[name] is None:
            raise ConfigError(f"{kind} has no {name}; expected an image processor of the Qwen-VL families")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        value = getattr(image_processor, name, None)
        if value is not True:
            raise ConfigError(f"{kind}.{name} is {value!r}; expected True: views are resized and normalised")
    resample = getattr(image_processor, "resample", None)
    if resample != _BICUBIC:
        raise ConfigError(f"{kind}.resample is {resample!r}; expected bicubic ({_BICUBIC})")
    rescale = getattr(image_processor, "rescale_factor", None)
    if rescale != 1 / 255:
        raise ConfigError(f"{kind}.rescale_factor is {rescale!r}; expected 1/255")
    size = fields.pop("size")
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        fields[name] = size.get(edge) if isinstance(size, Mapping) else getattr(size, edge, None)
        if fields[name] is None:
            raise ConfigError(f"{kind}.size is {size!r}; expected shortest_edge and longest_edge, in square pixels")
    for name in ("image_mean", "image_std"):
        fields[name] = tuple(fields[name])
    unknown = sorted(overrides.keys() - {field.name for field in dataclasses.fields(ViewConfig)})
    if unknown:
        raise ConfigError(f"ViewConfig has no field {unknown[0]!r}; see imagine_opd.types.ViewConfig")
    return _check_config(ViewConfig(**{**fields, **overrides}))


def _check_config(config: ViewConfig) -> ViewConfig:
    smallest = {
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
    }
    largest = {
        "patch_size": 1024,
        "merge_size": 64,
        "temporal_patch_size": 64,
        "max_image_pixels": 2**40,
        "max_image_bytes": 2**40,
        "num_threads": MAX_THREADS,
    }
    for name, low in smallest.items():
        value = getattr(config, name)
        if value is None and name.startswith("crop_"):
            continue
        high = largest.get(name, 2**31 - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"ViewConfig.{name} is {value!r}; expected a whole number from {low} to {high}")
    _check_budget("min_pixels", config.min_pixels, "max_pixels", config.max_pixels)
    crop_min = config.min_pixels if config.crop_min_pixels is None else config.crop_min_pixels
    crop_max = config.max_pixels if config.crop_max_pixels is None else config.crop_max_pixels
    _check_budget("crop_min_pixels", crop_min, "crop_max_pixels", crop_max)
    margin = config.box_margin
    if not _is_finite(margin) or margin < 0:
        raise ConfigError(f"ViewConfig.box_margin is {margin!r}; expected a finite number of at least 0")
    for name in ("image_mean", "image_std"):
        values = getattr(config, name)
        if not isinstance(values, Sequence) or len(values) != 3 or not all(map(_is_finite, values)):
            raise ConfigError(f"ViewConfig.{name} is {values!r}; expected three finite numbers")
    if not all(value > 0 for value in config.image_std):
        raise ConfigError(f"ViewConfig.image_std is {config.image_std!r}; expected numbers above 0")
    with np.errstate(all="ignore"):  # the darkest and brightest value of a channel, as Rust computes them
        mean, std = np.array([config.image_mean, config.image_std], np.float64).astype(np.float32) * np.float32(255)
        extremes = np.stack([(np.float32(byte) - mean) / std for byte in (0, 255)])
    for name, held in (("image_mean", np.isfinite(mean)), ("image_std", np.isfinite(std) & np.isfinite(extremes))):
        if not held.all():
            raise ConfigError(f"ViewConfig.{name} is {getattr(config, name)!r}; expected numbers that float32 holds")
    return config


def _check_budget(low_name: str, low: int, high_name: str, high: int) -> None:
    if low > high:
        raise ConfigError(f"ViewConfig.{low_name} is {low}, over {high_name}={high}; expected it to be at most that")


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _read_row(index: int, row: object, config: ViewConfig) -> Row | ViewError:
    """The row with every image as bytes or path and every box as a `Box`, or what is wrong with its form."""
    images: Any
    boxes: Any
    box_images: Any = None
    if isinstance(row, Row):
        images, boxes, source = row.images, row.boxes, row.source
    elif isinstance(row, Mapping):
        images, boxes = row.get("images"), row.get("boxes")
        images = row.get("image") if images is None else images
        box_images = row.get("box_images")
        source = str(row.get("source") or "")
    else:
        text = f"the row is a {type(row).__name__}; expected a Row or a mapping with `image` or `images`"
        return _name_error(index, "", "no_image", text)
    if not isinstance(images, (list, tuple)):
        images = () if images is None else (images,)
    refs: list[ImageRef] = []
    for position, image in enumerate(images):
        limit = config.max_image_pixels
        if isinstance(image, Image.Image) and image.width * image.height > limit:  # before it is loaded
            size = f"{image.width}x{image.height} pixels, over max_image_pixels={limit}"
            text = f"image {position} is {size}; shrink the image or raise the limit"
            return _name_error(index, source, "too_large", text)
        ref = _read_image(image)
        if isinstance(ref, str):
            return _name_error(index, source, "unreadable", f"image {position} {ref}")
        refs.append(ref)
    boxes = list(boxes) if isinstance(boxes, Iterable) else [] if boxes is None else [boxes]
    try:
        places = place_boxes(boxes, box_images, len(refs))
    except RowError as error:
        return _name_error(index, source, "box_image", str(error))
    placed: list[Box] = []
    for box, place in zip(boxes, places, strict=True):
        read = _read_box(box, place)
        if read is None:
            text = f"box {box!r} is not four numbers; expected (x0, y0, x1, y1), in pixels after EXIF"
            return _name_error(index, source, "box_not_finite", text)
        placed.append(read)
    return Row(images=tuple(refs), question="", boxes=tuple(placed), source=source)


def _read_image(image: object) -> ImageRef | str:
    """The image as bytes or path, or what is wrong with it."""
    if isinstance(image, Mapping):  # the undecoded image feature of `datasets`
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        try:
            os.fsencode(image)
        except UnicodeError:
            return f"is the path {str(image)!r}, which no file can have; expected text that can be encoded"
        return image if isinstance(image, Path) else Path(os.fsdecode(image))
    if not isinstance(image, Image.Image):
        return f"is a {type(image).__name__}; expected bytes, a path or a PIL image"
    try:
        return encode_image(image)
    except Exception as error:  # whatever a Pillow plugin raises for the file behind a lazy image
        return f"is a PIL image that cannot be read ({error}); expected one that loads"


def _read_box(box: object, image: int) -> Box | None:
    sides: Any = box
    if isinstance(box, Box):
        sides, image = (box.x0, box.y0, box.x1, box.y1), box.image
    if isinstance(sides, (str, bytes)):
        return None
    try:
        x0, y0, x1, y1 = (float(side) for side in sides)
        image = max(-1, min(operator.index(image), 2**31))
    except (TypeError, ValueError, OverflowError):
        return None
    return Box(x0, y0, x1, y1, image=image)


def _build_views(index: int, row: Row, made: tuple[Any, ...]) -> RowViews | ViewError:
    if len(made) == 2:
        return _name_error(index, row.source, *made)
    pixel_values, grids, student_patches, crops, sizes = made
    grid_thw = np.array([(1, rows, columns) for rows, columns in grids], dtype=np.int64)
    return RowViews(
        row=index,
        student=View(pixel_values[:student_patches], grid_thw[: len(sizes)]),
        teacher=View(pixel_values, grid_thw),
        crop_boxes=tuple(Box(*crop) for crop in crops),
        image_sizes=tuple(sizes),
    )


def _name_error(index: int, source: str, reason: str, text: str) -> ViewError:
    return ViewError(row=index, reason=reason, message=f"{source or f'row {index}'}: {text}")
