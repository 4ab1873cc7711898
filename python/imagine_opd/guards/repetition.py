"""How much a completion repeats itself: token ids in, a share out."""

from __future__ import annotations

from collections.abc import Sequence

REPEAT_NGRAM = 4


def measure_repetition(token_ids: Sequence[int], n: int = REPEAT_NGRAM) -> float:
    """The share of n-grams that stood in the completion before: 0 for none, towards 1 for a loop.

    A completion shorter than `n` tokens has no n-gram and repeats nothing.
    """
    total = len(token_ids) - n + 1
    if total < 1:
        return 0.0
    distinct = len(set(zip(*(token_ids[start:] for start in range(n)), strict=False)))
    return (total - distinct) / total
