"""Several processes: sums over ranks, and a sharded model's weights made whole for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each figure summed over all processes; the names must be the same on each."""
    if not _is_several():
        return dict(values)
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=_device())
    distributed.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def max_over_ranks(value: int) -> int:
    """The largest over all processes."""
    if not _is_several():
        return value
    largest = torch.tensor(value, device=_device())
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest)


def gather_figures(own: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    if not _is_several():
        return [own]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def is_sharded(model: Any) -> bool:
    """Whether a forward of the model takes collectives (FSDP2)."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@contextmanager
def gather_parameters(model: Any) -> Iterator[Any]:
    """The model with whole weights for generation."""
    yield getattr(model, "module", model)


def _is_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
