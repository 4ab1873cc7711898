"""Sharded weights: made whole for a while, copied, and a teacher sharded as its student is.

With one process or DDP every rank holds whole weights. FSDP2 and DeepSpeed ZeRO-3 leave it a shard; there all ranks
must go through the same calls, for a forward of one alone waits for the others until the timeout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_fsdp2(model: Any) -> bool:
    """Whether FSDP2 shards the model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(unwrap_parallel(model), FSDPModule)


def is_zero3(model: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 shards the model."""
    return any(hasattr(parameter, "ds_id") for parameter in unwrap_parallel(model).parameters())


def is_gathered(parameter: torch.Tensor) -> bool:
    """Whether a parameter that ZeRO-3 shards is whole now, as inside `gather_parameters`."""
    return parameter.numel() == getattr(parameter, "ds_numel", None)


def is_sharded(model: Any) -> bool:
    """Whether a forward of the model takes collectives: all ranks must call it as often."""
    return is_fsdp2(model) or is_zero3(model)


def unwrap_parallel(model: Any) -> Any:
    """The model inside DDP, a DeepSpeed engine or `torch.compile`. FSDP2 is the model itself."""
    from torch.nn.parallel import DistributedDataParallel

    while True:
        if isinstance(model, DistributedDataParallel) or _is_engine(model):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def strip_wrappers(name: str) -> str:
    """A parameter's name without what FSDP's activation checkpointing puts into it."""
    return name.replace("_checkpoint_wrapped_module.", "")


@contextmanager
def gather_parameters(model: Any) -> Iterator[Any]:
    """The unwrapped model with whole weights on every rank, for generation; sharded again on leaving.

    Inside, forwards take no collectives, so ranks may differ in their number. All ranks enter and leave together.
    Whole weights are held once, in the dtype that forwards compute in.
    """
    whole = unwrap_parallel(model)
    if is_fsdp2(whole):
        with _gather_fsdp2(whole):
            yield whole
    elif is_zero3(whole):
        with _gather_zero3(model, whole):
            yield whole
    else:
        yield whole


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter or its gradient as a whole tensor, detached; on all ranks together."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        whole: torch.Tensor = tensor.full_tensor()
        return whole.detach()
    if hasattr(tensor, "ds_id") and not is_gathered(tensor):  # leaving a second gathering would split it again
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@contextmanager
def building_whole() -> Iterator[None]:
    """Models made inside are whole: transformers would have DeepSpeed ZeRO-3 split them, by all processes together."""
    from transformers.integrations import deepspeed as integration

    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def shard_like(teacher: Any, student: Any) -> Any:
    """The frozen teacher sharded as the student is: the same mesh, precision and kinds of layers; as it is under DDP.

    Weights must be whole and equal on all ranks. All of a layer's weights are freed after its forward, the root's too.
    """
    if is_fsdp2(student) and not is_fsdp2(teacher):
        return _shard_fsdp2(teacher, unwrap_parallel(student))
    if is_zero3(student) and not _is_engine(teacher):
        return _shard_zero3(teacher, student)
    return teacher


def _is_engine(model: Any) -> bool:
    # By name: DeepSpeed is not imported where it is not used.
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def _fsdp_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _fsdp_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [state._fsdp_param_group] * (state._fsdp_param_group is not None)


@contextmanager
def _gather_fsdp2(model: Any) -> Iterator[None]:
    modules = _fsdp_modules(model)
    # First, so that the root is known to be the root: a part of it may be the first to run (PEFT's `generate`).
    model._get_fsdp_state()._lazy_init()
    # There is no public way to read what `set_reshard_after_forward` sets, and groups differ in it.
    meshes = [(group, group.post_forward_mesh_info) for module in modules for group in _fsdp_groups(module)]
    # `transformers` has FSDP2 treat `generate` as a forward around the model's own, after which the root is split
    # again: the next call would gather, and wait for ranks that have no next call.
    wrapped = model.__dict__.pop("generate", None)
    try:
        for group, _ in meshes:
            group.post_forward_mesh_info = None  # stay whole after a forward
        for module in modules:
            module.unshard()
        yield
    finally:
        if wrapped is not None:
            model.__dict__["generate"] = wrapped
        for group, mesh in meshes:
            group.post_forward_mesh_info = mesh
        for module in modules:
            module.reshard()


@contextmanager
def _gather_zero3(engine: Any, model: Any) -> Iterator[None]:
    import deepspeed

    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if offload is None:  # sharded at loading, before there is an engine: nothing frees the weights
            yield
            return
        # Its hooks would free a layer's weights after the layer's forward and wait for the others to gather them.
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


def _shard_fsdp2(teacher: Any, student: Any) -> Any:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    own = student._get_fsdp_state()
    options = {
        "mesh": next(p.device_mesh for p in student.parameters() if isinstance(p, DTensor)),
        "mp_policy": own._mp_policy,
        "offload_policy": next(group for m in _fsdp_modules(student) for group in _fsdp_groups(m)).offload_policy,
        "reshard_after_forward": True,
    }
    ends = (student, student.get_input_embeddings(), student.get_output_embeddings())
    layers = {
        # `fully_shard` gives a module a class of its own, below `FSDPModule` and the class it had.
        next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
        for module in _fsdp_modules(student)
        if module not in ends and len(module._get_fsdp_state()._modules) == 1
    }
    for module in reversed([module for module in teacher.modules() if type(module) in layers]):
        fully_shard(module, **options)
    # Embedding and head stay in the root's group: the head's weight is read inside the root's forward.
    fully_shard(teacher, **options)
    return teacher


def _shard_zero3(teacher: Any, engine: Any) -> Any:
    import deepspeed

    config = {name: value for name, value in engine.config.items() if name not in ("optimizer", "scheduler")}
    sharded = deepspeed.initialize(model=teacher, config=copy.deepcopy(config))[0]
    sharded.eval()
    return sharded
