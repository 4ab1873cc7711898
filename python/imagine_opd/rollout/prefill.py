"""Prompts that several completions start from go through the model once; their keys and values are then copied."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from imagine_opd.models import fit_inputs, get_base, get_body
from imagine_opd.pixel_inputs import PIXELS
from imagine_opd.types import Prompt

# B completions, P different prompts, L prompt tokens

_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


def find_copies(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """The different prompts, in order, and for each completion which of them it starts from."""
    places: dict[int, int] = {}
    for prompt in prompts:
        places.setdefault(id(prompt), len(places))
    different = list({id(prompt): prompt for prompt in prompts}.values())
    return different, [places[id(prompt)] for prompt in prompts]


def can_copy_cache(model: Any) -> bool:
    """Whether the rows of this model's cache can be copied: states of linear attention cannot."""
    cache = DynamicCache(config=get_base(model).config.get_text_config(decoder=True))
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def fill_cache(model: Any, inputs_PL: dict[str, torch.Tensor], places_B: Sequence[int]) -> dict[str, Any]:
    """What `generate` goes on from, for completions that start from the prompts `places_B`: ids, attention mask, and a
    cache of all tokens but the last, whose logits it makes itself. `inputs_PL`: left-padded, as `fit_inputs` takes
    them."""
    body = get_body(model)
    name = name_cache(get_base(model))
    cache = DynamicCache(config=get_base(model).config.get_text_config(decoder=True))
    inputs = {key: value[:, :-1] if key in _TOKENS else value for key, value in inputs_PL.items()}
    if hasattr(body, "rope_deltas"):
        body.rope_deltas = None  # of another forward
    if not hasattr(body, "get_rope_index") or PIXELS not in inputs:  # else it makes positions of its own
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    body(**fit_inputs(body, inputs), use_cache=True, **{name: cache})
    places = torch.tensor(places_B, device=inputs_PL["input_ids"].device)
    cache.batch_select_indices(places)
    if getattr(body, "rope_deltas", None) is not None:  # Qwen-VL keeps there how far positions lag behind tokens
        body.rope_deltas = body.rope_deltas[places]
    return {**{key: inputs_PL[key][places] for key in _TOKENS[:2]}, name: cache}


def name_cache(model: Any) -> str:
    """Under which name this release of transformers takes a cache."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
