"""How a step's cost grows: a kept run in; a picture of time outside generation and peak memory out.

    python -m benches.step_plot benches/baselines/step_cpu.json docs/images/step_growth.svg

Time is a multiple of our step's at the point all three rows of panels share, so that no seconds of a CPU are quoted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benches.step_table import StepResults, StepRow, read_results
from benches.table import OURS

GROUPS = {"crops": "crops a row", "new_tokens": "completion tokens a row", "vocabulary": "vocabulary, thousands"}
SHARED = "peers"
COLORS = {OURS: "#1f6f8b", "plain": "#c1442d", "plain, completion logits": "#d99a2b"}


@dataclass(frozen=True)
class Curve:
    """One peer over one quantity."""

    peer: str
    values: tuple[float, ...]
    times: tuple[float, ...]
    """Outside generation, in multiples of ours at the shared point."""
    peaks_mib: tuple[float, ...]


def make_curves(rows: Sequence[StepRow], group: str, cpu: bool) -> list[Curve]:
    """The curves of a group; the first case of the table, which lies on all of them, is in each."""
    base = next(row for row in rows if row.group == SHARED and row.peer == OURS)
    shared = [row for row in rows if row.group == SHARED and row.case == base.case]
    unit = base.read_s("outside", cpu)
    scale = 1000 if group == "vocabulary" else 1
    curves = []
    for peer in COLORS:
        points = [row for row in rows if row.group == group and row.peer == peer]
        if not points:
            continue
        points += [row for row in shared if row.peer == peer]
        points.sort(key=lambda row: getattr(row, group))
        curves.append(
            Curve(
                peer,
                tuple(getattr(row, group) / scale for row in points),
                tuple(row.read_s("outside", cpu) / unit for row in points),
                tuple(row.peak_mib for row in points),
            )
        )
    return curves


def draw(results: StepResults, path: Path) -> None:
    """Three columns: crops, tokens, vocabulary; time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file for the same figures: names inside it come from a fixed salt, and text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "step", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = pyplot.subplots(2, len(GROUPS), figsize=(9, 4.6), sharey="row", squeeze=False)
        for column, (group, label) in enumerate(GROUPS.items()):
            for curve in make_curves(results.rows, group, cpu=not results.on_gpu):
                for panel, values in ((panels[0][column], curve.times), (panels[1][column], curve.peaks_mib)):
                    panel.plot(curve.values, values, "o-", markersize=3.5, color=COLORS[curve.peer], label=curve.peer)
            panels[1][column].set_xlabel(label)
            for panel in panels[:, column]:
                panel.grid(alpha=0.3)
                panel.spines[["top", "right"]].set_visible(False)
        panels[0][0].set_ylabel("outside generation\n(ours with 3 crops = 1)")
        panels[1][0].set_ylabel("peak above what\nis held, MiB")
        for panel in panels[:, 0]:
            panel.set_ylim(bottom=0)  # of the whole row, once all of it is drawn
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(COLORS), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.94))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


if __name__ == "__main__":
    draw(read_results(Path(sys.argv[1])), Path(sys.argv[2]))
