"""A step's micro-batches to the same with their advantages, for baselines and whitening that see all of its tokens.

Advantages need the teacher and the sampler alone. So the teacher is run on every micro-batch before the first backward,
and its hidden states are kept for the loss: the forwards are the same, only earlier, at N x D numbers held.
"""

# B rows, T completion tokens, N kept response tokens, D hidden

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from imagine_opd.batches import MicroBatch
from imagine_opd.devices import move_to
from imagine_opd.kernels import OutputHead
from imagine_opd.loss import ObjectiveConfig, measure_advantages, shape_advantages
from imagine_opd.parallel import sum_tensor_over_ranks

ScoreTeacher = Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor | None]]
"""Micro-batch to the teacher's hidden states [N, D], with the evidence and, for a contrast, without."""


def add_step_advantages(
    micro_batches: Sequence[MicroBatch],
    score_teacher: ScoreTeacher,
    teacher_head: nn.Linear | OutputHead,
    config: ObjectiveConfig,
    max_positions: int,
    device: torch.device,
) -> list[MicroBatch]:
    """The micro-batches with `teacher_hidden_ND`, `neutral_hidden_ND` and `advantages_N`; a collective of all ranks."""
    scored: list[MicroBatch] = []
    advantages: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    for batch in micro_batches:
        active_BT = batch.weights_BT > 0
        teacher_hidden_ND, neutral_hidden_ND = score_teacher(batch)
        ids_N, sampling_logprobs_N = (
            move_to(values_BT[active_BT], device)
            for values_BT in (batch.rollouts.completion_ids_BT, batch.rollouts.sampling_logprobs_BT)
        )
        advantages.append(
            measure_advantages(teacher_hidden_ND, teacher_head, ids_N, sampling_logprobs_N, config, neutral_hidden_ND)
        )
        weights.append(move_to(batch.weights_BT[active_BT], device))
        positions.append(move_to(active_BT.nonzero()[:, 1], device))
        scored.append(replace(batch, teacher_hidden_ND=teacher_hidden_ND, neutral_hidden_ND=neutral_hidden_ND))
    shaped = shape_advantages(advantages, weights, positions, config, max_positions, sum_tensor_over_ranks, device)
    return [replace(batch, advantages_N=part_N) for batch, part_N in zip(scored, shaped, strict=True)]
