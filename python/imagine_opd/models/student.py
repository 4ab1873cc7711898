"""The student's forward: opened, so that code which calls body and head runs inside it; paused, to be looked at.

DDP, FSDP2 and DeepSpeed gather, synchronise and cast in hooks around a model's call. A loss that reaches past the call
to body and head would find shards where it expects weights, and its gradients would stay on their rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)


def open_forward(model: Model) -> Model:
    """Let `model(inside=function)` return `function(model)`; any other call is the model's own forward, as before.

    What wraps the model later (DDP, FSDP2, autocast, PEFT) passes `inside` on, so `function` runs between the
    wrapper's hooks and gets the model that was opened here. Opening twice is opening once. Accelerate's autocast turns
    16-bit tensors in tuples, lists and dicts that a forward returns into fp32; a dataclass passes through untouched.
    """
    if is_open(model):
        return model
    own = model.__dict__.get("forward")
    if own is None:
        closed: Callable[..., Any] = type(model).forward
    else:
        # On the model, not in a closure: deepcopy then gives the copy its own, not one that runs the original.
        model.__dict__["_closed_forward"] = own

        @functools.wraps(getattr(own, "__func__", own))
        def closed(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._closed_forward(*args, **kwargs)

    # `wraps` keeps the signature: `generate` and the Trainer read from it which inputs the model takes.
    @functools.wraps(closed)
    def forward(self: Any, *args: Any, inside: Callable[[Any], Any] | None = None, **kwargs: Any) -> Any:
        return closed(self, *args, **kwargs) if inside is None else inside(self)

    forward.is_open = True  # type: ignore[attr-defined]
    model.__dict__["forward"] = MethodType(forward, model)
    return model


def is_open(model: nn.Module) -> bool:
    """Whether `open_forward` was called on this model (not on one that it wraps), whatever was put around since."""
    forward = model.__dict__.get("forward")
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if getattr(forward, "is_open", False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def run_inside(model: Any, function: Callable[[Any], Result]) -> Result:
    """`function(opened model)`, run inside the call of `model`: the opened model itself or anything wrapped around."""
    result: Result = model(inside=function)
    return result


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """The model to be looked at: eval mode (no dropout, no gradient checkpointing), no gradient. The mode of each of
    its modules and the random state are put back exactly, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            with _uncached_autocast(device.type):
                yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _uncached_autocast(device_type: str) -> Iterator[None]:
    """Autocast as it is around, without its cache: a weight cast here, without gradient, would be found by the next
    forward with gradient, and would get none."""
    with torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    ):
        yield
