"""The Rust extension: image views from encoded bytes. Rows are `types.Row`, config is `types.ViewConfig`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from imagine_opd.types import Box, ImageRef, ViewConfig

class _Row(Protocol):
    """`types.Row`; its images may be RGB8 arrays `[height, width, 3]` too."""

    @property
    def images(self) -> Sequence[ImageRef | npt.NDArray[np.uint8]]: ...
    @property
    def boxes(self) -> Sequence[Box]: ...

# The place of the row's first patch or frame, (patches or frames, rows, columns) per view, the views of student,
# teacher and neutral teacher as (first, last + 1), crops as (left, top, right, bottom, image), each box's crop,
# (width, height) of each upright image.
_Plan: TypeAlias = tuple[
    int,
    list[tuple[int, int, int]],
    tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    list[tuple[int, int, int, int, int]],
    list[int],
    list[tuple[int, int]],
]
# Reason code, and the sentence without the row's name.
_Failure: TypeAlias = tuple[str, str]

__all__ = ["cache_stats", "clear_cache", "make_views", "plan_rows", "read_size"]

def make_views(
    rows: Sequence[_Row],
    config: ViewConfig,
    student: bool = True,
    progress: Callable[[int, int], Any] | None = None,
) -> tuple[npt.NDArray[Any], list[_Plan | _Failure]]:
    """Make the pixels of all rows, in order, without holding the interpreter.

    The samples `[patches or frames, features]` of all rows, and where those of each row are. `progress` is told
    (images done, images in all) now and then. Raises `KeyboardInterrupt` on Ctrl-C, and what `progress` raises.
    """

def plan_rows(rows: Sequence[_Row], config: ViewConfig, student: bool = True) -> list[_Plan | _Failure]:
    """Read headers and check boxes without decoding: per row its plan, or why it would have no views."""

def read_size(image: ImageRef | npt.NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) in pixels after EXIF, from the header alone. Raises `ValueError`: why it cannot be read."""

def cache_stats() -> tuple[int, int, int]:
    """(views held, their bytes, hits so far) of this process's cache of finished views."""

def clear_cache() -> None:
    """Let go of all finished views, and of the memory kept for the next batch."""
