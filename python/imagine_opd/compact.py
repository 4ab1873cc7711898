"""Compact pixels to what a model takes: raw bytes or bfloat16 bits in, normalised tensors out, on any device.

Bytes are an eighth of the float32 patches of the Qwen-VL layout, whose temporal copies are made here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imagine_opd.devices import move_to
from imagine_opd.errors import ConfigError
from imagine_opd.types import View, ViewConfig

_SAMPLES = {"float32": np.float32, "bfloat16": np.uint16, "uint8": np.uint8}


def expand_pixels(
    pixel_values: npt.NDArray[Any],
    config: ViewConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The `pixel_values` of a view as the model takes them, on `device`: `[patches, features]` or
    `[frames, 3, side, side]`.

    They are moved as they are and normalised there. From bytes, float32 on a CPU is bit for bit what
    `ViewConfig(output="float32")` gives.

    Raises:
        ConfigError: the pixels are not of `config.output`.
    """
    wanted = np.dtype(_SAMPLES[config.output])
    if pixel_values.dtype != wanted:
        raise ConfigError(f"pixels are {pixel_values.dtype}, but ViewConfig.output={config.output!r} gives {wanted}")
    samples = torch.from_numpy(pixel_values)
    if config.output == "bfloat16":
        samples = samples.view(torch.bfloat16)
    samples = move_to(samples, device)
    if config.output != "uint8":
        return samples.to(dtype)
    frames = samples.reshape(len(samples), 3, math.prod(samples.shape[1:]) // 3)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=samples.device)[:, None]
        for values in (config.image_mean, config.image_std)
    )
    # The order of operations of each backend, as in `ViewConfig.parity`.
    if config.parity == "torchvision":
        unit = 1.0 / config.rescale_factor
        values = frames.to(torch.float32).sub_(mean * unit).div_(std * unit)
    else:
        levels = torch.arange(256, dtype=torch.float64) * config.rescale_factor
        values = levels.to(torch.float32).to(samples.device)[frames.int()].sub_(mean).div_(std)
    values = values.to(dtype)
    if config.tiling is not None:
        return values.reshape(samples.shape)
    copies = values[:, :, None].expand(-1, -1, config.temporal_patch_size, -1)
    return copies.reshape(len(samples), samples.shape[1] * config.temporal_patch_size)


def mirror_pixels(view: View) -> View:
    """The view with every pixel on the other side of grey: values negated, bytes turned round."""
    pixels = view.pixel_values
    if pixels.dtype == np.uint8:
        return replace(view, pixel_values=255 - pixels)
    if pixels.dtype == np.uint16:  # bfloat16: its sign bit
        return replace(view, pixel_values=pixels ^ np.uint16(0x8000))
    return replace(view, pixel_values=-pixels)
