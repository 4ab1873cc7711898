"""Calls of transformers' image processors answered by Rust: options and images in, outputs laid out as the original's.

`RustImages` overrides two methods of an image processor: `fetch_images` leaves files undecoded, and
`_preprocess_image_like_inputs`, which transformers calls with all options resolved, hands images and options to
`views.process_images`. Its subclasses lay out what comes back, one for each form of output. What Rust does not do goes
to the original's code, with one warning a reason.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.utils import logging

from imagine_opd.errors import ConfigError, ImageError
from imagine_opd.families import view_config_from
from imagine_opd.image_inputs import DeferredImage, UnsupportedError, defer, read_source
from imagine_opd.types import ProcessedImages, ViewConfig
from imagine_opd.views import process_images

__all__ = ["Crops", "Nested", "Padded", "PaddedSamples", "Patches", "RustImages", "Tiles"]

_logger = logging.get_logger(__name__)
_warned: set[tuple[type, str]] = set()
_configs: dict[tuple[Any, ...], ViewConfig] = {}
_MAX_CONFIGS = 256
_SIZE_FIELDS = tuple(field.name for field in dataclasses.fields(SizeDict))
# Options that change what is done with the pixels, not the pixels.
_NOT_PIXELS = {"return_tensors", "disable_grouping", "do_pad", "return_row_col_info", "input_data_format"}


class RustImages:
    """What the classes below add in front of a transformers image processor."""

    backend: str
    _prepare_images_structure: Any

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """As the original, but a local file or base64 text becomes an image that is not decoded before its use.

        Raises:
            ImageError: there is no such image, or neither Rust nor transformers can read it.
        """
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, os.PathLike):
            images = os.fspath(images)
        if not isinstance(images, str):
            return super().fetch_images(images)  # type: ignore[misc]
        try:
            deferred = defer(images, self.backend)
        except ImageError as error:
            try:
                return super().fetch_images(images)  # type: ignore[misc]
            except Exception:  # whatever the decoders of transformers raise; they do not name the file
                raise error from error.__cause__
        return super().fetch_images(images) if deferred is None else deferred  # type: ignore[misc]

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        images = self._prepare_images_structure(images)
        try:
            config = _find_config(self, kwargs)
            samples = self._split(images, args, kwargs)
            sources = [[read_source(image, self, kwargs) for image in sample] for sample in samples]
        except UnsupportedError as error:
            self._warn(str(error), str(error))
            return super()._preprocess_image_like_inputs(self._load(images), *args, **kwargs)  # type: ignore[misc]
        try:
            made = process_images([sample for sample in sources if sample], config)
        except ImageError as error:
            # Damaged files, and sizes over our limits: taken if transformers takes them.
            try:
                batch = super()._preprocess_image_like_inputs(self._load(images), *args, **kwargs)  # type: ignore[misc]
            except Exception:  # its decoders name no file
                raise error from None
            self._warn("an image that Rust refuses", str(error))
            return batch
        return self._lay_out(made, [len(sample) for sample in samples], args, kwargs)

    def _split(self, images: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[Any]]:
        """The samples, each the list of its images."""
        if len(images) == 0:
            raise UnsupportedError("no images")
        return [[image] for image in images]

    def _lay_out(
        self, made: ProcessedImages, counts: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchFeature:
        raise NotImplementedError

    def _load(self, images: Any) -> Any:
        """The images as the original would have fetched them."""
        if isinstance(images, (list, tuple)):
            return [self._load(image) for image in images]
        if isinstance(images, DeferredImage) and not images.is_loaded:
            return super().fetch_images(images.reference)  # type: ignore[misc]
        return images

    def _warn(self, key: str, reason: str) -> None:
        if (type(self), key) not in _warned:
            _warned.add((type(self), key))
            _logger.warning(f"{type(self).__name__}: pixels made by transformers, not by Rust: {reason}")

    def _wrap(self, array: np.ndarray[Any, Any]) -> Any:
        """The array as the backend has it, without a copy."""
        return torch.from_numpy(array) if self.backend == "torchvision" else array

    def _cut(self, parts: Iterable[np.ndarray[Any, Any]]) -> list[Any]:
        """The parts, each of a storage of its own length: pickling one does not write the rest of its batch."""
        return [self._wrap(part) for part in parts]


class Patches(RustImages):
    """Qwen: `pixel_values` `[patches, features]` and the grid of each image."""

    def _lay_out(
        self, made: ProcessedImages, counts: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchFeature:
        grid_thw = np.array([(1, rows, columns) for rows, columns in made.grids], dtype=np.int64)
        data = {"pixel_values": self._wrap(made.pixel_values), "image_grid_thw": self._wrap(grid_thw)}
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])


class Tiles(RustImages):
    """InternVL: the frames of all images in one run, and how many each image has."""

    _counted = "num_patches"

    def _count(self, frames: int) -> int:
        return frames

    def _lay_out(
        self, made: ProcessedImages, counts: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchFeature:
        whole = kwargs["return_tensors"] is not None
        pixel_values = self._wrap(made.pixel_values) if whole else self._cut(made.pixel_values)
        data = {"pixel_values": pixel_values, self._counted: [self._count(frames) for frames in made.frames]}
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])


class Crops(Tiles):
    """Gemma 3: as InternVL, but the view of the whole image is not counted."""

    _counted = "num_crops"

    def _count(self, frames: int) -> int:
        return frames - 1


class Padded(RustImages):
    """LLaVA-NeXT: `[images, most frames, 3, side, side]`, images of fewer frames filled up with zeros."""

    def _lay_out(
        self, made: ProcessedImages, counts: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchFeature:
        pixels: Any
        if kwargs.get("do_pad") or len(set(made.frames)) == 1:
            padded = _pad_frames(made.pixel_values, made.frames)
            pixels = self._cut(padded) if kwargs["return_tensors"] is None else self._wrap(padded)
        else:
            pixels = self._cut(_split_runs(made.pixel_values, made.frames))
        data = {"pixel_values": pixels, "image_sizes": [(height, width) for width, height in made.sizes]}
        if args:  # LLaVA-OneVision's `batch_num_images`
            data["batch_num_images"] = args[0]
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])


class PaddedSamples(Padded):
    """LLaVA-OneVision: as LLaVA-NeXT, but only a sample's single image is tiled; several are one frame each."""

    image_mean: Any

    def _split(self, images: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[Any]]:
        (counts,) = args
        if not counts or sum(counts) != len(images):  # no images, or a stack of them, which the original refuses
            raise UnsupportedError("a stack of images")
        # Several images of a sample are padded with the processor's own mean, whatever the call says.
        if max(counts) > 1 and tuple(self.image_mean) != tuple(kwargs["image_mean"]):
            raise UnsupportedError("image_mean at a call with several images a sample")
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]


