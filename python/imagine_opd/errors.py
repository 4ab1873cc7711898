"""Every error a user can cause: one family, each member also the standard-library class it is."""

from __future__ import annotations


class ImagineError(Exception):
    """Base of all errors raised for the user's input; its text names what was found, where, and the fix."""


class ConfigError(ImagineError, ValueError):
    """A config field is unknown, has a bad value, or does not go with another field."""


class RowError(ImagineError, ValueError):
    """A row of the data is malformed: no question, a box without width, a missing image, …"""


class ImageError(ImagineError, ValueError):
    """An image cannot be read: missing, truncated, of an unknown format, or over the limits."""


class TeacherError(ImagineError, RuntimeError):
    """The teacher cannot teach: another vocabulary, dead weights, or it does not see its own view."""


class EngineError(ImagineError, RuntimeError):
    """A rollout engine cannot be used: not reachable, another model, other image sizes, or other weights than ours."""


class OutputError(ImagineError, OSError):
    """A folder or file of the run cannot be written."""


class AnswerError(ImagineError, ValueError):
    """An answer cannot be scored as asked: an unknown kind, or gold text that does not parse."""


class RunStoppedError(ImagineError, SystemExit):
    """A run was stopped by a signal after it saved a checkpoint. Uncaught, the process ends with 128 + the signal."""

    code: int

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.code = 128 + signal_number


class DivergenceError(ImagineError, ArithmeticError):
    """The run makes figures that are not finite, step after step, and cannot go on."""


class DeviceMemoryError(ImagineError, MemoryError):
    """A micro-batch, rollout or check does not fit into memory; the text says what it held and what to change."""
