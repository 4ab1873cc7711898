"""Fields of the views: pixel budgets, crops, and how far the student's image is degraded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagine_opd.errors import ConfigError

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "highlight": ("none", "teacher", "both"),
}
RANGES: dict[str, tuple[float, float | None]] = {
    "min_pixels": (1, None),
    "max_pixels": (1, None),
    "crop_min_pixels": (1, None),
    "crop_max_pixels": (1, None),
    "box_margin": (0.0, None),
    "min_crop_px": (1, None),
    "merge_overlap": (0.0, 1.0),
    "student_scale": (1e-4, 1.0),
    "student_blur_px": (0.0, 1000.0),
    "max_image_pixels": (1, None),
    "view_threads": (0, None),
}


@dataclass
class ViewFields:
    """Views (pixels; `None`: the processor's own setting).

    min_pixels, max_pixels: budget of the global image, as an area.
    crop_min_pixels, crop_max_pixels: budget of an evidence crop; a minimum above its size zooms in.
    box_margin: share of a box's side added on each edge; min_crop_px: minimum side of a crop.
    merge_overlap: crops that share more than this part of the smaller one become one; reading_order: crops line by
    line instead of as given; highlight: `none`, or the crops' borders on the global image of `teacher` or `both`.
    student_scale, student_blur_px: in training the student's image is shrunk to this share and blown up again, and
    blurred with this deviation, as in S²VOPD.
    scaled_decode: JPEGs decoded at 1/2 to 1/8 where views shrink by as much; faster, not exact.
    max_image_pixels: refuse larger originals before decoding; view_threads: 0 for all cores.
    """

    min_pixels: int | None = field(default=None, metadata={"help": "Least area of the global image."})
    max_pixels: int | None = field(default=None, metadata={"help": "Largest area of the global image."})
    crop_min_pixels: int | None = field(default=None, metadata={"help": "Least area of a crop."})
    crop_max_pixels: int | None = field(default=None, metadata={"help": "Largest area of a crop."})
    box_margin: float = field(default=0.1, metadata={"help": "Share of a box's side added on each edge."})
    min_crop_px: int = field(default=28, metadata={"help": "Minimum side of a crop, original pixels."})
    merge_overlap: float | None = field(default=None, metadata={"help": "Join crops that share more than this part."})
    reading_order: bool = field(default=False, metadata={"help": "Crops line by line instead of as given."})
    highlight: str = field(default="none", metadata={"help": "Borders of crops on the image: none, teacher or both."})
    student_scale: float = field(default=1.0, metadata={"help": "In training, the student's image at this scale."})
    student_blur_px: float = field(default=0.0, metadata={"help": "In training, a blur of the student's image."})
    scaled_decode: bool = field(default=False, metadata={"help": "Faster JPEG decoding, not exact."})
    max_image_pixels: int = field(default=178_956_970, metadata={"help": "Refuse larger originals."})
    view_threads: int = field(default=0, metadata={"help": "Threads for views; 0: all cores."})


def refuse_bad_views(config: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for fields of the views that do not go together."""
    for low_name, high_name in (("min_pixels", "max_pixels"), ("crop_min_pixels", "crop_max_pixels")):
        low_value, high_value = getattr(config, low_name), getattr(config, high_name)
        if low_value is not None and high_value is not None and low_value > high_value:
            raise ConfigError(f"{low_name}={low_value} is above {high_name}={high_value}")
