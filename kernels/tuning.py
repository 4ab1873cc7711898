"""Launch shapes and chunk heights: measured ones for known devices from `tuning.json`, sound ones for all others."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tuning.json")

CHUNK_BYTES = 2_684_354_560
"""Most that the buffers of a chunk may take, 2.5 GiB: with what else is held, 3 GiB beyond inputs and outputs."""

HEAD_BYTES = 3 * 2**30 - 2**26
"""Most that the buffers of a chunk and what a trained head's fp32 sum takes beyond its gradient may take together:
3 GiB less what rows of hidden states take."""

CPU_CHUNK_BYTES = 2**26

GROUP_CHUNK_ROWS = 512
"""Least rows of a chunk where chunks share one product with the head's gradient."""


class TileConfig(NamedTuple):
    """How a row is walked: columns per tile, warps per program, tiles in flight."""

    block_v: int
    num_warps: int
    num_stages: int


_TILE = TileConfig(4096, 8, 3)
_SUM_TILE = TileConfig(4096, 4, 3)
"""Of kernels that sum over a row: few warps wait for one another; a third faster than 8 warps on an H200."""


@dataclass(frozen=True)
class Tuning:
    """The launch shapes of one kind of device; the defaults compile for sm_80 and sm_90 without register spills."""

    stats: TileConfig = _SUM_TILE
    gradient: TileConfig = _TILE
    fused: TileConfig = _SUM_TILE
    rows_in_flight: int = 0
    """Programs of the fused kernel; each takes every such row. 0: one program for each row."""
    chunk_rows: dict[str, int] = field(default_factory=dict)
    """Rows of a chunk by hidden size, for fp32 logits of both sides: "2560" with a frozen head, "2560+dW" with a
    trained one."""


_override: Tuning | None = None


def get_tuning(device: torch.device | None = None) -> Tuning:
    """The launch shapes for a device: measured ones where its name is in the table."""
    if _override is not None:
        return _override
    if device is None or device.type != "cuda":
        return Tuning()
    return load_table(TABLE).get(torch.cuda.get_device_name(device), Tuning())


@contextlib.contextmanager
def override(tuning: Tuning) -> Iterator[None]:
    """Use these launch shapes inside the block, for sweeps and tests."""
    global _override
    before, _override = _override, tuning
    try:
        yield
    finally:
        _override = before


@functools.cache
def load_table(path: Path) -> dict[str, Tuning]:
    """The measured launch shapes by device name."""
    if not path.is_file():
        return {}
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Tuning(
            stats=TileConfig(*entry["stats"]),
            gradient=TileConfig(*entry["gradient"]),
            fused=TileConfig(*entry["fused"]),
            rows_in_flight=entry["rows_in_flight"],
            chunk_rows=entry["chunk_rows"],
        )
        for name, entry in entries.items()
    }


def save(path: Path, device_name: str, tuning: Tuning) -> None:
    """Write one device's launch shapes into the table and leave those of the others as they are."""
    entries = {name: asdict(entry) for name, entry in load_table.__wrapped__(path).items()}
    entries[device_name] = asdict(tuning)
    path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    load_table.cache_clear()


def choose_tile(tile: TileConfig, vocabulary: int) -> TileConfig:
    """The tile, cut to a vocabulary that is smaller, or whose rows are not aligned and take more address registers."""
    block_v = min(tile.block_v, 1 << max(vocabulary - 1, 0).bit_length(), tile.block_v if vocabulary % 8 == 0 else 2048)
    num_warps = max(1, min(tile.num_warps, block_v // 256))
    return tile if block_v == tile.block_v else TileConfig(block_v, num_warps, tile.num_stages)


def choose_splits(rows: int, vocabulary: int, tile: TileConfig, device: torch.device) -> int:
    """Programs for each row: more than one when rows alone would leave multiprocessors idle."""
    if device.type != "cuda":
        return 1
    tiles = -(-vocabulary // tile.block_v)
    return min(choose_parts(2 * count_multiprocessors(device), rows), 1 << (max(tiles // 2, 1).bit_length() - 1), 32)


def choose_parts(programs: int, rows: int) -> int:
    """Parts of each row for so many programs in all: a power of two, since each number is compiled for itself."""
    return 1 << (-(-programs // max(rows, 1)) - 1).bit_length()


def choose_chunk_rows(
    rows: int, hidden: int, row_bytes: int, trains_head: bool, device: torch.device, *, is_measured: bool = False
) -> int:
    """Rows of a chunk: as many full waves of the product that goes back to the hidden states as memory allows.

    `row_bytes`: what a row takes of all buffers. `is_measured`: the buffers are those of the table's heights.
    """
    if rows == 0:
        return 1
    if device.type != "cuda":
        return min(rows, max(16, CPU_CHUNK_BYTES // row_bytes))
    most = max(128, CHUNK_BYTES // row_bytes // 128 * 128)
    measured = find_measured_rows(hidden, trains_head, device) if is_measured else None
    height = min(measured, most) if measured is not None else choose_full_waves(hidden, most, device)
    # Chunks of equal height: a low last one reads the whole heads for a few rows.
    chunks = -(-rows // height)
    return min(height, -(-rows // (chunks * 128)) * 128) if chunks > 1 else rows


def find_measured_rows(hidden: int, trains_head: bool, device: torch.device) -> int | None:
    """Rows of a chunk as the table has them."""
    return get_tuning(device).chunk_rows.get(f"{hidden}+dW" if trains_head else str(hidden))


def choose_group(rows: int, logits_bytes: int, gradient_bytes: int, head_bytes: int) -> tuple[int, int] | None:
    """Rows of a chunk, and of the chunks whose gradients go back to a trained head in one product; `None`: no groups.

    Every product with the head's gradient reads and writes its whole fp32 sum, as long as half the product itself at
    1,500 rows: few high products, whose gradients wait in 16 bits, cost less than one for each chunk of fp32 logits.
    `logits_bytes`, `gradient_bytes`: what a row takes; `head_bytes`: what the head's sum takes beyond its gradient.
    """
    most = min(CHUNK_BYTES, HEAD_BYTES - head_bytes)
    for groups in range(1, 1 + -(-rows // GROUP_CHUNK_ROWS)):
        height = -(-rows // (groups * 128)) * 128
        for chunks in range(1, 1 + max(1, height // GROUP_CHUNK_ROWS)):
            chunk = -(-height // (chunks * 128)) * 128
            group = chunk * chunks
            if chunk * logits_bytes + min(group, rows) * gradient_bytes <= most:
                return chunk, group
    return None


def choose_full_waves(hidden: int, most: int, device: torch.device) -> int:
    """The height up to `most` whose product with the head, in tiles of 128 x 256, leaves fewest processors idle."""
    processors = count_multiprocessors(device)

    def fill(height: int) -> float:
        tiles = -(-height // 128) * -(-hidden // 256)
        waves = -(-tiles // processors)
        return tiles / (waves * processors)

    heights = range(min(512, most), most + 1, 128)
    best = max(fill(height) for height in heights)
    # Among heights that fill the device about as well the largest: each chunk reads both heads once more.
    return max(height for height in heights if fill(height) >= best - 0.03)


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
