"""The implementations behind one set of names: PyTorch everywhere, Triton on a GPU (or in Triton's interpreter)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from imagine_opd.errors import ConfigError
from imagine_opd.kernels.types import BackendName

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Once, here: torch.compile cannot trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_MODULES = {"triton": "launches_triton", "reference": "reference"}


class Backend(NamedTuple):
    """The passes of one implementation; signatures and meaning as in `reference`."""

    compute_stats: Callable[..., Tensor]
    compute_gradient: Callable[..., Tensor]
    compute_both: Callable[..., Tensor]
    look_again: Callable[..., Tensor]
    compute_state: Callable[..., Tensor]
    finish_state: Callable[..., Tensor]
    scale: Callable[[Tensor, Tensor], Tensor]


@functools.cache
def load_backend(name: str) -> Backend:
    """The backend called "triton" or "reference"; Triton is imported here and nowhere earlier."""
    module: Any = importlib.import_module(f"imagine_opd.kernels.{_MODULES[name]}")
    return Backend(*(getattr(module, field) for field in Backend._fields))


def choose_backend(name: BackendName, tensors: dict[str, torch.Tensor]) -> str:
    """ "triton" or "reference" for the tensors that the kernels would read. Raises `ConfigError` when it cannot be."""
    if name not in get_args(BackendName):
        raise ConfigError(f"backend is {name!r}; expected one of {', '.join(map(repr, get_args(BackendName)))}")
    fits = all(tensor.dtype in _TRITON_DTYPES for tensor in tensors.values())
    is_cuda = all(tensor.is_cuda for tensor in tensors.values())
    if name == "auto":
        return "triton" if is_cuda and fits and _HAS_TRITON else "reference"
    if name == "reference":
        return "reference"
    if not fits:
        found = ", ".join(f"{label} {tensor.dtype}" for label, tensor in tensors.items())
        raise ConfigError(
            f"{found}: backend 'triton' takes float32, bfloat16 and float16, backend 'reference' takes the others"
        )
    if not _HAS_TRITON:
        raise ConfigError("backend 'triton' needs the triton package; install it or take backend 'reference'")
    # Off the GPU a kernel runs in Triton's interpreter only, which is how the tests check it.
    if not is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        label, tensor = next(iter(tensors.items()))
        raise ConfigError(f"{label} are on {tensor.device}; backend 'triton' needs a CUDA device")
    return "triton"
