"""The values that travel along the path: rows, boxes, views, prompts, rollouts, scores.

All are frozen dataclasses. Shapes: B rows, T completion tokens, N kept response tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

ImageRef = bytes | Path
"""An encoded image (JPEG, PNG, WebP) in memory, or the path of one on disk."""


@dataclass(frozen=True, slots=True)
class Box:
    """A region `(x0, y0, x1, y1)` in pixels of the original image after EXIF, right and bottom excluded.

    `image` says which of the row's images it lies on.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    image: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One training or evaluation example: images, a question, and where the evidence is.

    `source` names the place the row came from (`rows.jsonl:17`) and opens every error about it.
    """

    images: tuple[ImageRef, ...]
    question: str
    boxes: tuple[Box, ...] = ()
    answer: str | None = None
    options: tuple[str, ...] = ()
    id: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """How images become views, in the Qwen-VL layout (defaults: Qwen3-VL).

    Sizes are areas in pixels of the resized image; every side becomes a multiple of
    `patch_size * merge_size`. `crop_min_pixels`/`crop_max_pixels` are the same budget for evidence crops
    (`None`: as for the global image), so a small crop is zoomed in. `box_margin` grows a box by that share of
    its own side on each edge; `min_crop_px` then grows it to a minimum side, moved to stay inside the image.
    `max_image_pixels` and `max_image_bytes` are refused before any allocation.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    crop_min_pixels: int | None = None
    crop_max_pixels: int | None = None
    box_margin: float = 0.1
    min_crop_px: int = 28
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    max_image_pixels: int = 178_956_970
    max_image_bytes: int = 256 * 1024 * 1024
    num_threads: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """The pixels of one side. pixel_values `[patches, features]` float32; image_grid_thw `[images, 3]` int64."""

    pixel_values: np.ndarray[Any, np.dtype[np.float32]]
    image_grid_thw: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class RowViews:
    """What the student sees (the global images) and what the teacher sees (the same, then the evidence crops).

    The student's pixels are the leading rows of the teacher's memory: a change to one is a change to the other.
    `crop_boxes` are the integer regions that were really cut, one per crop, in the teacher's order;
    `image_sizes` are (width, height) of the originals after EXIF.
    """

    row: int
    student: View
    teacher: View
    crop_boxes: tuple[Box, ...]
    image_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ViewError:
    """A row whose views could not be made: its index, a short reason code, and the full sentence."""

    row: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One side's prompt, image placeholders expanded: token ids, their modality (1 at image tokens), pixels.

    An image of `p` patches stands for `p / merge_size²` tokens.
    """

    text: str
    input_ids: tuple[int, ...]
    mm_token_type_ids: tuple[int, ...]
    view: View
    merge_size: int


@dataclass(frozen=True, slots=True)
class PromptPair:
    """The same question for both sides; only the views (and any teacher instruction) differ."""

    student: Prompt
    teacher: Prompt


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Completions the student sampled. All `[B, T]`; the mask is 1 up to and including the end token."""

    completion_ids_BT: torch.Tensor
    completion_mask_BT: torch.Tensor
    sampling_logprobs_BT: torch.Tensor
    dropped: dict[str, int] = field(default_factory=dict)

    def select(self, rows: slice) -> Rollouts:
        """The same for a slice of the rows (`dropped` stays with the whole)."""
        return dataclasses.replace(
            self,
            completion_ids_BT=self.completion_ids_BT[rows],
            completion_mask_BT=self.completion_mask_BT[rows],
            sampling_logprobs_BT=self.sampling_logprobs_BT[rows],
            dropped={},
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Hidden states of both sides at the same N response tokens, never at the prompt."""

    student_hidden_ND: torch.Tensor
    teacher_hidden_ND: torch.Tensor
    token_ids_N: torch.Tensor
    sampling_logprobs_N: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
