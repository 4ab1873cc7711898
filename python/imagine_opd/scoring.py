"""Both sides' hidden states at the response tokens only: never the prompt's, and no logits.

Each side gets its own sequence, [prompt, completion], so positions and vision placeholders are those of its own view.
Sequences of a batch are padded on the right, where a causal body never lets the padding reach a response token, or
packed into one row (`packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from imagine_opd.devices import move_to
from imagine_opd.models import fit_inputs, get_body, get_device
from imagine_opd.packing import find_starts, pack_inputs
from imagine_opd.pixel_inputs import join_pixels
from imagine_opd.types import Prompt, PromptPair, Rollouts, Scores
from imagine_opd.vision_features import VisionFeatures, supplying

# B rows, L sequence tokens, P tokens of a packed row, T completion tokens, N kept response tokens, D hidden


class ScoredBatch(Protocol):
    """What is scored: both prompts of each completion, and the completions."""

    @property
    def prompts(self) -> Sequence[PromptPair]: ...
    @property
    def rollouts(self) -> Rollouts: ...


def score_teacher(
    teacher: Any,
    batch: ScoredBatch,
    active_BT: torch.Tensor,
    pad_id: int,
    neutral: bool = False,
    features: VisionFeatures | None = None,
    packed: bool = False,
) -> torch.Tensor:
    """`[N, D]` hidden states of the teacher under its own view, or under the one with neutral evidence, without
    gradient."""
    prompts = [pair.neutral if neutral else pair.teacher for pair in batch.prompts]
    assert all(prompts), "a prompt was built without its neutral pass"
    shown = [prompt for prompt in prompts if prompt is not None]
    with torch.no_grad(), supplying(features, get_body(teacher), shown, "teacher"):
        return score_side(teacher, shown, batch.rollouts, active_BT, pad_id, features is None, packed)


def score_student(
    student: Any,
    teacher_hidden_ND: torch.Tensor,
    batch: ScoredBatch,
    active_BT: torch.Tensor,
    pad_id: int,
    features: VisionFeatures | None = None,
    packed: bool = False,
) -> Scores:
    """Both sides at the tokens where `active_BT` is set: the student's hidden states with gradient, and the teacher's.

    Row i of the hidden states is the one that predicts `token_ids_N[i]`: no shift is left to the caller.
    """
    rollouts = batch.rollouts
    prompts = [pair.student for pair in batch.prompts]
    with supplying(features, get_body(student), prompts, "student"):
        student_hidden_ND = score_side(student, prompts, rollouts, active_BT, pad_id, features is None, packed)
    row_N, position_N = active_BT.nonzero(as_tuple=True)
    device = student_hidden_ND.device
    return Scores(
        student_hidden_ND=student_hidden_ND,
        teacher_hidden_ND=teacher_hidden_ND,
        token_ids_N=move_to(rollouts.completion_ids_BT[active_BT], device),
        sampling_logprobs_N=move_to(rollouts.sampling_logprobs_BT[active_BT], device),
        row_N=move_to(row_N, device),
        position_N=move_to(position_N, device),
    )


def score_side(
    model: Any,
    prompts: Sequence[Prompt],
    rollouts: Rollouts,
    active_BT: torch.Tensor,
    pad_id: int,
    with_pixels: bool = True,
    packed: bool = False,
) -> torch.Tensor:
    """`[N, D]` hidden states of one side at the active response tokens, in row order then token order.

    `with_pixels=False`: around the call the features of the images are supplied (`vision_features`). packed: the
    sequences go through the model as one row without padding.
    """
    device = get_device(model)
    body = get_body(model)
    inputs = fit_inputs(body, join_sequences(prompts, rollouts, pad_id, device, with_pixels))
    row_N, position_N = active_BT.nonzero(as_tuple=True)
    starts_B = torch.tensor([len(prompt.input_ids) for prompt in prompts], device=row_N.device)
    place_N = starts_B[row_N] + position_N - 1
    if packed:
        place_N = place_N + find_starts(inputs["attention_mask"]).to(place_N.device)[row_N]
        row_N, inputs = torch.zeros_like(row_N), pack_inputs(body, inputs)
    hidden_BLD: torch.Tensor = body(**inputs, use_cache=False).last_hidden_state
    return hidden_BLD[move_to(row_N, device), move_to(place_N, device)]


def join_sequences(
    prompts: Sequence[Prompt], rollouts: Rollouts, pad_id: int, device: torch.device, with_pixels: bool = True
) -> dict[str, torch.Tensor]:
    """Model inputs of one side: prompt then completion, padded on the right, with that side's pixels."""
    completion_ids_BT = rollouts.completion_ids_BT.cpu()
    lengths_B = rollouts.completion_mask_BT.sum(dim=1).tolist()
    sizes = [len(prompt.input_ids) + length for prompt, length in zip(prompts, lengths_B, strict=True)]
    ids_BL = torch.full((len(prompts), max(sizes)), pad_id, dtype=torch.long)
    attention_BL = torch.zeros_like(ids_BL)
    types_BL = torch.zeros_like(ids_BL)
    for row, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        start = len(prompt.input_ids)
        ids_BL[row, :start] = torch.tensor(prompt.input_ids)
        ids_BL[row, start:size] = completion_ids_BT[row, : size - start]
        attention_BL[row, :size] = 1
        types_BL[row, :start] = torch.tensor(prompt.mm_token_type_ids)
    inputs = {"input_ids": ids_BL, "attention_mask": attention_BL, "mm_token_type_ids": types_BL}
    return {
        **{name: move_to(tensor, device) for name, tensor in inputs.items()},
        **join_pixels(prompts, device, in_full=with_pixels),
    }


def pick_tokens(values: torch.Tensor | None, index: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """`values[index]` on `device`: each kept token's own value, or that of its completion."""
    return None if values is None else move_to(values[index], device)
