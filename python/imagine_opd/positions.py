"""Where a model's own forward places its tokens: watched, and compared with what the prompts alone give.

For families with parted positions (t, h, w). Log-probs hardly tell: a response a few positions off drifts by 1e-4 nats
in a small model, so positions are compared as the integers they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from imagine_opd.errors import TeacherError
from imagine_opd.models import fit_inputs, get_body
from imagine_opd.scoring import join_sequences
from imagine_opd.types import Prompt, Rollouts

# B rows, L sequence tokens


@contextmanager
def watch_positions(model: Any) -> Iterator[list[torch.Tensor]]:
    """Records `[3, B, L]` of each forward inside, as the model hands them to its language model."""
    found: list[torch.Tensor] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.ndim == 3:
            found.append(positions[-3:])  # some families put the plain positions in front of the three

    decoder = getattr(get_body(model), "language_model", None)
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True) if decoder is not None else None
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def own_positions(model: Any, prompts: Sequence[Prompt], rollouts: Rollouts, pad_id: int, side: str) -> Iterator[None]:
    """Raise `TeacherError` when the forward inside, of these prompts and completions, places a token elsewhere than
    its own prompt does: with positions of the other side, say. Families of plain positions pass."""
    with watch_positions(model) as found:
        yield
    body = get_body(model)
    derive = getattr(body, "get_rope_index", None)
    if derive is None or not found:
        return
    given = fit_inputs(body, join_sequences(prompts, rollouts, pad_id, found[0].device))
    taken = inspect.signature(derive).parameters
    expected_3BL = derive(**{name: tensor for name, tensor in given.items() if name in taken})[0]
    is_wrong_BL = (found[0] != expected_3BL).any(dim=0) & given["attention_mask"].bool()
    if not is_wrong_BL.any():
        return
    row, token = is_wrong_BL.nonzero()[0].tolist()
    seen, own = (tuple(positions[:, row, token].tolist()) for positions in (found[0], expected_3BL))
    raise TeacherError(
        f"token {token} of probe row {row} stands at position (t, h, w) = {seen} in the {side}'s forward, its own "
        f"prompt gives {own}: the {side} is misaligned, its positions are those of another prompt"
    )
