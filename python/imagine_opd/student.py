"""The student's open forward: code that calls its body and head runs inside its own `forward`.

DDP, FSDP2 and DeepSpeed gather, synchronise and cast in hooks around a model's call. A loss that reaches past the call
to body and head would find shards where it expects weights, and its gradients would stay on their rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

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
