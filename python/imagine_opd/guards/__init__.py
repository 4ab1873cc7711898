"""What watches a run: collapse monitors, steps that are not finite, images of the wrong row."""

from imagine_opd.guards.run import RunGuards

__all__ = [
    "RunGuards",
]
