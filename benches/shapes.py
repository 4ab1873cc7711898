"""The shapes of the kernel benches by size: `target` on a GPU, `small` on a CPU, `tiny` to try the plumbing."""

# N kept tokens, V vocabulary, D hidden

from __future__ import annotations

from typing import Any, NamedTuple

import torch

VOCABULARY = 151_936
"""Of the Qwen models, rows of their heads."""


class LogitsShape(NamedTuple):
    """Logits [N, V]."""

    rows: int
    vocabulary: int

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocabulary}"


class LinearShape(NamedTuple):
    """Hidden states [N, D] and heads [V, D]."""

    rows: int
    vocabulary: int
    hidden: int

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocabulary} D={self.hidden}"


LOGITS_SHAPES = {
    "target": [LogitsShape(8192, VOCABULARY), LogitsShape(4096, VOCABULARY)],
    "small": [LogitsShape(64, 32_000), LogitsShape(480, 59)],
    "tiny": [LogitsShape(8, 1003)],
}
LINEAR_SHAPES = {
    "target": [LinearShape(rows, VOCABULARY, hidden) for rows in (8192, 4096) for hidden in (2560, 4096)],
    "small": [LinearShape(256, 16_000, 256)],
    "tiny": [LinearShape(8, 1003, 16)],
}
DTYPES = {"target": torch.bfloat16, "small": torch.float32, "tiny": torch.float32}

SIZES = tuple(LOGITS_SHAPES)


def choose_size(config: Any) -> str:
    """What `--bench-shapes` says, or what suits the machine."""
    return config.getoption("bench_shapes") or ("target" if torch.cuda.is_available() else "small")


def name_dtype(dtype: torch.dtype) -> str:
    """`fp32` or `bf16`."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
