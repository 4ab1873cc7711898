"""Drop-in image processors of transformers: their own options, checks and outputs, with the pixels made by Rust.

`use_rust_images` takes a processor and gives one like it; `RustX` is `transformers.X` with its pixels made by Rust
(`image_layouts` says how). A class calls itself `X`, also in what it saves, so that others load a folder without us;
pickle and deepcopy go by its qualified name.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from transformers import (
    Gemma3ImageProcessor,
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessor,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessor,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionImageProcessorPil,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessor,
    SmolVLMImageProcessorPil,
)

from imagine_opd.errors import ConfigError
from imagine_opd.image_layouts import Crops, Nested, Padded, PaddedSamples, Patches, RustImages, Tiles

__all__ = [
    "RustGemma3ImageProcessor",
    "RustGemma3ImageProcessorPil",
    "RustGotOcr2ImageProcessor",
    "RustGotOcr2ImageProcessorPil",
    "RustIdefics3ImageProcessor",
    "RustIdefics3ImageProcessorPil",
    "RustLlavaNextImageProcessor",
    "RustLlavaNextImageProcessorPil",
    "RustLlavaOnevisionImageProcessor",
    "RustLlavaOnevisionImageProcessorPil",
    "RustQwen2VLImageProcessor",
    "RustQwen2VLImageProcessorPil",
    "RustSmolVLMImageProcessor",
    "RustSmolVLMImageProcessorPil",
    "use_rust_images",
]

_Processor = TypeVar("_Processor")
_RustClass = TypeVar("_RustClass", bound=type[RustImages])

_BY_ORIGINAL: dict[type, type[RustImages]] = {}


def use_rust_images(processor: _Processor) -> _Processor:
    """Give a processor like this one whose images are made by Rust: the same calls, options and outputs, bit for bit.

    `processor` is a transformers processor (its tokenizer and other parts are shared with the result) or an image
    processor (its settings are copied). It is left as it was; videos are not touched.

    Raises:
        ConfigError: its image processor is not one of the supported classes.
    """
    if isinstance(processor, ProcessorMixin):
        changed = copy.copy(processor)
        changed.image_processor = use_rust_images(processor.image_processor)
        return changed
    if isinstance(processor, RustImages):
        return processor
    rust_class = _BY_ORIGINAL.get(type(processor))
    if rust_class is None:
        names = ", ".join(sorted(original.__name__ for original in _BY_ORIGINAL))
        raise ConfigError(f"{type(processor).__name__} has no Rust counterpart; expected one of {names}")
    made = rust_class.__new__(rust_class)
    made.__dict__.update(copy.deepcopy(processor.__dict__))
    return made  # type: ignore[return-value]


def _named_as_original(rust_class: _RustClass) -> _RustClass:
    original = rust_class.__bases__[-1]
    rust_class.__name__ = original.__name__
    rust_class.__doc__ = f"`transformers.{original.__name__}` with its pixels made by Rust."
    _BY_ORIGINAL[original] = rust_class
    return rust_class


@_named_as_original
class RustQwen2VLImageProcessor(Patches, Qwen2VLImageProcessor): ...


@_named_as_original
class RustQwen2VLImageProcessorPil(Patches, Qwen2VLImageProcessorPil): ...


@_named_as_original
class RustGotOcr2ImageProcessor(Tiles, GotOcr2ImageProcessor): ...


@_named_as_original
class RustGotOcr2ImageProcessorPil(Tiles, GotOcr2ImageProcessorPil): ...


@_named_as_original
class RustGemma3ImageProcessor(Crops, Gemma3ImageProcessor): ...


@_named_as_original
class RustGemma3ImageProcessorPil(Crops, Gemma3ImageProcessorPil): ...


@_named_as_original
class RustLlavaNextImageProcessor(Padded, LlavaNextImageProcessor): ...


@_named_as_original
class RustLlavaNextImageProcessorPil(Padded, LlavaNextImageProcessorPil): ...


@_named_as_original
class RustLlavaOnevisionImageProcessor(PaddedSamples, LlavaOnevisionImageProcessor): ...


@_named_as_original
class RustLlavaOnevisionImageProcessorPil(PaddedSamples, LlavaOnevisionImageProcessorPil): ...


@_named_as_original
class RustIdefics3ImageProcessor(Nested, Idefics3ImageProcessor): ...


@_named_as_original
class RustIdefics3ImageProcessorPil(Nested, Idefics3ImageProcessorPil): ...


@_named_as_original
class RustSmolVLMImageProcessor(Nested, SmolVLMImageProcessor): ...


@_named_as_original
class RustSmolVLMImageProcessorPil(Nested, SmolVLMImageProcessorPil): ...
