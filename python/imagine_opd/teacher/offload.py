"""Weights held in host memory and brought to the device block by block, while a block's forward runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn


def hold_on_cpu(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Keep every block's weights in host memory (pinned for CUDA); the rest of the model goes to `device` for good.

    A block is an element of an outermost `ModuleList`: a decoder layer, a block of the vision tower. While it does not
    run, its parameters are placeholders without memory (`meta`). Returns the held weights by parameter name: the
    memory that is read at each forward, so a change in place is seen by the next one.
    """
    held: dict[str, Tensor] = {}
    device = torch.device("cpu") if device.type == "cpu" else device  # "cpu:0" is another device to `Tensor.to`
    for prefix, block in find_blocks(model):
        weights = {name: _move_to_host(parameter.data, device) for name, parameter in block.named_parameters()}
        held.update({f"{prefix}.{name}": weight for name, weight in weights.items()})
        hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(block, hook)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            tensor.data = tensor.data.to(device)
    return held


def find_blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The elements of every outermost `ModuleList`, by name."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{prefix}{name}.{index}", block) for index, block in enumerate(child))
        else:
            yield from find_blocks(child, f"{prefix}{name}.")


def _move_to_host(weight: Tensor, device: torch.device) -> Tensor:
    weight = weight.to("cpu")
    return weight.pin_memory() if device.type == "cuda" else weight
