"""Weights in a file, for an engine that lives in other processes, and the folders that such a file must not go to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from imagine_opd.errors import ConfigError, OutputError

WEIGHTS_FILE = "model.safetensors"
_OURS = {"format": "pt", "written_by": "imagine_opd for vllm"}


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
        save_file(tensors, unfinished, metadata=_OURS)
        unfinished.replace(folder / WEIGHTS_FILE)
    except OSError as error:
        raise OutputError(f"{folder}: the weights for vLLM cannot be written ({error}); set vllm_sync_dir") from error


def refuse_foreign_folder(folder: Path, model_name: str, output_dir: Path) -> None:
    """Raise `ConfigError` for a folder whose `model.safetensors` would be somebody's: a model's, or the run's own."""
    found = _find_foreign(folder)
    if folder == output_dir.resolve():
        found = "it is output_dir, where the trained model is saved"
    elif model_name and folder == Path(model_name).resolve():
        found = "it is the folder of the model that is trained"
    if found:
        raise ConfigError(
            f"{folder}: the weights for vLLM cannot go there, {found}; set vllm_sync_dir to a new folder for them "
            "alone, or leave it out for one in output_dir"
        )


def _find_foreign(folder: Path) -> str:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name == "config.json" or path.name.endswith(".index.json"):
            return f"{path.name} says that it holds a model"
        if path.suffix == ".safetensors" and not _is_ours(path):
            return f"{path.name} was not written for vLLM"
    return ""


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}) == _OURS
    except (OSError, SafetensorError):
        return False
