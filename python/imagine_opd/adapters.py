"""One entry per model family: how its images become tokens of the prompt, and their pixels inputs of the model.

The rest of the package asks `find_adapter(processor)` and names no family. docs/families.md says how to add one.
"""

# B prompts, P patches, F features of a patch, I images, N frames, S side of a frame

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np

from imagine_opd.errors import ConfigError
from imagine_opd.types import View, ViewConfig

Expansion = tuple[str | int, ...]
"""What one image's placeholder becomes: text, and numbers of feature tokens, in order: `("<img>", 512, "</img>")`."""

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One family.

    processors, model_types: the names by which it is known, of processor classes and of `config.model_type`.
    expand: view and processor to one `Expansion` per image, as the processor's own call makes it.
    join: the views of a batch's prompts to the model's pixel inputs.
    count_features: view and model config to the features that the model makes of each image.
    placeholder: what the chat template puts for an image, before it is expanded.
    feature_token: the token whose place a feature takes. other_tokens: those that stand for vision too, in an
    expansion or for a video. None of them is ever sampled.
    split: the tiling switch that the processor passes at each call; `None`: as its image processor says.
    shares_features: an image has the same features whatever else its prompt shows (`vision_features`).
    write_budget: puts a pixel budget into the processor that is saved with the model; `None`: the family has none.
    """

    family: str
    processors: tuple[str, ...]
    model_types: tuple[str, ...]
    expand: Callable[[View, Any], Sequence[Expansion]]
    join: Callable[[Sequence[View]], Arrays]
    count_features: Callable[[View, Any], Sequence[int]]
    placeholder: Callable[[Any], str] = attrgetter("image_token")
    feature_token: Callable[[Any], str] = attrgetter("image_token")
    other_tokens: Callable[[Any], Sequence[str | None]] = lambda processor: ()
    split: bool | None = None
    shares_features: bool = True
    write_budget: Callable[[Any, ViewConfig], None] | None = None


# Frames side by side: Qwen-VL's patches, InternVL, Gemma 3


def join_frames(views: Sequence[View]) -> Arrays:
    """`pixel_values` `[N, 3, S, S]`: the frames of all images in one run."""
    return {"pixel_values": np.concatenate([view.pixel_values for view in views])}


def _join_qwen(views: Sequence[View]) -> Arrays:
    """`pixel_values` `[P, F]` and `image_grid_thw` `[I, 3]`."""
    return {**join_frames(views), "image_grid_thw": np.concatenate([view.image_grid_thw for view in views])}


def _expand_qwen(view: View, processor: Any) -> list[Expansion]:
    merged = int(processor.image_processor.merge_size) ** 2
    return [(patches // merged,) for patches in view.frame_counts]


def _count_qwen(view: View, config: Any) -> list[int]:
    return [patches // config.vision_config.spatial_merge_size**2 for patches in view.frame_counts]


def _name_qwen(processor: Any) -> list[str | None]:
    return [getattr(processor, "video_token", None), "<|vision_start|>", "<|vision_end|>"]


def _write_qwen(processor: Any, config: ViewConfig) -> None:
    budget = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor.image_processor.size = type(processor.image_processor.size)(**budget)


def _expand_internvl(view: View, processor: Any) -> list[Expansion]:
    start, end = processor.start_image_token, processor.end_image_token
    return [(start, processor.image_seq_length * frames, end) for frames in view.frame_counts]


def _count_internvl(view: View, config: Any) -> list[int]:
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    high, wide = size if isinstance(size, (list, tuple)) else (size, size)
    rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    each = int((high // rows) * (wide // columns) * config.downsample_ratio**2)
    return [each * frames for frames in view.frame_counts]


def _name_internvl(processor: Any) -> list[str | None]:
    return [processor.start_image_token, processor.end_image_token, processor.video_token]


def _expand_gemma3(view: View, processor: Any) -> list[Expansion]:
    tokenizer = processor.tokenizer
    frame: Expansion = ("\n\n" + tokenizer.boi_token, processor.image_seq_length, tokenizer.eoi_token + "\n\n")
    return [frame if frames == 1 else _describe_crops(frame, frames - 1) for frames in view.frame_counts]


def _describe_crops(frame: Expansion, crops: int) -> Expansion:
    """The words with which Gemma 3 was shown an image and its crops."""
    spaced = [part for _ in range(crops - 1) for part in (" ", *frame)]
    return (
        "Here is the original image ",
        *frame,
        " and here are some crops to help you see better ",
        *frame,
        *spaced,
    )


def _count_gemma3(view: View, config: Any) -> list[int]:
    return [config.mm_tokens_per_image * frames for frames in view.frame_counts]


def _name_gemma3(processor: Any) -> list[str | None]:
    return [processor.tokenizer.boi_token, processor.tokenizer.eoi_token]


# Frames nested in prompts: Idefics3 and SmolVLM


def _join_idefics3(views: Sequence[View]) -> Arrays:
    """`pixel_values` `[B, N, 3, S, S]`, prompts of fewer frames filled up with zeros, and the mask of the others."""
    pixels = pad_runs([view.pixel_values for view in views])
    mask = np.zeros((*pixels.shape[:2], *pixels.shape[3:]), dtype=np.int64)
    for row, view in enumerate(views):
        mask[row, : len(view.pixel_values)] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _expand_idefics3(view: View, processor: Any) -> list[Expansion]:
    whole = getattr(processor, "global_image_token", None) or processor.global_image_tag
    return [
        _expand_grid(rows, columns, processor.image_seq_len, processor.fake_image_token, whole)
        for rows, columns in view.tile_grids
    ]


@lru_cache(maxsize=256)
def _expand_grid(rows: int, columns: int, each: int, fake: str, whole: str) -> Expansion:
    parts: list[str | int] = []
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            parts += [f"{fake}<row_{row}_col_{column}>", each]
        parts.append("\n")
    if parts:
        parts.append("\n")
    return (*parts, fake + whole, each, fake)


def _count_idefics3(view: View, config: Any) -> list[int]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [side**2 // config.scale_factor**2 * frames for frames in view.frame_counts]


def _name_idefics3(processor: Any) -> list[str | None]:
    names = [processor.fake_image_token, getattr(processor, "video_token", None)]
    names += [getattr(processor, name, None) for name in ("global_image_token", "global_image_tag")]
    return names + [word for word in processor.tokenizer.get_vocab() if word.startswith("<row_") and "_col_" in word]


# Frames padded image by image: LLaVA-NeXT and LLaVA-OneVision


def _join_llava(views: Sequence[View]) -> Arrays:
    """`pixel_values` `[I, N, 3, S, S]`, images of fewer frames filled up, and `image_sizes` `[I, 2]`, height first."""
    frames = [
        run for view in views for run in np.split(view.pixel_values, np.cumsum(view.frame_counts)[:-1]) if len(run)
    ]
    sizes = [(height, width) for view in views for width, height in view.source_sizes]
    return {"pixel_values": pad_runs(frames), "image_sizes": np.array(sizes, dtype=np.int64)}


def _join_llava_onevision(views: Sequence[View]) -> Arrays:
    """The same, and how many images each prompt has: only a single one is tiled."""
    counts = np.array([len(view.frame_counts) for view in views], dtype=np.int64)
    return {**_join_llava(views), "batch_num_images": counts}


def _expand_llava_next(view: View, processor: Any) -> list[Expansion]:
    side = view.pixel_values.shape[-1] // processor.patch_size
    counts = _count_tiles(view, view.tile_grids, side)
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    return [(count + extra,) for count in counts]


def _expand_llava_onevision(view: View, processor: Any) -> list[Expansion]:
    side = math.isqrt(processor.num_image_tokens)
    counts = _count_tiles(view, view.tile_grids, side, processor.vision_aspect_ratio)
    return [(count - (processor.vision_feature_select_strategy == "default"),) for count in counts]


def _count_llava(view: View, config: Any) -> list[int]:
    from transformers.image_processing_utils import select_best_resolution

    frame_px = config.vision_config.image_size
    grids = [(0, 0)] * len(view.tile_grids)
    for index, (width, height) in enumerate(view.source_sizes):
        if view.tile_grids[index] != (0, 0):
            high, wide = select_best_resolution((height, width), [tuple(pair) for pair in config.image_grid_pinpoints])
            grids[index] = (high // frame_px, wide // frame_px)
    side = frame_px // config.vision_config.patch_size
    return _count_tiles(view, grids, side, getattr(config, "vision_aspect_ratio", None))


def _count_tiles(view: View, grids: Sequence[tuple[int, int]], side: int, aspect_ratio: str | None = None) -> list[int]:
    """Features of each image, `side` of them to a frame's side: those of the whole, those of the tiles without the
    padding around them, and one at the end of each of their lines. One frame: its own and one. `aspect_ratio`
    `"anyres_max_9"`: what is more than nine frames is shrunk to them."""
    counts = []
    for (width, height), (rows, columns) in zip(view.source_sizes, grids, strict=True):
        if (rows, columns) == (0, 0):
            counts.append(side**2 + 1)
            continue
        high, wide = side * rows, side * columns
        if width / height > wide / high:
            high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
        else:
            wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
        if aspect_ratio is not None:
            ratio = math.sqrt(high * wide / (int(aspect_ratio.rpartition("_")[2]) * side**2))
            if ratio > 1.1:
                high, wide = int(high // ratio), int(wide // ratio)
        counts.append(side**2 + high * wide + high)
    return counts


def _name_llava(processor: Any) -> list[str | None]:
    return [getattr(processor, "video_token", None)]


def pad_runs(runs: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Runs of frames as one array `[runs, longest, ...]`, short ones filled up with zeros."""
    longest = max(len(run) for run in runs)
    padded = np.zeros((len(runs), longest, *runs[0].shape[1:]), dtype=runs[0].dtype)
    for index, run in enumerate(runs):
        padded[index, : len(run)] = run
    return padded


