"""Whose pixels a prompt carries: the images of a step's prompts against those its rows give when made alone.

Images shuffled apart from their rows give a teacher that is sure of the wrong thing, and a loss that falls. Views are
exact, so a row made again alone has the very same bytes; where they differ, the row they belong to is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from imagine_opd.errors import TeacherError
from imagine_opd.types import Prompt, PromptPair, Row, View

_SAME_SHARE = 0.5


def split_images(view: View) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """The pixels of a view, one array for each image."""
    return np.split(view.pixel_values, np.cumsum(view.frame_counts)[:-1]) if view.frame_counts else []


def hash_images(view: View) -> tuple[str, ...]:
    """A key of each image's content: equal pixels, equal key."""
    return tuple(
        hashlib.blake2b(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes(), digest_size=8).hexdigest()
        for pixels in split_images(view)
    )


def refuse_foreign_images(
    rows: Sequence[Row],
    pairs: Sequence[PromptPair],
    build_pairs: Callable[[Sequence[Row]], Sequence[PromptPair | None]],
    *,
    exact: bool = True,
) -> None:
    """Raise `TeacherError` where a prompt of `pairs[i]` does not carry the images or the question of `rows[i]`.

    `build_pairs` makes prompts from rows; each row is given to it alone, so that nothing can be mixed up again.
    `exact=False`: pixels may differ a little, as with `scaled_decode`.
    """
    owners: dict[str, Row] = {}
    made = []
    for row in rows:
        pair = build_pairs([row])[0]
        made.append(pair)
        for prompt in (pair.student, pair.teacher) if pair is not None else ():
            for key in hash_images(prompt.view):
                owners.setdefault(key, row)
    for row, pair, own in zip(rows, pairs, made, strict=True):
        for side in ("student", "teacher") if own is not None else ():
            _refuse_foreign_prompt(row, side, getattr(pair, side), getattr(own, side), owners, exact)


def _refuse_foreign_prompt(
    row: Row, side: str, found: Prompt, own: Prompt, owners: dict[str, Row], exact: bool
) -> None:
    images, own_images = split_images(found.view), split_images(own.view)
    if len(images) != len(own_images):
        raise TeacherError(
            f"{_name(row)}: the {side}'s prompt carries {len(images)} images where the row gives {len(own_images)}: "
            "images and rows have come apart"
        )
    keys = hash_images(found.view)
    for index, (image, own_image) in enumerate(zip(images, own_images, strict=True)):
        if _is_same(image, own_image, exact):
            continue
        owner = owners.get(keys[index])
        whose = f"that of {_name(owner)}" if owner is not None and owner is not row else "of no row of this batch"
        raise TeacherError(
            f"{_name(row)}: image {index} of the {side} is not its own but {whose}: images and rows have come apart "
            "(a shuffled buffer, a cache with a wrong key)"
        )
    if found.input_ids != own.input_ids:
        raise TeacherError(
            f"{_name(row)}: the {side}'s prompt is not the one this row gives: questions and rows have come apart"
        )


def _is_same(found: np.ndarray[Any, Any], own: np.ndarray[Any, Any], exact: bool) -> bool:
    if found.shape != own.shape:
        return False
    if exact or found.dtype != np.float32:
        return np.array_equal(found, own)
    # Two different pictures are about as far apart as their pixels spread.
    return bool(np.abs(found - own).mean() <= _SAME_SHARE * own.std())


def _name(row: Row) -> str:
    return row.source or row.id or repr(row.question)
