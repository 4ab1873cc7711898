"""A micro-batch over the token budget: which completions go through the models together, and its step in these parts.

Rows are laid in parts of like length and even size, as few as the budget allows. All ranks go through as many: one with
fewer cuts further, or lets a completion through with weight 0. The loss is a sum over tokens divided by the step's
weights, so the parts of a micro-batch add up to it.
"""

# B completions, T completion tokens, N kept response tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from imagine_opd.batches import MicroBatch
from imagine_opd.config import ImagineOPDConfig
from imagine_opd.parallel import gather_figures, is_fsdp2

Part = tuple[int, ...]
Lengths = Sequence[tuple[int, ...]]
"""Of each completion, the tokens of its sequence on each side."""


# Planning


def plan_parts(
    micro_batches: Sequence[MicroBatch], args: ImagineOPDConfig, say: Callable[[str], None]
) -> list[MicroBatch]:
    """The micro-batches with their `parts`; where there is a `max_tokens_per_forward`, a collective of all ranks.

    With `padding_free` a side's forward has the tokens of its sequences, else those of the padding too.
    """
    budget, packed = args.max_tokens_per_forward, args.padding_free
    if budget is None:
        return list(micro_batches)
    lengths = [measure_lengths(batch) for batch in micro_batches]
    plans = [cut_rows(sizes, budget, packed) for sizes in lengths]
    if any(max(size) > budget for sizes in lengths for size in sizes):
        say(
            f"max_tokens_per_forward={budget}: sequences of more tokens go alone; max_pixels, crop_max_pixels and "
            "max_completion_length make them shorter"
        )
    counts = [max(found) for found in zip(*gather_figures([len(plan) for plan in plans]), strict=True)]
    return [
        replace(batch, parts=tuple(cut_further(plan, sizes, count, packed)))
        for batch, plan, sizes, count in zip(micro_batches, plans, lengths, counts, strict=True)
    ]


def measure_lengths(batch: MicroBatch) -> Lengths:
    """Tokens of each completion's sequence for the student, the teacher and, where there is one, the neutral pass."""
    completions = batch.rollouts.completion_mask_BT.sum(dim=1).tolist()
    return [
        tuple(len(prompt.input_ids) + length for prompt in (pair.student, pair.teacher, pair.neutral) if prompt)
        for pair, length in zip(batch.prompts, completions, strict=True)
    ]


def count_tokens(rows: Sequence[int], lengths: Lengths, packed: bool) -> int:
    """Tokens of the largest side's forward over these rows."""
    sides: list[tuple[int, ...]] = list(zip(*(lengths[row] for row in rows), strict=True))
    return max(sum(side) if packed else len(side) * max(side) for side in sides)


def cut_rows(lengths: Lengths, budget: int, packed: bool) -> list[Part]:
    """As few parts as fit into the budget, then as even as that many allow; the rows of each in their order."""
    parts = _fill(lengths, budget, packed)
    # The least budget that needs no part more leaves none of them nearly empty.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        tried = _fill(lengths, middle, packed)
        if len(tried) <= len(parts):
            parts, high = tried, middle
        else:
            low = middle + 1
    return parts


def cut_further(parts: Sequence[Part], lengths: Lengths, count: int, packed: bool) -> list[Part]:
    """The parts made `count`: the largest in two, and where each has one row only, spare forwards (`()`)."""
    parts = list(parts)
    while len(parts) < count:
        several = [part for part in parts if len(part) > 1]
        if not several:
            return parts + [()] * (count - len(parts))
        largest = max(several, key=lambda part: count_tokens(part, lengths, packed))
        rows = sorted(largest, key=lambda row: max(lengths[row]))
        place = parts.index(largest)
        parts[place : place + 1] = (tuple(sorted(half)) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]))
    return parts


