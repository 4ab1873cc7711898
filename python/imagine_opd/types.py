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
"""An encoded image (JPEG, PNG, WebP, the first frame of a GIF) in memory, or the path of one on disk."""


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

    `source` names the place the row came from (`rows.jsonl:17`) and opens every error about it. `teacher_images` and
    `hint` are ready-made evidence, for the teacher alone.
    """

    images: tuple[ImageRef, ...]
    question: str
    boxes: tuple[Box, ...] = ()
    answer: str | None = None
    options: tuple[str, ...] = ()
    id: str = ""
    source: str = ""
    teacher_images: tuple[ImageRef, ...] = ()
    hint: str = ""


@dataclass(frozen=True, slots=True)
class SideView:
    """What one side is given of a row: images, evidence boxes cut out of them as further images, and words.

    boxes: regions of `images`, for the teacher alone. show_whole: `False` leaves the crops alone. enlarge: the images
    at the budget of crops instead of their own. template: in place of the config's, contains `{question}`. hint: words
    after the question and its instruction.
    """

    images: tuple[ImageRef, ...]
    boxes: tuple[Box, ...] = ()
    show_whole: bool = True
    enlarge: bool = False
    template: str | None = None
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images of the families that take square frames are cut; each family reads its own fields.

    family: `"internvl"`, `"llava_next"`, `"llava_onevision"`, `"idefics3"` or `"gemma3"`. `frame_px`: side of a frame.
    `split=False`: one frame an image. InternVL: between `min_tiles` and `max_tiles` tiles. LLaVA: `pinpoints` are the
    (height, width) an image may be fitted in. Idefics3: its longer side becomes `longest_edge_px` first. Gemma 3:
    images of an aspect ratio from `min_ratio` on get at most `max_crops` crops of at least `min_crop_px`.
    """

    family: str
    frame_px: int
    split: bool = True
    min_tiles: int = 1
    max_tiles: int = 12
    pinpoints: tuple[tuple[int, int], ...] = ()
    longest_edge_px: int = 0
    min_crop_px: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2


@dataclass(frozen=True, slots=True)
class ViewConfig:
    """How images become views (defaults: Qwen3-VL). `families.view_config_from` reads one from a checkpoint.

    **Size.** `tiling=None` is the Qwen-VL layout: sizes are areas in pixels of the resized image, every side becomes
    a multiple of `patch_size * merge_size`, and `crop_min_pixels`/`crop_max_pixels` are the same budget for evidence
    crops (`None`: as for the global image), so a small crop is zoomed in. With a `Tiling`, patch sizes and budgets do
    nothing.

    **Numbers.** `parity` says whose pixels are met bit for bit: `"torchvision"` (transformers' default backend),
    `"pillow"` (its Pillow backend, Pillow 13) or `"pillow12"` (Pillow up to 12.1). `output` is `"float32"`,
    `"bfloat16"` (its bits, as uint16) or `"uint8"` (raw bytes without the temporal copy, an eighth of the memory:
    `compact.expand_pixels` normalises them on the device).

    **Crops.** `box_margin` grows a box by that share of its own side on each edge; `min_crop_px` then grows it to a
    minimum side, moved to stay inside the image. Crops that share more than `merge_overlap` of the smaller one become
    one; `reading_order` sorts them line by line instead of as given. `teacher_global=False` leaves the teacher the
    crops alone. `highlight` (`"none"`, `"teacher"`, `"both"`) draws the crops' borders on the global image,
    `highlight_width` of its longer side wide.

    **Contrast.** The student's image is shrunk to `student_scale` of its sides (and blown up again: as many tokens)
    and blurred with deviation `student_blur_px`, in original pixels. `neutral` (`"mean"`, `"blur"`,
    `"low_resolution"`) adds the teacher's view with evidence that says nothing, of equal size.

    **Files.** `alpha="white"` blends on white instead of dropping alpha; `exif=False` leaves images as stored;
    both are what a PIL image means to transformers. `scaled_decode` lets JPEGs be decoded at 1/2, 1/4 or 1/8 where
    every view made of the image in a batch shrinks by as much: a little faster, no longer exact. `max_image_pixels`
    and `max_image_bytes` are refused before any allocation. `num_threads=0`: the environment's
    `IMAGINE_OPD_NUM_THREADS`, or one per core, or one in a data loader's worker. `cache_bytes` keeps finished views by
    content, 0 for none.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    crop_min_pixels: int | None = None
    crop_max_pixels: int | None = None
    tiling: Tiling | None = None
    resample: str = "bicubic"
    parity: str = "torchvision"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    output: str = "float32"
    box_margin: float = 0.1
    min_crop_px: int = 28
    merge_overlap: float | None = None
    reading_order: bool = False
    teacher_global: bool = True
    highlight: str = "none"
    highlight_width: float = 0.004
    highlight_colour: tuple[int, int, int] = (255, 0, 0)
    student_scale: float = 1.0
    student_blur_px: float = 0.0
    neutral: str = "none"
    alpha: str = "drop"
    exif: bool = True
    scaled_decode: bool = False
    max_image_pixels: int = 178_956_970
    max_image_bytes: int = 256 * 1024 * 1024
    num_threads: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """The pixels of one side, image after image.

    pixel_values: Qwen-VL `[patches, features]`, other families `[frames, 3, side, side]`; float32, or as
    `ViewConfig.output` says. image_grid_thw `[images, 3]` int64 in patches (`[0, 3]` in other families).
    `frame_counts`: patches or frames per image; `tile_grids`: (rows, columns) of patches or tiles, (0, 0) for an image
    that is one frame; `source_sizes`: (width, height) in pixels of what each image was made from. `config`: of pixels
    that are not float32, by which `compact.expand_pixels` normalises them.
    """

    pixel_values: np.ndarray[Any, np.dtype[Any]]
    image_grid_thw: np.ndarray[Any, np.dtype[np.int64]]
    frame_counts: tuple[int, ...] = ()
    tile_grids: tuple[tuple[int, int], ...] = ()
    source_sizes: tuple[tuple[int, int], ...] = ()
    config: ViewConfig | None = None


@dataclass(frozen=True, slots=True)
class RowViews:
    """What the student sees (the global images) and what the teacher sees (the same, then the evidence crops).

    All pixels of a batch are one memory, row after row. Where both sides see the same global images, the student's
    pixels are the leading ones of the teacher's: a change to one is a change to the other.
    `crop_boxes` are the integer regions that were really cut, one per crop, in the teacher's order; `crop_of_box` says
    for each box of the row which of them it is in. `image_sizes` are (width, height) of the upright originals.
    `neutral` is the teacher's view without its evidence, where `ViewConfig.neutral` asks for it.
    """

    row: int
    student: View
    teacher: View
    crop_boxes: tuple[Box, ...]
    image_sizes: tuple[tuple[int, int], ...]
    crop_of_box: tuple[int, ...] = ()
    neutral: View | None = None


@dataclass(frozen=True, slots=True)
class ViewSizes:
    """How large a row's views will be, known from headers alone: patches or frames per image of each side.

    In the Qwen-VL layout an image of `p` patches is `p / merge_size²` tokens.
    """

    row: int
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ViewError:
    """A row whose views could not be made: its index, a short reason code, and the full sentence."""

    row: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ProcessedImages:
    """Images of a batch as a model's image processor makes them, one memory, image after image.

    pixel_values: Qwen-VL `[patches, features]`, other families `[frames, 3, side, side]`; float32, or as
    `ViewConfig.output` says. `frames`: patches or frames per image; `grids`: (rows, columns) of patches or tiles,
    (0, 0) for an image that is one frame; `sizes`:
    (width, height) of the upright originals.
    """

    pixel_values: np.ndarray[Any, np.dtype[Any]]
    frames: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One side's prompt, image placeholders expanded: token ids, their modality (1 where a feature of an image goes),
    pixels.

    image_tokens: how many of these tokens each image has. family: whose inputs the pixels become (`adapters`).
    """

    text: str
    input_ids: tuple[int, ...]
    mm_token_type_ids: tuple[int, ...]
    view: View
    image_tokens: tuple[int, ...]
    family: str


