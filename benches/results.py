"""What a run of the benches has found, kept in pytest's stash for the profile table at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from benches.table import Row, render_left_out, render_text


@dataclass
class Results:
    """Rows and absent implementations in the order of the cases, and what they ran on."""

    device: str
    on_gpu: bool
    rows: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def render(self) -> str:
        """The profile table with its notes."""
        note = (
            f"{self.device}: rates are the least work of the case over its time, held against the measured ceilings"
            if self.on_gpu
            else f"{self.device}, no CUDA device: PyTorch twins at small shapes, where nothing but the ratios counts"
        )
        return "\n".join(filter(None, [note, self.rows and render_text(self.rows), render_left_out(self.left_out)]))


RESULTS = pytest.StashKey[Results]()
