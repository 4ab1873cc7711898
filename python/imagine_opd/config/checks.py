"""What makes a value bad whatever the field: its kind, its keys, its placeholders."""

from __future__ import annotations

import math
import string
from typing import Any

from imagine_opd.errors import ConfigError


def refuse_bad_kind(name: str, value: Any, kind: str) -> None:
    """Raise `ConfigError` unless the value is of the field's annotated kind; numbers must be finite."""
    if value is None and "None" in kind:
        return
    kind = kind.split(" |")[0].split("[")[0]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "bool": isinstance(value, bool),
        "int": is_number and not isinstance(value, float),
        "float": is_number and math.isfinite(value),
        "str": isinstance(value, str),
        "dict": isinstance(value, dict),
    }
    expected = {"bool": "true or false", "int": "a whole number", "float": "a finite number", "str": "text"}
    if not fits.get(kind, True):
        raise ConfigError(f"{name}={value!r}: expected {expected.get(kind, 'a mapping')}")


def refuse_bad_template(name: str, template: str, fields: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the template holds exactly the placeholders in `fields`."""
    try:
        found = {key for _, key, _, _ in string.Formatter().parse(template) if key is not None}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}={template!r}: {error}") from error
    if found != set(fields):
        expected = ", ".join(f"{{{key}}}" for key in fields)
        raise ConfigError(f"{name}={template!r}: expected the placeholder {expected} and no other")
