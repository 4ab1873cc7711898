"""Packed against alone: that a side's packed forward gives each sequence what it gets by itself, before step 0.

It depends on the attention, which may be anyone's, and on how the release of transformers at hand makes its masks.
"""

# B prompts, T completion tokens, N scored tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imagine_opd.errors import ConfigError
from imagine_opd.models import TokenIds, get_base, get_device, get_head
from imagine_opd.scoring import score_side
from imagine_opd.types import Prompt, Rollouts

_TOKENS = 4
_LIMIT = 5e-3
_LIMIT_16_BIT = 5e-2


def measure_packing(model: Any, prompts: Sequence[Prompt], token_ids: TokenIds) -> float:
    """Norm of the difference between hidden states of packed prompts, a few tokens after each, and of each alone, over
    the norm of these. `prompts`: two or more."""
    ids_BT = torch.full((len(prompts), _TOKENS), token_ids.eos[0])
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    rollouts = Rollouts(ids_BT, mask_BT, torch.zeros(ids_BT.shape))
    with torch.no_grad():
        packed_ND = score_side(model, prompts, rollouts, mask_BT, token_ids.pad, packed=True)
        alone_ND = torch.cat(
            [
                score_side(model, [prompt], rollouts.select([row]), mask_BT[[row]], token_ids.pad)
                for row, prompt in enumerate(prompts)
            ]
        )
    return float((packed_ND.float() - alone_ND.float()).norm() / alone_ND.float().norm().clamp_min(1e-30))


def refuse_mixed_packing(model: Any, prompts: Sequence[Prompt], token_ids: TokenIds, side: str) -> None:
    """Raise `ConfigError` where packed sequences are not what each is alone, to rounding."""
    found = measure_packing(model, prompts, token_ids)
    is_fp32 = get_head(model).weight_VD.dtype == torch.float32
    limit = _LIMIT if is_fp32 and not torch.is_autocast_enabled(get_device(model).type) else _LIMIT_16_BIT
    if not found <= limit:
        attention = getattr(get_base(model).config.get_text_config(), "_attn_implementation", None)
        raise ConfigError(
            f"padding_free=True: the {side}'s hidden states of packed sequences are {found:.2g} away from those of "
            f"each alone (limit {limit:g}): its attention ({attention}) reaches from one into the next; set "
            "padding_free=False, or load the model with attn_implementation='sdpa'"
        )
