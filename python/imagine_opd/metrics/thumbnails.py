"""Small pictures of a view, as a person can look at them beside a completion."""

from __future__ import annotations

import numpy as np
from PIL import Image

from imagine_opd.pictures import Pixels, restore_pictures
from imagine_opd.types import View, ViewConfig


def make_thumbnails(view: View, config: ViewConfig, max_side_px: int = 256) -> list[Pixels]:
    """One `[height, width, 3]` uint8 picture per image, its longer side at most `max_side_px`.

    Of an image cut into frames the frame of the whole image is shown, in the image's own aspect.
    """
    pictures = []
    for index in range(len(view.frame_counts)):
        whole = restore_pictures(view, index, config)[0].pixels_HWC
        pictures.append(_shrink(whole, view.source_sizes[index] if config.tiling is not None else None, max_side_px))
    return pictures


def _shrink(picture: Pixels, aspect: tuple[int, int] | None, max_side_px: int) -> Pixels:
    height, width = picture.shape[:2]
    if aspect is not None:  # a frame is square, whatever its image
        larger = max(width, height)
        width, height = (max(1, round(larger * side / max(aspect))) for side in aspect)
    scale = min(1.0, max_side_px / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(np.ascontiguousarray(picture))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)
