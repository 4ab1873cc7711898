"""Leaks: what a completion gives away of the privilege, measured and weighed in the loss."""

from imagine_opd.leaks.meter import LeakMeter
from imagine_opd.leaks.weighing import unlikelihood

__all__ = [
    "LeakMeter",
    "unlikelihood",
]
