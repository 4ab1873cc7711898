"""The Hugging Face model as the path needs it: load it, reach its body and head, know its inputs and its vision ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from imagine_opd.adapters import find_adapter, list_vision_tokens, refuse_other_family
from imagine_opd.errors import ConfigError
from imagine_opd.kernels import OutputHead
from imagine_opd.models.peft_models import get_base, get_running_module, is_adapter_folder, load_adapter, read_base_name

# Names under which configs, processors and tokenizers keep ids that stand for vision.
_VISION_ID_NAMES = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("vision_start_token_id", "vision_end_token_id", "start_image_token_id", "end_image_token_id"),
    *("boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index", "fake_image_token_id"),
)
_MODALITY_NAMES = ("mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids the path treats apart: the end tokens, the padding, and those the student must never sample.

    special: all that the tokenizer calls special, these included.
    """

    eos: tuple[int, ...]
    pad: int
    vision: tuple[int, ...]
    special: tuple[int, ...] = ()


def load_model(model: Any, dtype: str = "float32") -> Any:
    """A model from a hub name or a folder (safetensors only), or the loaded model itself.

    A folder that holds an adapter gives a `PeftModel` on the base that the adapter names.
    """
    if not isinstance(model, (str, Path)):
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is {type(model).__name__}; expected a name, a folder or a loaded model")
        return model
    if is_adapter_folder(model):
        return load_adapter(load_model(read_base_name(model), dtype), model)
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
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"processor {str(source)!r} cannot be loaded: {error}") from error
    for name in ("tokenizer", "image_processor", "image_token", "apply_chat_template"):
        if not hasattr(source, name):
            raise ConfigError(
                f"processor {type(source).__name__} has no {name}; expected a vision-language processor "
                "with a tokenizer and an image processor, such as Qwen3VLProcessor"
            )
    find_adapter(source)
    return source


def get_body(model: Any) -> Any:
    """The network below the head: inputs to last hidden states. A PEFT wrapper is looked through."""
    inner = get_base(model)
    body = inner.base_model
    if body is inner:
        raise ConfigError(f"{type(inner).__name__} has no body apart from its head; expected a causal language model")
    return body


def get_head(model: Any) -> OutputHead:
    """The output head as `kernels.linear_token_stats` takes it: hidden states `[N, D]` to logits `[N, V]`, with the
    bias, scale and softcap that the model's own forward applies.

    Of a head that PEFT trains in full (`modules_to_save`) the copy in use now: inside `disable_adapter()` the original.
    """
    return describe_head(find_head(model), model)


def find_head(model: Any) -> nn.Linear:
    """The layer that runs as output head now."""
    head = get_running_module(model.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has {type(head).__name__} as output head; expected a linear layer")
    return head


def describe_head(head: nn.Linear, model: Any) -> OutputHead:
    """The layer's weights as they are now, with what the model's forward does to its logits."""
    return OutputHead(head.weight, head.bias, *_read_head_settings(get_base(model)))


def _read_head_settings(model: Any) -> tuple[float, float | None]:
    """Scale and softcap of the logits. Some models leave the config's unused: only what `forward` names counts."""
    config, used = model.config.get_text_config(), _list_head_settings(type(model).forward)
    values = {name: getattr(config, name, None) for name in used}
    scale = float(values.get("logit_scale") or 1.0) / float(values.get("logits_scaling") or 1.0)
    softcap = values.get("final_logit_softcapping")
    return scale, None if softcap is None else float(softcap)


@lru_cache
def _list_head_settings(forward: Callable[..., Any]) -> tuple[str, ...]:
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):  # made at run time, without a file
        return names
    return tuple(name for name in names if name in source)


def fit_inputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with their modality ids under the name by which this model's `forward` takes them, or without."""
    fitted = dict(inputs)
    modality = fitted.pop("mm_token_type_ids")
    name = _name_modality(type(get_base(model)).forward)
    return fitted if name is None else {**fitted, name: modality}


@lru_cache
def _name_modality(forward: Callable[..., Any]) -> str | None:
    taken = inspect.signature(forward).parameters
    return next((name for name in _MODALITY_NAMES if name in taken), None)


def read_token_ids(model: Any, processor: Any) -> TokenIds:
    """End, padding and vision ids, from the generation config, the tokenizer and the model config.

    Raises `ConfigError` when model and processor are of different families.
    """
    refuse_other_family(find_adapter(processor), processor, model)
    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = tokenizer.eos_token_id if eos is None else eos
    if eos is None:
        raise ConfigError("neither the model's generation config nor the tokenizer names an end token (eos_token_id)")
    ends = tuple(int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    sources = (model.config, processor, tokenizer)
    vision = {getattr(source, name, None) for source in sources for name in _VISION_ID_NAMES}
    vision |= set(tokenizer.convert_tokens_to_ids(list_vision_tokens(processor)))
    banned = {int(token) for token in vision if token is not None} - set(ends)
    special = {*ends, int(pad), *banned, *(int(token) for token in tokenizer.all_special_ids)}
    return TokenIds(ends, int(pad), tuple(sorted(banned)), tuple(sorted(special)))


def get_device(model: Any) -> torch.device:
    """The device of the model's first parameter; one that is away between forwards (`meta`) is passed over."""
    device: torch.device = next(p.device for p in model.parameters() if p.device.type != "meta")
    return device
