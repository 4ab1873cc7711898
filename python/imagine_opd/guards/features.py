"""Shared against made again: that a forward with image features of another forward gives what its own would give.

It depends on how the model at hand makes and takes them, which may be anyone's, and on the teacher's tower.
"""

# B prompts, T completion tokens, N scored tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imagine_opd.models import TokenIds, get_body, get_device, get_head
from imagine_opd.scoring import score_side
from imagine_opd.types import Prompt, Rollouts
from imagine_opd.vision_features import VisionFeatures

_TOKENS = 4
_LIMIT = 5e-3
_LIMIT_16_BIT = 5e-2


def measure_sharing(
    model: Any, prompts: Sequence[Prompt], token_ids: TokenIds, features: VisionFeatures, side: str
) -> float:
    """Norm of the difference between hidden states behind the prompts with what `features` supply to `side` and those
    of a plain forward, over the norm of these."""
    ids_BT = torch.full((len(prompts), _TOKENS), token_ids.eos[0])
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    rollouts = Rollouts(ids_BT, mask_BT, torch.zeros(ids_BT.shape))
    with torch.no_grad():
        with features.supply(get_body(model), prompts, side):
            shared_ND = score_side(model, prompts, rollouts, mask_BT, token_ids.pad, with_pixels=False)
        plain_ND = score_side(model, prompts, rollouts, mask_BT, token_ids.pad)
    return float((shared_ND.float() - plain_ND.float()).norm() / plain_ND.float().norm().clamp_min(1e-30))


def describe_difference(found: float, model: Any, side: str) -> str | None:
    """A sentence where a difference is more than rounding."""
    is_fp32 = get_head(model).weight_VD.dtype == torch.float32
    limit = _LIMIT if is_fp32 and not torch.is_autocast_enabled(get_device(model).type) else _LIMIT_16_BIT
    if found <= limit:
        return None
    return (
        f"share_vision_features is off: with shared image features the {side}'s hidden states are {found:.2g} away "
        f"from those of its own (limit {limit:g})"
    )
