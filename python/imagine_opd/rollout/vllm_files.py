"""Weights in a file, for an engine that lives in other processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from imagine_opd.errors import OutputError

WEIGHTS_FILE = "model.safetensors"


def write_weights(weights: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `model.safetensors`, floating-point weights as `dtype` where one is given; a reader sees all or nothing.

    Tensors of one memory are written each for itself: vLLM takes a tied head from its own name or leaves it out.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", wanted, copy=True).contiguous()
    unfinished = folder / f".{WEIGHTS_FILE}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.replace(folder / WEIGHTS_FILE)
    except OSError as error:
        raise OutputError(f"{folder}: the weights for vLLM cannot be written ({error}); set vllm_sync_dir") from error
