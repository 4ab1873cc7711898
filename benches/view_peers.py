"""The peers of the views: transformers' image processors as checkpoints set them, and the ways to hand them a file.

`path`: the processor decodes, by torchvision. `tensor`: torchvision decodes, the processor gets the tensor. Either may
be the fastest, "best". `PIL image`: Pillow decodes, as trainers do it, "usual". `PIL backend`: Pillow decodes and
resizes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

MAX_PIXELS = 1_048_576
"""Of one image in the Qwen-VL layout: what training with many images affords."""

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN = {"patch_size": 16, **HALF, "size": {"shortest_edge": 65_536, "longest_edge": MAX_PIXELS}}

# Name in the table, class, what a checkpoint or the model's processor sets.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "InternVL": (
        "GotOcr2ImageProcessor",
        {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12, **IMAGENET},
    ),
    "LLaVA-NeXT": (
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "LLaVA-OneVision": ("LlavaOnevisionImageProcessor", {"size": {"height": 384, "width": 384}, **HALF}),
    "SmolVLM": ("SmolVLMImageProcessor", {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}),
    "Idefics3": ("Idefics3ImageProcessor", {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}),
    "Gemma 3": (
        "Gemma3ImageProcessor",
        {
            "size": {"height": 896, "width": 896},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 256,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
}

TORCHVISION_SAYS = "The image decoding and encoding capabilities of TorchVision are deprecated"
TRANSFORMERS_SAYS = "Image decoding with `torchvision` is deprecated"


def silence_deprecations() -> None:
    """Torchvision and transformers each say once that torchvision's decoder will go; nothing else is silenced."""
    warnings.filterwarnings("ignore", TORCHVISION_SAYS, DeprecationWarning)
    logging.getLogger("transformers.image_utils").addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a line of the log is another than transformers' on torchvision's decoder."""
    return TRANSFORMERS_SAYS not in record.getMessage()


def make_processor(name: str = "Qwen2VLImageProcessor", settings: dict[str, Any] | None = None) -> Any:
    """A processor as a checkpoint sets it; Qwen3-VL's, if none is named."""
    return getattr(transformers, name)(**(QWEN if settings is None else settings))


def pass_path(path: Path) -> str:
    """The processor decodes."""
    return str(path)


def read_tensor(path: Path) -> Tensor:
    """Decoded by torchvision, `[3, height, width]`."""
    return decode_image(str(path), mode=ImageReadMode.RGB)


def read_pil(path: Path) -> Image.Image:
    """Decoded by Pillow."""
    return Image.open(path).convert("RGB")


READERS: dict[str, Callable[[Path], Any]] = {"path": pass_path, "tensor": read_tensor, "PIL image": read_pil}


def process(processor: Any, images: Sequence[Any], **options: Any) -> Tensor:
    """The pixels of one call."""
    return processor(images=list(images), return_tensors="pt", **options)["pixel_values"]