# The table

ADAPTERS: dict[str, Adapter] = {}


def register_family(adapter: Adapter) -> None:
    """Make a family known; one of the same name is replaced."""
    ADAPTERS[adapter.family] = adapter


for _adapter in (
    Adapter(
        family="qwen_vl",
        processors=("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"),
        model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        expand=_expand_qwen,
        join=_join_qwen,
        count_features=_count_qwen,
        other_tokens=_name_qwen,
        write_budget=_write_qwen,
    ),
    Adapter(
        family="internvl",
        processors=("InternVLProcessor",),
        model_types=("internvl",),
        expand=_expand_internvl,
        join=join_frames,
        count_features=_count_internvl,
        other_tokens=_name_internvl,
        split=True,
    ),
    Adapter(
        family="llava_onevision",
        processors=("LlavaOnevisionProcessor",),
        model_types=("llava_onevision",),
        expand=_expand_llava_onevision,
        join=_join_llava_onevision,
        count_features=_count_llava,
        other_tokens=_name_llava,
        shares_features=False,
    ),
    Adapter(
        family="llava_next",
        processors=("LlavaNextProcessor",),
        model_types=("llava_next",),
        expand=_expand_llava_next,
        join=_join_llava,
        count_features=_count_llava,
        other_tokens=_name_llava,
    ),
    Adapter(
        family="idefics3",
        processors=("Idefics3Processor", "SmolVLMProcessor"),
        model_types=("idefics3", "smolvlm"),
        expand=_expand_idefics3,
        join=_join_idefics3,
        count_features=_count_idefics3,
        other_tokens=_name_idefics3,
    ),
    Adapter(
        family="gemma3",
        processors=("Gemma3Processor",),
        model_types=("gemma3",),
        expand=_expand_gemma3,
        join=join_frames,
        count_features=_count_gemma3,
        placeholder=attrgetter("tokenizer.boi_token"),
        feature_token=attrgetter("tokenizer.image_token"),
        other_tokens=_name_gemma3,
        split=False,
    ),
):
    register_family(_adapter)


