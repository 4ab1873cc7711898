"""What the tests of weights share: a student prepared from config fields, its inputs, what a teacher says of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from imagine_opd.config import build_config
from imagine_opd.models.access import find_head, get_body
from imagine_opd.models.peft_models import find_adapter_layers, prepare_student
from imagine_opd.privilege import PrivilegeConfig, build_prompts
from imagine_opd.rollout.hf import pad_prompts
from imagine_opd.views import make_views

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


def make_config(tmp_path, **fields):
    return build_config(tmp_path, {"report_to": "none", "use_cpu": True, **fields})


def make_student(tiny, tmp_path, peft_config=None, **fields) -> Any:
    return prepare_student(copy.deepcopy(tiny.model), make_config(tmp_path, **fields), peft_config)


def make_inputs(tiny, make_rows, count=2) -> dict[str, torch.Tensor]:
    rows = make_rows(count)
    views = make_views(rows, tiny.view_config)
    config = PrivilegeConfig("{question}", "{question}")
    pairs = [build_prompts(row, view, tiny.processor, config) for row, view in zip(rows, views, strict=True)]
    return pad_prompts([pair.teacher for pair in pairs], 0, torch.device("cpu"))


def project(inputs):
    """A function of a module: its logits, by body and head as scoring calls them."""

    def run(module: Any) -> torch.Tensor:
        return find_head(module)(get_body(module)(**inputs, use_cache=False).last_hidden_state)

    return run


def shake(model: Any, size: float = 0.05, seed: int = 1) -> None:
    """Move every weight that trains, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter.dtype))


def wrap_layers(model: Any) -> None:
    """As accelerate's `fsdp_activation_checkpointing` does: names of parameters gain a part."""
    layers = model.get_decoder().layers
    for place, layer in enumerate(layers):
        layers[place] = checkpoint_wrapper(layer)


def measure_bytes(model: Any) -> int:
    """Memory of the parameters, each counted once."""
    sizes = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta"}
    return sum(sizes.values())


def read_modes(model: Any) -> dict[str, Any]:
    """Everything about a model that looking through its teacher must leave as it was."""
    layers = [(layer.disable_adapters, tuple(layer.active_adapters)) for layer in find_adapter_layers(model)]
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "adapters": layers,
        "memory": {name: p.data_ptr() for name, p in model.named_parameters()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }
