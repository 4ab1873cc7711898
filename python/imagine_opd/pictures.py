"""A view's pixels back to pictures: patches and frames laid out again, normalisation undone, `[H, W, 3]` uint8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imagine_opd.types import View, ViewConfig

__all__ = ["Picture", "restore_pictures"]

# Families whose view of the whole image comes behind its tiles; in the others it comes first.
_WHOLE_LAST = ("internvl", "idefics3")

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """What a model is given of one image. kind: `"whole"`, or `"tiles"`, laid out as they were cut; frames: of how
    many frames (1 in the Qwen-VL layout)."""

    kind: str
    pixels_HWC: Pixels
    frames: int = 1


def restore_pictures(view: View, index: int, config: ViewConfig) -> tuple[Picture, ...]:
    """Image `index` of a view as the model is given it: the whole, and its tiles where the family cuts some.

    `config` is the one that the view was made with. Exact up to the rounding of `config.output`.
    """
    start = sum(view.frame_counts[:index])
    samples = view.pixel_values[start : start + view.frame_counts[index]]
    rows, columns = view.tile_grids[index]
    if config.tiling is None:
        return (Picture("whole", _lay_patches(samples, rows, columns, config)),)
    frames_NHWC = _restore_levels(samples.transpose(0, 2, 3, 1), config)
    if rows * columns == 0:
        return (Picture("whole", frames_NHWC[0]),)
    last = config.tiling.family in _WHOLE_LAST
    whole, tiles = (frames_NHWC[-1], frames_NHWC[:-1]) if last else (frames_NHWC[0], frames_NHWC[1:])
    side = config.tiling.frame_px
    grid = tiles.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    picture = grid.reshape(rows * side, columns * side, 3)
    return Picture("whole", whole), Picture("tiles", picture, frames=rows * columns)


def _lay_patches(samples: npt.NDArray[Any], rows: int, columns: int, config: ViewConfig) -> Pixels:
    """Qwen-VL patches, which come in blocks of merge x merge, as one picture; of temporal copies the first."""
    patch, merge = config.patch_size, config.merge_size
    copies = samples.shape[1] // (3 * patch * patch)
    blocks = samples.reshape(rows // merge, columns // merge, merge, merge, 3, copies, patch, patch)[:, :, :, :, :, 0]
    picture = blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
    return _restore_levels(picture, config)


def _restore_levels(values: npt.NDArray[Any], config: ViewConfig) -> Pixels:
    """Normalised values, channels last, as levels 0 to 255."""
    if config.output == "uint8":
        return np.ascontiguousarray(values)
    if config.output == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    mean, std = (np.asarray(numbers, dtype=np.float32) for numbers in (config.image_mean, config.image_std))
    levels = (values * std + mean) / np.float32(config.rescale_factor)
    restored: Pixels = np.round(np.clip(np.nan_to_num(levels, nan=0.0), 0.0, 255.0)).astype(np.uint8)
    return restored
