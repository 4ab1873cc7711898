"""Small real models of several families, and settings to plan them with, for the tests of the memory planner."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import peft
import torch
import transformers
from transformers import (
    Gemma3Config,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from imagine_opd.config import ImagineOPDConfig
from imagine_opd.memory import (
    MemorySettings,
    ViewSize,
)

IMAGE, GRID = 990, 12
ROPE = {"rope_type": "default", "mrope_section": [8, 8, 8], "rope_theta": 1e4}
IDS = {"image_token_id": IMAGE, "video_token_id": 991, "vision_start_token_id": 992, "vision_end_token_id": 993}
TEXT_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build_qwen3_config(**text: Any) -> Qwen3VLConfig:
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 48}
    sizes |= {"num_hidden_layers": 4, "intermediate_size": 768, "vocab_size": 1000, "rope_parameters": ROPE}
    vision = {"depth": 3, "hidden_size": 128, "num_heads": 4, "intermediate_size": 320, "patch_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 256, "out_hidden_size": 256}
    return Qwen3VLConfig(text_config=sizes | text, vision_config=vision, tie_word_embeddings=True, **IDS)


def build_published_config(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> Qwen3VLConfig:
    is_large = hidden >= 4096
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    if not is_large:
        vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    vision |= {"num_heads": 16, "patch_size": 16, "spatial_merge_size": 2, "out_hidden_size": hidden}
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 128}
    text |= {"num_key_value_heads": 8, "intermediate_size": intermediate, "vocab_size": 151936}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def build_qwen25_config() -> Qwen2_5_VLConfig:
    text = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"intermediate_size": 512, "vocab_size": 1000, "rope_parameters": ROPE}
    vision = {"depth": 2, "hidden_size": 96, "num_heads": 2, "intermediate_size": 256, "out_hidden_size": 192}
    vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS)


def build_gemma_config() -> Gemma3Config:
    text = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 32, "intermediate_size": 384, "vocab_size": 1000, "sliding_window": 32, "pad_token_id": 0}
    text |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    vision |= {"image_size": 32, "patch_size": 8}
    ids = {"image_token_index": IMAGE, "boi_token_index": 991, "eoi_token_index": 992}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)


def build_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(dtype)


def add_adapters(model: Any, **fields: Any) -> Any:
    with warnings.catch_warnings():
        # peft asks transformers 5.24 by a name that it calls deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, peft.LoraConfig(r=8, **{"target_modules": TEXT_LAYERS, **fields}))


def get_base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def make_inputs(model: Any, rows: int, length: int) -> tuple[dict[str, torch.Tensor], ViewSize]:
    """Rows with one image each, the last row padded, and the size of the longest."""
    config = get_base(model).config
    is_gemma = config.model_type == "gemma3"
    image_tokens, patches = (4, 16) if is_gemma else ((GRID // 2) ** 2, GRID**2)
    ids_BL = torch.randint(1, 900, (rows, length), generator=torch.Generator().manual_seed(1))
    ids_BL[:, 5 : 5 + image_tokens] = IMAGE
    attention_BL = torch.ones_like(ids_BL)
    attention_BL[-1, -7:] = 0
    kinds_BL = (ids_BL == IMAGE).long()
    inputs = {"input_ids": ids_BL, "attention_mask": attention_BL}
    if is_gemma:
        inputs |= {"token_type_ids": kinds_BL, "pixel_values": torch.randn(rows, 3, 32, 32)}
    else:
        patch_px = config.vision_config.patch_size
        inputs |= {"mm_token_type_ids": kinds_BL, "pixel_values": torch.randn(rows * patches, 6 * patch_px**2)}
        inputs["image_grid_thw"] = torch.tensor([[1, GRID, GRID]] * rows)
    return inputs, ViewSize(length - image_tokens, image_tokens, patches)


def make_settings(view: ViewSize, **fields: Any) -> MemorySettings:
    fixed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_completion_length": 0}
    return MemorySettings(view, view, **{**fixed, "model_dtype": "auto", "device_type": "cpu", **fields})


def sum_storages(tensors: Iterable[Any]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


VIEW = ViewSize(64, 36, 144)
HAS_NEW_NAME = "activation_checkpointing" in ImagineOPDConfig.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if HAS_NEW_NAME else "gradient_checkpointing"
