"""Which part of a completion a token belongs to, and where the KL lies: by class, by position, in its top tokens.

answer: inside `<answer>…</answer>`; template: the tags themselves and special tokens; trace: the rest.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from imagine_opd.metrics.step import StepMetrics

# B rows, T completion tokens, N kept response tokens

NOTHING, ANSWER, TRACE, TEMPLATE = 0, 1, 2, 3
CLASS_NAMES = {ANSWER: "answer", TRACE: "trace", TEMPLATE: "template"}

_OPEN = re.compile("<answer>", re.IGNORECASE | re.ASCII)
_CLOSE = re.compile("</answer>", re.IGNORECASE | re.ASCII)
_POSITION_STARTS = (0, 1, 4, 16, 64, 256, 1024)
_TOP_SHARE = 0.05
_QUARTERS = 4


class TokenClassifier:
    """Classifies completions of one tokenizer. Each id is decoded once in the life of the object."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(int(token) for token in tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}

    def classify(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """`[B, T]` uint8 on the CPU: `ANSWER`, `TRACE` or `TEMPLATE`, and `NOTHING` after a completion's end.

        The last open tag counts; one that is never closed reaches to the end.
        """
        width = ids_BT.shape[1]
        lengths = mask_BT.sum(dim=1).tolist()
        rows = [self.classify_one(ids[:length]) for ids, length in zip(ids_BT.tolist(), lengths, strict=True)]
        padded = [classes + [NOTHING] * (width - len(classes)) for classes in rows]
        return torch.tensor(padded, dtype=torch.uint8).reshape(ids_BT.shape)

    def classify_one(self, token_ids: Sequence[int]) -> list[int]:
        """The class of each token of one completion."""
        classes = [TEMPLATE if token in self.special else TRACE for token in token_ids]
        pieces = [self._read_piece(token) for token in token_ids]
        text = "".join(pieces)
        if "answer>" not in text.lower():
            return classes
        ends = list(itertools.accumulate(len(piece) for piece in pieces))
        opens = [match.span() for match in _OPEN.finditer(text)]
        for start, end in opens + [match.span() for match in _CLOSE.finditer(text)]:
            for token in _tokens_of(ends, start, end):
                classes[token] = TEMPLATE
        if not opens:
            return classes
        inside = opens[-1][1]
        closed = _CLOSE.search(text, inside)
        outside = closed.start() if closed else len(text)
        for token in _tokens_of(ends, inside, outside):
            start, end = ends[token] - len(pieces[token]), ends[token]
            # A token of a tag and of the answer, such as ">C", is part of the answer. Space alone is layout.
            if token_ids[token] in self.special or not text[max(start, inside) : min(end, outside)].strip():
                classes[token] = TEMPLATE
            else:
                classes[token] = ANSWER
        return classes

    def _read_piece(self, token: int) -> str:
        # Pieces joined may lack a space or hold a broken character; the tags are plain ASCII and stay whole.
        if token not in self._pieces:
            self._pieces[token] = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self._pieces[token]


def classify_tokens(ids_BT: torch.Tensor, mask_BT: torch.Tensor, processor: Any) -> torch.Tensor:
    """`TokenClassifier.classify` for one call; a trainer keeps the classifier."""
    return TokenClassifier(processor.tokenizer).classify(ids_BT, mask_BT)


def note_kl(
    metrics: StepMetrics,
    kl_N: torch.Tensor,
    classes_N: torch.Tensor,
    position_N: torch.Tensor,
    length_N: torch.Tensor,
) -> None:
    """Add the figures of a micro-batch's per-token KL (nats) to the log; means are over tokens.

    `kl/answer`, `kl/trace`, `kl/template`; `kl/quarter_1` to `_4` of the completion; `kl/position_A_B` for the token
    places from A to B; `kl/top5_share`, how much of the sum lies in the 5 % of tokens with the most.
    `position_N` counts from 0, `length_N` is the length of the token's completion.
    """
    if not len(kl_N):
        return
    kl_N = kl_N.detach().float()
    device = kl_N.device
    position_N, length_N = position_N.to(device), length_N.to(device)
    starts = torch.tensor(_POSITION_STARTS, device=device)
    place_N = torch.bucketize(position_N, starts, right=True) - 1
    quarter_N = torch.div(position_N * _QUARTERS, length_N.clamp(min=1), rounding_mode="floor").clamp(max=_QUARTERS - 1)
    groups = (
        ([f"kl/{CLASS_NAMES[kind]}" if kind else "" for kind in range(4)], classes_N.to(device).long()),
        ([f"kl/quarter_{number}" for number in range(1, _QUARTERS + 1)], quarter_N),
        (_name_positions(), place_N),
    )
    top = kl_N.topk(math.ceil(len(kl_N) * _TOP_SHARE)).values.sum()
    parts = [torch.stack([top, kl_N.sum()])]
    for names, group_N in groups:
        # Not `bincount`: with weights on a GPU it has no deterministic form, and it waits for the device.
        zeros = torch.zeros(len(names), device=device)
        parts += [zeros.index_add(0, group_N, weights_N) for weights_N in (kl_N, torch.ones_like(kl_N))]
    values = torch.cat(parts).tolist()  # the one wait for the device
    # Weighted by its KL, a mean over micro-batches is the share of their sum.
    metrics.add_mean("kl/top5_share", values[0], values[1])
    start = 2
    for names, _ in groups:
        sums, counts = values[start : start + len(names)], values[start + len(names) : start + 2 * len(names)]
        for name, total, count in zip(names, sums, counts, strict=True):
            if name and count:
                metrics.add_mean(name, total, count)
        start += 2 * len(names)


def _name_positions() -> list[str]:
    ends = [start - 1 for start in _POSITION_STARTS[1:]]
    names = [
        f"kl/position_{start}" if start == end else f"kl/position_{start}_{end}"
        for start, end in zip(_POSITION_STARTS, ends, strict=False)
    ]
    return [*names, f"kl/position_{_POSITION_STARTS[-1]}_up"]


def _tokens_of(ends: Sequence[int], start: int, end: int) -> range:
    """The tokens that hold a character from `start` to `end` (excluded), where `ends` are the tokens' own."""
    return range(
        bisect.bisect_right(ends, start), min(bisect.bisect_left(ends, end) + 1, len(ends)) if end > start else 0
    )
