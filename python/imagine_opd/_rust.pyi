"""The Rust extension: image views from encoded bytes. Rows are `types.Row`, config is `types.ViewConfig`."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from imagine_opd.types import ImageRef, Row, ViewConfig

# Teacher's pixel values `[patches, features]`, (rows, columns) of patches per view, the student's patches,
# crops as (left, top, right, bottom, image), (width, height) of each image after EXIF.
_Pixels: TypeAlias = tuple[
    npt.NDArray[np.float32],
    list[tuple[int, int]],
    int,
    list[tuple[int, int, int, int, int]],
    list[tuple[int, int]],
]
# Reason code, and the sentence without the row's name.
_Failure: TypeAlias = tuple[str, str]

__all__ = ["check_rows", "make_views", "read_size"]

def make_views(rows: Sequence[Row], config: ViewConfig) -> list[_Pixels | _Failure]:
    """Make the pixels of each row, in order, without holding the interpreter."""

def check_rows(rows: Sequence[Row], config: ViewConfig) -> list[_Failure | None]:
    """Read headers and check boxes without decoding: per row, why it would have no views."""

def read_size(image: ImageRef) -> tuple[int, int]:
    """(width, height) in pixels after EXIF, from the header alone. Raises `ValueError`: why it cannot be read."""
