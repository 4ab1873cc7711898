"""Raw generated ids to `Rollouts`: the end found by position, leaked vision ids dropped with their row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from imagine_opd.models import TokenIds
from imagine_opd.types import Rollouts

# B rows, T completion tokens


def finish_completions(
    completion_ids_BT: torch.Tensor, sampling_logprobs_BT: torch.Tensor, token_ids: TokenIds
) -> Rollouts:
    """Mask each row up to and including its first end token, and empty the rows that hold a vision id.

    The end is the first end id by position, never "not padding": the padding id may be the end id. A vision id would
    make the next forward look for pixels that are not there, so its row is dropped: mask 0, ids replaced by padding.
    """
    ends = torch.tensor(token_ids.eos, device=completion_ids_BT.device)
    is_end_BT = torch.isin(completion_ids_BT, ends)
    ended_before_BT = is_end_BT.cumsum(dim=1) - is_end_BT.long()
    mask_BT = ended_before_BT == 0
    vision = torch.tensor(token_ids.vision, device=completion_ids_BT.device, dtype=completion_ids_BT.dtype)
    leaked_B = (torch.isin(completion_ids_BT, vision) & mask_BT).any(dim=1)
    mask_BT = mask_BT & ~leaked_B[:, None]
    ids_BT = torch.where(mask_BT, completion_ids_BT, torch.full_like(completion_ids_BT, token_ids.pad))
    logprobs_BT = torch.where(mask_BT, sampling_logprobs_BT, torch.zeros_like(sampling_logprobs_BT))
    leaked = int(leaked_B.sum())
    return Rollouts(ids_BT, mask_BT, logprobs_BT, {"vision_token": leaked} if leaked else {})


def find_truncated(rollouts: Rollouts, token_ids: TokenIds) -> torch.Tensor:
    """`[B]` bool: the completion has tokens but no end token, that is, the length cap cut it."""
    ends = torch.tensor(token_ids.eos, device=rollouts.completion_ids_BT.device)
    ended_B = (torch.isin(rollouts.completion_ids_BT, ends) & rollouts.completion_mask_BT).any(dim=1)
    return ~ended_B & rollouts.completion_mask_BT.any(dim=1)


def join_rollouts(parts: Sequence[Rollouts], pad_id: int, device: torch.device) -> Rollouts:
    """Several batches of rollouts as one, padded to the longest; of none, one without rows on `device`."""
    if not parts:
        ids_BT = torch.zeros(0, 1, dtype=torch.long, device=device)
        return Rollouts(ids_BT, ids_BT.bool(), ids_BT.float())
    longest = max(part.completion_ids_BT.shape[1] for part in parts)
    columns: list[torch.Tensor] = []
    for name, value in (("completion_ids_BT", pad_id), ("completion_mask_BT", False), ("sampling_logprobs_BT", 0.0)):
        tensors = [getattr(part, name).to(device) for part in parts]
        columns.append(torch.cat([pad(tensor, (0, longest - tensor.shape[1]), value=value) for tensor in tensors]))
    dropped: dict[str, int] = {}
    for part in parts:
        for reason, number in part.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
    return Rollouts(columns[0], columns[1], columns[2], dropped)
