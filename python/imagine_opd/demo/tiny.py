"""The tiny world's model: a real Qwen3-VL of half a million parameters, its processor and its 60-word tokenizer.

Nothing here is special-cased by the package: the folder loads through `AutoModelForImageTextToText` and
`AutoProcessor` like any Qwen3-VL.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.demo.scenes import COLORS, PLACES, SHAPES

GLOBAL_PX = 48
CROP_PX = 32
PATCH_PX = 8
MERGE = 2

TINY_VIEWS: dict[str, Any] = {
    "patch_size": PATCH_PX,
    "merge_size": MERGE,
    "temporal_patch_size": 1,
    "min_pixels": GLOBAL_PX**2,
    "max_pixels": GLOBAL_PX**2,
    "crop_min_pixels": CROP_PX**2,
    "crop_max_pixels": CROP_PX**2,
    # A tight glyph box grows to exactly 32x32 scene pixels, shown at the scene's own resolution: a zoom of three.
    "box_margin": 0.0,
    "min_crop_px": CROP_PX,
}
"""Arguments of `imagine_opd.types.ViewConfig` for this world (the config fields are `TINY_RECIPE`)."""

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_WORDS = (
    *("<unk>", "\n", ".", "?", "system", "user", "assistant", "<answer>", "</answer>"),
    *("what", "digit", "is", "on", "the", "image", "look", "at", "zoom", "i", "see"),
    *PLACES,
    *COLORS,
    *SHAPES,
    *(str(digit) for digit in range(10)),
)
_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|> ' + message.role + ' \n ' }}"
    "{%- if message.content is string %}{{- message.content + ' ' }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|> ' }}"
    "{%- elif part.type == 'text' %}{{- part.text + ' ' }}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|> \n ' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|> assistant \n ' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word. Upper case, and a full stop or question mark without a space before it, are accepted."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL_TOKENS, *_WORDS))}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"\n|[.?]|</?answer>"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *_SPECIAL_TOKENS[3:]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor() -> Qwen3VLProcessor:
    """The real processor: images at 48x48 in patches of 8, four patches merged into one token of 16x16."""
    pixels = {
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
        "temporal_patch_size": 1,
        "size": {"shortest_edge": GLOBAL_PX**2, "longest_edge": GLOBAL_PX**2},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=build_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**pixels),
        chat_template=_CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, seed: int) -> Qwen3VLForConditionalGeneration:
    """A fresh model in fp32. Raises nothing; the same seed gives the same weights."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL_TOKENS}
    # 0.08: at this size the library's 0.02 leaves the first hundreds of steps without any signal.
    init_std = 0.08
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 192,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "out_hidden_size": 96,
            "num_position_embeddings": (GLOBAL_PX // PATCH_PX) ** 2,
            "deepstack_visual_indexes": [],
            "initializer_range": init_std,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "initializer_range": init_std,
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        # The fastest on a CPU at this size; the fused kernels' overhead exceeds the work.
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        model.model.visual.pos_embed.weight.normal_(0.0, 2 * init_std)
        for layer in model.model.language_model.layers:
            # Keys start equal to queries, so alike tokens attend to each other, and what is attended to is copied as
            # it is: together half of "find the red shape and say what is there", which otherwise starts very late.
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        max_new_tokens=TINY_RECIPE["max_completion_length"],
    )
    return model
