"""The vision tower and its projector, whatever a family calls them: found by name, frozen together."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from imagine_opd.errors import ConfigError

_TOWERS = ("visual", "vision_tower", "vision_model", "vision_encoder")
_PROJECTORS = ("multi_modal_projector", "connector", "embed_vision", "mm_projector", "image_newline")


def find_vision_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the vision tower and of what projects its features to the text's width: modules, or bare parameters.

    Qwen-VL's projector (`merger`) lies inside its tower. Raises `ConfigError` when there is no tower.
    """
    named = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    found: list[str] = []
    for name in named:
        last = name.rsplit(".", 1)[-1]
        if last in _TOWERS + _PROJECTORS and not is_inside(name, tuple(found)):
            found.append(name)
    if not any(name.rsplit(".", 1)[-1] in _TOWERS for name in found):
        raise ConfigError(
            f"freeze_vision: no vision tower found in {type(model).__name__} (looked for {', '.join(_TOWERS)}); "
            "set freeze_vision=False, and freeze what should not train yourself (requires_grad_(False))"
        )
    return tuple(found)


def is_vision_name(name: str) -> bool:
    """Whether a module or parameter of this name is of a tower or a projector."""
    return not {*_TOWERS, *_PROJECTORS}.isdisjoint(name.split("."))


def is_inside(name: str, owners: tuple[str, ...]) -> bool:
    """Whether a module or parameter is one of `owners` or lies within one."""
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def make_vision_pattern(model: nn.Module) -> str:
    """A regular expression that matches every module of the tower and projector, for PEFT's `exclude_modules`."""
    return f"({'|'.join(re.escape(name) for name in find_vision_names(model))})(\\..*)?"


def freeze_vision_tower(model: Any) -> None:
    """Take tower and projector out of training."""
    names = find_vision_names(model)
    for name, parameter in model.named_parameters():
        if is_inside(name, names):
            parameter.requires_grad_(False)


def list_tower(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of tower and projector by name; of a model without a tower none. `model` has no PEFT wrapper."""
    try:
        names = find_vision_names(model)
    except ConfigError:
        return {}
    return {name: parameter for name, parameter in model.named_parameters() if is_inside(name, names)}


def is_tower_frozen(model: nn.Module) -> bool:
    """Whether tower and projector make the same of an image at every forward: nothing of them trains, and nothing in
    them is random. `model` has no PEFT wrapper."""
    tower = list_tower(model)
    if not tower or any(parameter.requires_grad for parameter in tower.values()):
        return False
    names = find_vision_names(model)
    dropouts = [part for name, part in model.named_modules() if isinstance(part, nn.Dropout) and is_inside(name, names)]
    config = getattr(model.config, "vision_config", None)
    rates = [value for name, value in vars(config).items() if "drop" in name] if config is not None else []
    return not any(isinstance(rate, (int, float)) and rate > 0 for rate in (*rates, *(part.p for part in dropouts)))
