"""A forward that shares or packs against the plain one, before step 0: both give the same hidden states, to rounding.

Whether they do depends on the model's own code, on its attention, which may be anyone's, on the teacher's tower, and on
how the release of transformers at hand makes its masks.
"""

# B prompts, T completion tokens, N scored tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from imagine_opd.errors import ConfigError
from imagine_opd.models import TokenIds, get_base, get_body, get_device, get_head
from imagine_opd.scoring import score_side
from imagine_opd.types import Prompt, Rollouts
from imagine_opd.vision_features import VisionFeatures

_TOKENS = 4
_LIMIT = 5e-3
# Between what was measured: at most 0.023 in bf16 where each sequence keeps to itself (64 layers), at least 0.046 where
# positions run on (2 layers), of ten families.
_LIMIT_16_BIT = 3.5e-2


def measure_packing(model: Any, prompts: Sequence[Prompt], token_ids: TokenIds) -> float:
    """How far hidden states behind packed prompts are from those of each alone, by `compare_states`: of the sequence
    that is furthest, for the first sees none before it."""
    rollouts = _make_rollouts(prompts, token_ids)
    mask_BT = rollouts.completion_mask_BT
    with torch.no_grad():
        packed_ND = score_side(model, prompts, rollouts, mask_BT, token_ids.pad, packed=True)
        alone = [
            score_side(model, [prompt], rollouts.select([row]), mask_BT[[row]], token_ids.pad)
            for row, prompt in enumerate(prompts)
        ]
    return max(map(compare_states, torch.split(packed_ND, _TOKENS), alone))


def measure_sharing(
    model: Any, prompts: Sequence[Prompt], token_ids: TokenIds, features: VisionFeatures, side: str
) -> float:
    """The same of what `features` supply to `side`, from a plain forward."""
    rollouts = _make_rollouts(prompts, token_ids)
    mask_BT = rollouts.completion_mask_BT
    with torch.no_grad():
        with features.supply(get_body(model), prompts, side):
            shared_ND = score_side(model, prompts, rollouts, mask_BT, token_ids.pad, with_pixels=False)
        plain_ND = score_side(model, prompts, rollouts, mask_BT, token_ids.pad)
    return compare_states(shared_ND, plain_ND)


def compare_states(found_ND: torch.Tensor, plain_ND: torch.Tensor) -> float:
    """Norm of their difference over the norm of the plain ones."""
    found_ND, plain_ND = found_ND.float(), plain_ND.float()
    return float((found_ND - plain_ND).norm() / plain_ND.norm().clamp_min(1e-30))


def find_limit(model: Any) -> float:
    """What rounding alone may make of it."""
    is_fp32 = get_head(model).weight_VD.dtype == torch.float32
    return _LIMIT if is_fp32 and not torch.is_autocast_enabled(get_device(model).type) else _LIMIT_16_BIT


def refuse_mixed_packing(model: Any, prompts: Sequence[Prompt], token_ids: TokenIds, side: str) -> None:
    """Raise `ConfigError` where packed sequences are not what each is alone, to rounding. `prompts`: two or more."""
    found, limit = measure_packing(model, prompts, token_ids), find_limit(model)
    if not found <= limit:
        attention = getattr(get_base(model).config.get_text_config(), "_attn_implementation", None)
        raise ConfigError(
            f"padding_free=True: the {side}'s hidden states of packed sequences are {found:.2g} away from those of "
            f"each alone (limit {limit:g}): its attention ({attention}) reaches from one into the next; set "
            "padding_free=False, or load the model with attn_implementation='sdpa'"
        )


def describe_sharing(
    model: Any, prompts: Sequence[Prompt], token_ids: TokenIds, features: VisionFeatures, side: str
) -> str:
    """A sentence where shared features are not what the side (`rollout`: the student) makes itself, to rounding; else
    empty."""
    found, limit = measure_sharing(model, prompts, token_ids, features, side), find_limit(model)
    if found <= limit:
        return ""
    named = "student" if side == "rollout" else side
    return (
        f"share_vision_features is off: with shared image features the {named}'s hidden states are {found:.2g} away "
        f"from those of its own (limit {limit:g})"
    )


def _make_rollouts(prompts: Sequence[Prompt], token_ids: TokenIds) -> Rollouts:
    """A few end tokens behind each prompt."""
    ids_BT = torch.full((len(prompts), _TOKENS), token_ids.eos[0])
    return Rollouts(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.zeros(ids_BT.shape))
