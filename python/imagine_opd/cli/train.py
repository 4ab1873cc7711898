"""`imagine-opd train`: a YAML file and `--field value` options to one call of `imagine_opd.train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from imagine_opd.errors import ConfigError

_CALL_FIELDS = ("model", "data", "output_dir", "processor", "eval_data", "teacher", "resume_from_checkpoint", "dry_run")


def run_train(config: str, overrides: dict[str, str]) -> None:
    """Train as the file and the options say; print where the model lies. Raises `ConfigError` and what `train` does."""
    from imagine_opd.api import train

    result = train(**read_call(config, overrides))
    if result.global_step:
        print(f"trained {result.global_step} steps; the model is in {result.output_dir}")


def read_call(config: str, overrides: dict[str, str]) -> dict[str, Any]:
    """The arguments of `imagine_opd.train` that a file and the options give. Raises `ConfigError`."""
    fields = {**read_config(config), **read_overrides(overrides)}
    for name in ("model", "data"):
        if fields.get(name) is None:
            raise ConfigError(f"{config}: has no {name!r}; set it there or with --{name}")
    call = {name: fields.pop(name) for name in _CALL_FIELDS if name in fields}
    return {**call, **read_numbers(fields)}


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


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`--field value` and `--field=value` pairs as text. Raises `ValueError` for anything else."""
    overrides: dict[str, str] = {}
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
        overrides[name.replace("-", "_")] = value
    return overrides


def read_overrides(overrides: dict[str, str]) -> dict[str, Any]:
    """Option texts as values: a text field takes the words as they stand, any other is read as YAML."""
    kinds = read_kinds()
    read: dict[str, Any] = {}
    for name, value in overrides.items():
        is_text = kinds.get(name, "").startswith("str") or name in _CALL_FIELDS
        is_text = is_text and name not in ("resume_from_checkpoint", "dry_run")  # a folder, or true; true
        try:
            read[name] = value if is_text else yaml.safe_load(value)
        except yaml.YAMLError:
            read[name] = value
    return read


def read_kinds() -> dict[str, str]:
    """The annotation of every config field."""
    from imagine_opd.config import ImagineOPDConfig

    return {item.name: str(item.type) for item in dataclasses.fields(ImagineOPDConfig)}


def read_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Text such as `1e-6`, which YAML does not take for a number, as a float where the field is one."""
    kinds = read_kinds()
    read = {}
    for name, value in fields.items():
        if isinstance(value, str) and "float" in kinds.get(name, "") and "str" not in kinds.get(name, ""):
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{name}={value!r}: expected a number") from None
        read[name] = value
    return read
