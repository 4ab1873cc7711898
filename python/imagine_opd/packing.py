"""A side's sequences as one row without padding: model inputs padded on the right in, packed inputs out.

Nothing attends across sequences: the model gets no attention mask, and positions that start again at 0 with each of
them, from which transformers makes its block mask, or flash attention the bounds of its sequences.
"""

# B sequences, L tokens of the longest, P tokens of all

from __future__ import annotations

import inspect
from typing import Any

import torch

from imagine_opd.errors import ConfigError
from imagine_opd.models import get_base

_SEQUENCE_INPUTS = ("input_ids", "mm_token_type_ids", "token_type_ids")
# Of `layer_types`. Others carry a state, or blocks counted from the start of the row, from one sequence to the next.
_PACKED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def pack_inputs(body: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of `body` with the sequences of the batch in one row `[1, P]`, one after the other.

    Pixels stay as they are: images are in the order of the sequences already. `position_ids` are `[1, P]`, and in
    families of parted positions `[4, 1, P]`: those within the sequence, then (t, h, w) as the model itself derives
    them from each sequence with its own images.
    """
    kept_BL = inputs["attention_mask"].bool()
    packed = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for name in _SEQUENCE_INPUTS:
        if name in packed:
            packed[name] = packed[name][kept_BL][None]
    own_BL = torch.arange(kept_BL.shape[1], device=kept_BL.device).expand_as(kept_BL)
    derive = getattr(body, "get_rope_index", None)
    if derive is None:
        return {**packed, "position_ids": own_BL[kept_BL][None]}
    taken = inspect.signature(derive).parameters
    parted_3BL = derive(**{name: value for name, value in inputs.items() if name in taken})[0]
    return {**packed, "position_ids": torch.cat([own_BL[None], parted_3BL])[:, kept_BL][:, None]}


def find_starts(kept_BL: torch.Tensor) -> torch.Tensor:
    """`[B]`: where in the packed row each sequence begins."""
    lengths_B = kept_BL.sum(dim=1)
    return lengths_B.cumsum(0) - lengths_B


def refuse_unpackable(model: Any) -> None:
    """Raise `ConfigError` for a model in which one sequence of a row reaches the next whatever the mask says."""
    inner = get_base(model)
    if "token_type_ids" in inspect.signature(type(inner).forward).parameters:
        raise ConfigError(
            f"padding_free=True: in {inner.config.model_type} the tokens of an image see each other both ways, which "
            "releases of transformers do not keep within a packed sequence; set padding_free=False, and "
            "max_tokens_per_forward for long sequences"
        )
    kinds = getattr(inner.config.get_text_config(), "layer_types", None) or ()
    others = sorted(set(kinds) - _PACKED_LAYERS)
    if others:
        raise ConfigError(
            f"padding_free=True: {inner.config.model_type} has layers of {', '.join(others)}, which run on from one "
            "packed sequence into the next; set padding_free=False, and max_tokens_per_forward for long sequences"
        )


def describe_packing(model: Any) -> str:
    """How the model keeps packed sequences apart, as a line for the user."""
    attention = getattr(get_base(model).config.get_text_config(), "_attn_implementation", None) or "sdpa"
    if "flash" in attention:
        way = "by the bounds of the sequences, without a mask"
    elif attention == "flex_attention":
        way = "by a block mask, whose empty blocks are skipped"
    else:
        way = (
            "by a mask of the packed row's length squared; where that is too much set max_tokens_per_forward, or load "
            "the model with attn_implementation='flash_attention_2'"
        )
    return f"padding_free: {attention} keeps the sequences of a row apart {way}"
