"""The Hugging Face model as the path needs it: load it, reach its body and head, know its vision ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from imagine_opd.errors import ConfigError

_VISION_ID_NAMES = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_token_index",
    "video_token_index",
)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids the path treats apart: the end tokens, the padding, and those the student must never sample."""

    eos: tuple[int, ...]
    pad: int
    vision: tuple[int, ...]


def load_model(model: Any, dtype: str = "float32") -> Any:
    """A model from a hub name or a folder (safetensors only), or the loaded model itself."""
    if not isinstance(model, (str, Path)):
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {type(model).__name__}; expected a name, a folder or a loaded model")
        return model
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            str(model), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model {str(model)!r} cannot be loaded: {error}") from error


def load_processor(processor: Any, model: Any) -> Any:
    """The processor itself, or the one of its name, or the one beside the model."""
    source = processor
    if source is None:
        source = model if isinstance(model, (str, Path)) else getattr(model, "name_or_path", "")
        if not source:
            raise ConfigError("the model has no name or folder to take a processor from; pass processor=")
    if isinstance(source, (str, Path)):
        from transformers import AutoProcessor

        try:
            source = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"processor {str(source)!r} cannot be loaded: {error}") from error
    for name in ("tokenizer", "image_processor", "image_token", "apply_chat_template"):
        if not hasattr(source, name):
            raise ConfigError(
                f"processor {type(source).__name__} has no {name}; expected a vision-language processor "
                "with a tokenizer and an image processor, such as Qwen3VLProcessor"
            )
    return source


def get_body(model: Any) -> Any:
    """The network below the head: inputs to last hidden states. A PEFT wrapper is looked through."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = inner.base_model
    if body is inner:
        raise ConfigError(f"{type(inner).__name__} has no body apart from its head; expected a causal language model")
    return body


def get_head(model: Any) -> nn.Linear:
    """The output head, hidden states `[N, D]` to logits `[N, V]`."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has {type(head).__name__} as output head; expected a linear layer")
    return head


def read_token_ids(model: Any, processor: Any) -> TokenIds:
    """End, padding and vision ids, from the generation config, the tokenizer and the model config."""
    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ConfigError("neither the model's generation config nor the tokenizer names an end token (eos_token_id)")
    ends = tuple(int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    vision = {getattr(model.config, name, None) for name in _VISION_ID_NAMES}
    vision |= {getattr(processor, name, None) for name in _VISION_ID_NAMES}
    vision.add(tokenizer.convert_tokens_to_ids(processor.image_token))
    return TokenIds(ends, int(pad), tuple(sorted(int(token) for token in vision - {None} if token is not None)))


def get_device(model: Any) -> torch.device:
    """The device of the model's first parameter."""
    device: torch.device = next(iter(model.parameters())).device
    return device
