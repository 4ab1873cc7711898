"""The teacher: which weights teach, where they lie, how they follow the student, and whether they still teach."""

from imagine_opd.teacher.checks import TeacherReport, check_teacher
from imagine_opd.teacher.load import MOVING_TEACHER, Teacher, build_teacher
from imagine_opd.teacher.merging import refuse_unmergeable, replace_adapter
from imagine_opd.teacher.probe import STUDENT, PrivilegeProbe, build_probe, measure_sides, split_privilege
from imagine_opd.teacher.watch import (
    TeacherRecord,
    TeacherWatchCallback,
    check_teacher_again,
    record_teacher,
    refuse_blind_batch,
)

__all__ = [
    "MOVING_TEACHER",
    "STUDENT",
    "PrivilegeProbe",
    "Teacher",
    "TeacherRecord",
    "TeacherReport",
    "TeacherWatchCallback",
    "build_probe",
    "build_teacher",
    "check_teacher",
    "check_teacher_again",
    "measure_sides",
    "record_teacher",
    "refuse_blind_batch",
    "refuse_unmergeable",
    "replace_adapter",
    "split_privilege",
]
