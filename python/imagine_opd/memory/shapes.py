"""A model's shapes without its weights: from a config (built on the meta device) or a loaded model to `ModelShape`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from imagine_opd.errors import ConfigError
from imagine_opd.models import get_base, is_vision_name


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """One tensor of weights. `block`: the block it belongs to, or an empty text."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    is_trained: bool
    is_vision: bool
    block: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_adapter(self) -> bool:
        """Whether a PEFT adapter put it there."""
        return "lora_" in self.name


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear layer. `is_adapted`: it carries an adapter in the model at hand; `is_head`: it makes the logits."""

    name: str
    inputs: int
    outputs: int
    is_vision: bool
    is_head: bool
    is_adapted: bool


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of the language model's blocks. `intermediate`: of all experts that a token visits."""

    layers: int
    hidden: int
    query: int
    kv: int
    heads: int
    intermediate: int
    norms: int
    has_qk_norm: bool
    is_gated: bool
    cached_tokens: tuple[int | None, ...]
    """By layer, the most tokens that its cache keeps; `None`: all; 0: a state of fixed size instead."""
    state_numel: int
    """Numbers in the fixed state of a linear-attention layer, for one row."""


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of the vision tower's blocks, and how images become tokens."""

    layers: int
    hidden: int
    intermediate: int
    is_gated: bool
    patch_px: int
    patch_numel: int
    """Numbers in one patch of `pixel_values`."""
    mergers: int


@dataclass(frozen=True)
class ModelShape:
    """What the memory planner knows of a model."""

    name: str
    parameters: tuple[ParameterShape, ...] = field(repr=False)
    linears: tuple[LinearShape, ...] = field(repr=False)
    text: TextShape
    vision: VisionShape
    vocabulary: int
    attention: str
    config: Any = field(repr=False, compare=False)

    @cached_property
    def numel(self) -> int:
        """Parameters without adapters, shared ones once."""
        return sum(p.numel for p in self.parameters if not p.is_adapter)

    @cached_property
    def block_numels(self) -> dict[str, int]:
        """Parameters of each block, vision and text, without adapters."""
        sizes: dict[str, int] = {}
        for p in self.parameters:
            if p.block and not p.is_adapter:
                sizes[p.block] = sizes.get(p.block, 0) + p.numel
        return sizes

    @property
    def largest_block_numel(self) -> int:
        """Parameters of the largest block."""
        return max(self.block_numels.values(), default=0)

    @property
    def resident_numel(self) -> int:
        """Parameters outside all blocks: embeddings, head, norms, projectors."""
        return self.numel - sum(self.block_numels.values())


def read_model_shape(source: Any) -> ModelShape:
    """The shape of a `ModelShape` (itself), a loaded model (PEFT-wrapped or not), or a `transformers` config.

    A config is built on the meta device: exact counts of any family, no memory. Raises `ConfigError` for anything
    else, and for a model without a vision tower.
    """
    if isinstance(source, ModelShape):
        return source
    model = source if isinstance(source, nn.Module) else build_meta_model(source)
    # Any: PEFT's wrapper and transformers' models add methods that nn.Module does not declare
    inner: Any = get_base(model)
    config = inner.config
    if getattr(config, "vision_config", None) is None:
        raise ConfigError(f"{type(inner).__name__} has no vision_config; expected a vision-language model")
    head: Any = inner.get_output_embeddings()
    decoder: Any = inner.get_decoder()
    blocks = _list_blocks(inner)
    text_block = next((module for name, module in blocks.items() if not is_vision_name(name)), decoder)
    vision_block = next((module for name, module in blocks.items() if is_vision_name(name)), inner)
    return ModelShape(
        name=type(inner).__name__,
        parameters=tuple(_list_parameters(inner, blocks)),
        linears=tuple(_list_linears(inner, head)),
        text=_read_text(config.get_text_config(), text_block),
        vision=_read_vision(config.vision_config, vision_block),
        vocabulary=int(head.weight.shape[0]),
        attention=getattr(config, "_attn_implementation", None) or "sdpa",
        config=config,
    )


def read_adapter(shape: ModelShape) -> dict[str, Any]:
    """Rank and kind of the adapter that the model carries, under the names of the config's fields; else nothing."""
    adapters = [p for p in shape.parameters if p.is_adapter]
    ranks = [p.shape[0] for p in adapters if "lora_A" in p.name]
    return {"lora_r": max(ranks), "use_dora": any("magnitude" in p.name for p in adapters)} if ranks else {}


def build_meta_model(config: Any) -> Any:
    """The model of a config, without memory for its weights."""
    from transformers import AutoModelForImageTextToText, PretrainedConfig

    if not isinstance(config, PretrainedConfig):
        raise ConfigError(f"{type(config).__name__} is neither a model nor a config of transformers")
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"{type(config).__name__}: no vision-language model is known for it ({error})") from error


def match_targets(linears: Sequence[LinearShape], targets: str | Sequence[str]) -> list[LinearShape]:
    """The linear layers that an adapter's targets name, as `peft` matches them: `all-linear`, a pattern of the whole
    name, or ends of names."""
    if targets == "all-linear":
        return [linear for linear in linears if not linear.is_head]
    if isinstance(targets, str):
        return [linear for linear in linears if re.fullmatch(targets, linear.name)]
    return [linear for linear in linears if any(f".{linear.name}".endswith(f".{end}") for end in targets)]


