"""Rows to views: decode each image once, keep it whole for the student, add the evidence crops for the teacher.

Rows come as `types.Row` or as mappings; each gives a `RowViews`, or a `ViewError` that says what to fix. The
pixels are made in Rust (`_rust`) and equal those of transformers' image processors given the same files.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imagine_opd import _rust
from imagine_opd.data.rows import flatten_image, place_boxes
from imagine_opd.errors import ConfigError, ImageError, RowError
from imagine_opd.families import view_config_from
from imagine_opd.types import (
    Box,
    ImageRef,
    ProcessedImages,
    Row,
    RowViews,
    View,
    ViewConfig,
    ViewError,
    ViewSizes,
)
from imagine_opd.view_checks import MAX_THREADS, check_view_config

__all__ = [
    "RowViews",
    "View",
    "ViewConfig",
    "ViewError",
    "check_images",
    "clear_cache",
    "make_views",
    "measure_views",
    "process_images",
    "view_config_from",
]

_SIDES = ("student", "teacher")


def make_views(
    rows: Iterable[Row | Mapping[str, Any]],
    config: ViewConfig | None = None,
    *,
    sides: Sequence[str] = _SIDES,
    progress: Callable[[int, int], Any] | None = None,
) -> list[RowViews | ViewError]:
    """Make student and teacher views of each row, in order.

    The teacher sees the row's images and then one crop per box, in box order; the student's `pixel_values` are
    the leading ones of the same memory. A row that cannot be made is a `ViewError`; the others are not held up.
    Rows that share an image (the same path, or the same bytes object) share its decoding. `sides=("teacher",)`
    leaves the student's views empty. `progress` is told (images done, images in all)
    about every 50 ms; what it raises stops the batch, and so does Ctrl-C.

    Raises:
        ConfigError: a field of `config` has a bad value.
    """
    config = _prepare_config(config)
    student = _wants_student(sides)
    entries = [_read_row(index, row, config) for index, row in enumerate(rows)]
    good = [row for row in entries if isinstance(row, _Sample)]
    samples, plans = _rust.make_views(good, config, student, progress)
    samples = _shape_samples(samples, config)
    found = iter(plans)
    return [
        row if isinstance(row, ViewError) else _build_views(index, row, samples, next(found), config)
        for index, row in enumerate(entries)
    ]


def measure_views(
    rows: Iterable[Row | Mapping[str, Any]], config: ViewConfig | None = None, *, sides: Sequence[str] = _SIDES
) -> list[ViewSizes | ViewError]:
    """Say how many patches or frames each row's views will have, reading only the headers of their images.

    Prompts can be laid out from it before any pixel exists. A file that is damaged behind its header is measured
    here and fails in `make_views`.

    Raises:
        ConfigError: a field of `config` has a bad value.
    """
    config = _prepare_config(config)
    student = _wants_student(sides)
    entries = [_read_row(index, row, config) for index, row in enumerate(rows)]
    found = iter(_rust.plan_rows([row for row in entries if isinstance(row, _Sample)], config, student))
    measured: list[ViewSizes | ViewError] = []
    for index, row in enumerate(entries):
        if isinstance(row, ViewError):
            measured.append(row)
            continue
        plan = next(found)
        if len(plan) == 2:
            measured.append(_name_error(index, row.source, *plan))
            continue
        _, views, (of_student, of_teacher, _), *_, sizes = plan
        counts = [frames for frames, _, _ in views]
        student_counts, teacher_counts = (tuple(counts[slice(*place)]) for place in (of_student, of_teacher))
        measured.append(ViewSizes(index, student_counts, teacher_counts, tuple(sizes)))
    return measured


def check_images(rows: Iterable[Row | Mapping[str, Any]], config: ViewConfig | None = None) -> list[ViewError | None]:
    """Say which rows would fail, reading only the headers of their images and checking their boxes.

    A file that is damaged behind its header passes here and fails in `make_views`.

    Raises:
        ConfigError: a field of `config` has a bad value.
    """
    return [found if isinstance(found, ViewError) else None for found in measure_views(rows, config)]


def process_images(
    samples: Sequence[Sequence[ImageRef | npt.NDArray[np.uint8]]], config: ViewConfig
) -> ProcessedImages:
    """Make the pixels of the images of each sample (one prompt's images), as a model's image processor would.

    An array is RGB8 `[height, width, 3]`. Nothing is left out: the first image that cannot be made stops
    the batch. What `config` says of students, teachers and evidence does nothing.

    Raises:
        ConfigError: a field of `config` has a bad value.
        ImageError: names the image and what is wrong with it.
    """
    config = _prepare_config(config)
    if not config.teacher_global or config.neutral != "none":
        config = dataclasses.replace(config, teacher_global=True, neutral="none")
    read: list[_Sample] = []
    for index, images in enumerate(samples):
        refs = [_read_image(image) for image in images]
        for position, ref in enumerate(refs):
            if isinstance(ref, str):
                raise ImageError(f"sample {index}: image {position} {ref}")
        read.append(_Sample([ref for ref in refs if not isinstance(ref, str)]))
    # The teacher's views of rows without boxes are the images as they are.
    made, plans = _rust.make_views(read, config, student=False)
    frames: list[int] = []
    grids: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []
    for index, plan in enumerate(plans):
        if len(plan) == 2:
            raise ImageError(f"sample {index}: {plan[1]}")
        for count, rows, columns in plan[1]:
            frames.append(count)
            grids.append((rows, columns))
        sizes.extend(plan[5])
    return ProcessedImages(_shape_samples(made, config), tuple(frames), tuple(grids), tuple(sizes))


def clear_cache() -> None:
    """Let go of what this process keeps between batches: finished views (`ViewConfig.cache_bytes`), and the memory of
    the last large batch."""
    _rust.clear_cache()


@dataclass(frozen=True, slots=True)
class _Sample:
    """A row as Rust takes it."""

    images: Sequence[ImageRef | npt.NDArray[np.uint8]]
    boxes: tuple[Box, ...] = ()
    source: str = ""


def _wants_student(sides: Sequence[str]) -> bool:
    if isinstance(sides, str) or set(sides) - set(_SIDES) or "teacher" not in sides:
        raise ConfigError(f'sides is {sides!r}; expected ("student", "teacher") or ("teacher",)')
    return "student" in sides


def _prepare_config(config: ViewConfig | None) -> ViewConfig:
    config = check_view_config(config or ViewConfig())
    if config.num_threads:
        return config
    told = os.environ.get("IMAGINE_OPD_NUM_THREADS", "")
    if told:
        if not told.isdecimal() or not 1 <= int(told) <= MAX_THREADS:
            raise ConfigError(f"IMAGINE_OPD_NUM_THREADS is {told!r}; expected a whole number from 1 to {MAX_THREADS}")
        return dataclasses.replace(config, num_threads=int(told))
    if multiprocessing.parent_process() is not None:  # a data loader's worker, one of many
        return dataclasses.replace(config, num_threads=1)
    return config


def _shape_samples(samples: npt.NDArray[Any], config: ViewConfig) -> npt.NDArray[Any]:
    if config.tiling is None:
        return samples
    side = config.tiling.frame_px
    return samples.reshape(len(samples), 3, side, side)


def _read_row(index: int, row: object, config: ViewConfig) -> _Sample | ViewError:
    """The row with every image as bytes, path or array and every box as a `Box`, or what is wrong with its form."""
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
    refs: list[ImageRef | npt.NDArray[np.uint8]] = []
    for position, image in enumerate(images):
        limit = config.max_image_pixels
        width, height = _measure_image(image)
        if width * height > limit:  # before it is loaded or copied
            size = f"{width}x{height} pixels, over max_image_pixels={limit}"
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
    return _Sample(images=refs, boxes=tuple(placed), source=source)


def _measure_image(image: object) -> tuple[int, int]:
    """(width, height) of a picture in memory; of others nothing is known yet."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, np.ndarray) and image.ndim == 3:
        return image.shape[1], image.shape[0]
    return 0, 0


def _read_image(image: object) -> ImageRef | npt.NDArray[np.uint8] | str:
    """The image as bytes, path or array, or what is wrong with it."""
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
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            return f"is an array of {image.dtype} {image.shape}; expected uint8 (height, width, 3), RGB"
        return np.ascontiguousarray(image)
    if not isinstance(image, Image.Image):
        return f"is a {type(image).__name__}; expected bytes, a path, an array or a PIL image"
    try:
        return flatten_image(image)
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


def _build_views(
    index: int, row: _Sample, samples: npt.NDArray[Any], plan: Any, config: ViewConfig
) -> RowViews | ViewError:
    if len(plan) == 2:
        return _name_error(index, row.source, *plan)
    start, views, (student, teacher, neutral), crops, crop_of_box, sizes = plan
    starts = [start, *(start + place for place in np.cumsum([frames for frames, _, _ in views]).tolist())]
    globals_seen = len(sizes) if config.teacher_global else 0
    crop_sizes = [(right - left, bottom - top) for left, top, right, bottom, _ in crops]
    teacher_sizes = (*sizes[:globals_seen], *crop_sizes)

    def build(place: tuple[int, int], source_sizes: Sequence[tuple[int, int]]) -> View:
        first, last = place
        grids = [(rows, columns) for _, rows, columns in views[first:last]]
        thw = [(1, rows, columns) for rows, columns in grids] if config.tiling is None else []
        return View(
            pixel_values=samples[starts[first] : starts[last]],
            image_grid_thw=np.array(thw, dtype=np.int64).reshape(-1, 3),
            frame_counts=tuple(frames for frames, _, _ in views[first:last]),
            tile_grids=tuple(grids),
            source_sizes=tuple(source_sizes[: last - first]),
            config=None if config.output == "float32" else config,
        )

    return RowViews(
        row=index,
        student=build(student, sizes),
        teacher=build(teacher, teacher_sizes),
        crop_boxes=tuple(Box(*crop) for crop in crops),
        image_sizes=tuple(sizes),
        crop_of_box=tuple(crop_of_box),
        neutral=None if config.neutral == "none" else build(neutral, teacher_sizes),
    )


def _name_error(index: int, source: str, reason: str, text: str) -> ViewError:
    return ViewError(row=index, reason=reason, message=f"{source or f'row {index}'}: {text}")