class Nested(RustImages):
    """Idefics3 and SmolVLM: `[samples, most frames, 3, side, side]`, a mask of the pixels, rows and columns."""

    def _split(self, images: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[Any]]:
        if not any(len(sample) for sample in images):
            raise UnsupportedError("no images")
        return [list(sample) for sample in images]

    def _lay_out(
        self, made: ProcessedImages, counts: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BatchFeature:
        frames = iter(made.frames)
        lengths = [sum(next(frames) for _ in range(count)) for count in counts]
        data: dict[str, Any]
        if kwargs.get("do_pad"):
            padded = _pad_frames(made.pixel_values, lengths)
            mask = np.zeros((*padded.shape[:2], *padded.shape[3:]), dtype=np.int64)
            for sample, length in enumerate(lengths):
                mask[sample, :length] = 1
            data = {"pixel_values": self._wrap(padded), "pixel_attention_mask": self._wrap(mask)}
        elif kwargs["return_tensors"] is not None and len(set(lengths)) == 1:
            data = {"pixel_values": self._wrap(_pad_frames(made.pixel_values, lengths))}
        elif kwargs["return_tensors"] == "pt":
            raise ValueError(f"samples of {sorted(set(lengths))} frames make no tensor; expected do_pad=True")
        else:
            data = {"pixel_values": [self._cut(part) for part in _split_runs(made.pixel_values, lengths)]}
        encoding = BatchFeature(data=data, tensor_type=kwargs["return_tensors"])
        if kwargs.get("return_row_col_info"):
            grids = iter(made.grids)
            split = [[next(grids) for _ in range(count)] for count in counts]
            encoding["rows"] = [[rows for rows, _ in sample] for sample in split]
            encoding["cols"] = [[columns for _, columns in sample] for sample in split]
        return encoding


def _split_runs(frames: np.ndarray[Any, Any], lengths: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    return np.split(frames, np.cumsum(lengths)[:-1])


def _pad_frames(frames: np.ndarray[Any, Any], lengths: Sequence[int]) -> np.ndarray[Any, Any]:
    """Runs of frames as `[runs, longest, …]`; no copy when all are of one length."""
    longest = max(lengths)
    if longest * len(lengths) == len(frames):
        return frames.reshape(len(lengths), longest, *frames.shape[1:])
    padded = np.zeros((len(lengths), longest, *frames.shape[1:]), dtype=frames.dtype)
    first = 0
    for run, length in enumerate(lengths):
        padded[run, :length] = frames[first : first + length]
        first += length
    return padded


def _find_config(processor: Any, kwargs: dict[str, Any]) -> ViewConfig:
    """The `ViewConfig` of a call's resolved options, remembered between calls.

    Raises:
        UnsupportedError: an option asks for what Rust does not do.
    """
    options = tuple([(name, _freeze(value)) for name, value in kwargs.items() if name not in _NOT_PIXELS])
    key = (type(processor), options)
    try:
        config = _configs.get(key)
    except TypeError:  # an option that has no hash
        return _build_config(processor, kwargs)
    if config is None:
        config = _build_config(processor, kwargs)
        if len(_configs) >= _MAX_CONFIGS:
            _configs.clear()
        _configs[key] = config
    return config


def _build_config(processor: Any, kwargs: dict[str, Any]) -> ViewConfig:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        raise UnsupportedError(f"device={device}")
    # The same names and the same class name as an image processor of these options has; `read_source` makes RGB.
    settings = type(type(processor).__name__, (SimpleNamespace,), {})(**{**kwargs, "do_convert_rgb": True})
    try:
        return view_config_from(settings)
    except ConfigError as error:
        raise UnsupportedError(str(error)) from error


def _freeze(value: Any) -> Any:
    if isinstance(value, SizeDict):
        return tuple([getattr(value, name) for name in _SIZE_FIELDS])
    if isinstance(value, (list, tuple)):
        return tuple([_freeze(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _freeze(item)) for name, item in value.items()])
    return value