@dataclass(frozen=True, slots=True)
class PromptPair:
    """The same question for both sides; only the views (and any teacher instruction) differ.

    `neutral`: the teacher's prompt with evidence that says nothing, token for token where the teacher's lie.
    """

    student: Prompt
    teacher: Prompt
    neutral: Prompt | None = None


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Completions the student sampled. All `[B, T]`; the mask is 1 up to and including the end token."""

    completion_ids_BT: torch.Tensor
    completion_mask_BT: torch.Tensor
    sampling_logprobs_BT: torch.Tensor
    dropped: dict[str, int] = field(default_factory=dict)

    def select(self, rows: slice | list[int]) -> Rollouts:
        """The same for some of the rows (`dropped` stays with the whole)."""
        return dataclasses.replace(
            self,
            completion_ids_BT=self.completion_ids_BT[rows],
            completion_mask_BT=self.completion_mask_BT[rows],
            sampling_logprobs_BT=self.sampling_logprobs_BT[rows],
            dropped={},
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Hidden states of both sides at the same N response tokens, never at the prompt.

    weights_N: of the tokens in the loss (`token_weights`); `None`: 1 each. neutral_hidden_ND: the teacher's without the
    evidence. advantages_N: made over the whole step (`advantages.shape_advantages`), where the config asks for it.
    distill_N: factor of the teacher's loss alone, 0 where a reward says that nothing is to be corrected.
    reward_advantages_N: of a policy-gradient loss beside it. leaked_N: tokens that give the teacher's privilege away,
    where they have a loss of their own. `None`: none of it.
    """

    student_hidden_ND: torch.Tensor
    teacher_hidden_ND: torch.Tensor
    token_ids_N: torch.Tensor
    sampling_logprobs_N: torch.Tensor
    row_N: torch.Tensor
    position_N: torch.Tensor
    weights_N: torch.Tensor | None = None
    neutral_hidden_ND: torch.Tensor | None = None
    advantages_N: torch.Tensor | None = None
    distill_N: torch.Tensor | None = None
    reward_advantages_N: torch.Tensor | None = None
    leaked_N: torch.Tensor | None = None