def _list_blocks(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


def _list_parameters(model: nn.Module, blocks: dict[str, nn.Module]) -> list[ParameterShape]:
    shapes = []
    for name, parameter in model.named_parameters():
        words = name.split(".")
        heads = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
        shapes.append(
            ParameterShape(
                name=name,
                shape=tuple(parameter.shape),
                itemsize=parameter.element_size(),
                is_trained=parameter.requires_grad,
                is_vision=is_vision_name(name),
                block=next((head for head in heads if head in blocks), ""),
            )
        )
    return shapes


def _list_linears(model: nn.Module, head: nn.Module) -> list[LinearShape]:
    linears = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or "lora_" in name:
            continue
        linears.append(
            LinearShape(
                name=name.removesuffix(".base_layer"),
                inputs=module.in_features,
                outputs=module.out_features,
                is_vision=is_vision_name(name),
                is_head=module is head,
                is_adapted=name.endswith(".base_layer"),
            )
        )
    return linears


def _read_text(config: Any, block: nn.Module) -> TextShape:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    experts = getattr(config, "num_experts_per_tok", None)
    intermediate = int(config.intermediate_size)
    if experts and getattr(config, "moe_intermediate_size", None):
        intermediate = int(experts) * int(config.moe_intermediate_size)
    names = [name for name, _ in block.named_modules()]
    norms = [
        name
        for name, module in block.named_modules()
        if type(module).__name__.endswith("Norm") and next(module.parameters()).shape == (config.hidden_size,)
    ]
    layers = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * layers)
    window = getattr(config, "sliding_window", None)
    kept = {"linear_attention": 0, "sliding_attention": window, "chunked_attention": window}
    state_numel = 0
    if "linear_attention" in kinds:
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        state_numel = values * config.linear_key_head_dim + (2 * keys + values) * config.linear_conv_kernel_dim
    return TextShape(
        layers=layers,
        hidden=int(config.hidden_size),
        query=heads * head_dim,
        kv=kv_heads * head_dim,
        heads=heads,
        intermediate=intermediate,
        norms=len(norms),
        has_qk_norm=any(name.endswith("q_norm") for name in names),
        is_gated=any(name.endswith(("gate_proj", "gate_up_proj")) for name in names) or bool(experts),
        cached_tokens=tuple(kept.get(kind) for kind in kinds),
        state_numel=state_numel,
    )


def _read_vision(config: Any, block: nn.Module) -> VisionShape:
    hidden = int(config.hidden_size)
    patch_px = config.patch_size
    patch_px = int(patch_px if isinstance(patch_px, int) else patch_px[0])
    channels = int(getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3)
    frames = int(getattr(config, "temporal_patch_size", None) or 1)
    return VisionShape(
        layers=int(getattr(config, "depth", None) or config.num_hidden_layers),
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        is_gated=any(name.endswith("gate_proj") for name, _ in block.named_modules()),
        patch_px=patch_px,
        patch_numel=channels * frames * patch_px**2,
        mergers=1 + len(getattr(config, "deepstack_visual_indexes", None) or ()),
    )


@dataclass(frozen=True, slots=True)
class ViewSize:
    """One prompt of a side, at its longest: text and image tokens, and patches of the vision tower."""

    text_tokens: int
    image_tokens: int
    patches: int

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def estimate_view(source: Any, image_pixels: Sequence[int], text_tokens: int) -> ViewSize:
    """The size of a prompt with images of so many pixels (after their resize), by the family's own arithmetic.

    Families with a pixel budget (Qwen) take tokens by area; those with tiles take as many of their own size as the area
    fills, and one of the whole image beside several; the others a fixed number for each image.
    """
    shape = read_model_shape(source)
    config, vision = shape.config, shape.config.vision_config
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    if merge:
        patches = sum(-(-pixels // (shape.vision.patch_px * merge) ** 2) * merge**2 for pixels in image_pixels)
        return ViewSize(text_tokens, patches // merge**2, patches)
    side_px = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    tile_patches = (side_px // shape.vision.patch_px) ** 2
    if fixed := getattr(config, "mm_tokens_per_image", None):
        return ViewSize(text_tokens, fixed * len(image_pixels), tile_patches * len(image_pixels))
    shrink = float(getattr(config, "downsample_ratio", None) or 1.0 / (getattr(config, "scale_factor", None) or 1))
    tiles = 0
    for pixels in image_pixels:
        count = -(-pixels // side_px**2)
        tiles += count + (count > 1)
    return ViewSize(text_tokens, round(tiles * tile_patches * shrink**2), tiles * tile_patches)


def measure_views(shape: ModelShape, prompts: Sequence[Any]) -> ViewSize:
    """The largest size of real prompts (`types.Prompt`), each count taken by itself."""
    image_tokens = [int(sum(prompt.mm_token_type_ids)) for prompt in prompts]
    return ViewSize(
        text_tokens=max(len(prompt.input_ids) - count for prompt, count in zip(prompts, image_tokens, strict=True)),
        image_tokens=max(image_tokens),
        patches=max(-(-_count_pixels(prompt.view) // shape.vision.patch_numel) for prompt in prompts),
    )


def _count_pixels(view: Any) -> int:
    """Numbers in a view's pixels as the model takes them: bytes lack the temporal copies."""
    numbers = int(view.pixel_values.size)
    return numbers * view.config.temporal_patch_size if view.pixel_values.dtype.name == "uint8" else numbers