def _fill(lengths: Lengths, budget: int, packed: bool) -> list[Part]:
    """Longest first, each row into the first part that it fits in."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -max(lengths[row])):
        fitting = (part for part in parts if count_tokens([*part, row], lengths, packed) <= budget)
        part = next(fitting, None)
        if part is None:
            parts.append([row])
        else:
            part.append(row)
    return [tuple(sorted(part)) for part in parts]


# Cutting


def split_batch(batch: MicroBatch) -> list[MicroBatch]:
    """The parts of a micro-batch as micro-batches of their own."""
    return [take_rows(batch, part) for part in batch.parts] if len(batch.parts) > 1 else [batch]


def take_rows(batch: MicroBatch, rows: Part) -> MicroBatch:
    """The micro-batch of some of its completions; of none: the one with the shortest prompt, at weight 0."""
    if not rows:
        shortest = min(range(len(batch.prompts)), key=lambda row: len(batch.prompts[row].teacher.input_ids))
        spare = replace(batch, weights_BT=torch.zeros_like(batch.weights_BT), is_used=False)
        return take_rows(spare, (shortest,))
    chosen = list(rows)
    kept_N = _find_tokens(batch, rows)

    def pick(values: torch.Tensor | None, kept: torch.Tensor | list[int]) -> torch.Tensor | None:
        if values is None:
            return None
        return values[kept.to(values.device) if isinstance(kept, torch.Tensor) else kept]

    return replace(
        batch,
        rows=tuple(batch.rows[row] for row in rows),
        prompts=tuple(batch.prompts[row] for row in rows),
        rollouts=batch.rollouts.select(chosen),
        weights_BT=batch.weights_BT[chosen],
        teacher_hidden_ND=pick(batch.teacher_hidden_ND, kept_N),
        neutral_hidden_ND=pick(batch.neutral_hidden_ND, kept_N),
        advantages_N=pick(batch.advantages_N, kept_N),
        distill_B=pick(batch.distill_B, chosen),
        reward_advantages_B=pick(batch.reward_advantages_B, chosen),
        leaked_BT=pick(batch.leaked_BT, chosen),
        parts=(),
    )


def _find_tokens(batch: MicroBatch, rows: Part) -> torch.Tensor:
    """`[N]` numbers, among the micro-batch's tokens in the loss, of those of these rows, in order."""
    row_N = (batch.weights_BT > 0).nonzero()[:, 0]
    return torch.isin(row_N, torch.tensor(rows, device=row_N.device)).nonzero()[:, 0]


# Running


Scored = tuple[torch.Tensor, torch.Tensor | None]


def score_parts(batch: MicroBatch, score: Callable[[MicroBatch], Scored]) -> Scored:
    """The teacher's hidden states of a micro-batch, `[N, D]` each, scored part by part."""
    if len(batch.parts) < 2:
        return score(batch)
    found = [score(part) for part in split_batch(batch)]
    order_N = torch.cat([_find_tokens(batch, part) for part in batch.parts if part]).argsort()

    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole_ND = torch.cat(list(parts))
        return whole_ND[order_N.to(whole_ND.device)]

    neutral = [part for _, part in found if part is not None]
    return join([part for part, _ in found]), join(neutral) if neutral else None


def step_parts(
    accelerator: Any, model: Any, batch: MicroBatch, step: Callable[[MicroBatch], torch.Tensor]
) -> torch.Tensor:
    """Forward and backward of each part by `step`; the sum of their losses. Processes sync gradients in the last."""
    *first, last = split_batch(batch)
    losses = []
    for part in first:
        with _delay_sync(accelerator, model):
            losses.append(step(part))
    return torch.stack([*losses, step(last)]).sum()


@contextmanager
def _delay_sync(accelerator: Any, model: Any) -> Iterator[None]:
    state = accelerator.gradient_state
    if not state.sync_gradients:  # the Trainer has seen to it for the whole micro-batch
        yield
        return
    state._set_sync_gradients(False)  # DeepSpeed steps in the backward that finds it set
    try:
        # FSDP2 would hold whole gradients between the parts: it adds up shards instead.
        if accelerator.distributed_type == "DEEPSPEED" or is_fsdp2(model):
            yield
        else:
            with accelerator.no_sync(model):
                yield
    finally:
        state._set_sync_gradients(True)
