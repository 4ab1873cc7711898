"""Tensors on their way to the device."""

from __future__ import annotations

import torch


def move_to(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """The tensor on `device`. To a GPU it goes through pinned memory, without the host waiting for it."""
    if device is None or torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
