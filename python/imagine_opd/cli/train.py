"""`imagine-opd train`: a YAML file and `--field value` options to one call of `imagine_opd.train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from imagine_opd.errors import ConfigError

_CALL_FIELDS = ("model", "data", "output_dir", "processor", "eval_data", "teacher", "resume_from_checkpoint")


def run_train(config: str, overrides: dict[str, Any]) -> None:
    """Train as the file and the options say; print where the model lies. Raises `ConfigError` and what `train` does."""
    from imagine_opd.api import train

    fields = {**read_config(config), **overrides}
    for name in ("model", "data"):
        if fields.get(name) is None:
            raise ConfigError(f"{config}: has no {name!r}; set it there or with --{name}")
    call = {name: fields.pop(name) for name in _CALL_FIELDS if name in fields}
    result = train(call.pop("model"), call.pop("data"), **call, **read_numbers(fields))
    print(f"trained {result.global_step} steps; the model is in {result.output_dir}")


def read_config(config: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file. Raises `ConfigError` naming the file and the line."""
    path = Path(config)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected fields such as 'model: ...', found {type(fields).__name__}")
    return {str(name): value for name, value in fields.items()}


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--field value` and `--field=value` pairs; values read as YAML. Raises `ValueError` for anything else."""
    overrides: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"expected --field value, found {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not waiting:
                raise ValueError(f"--{name} has no value")
            value = waiting.pop(0)
        try:
            overrides[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            overrides[name.replace("-", "_")] = value
    return overrides


def read_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Text such as `1e-6`, which YAML does not take for a number, as a float where the field is one."""
    from imagine_opd.config import ImagineOPDConfig

    kinds = {item.name: str(item.type) for item in dataclasses.fields(ImagineOPDConfig)}
    read = {}
    for name, value in fields.items():
        if isinstance(value, str) and "float" in kinds.get(name, "") and "str" not in kinds.get(name, ""):
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{name}={value!r}: expected a number") from None
        read[name] = value
    return read
