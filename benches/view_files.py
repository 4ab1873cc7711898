"""The pictures of the views' benches: their sizes by level in, photograph-like files out, written once a run.

A photograph of scikit-learn's is blown up and given the grain of a sensor, so that a JPEG is as long as a camera's:
1.7 bits a pixel, about 2.5 MB at 12 megapixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
from PIL import Image

PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
GRAIN = 3.2
"""Standard deviation of the grain in levels of 255, the same in all three channels."""

OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 90, "subsampling": "4:2:0"},
    "PNG": {},
    "WEBP": {"quality": 90},
}


@dataclass(frozen=True)
class Size:
    """Pixels, and the name that the table gives them."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class Level:
    """How much is measured: `full` for figures to be quoted, `quick` for a look, `tiny` to try the plumbing."""

    name: str
    large: Size
    small: Size
    batch: int
    seconds: float
    """How long the implementations of a case take turns, beyond the least number of rounds."""
    rounds: tuple[int, int]
    measures_memory: bool


_LARGE, _SMALL = Size("12 MP", 4032, 3024), Size("1080p", 1920, 1080)
LEVELS = {
    "full": Level("full", _LARGE, _SMALL, 16, 4.0, (3, 15), measures_memory=True),
    "quick": Level("quick", _LARGE, _SMALL, 4, 0.5, (2, 5), measures_memory=False),
    "tiny": Level("tiny", Size("0.2 MP", 504, 378), Size("0.1 MP", 480, 270), 2, 0.0, (1, 1), measures_memory=False),
}


def choose_level(config: Any) -> Level:
    """Full where the benches are named on the command line; `pytest --benchmark` takes a quick look."""
    shapes = config.getoption("bench_shapes")
    if shapes == "tiny":
        return LEVELS["tiny"]
    return LEVELS["quick" if shapes or config.getoption("benchmark") else "full"]


@dataclass(frozen=True)
class Pictures:
    """Files of one level, written when first asked for."""

    folder: Path
    level: Level

    def write(self, size: Size, kind: str = "JPEG", number: int = 0) -> Path:
        """The path of a file; pictures of one size and different numbers differ in their grain."""
        path = self.folder / f"{size.width}x{size.height}-{number}.{kind.lower()}"
        if not path.exists():
            draw_photo(size, number).save(path, kind, **OPTIONS[kind])
        return path

    def write_batch(self, size: Size) -> list[Path]:
        """As many distinct files as a batch of the level has."""
        return [self.write(size, number=number) for number in range(self.level.batch)]


def draw_photo(size: Size, number: int) -> Image.Image:
    """The middle of the photograph, of the aspect of `size`, enlarged, with grain."""
    photo = Image.open(PHOTO).convert("RGB")
    width = min(photo.width, photo.height * size.width / size.height)
    height = width * size.height / size.width
    left, top = (photo.width - width) / 2, (photo.height - height) / 2
    box = (left, top, left + width, top + height)
    smooth = photo.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box)
    grain = np.random.default_rng(number).standard_normal((size.height, size.width, 1), dtype=np.float32)
    return Image.fromarray(np.clip(np.rint(smooth + grain * np.float32(GRAIN)), 0, 255).astype(np.uint8))
