"""Rollouts to the weight of each response token in the loss: 0 leaves it out.

The loss of a step is sum(w L) / sum(w) over all micro-batches and ranks. Every rule about which tokens count, and how
much, is here; none of them looks at a model.
"""

# B rows, T completion tokens

from __future__ import annotations

import torch

from imagine_opd.config.objective import ObjectiveFields
from imagine_opd.models import TokenIds
from imagine_opd.rollout.finish import find_truncated
from imagine_opd.types import Rollouts


def make_token_weights(
    rollouts: Rollouts, token_ids: TokenIds, config: ObjectiveFields, masked_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """`[B, T]` fp32: the weight of each response token, 0 behind the end.

    In order: tokens of `masked_BT`, the first `num_loss_tokens_to_skip` and special tokens get 0; the weight halves
    every `early_weight_half_life` tokens; with `sequence_mean` each completion's weights are brought to sum 1;
    completions cut by the length cap count `truncated_weight`.
    """
    weights_BT = rollouts.completion_mask_BT.to(torch.float32)
    if masked_BT is not None:
        weights_BT[masked_BT.to(weights_BT.device)] = 0.0
    weights_BT[:, : config.num_loss_tokens_to_skip] = 0.0
    if config.mask_special_tokens:
        special = torch.tensor(token_ids.special, device=weights_BT.device, dtype=rollouts.completion_ids_BT.dtype)
        weights_BT[torch.isin(rollouts.completion_ids_BT, special)] = 0.0
    if config.early_weight_half_life is not None:
        positions_T = torch.arange(weights_BT.shape[1], dtype=torch.float32, device=weights_BT.device)
        weights_BT *= torch.exp2(-positions_T / config.early_weight_half_life)
    if config.loss_aggregation == "sequence_mean":
        totals_B1 = weights_BT.sum(dim=1, keepdim=True)
        weights_BT = torch.where(totals_B1 > 0, weights_BT / totals_B1, 0.0)
    truncated_weight = 0.0 if config.mask_truncated_completions else config.truncated_weight
    if truncated_weight != 1.0:
        weights_BT[find_truncated(rollouts, token_ids)] *= truncated_weight
    return weights_BT
