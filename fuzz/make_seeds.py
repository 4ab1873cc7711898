"""Writes the fuzzer's seeds: the image files of `tests/hostile.py`, and configs and sizes for `plan`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import hostile  # noqa: E402

MOST_BYTES = 20_000  # of a seed: the fuzzer soon makes larger ones of it


def main() -> None:
    images = HERE / "seeds/images"
    images.mkdir(parents=True, exist_ok=True)
    for kind in (hostile.make_sound, hostile.make_damaged, hostile.make_hostile):
        for name, data in kind().items():
            if len(data) <= MOST_BYTES:
                (images / name).write_bytes(data)
    rng = random.Random(5)
    plans = HERE / "seeds/plan"
    plans.mkdir(parents=True, exist_ok=True)
    for index in range(12):
        (plans / f"{index:02}").write_bytes(rng.randbytes(40 + 20 * index))


if __name__ == "__main__":
    main()