def find_adapter(processor: Any) -> Adapter:
    """The entry of the processor's family. Raises `ConfigError` for a family that is not in the table."""
    for cls in type(processor).__mro__:
        for adapter in ADAPTERS.values():
            if cls.__name__ in adapter.processors:
                return adapter
    raise ConfigError(
        f"{type(processor).__name__} is of no known family; expected one of {_list_names('processors')}, "
        "or a family of your own (docs/families.md)"
    )


def refuse_other_family(adapter: Adapter, processor: Any, model: Any) -> None:
    """Raise `ConfigError` unless the model is one of those whose images the adapter knows."""
    kind = str(model.config.model_type)
    if kind not in adapter.model_types:
        raise ConfigError(
            f"the model is a {kind}, its processor a {type(processor).__name__} for {', '.join(adapter.model_types)}; "
            f"known models are {_list_names('model_types')} (docs/families.md says how to add one)"
        )


def join_views(family: str, views: Sequence[View]) -> Arrays:
    """The pixel inputs of a batch's prompts; none where no view holds an image."""
    return ADAPTERS[family].join(views) if any(view.frame_counts for view in views) else {}


def count_features(family: str, view: View, model: Any) -> list[int]:
    """The features that the model makes of each image of a view."""
    return list(ADAPTERS[family].count_features(view, model.config))


def write_budget(processor: Any, config: ViewConfig) -> None:
    """Put the pixel budget a model is trained with into its processor, for every tool that loads it."""
    write = find_adapter(processor).write_budget
    if write is not None:
        write(processor, config)


def list_vision_tokens(processor: Any) -> list[str]:
    """The tokens that stand for vision, of those in the vocabulary; the feature token first."""
    adapter, known = find_adapter(processor), processor.tokenizer.get_vocab()
    feature_token = adapter.feature_token(processor)
    if feature_token not in known:
        raise ConfigError(f"the tokenizer has no {feature_token!r}, where {type(processor).__name__} puts images")
    names = [feature_token, adapter.placeholder(processor), *adapter.other_tokens(processor)]
    return list(dict.fromkeys(name for name in names if name is not None and name in known))


def _list_names(field: str) -> str:
    return ", ".join(sorted({name for adapter in ADAPTERS.values() for name in getattr(adapter, field)}))
