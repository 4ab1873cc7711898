"""Fields of the guards: what is checked before and while a run goes, and when it stops."""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES: dict[str, tuple[str, ...]] = {}
RANGES: dict[str, tuple[float, float | None]] = {
    "teacher_check_rows": (1, None),
}


@dataclass
class GuardFields:
    """Checks.

    teacher_checks, teacher_check_rows: check the teacher before step 0, on that many rows.
    """

    teacher_checks: bool = field(default=True, metadata={"help": "Check the teacher before step 0."})
    teacher_check_rows: int = field(default=8, metadata={"help": "Rows used by the teacher checks."})
