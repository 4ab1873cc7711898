"""Several processes: figures over all ranks, and launches that would train something else made right or refused."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed

from imagine_opd.errors import ConfigError

# Figures


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each figure summed over all processes; a name that a process lacks counts as 0 there."""
    sums: dict[str, float] = {}
    for own in gather_figures(dict(values)):
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def sum_tensor_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor summed over all processes; its shape and dtype must be the same on each."""
    if not _is_several():
        return tensor
    total = tensor.to(_device(), copy=True)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def get_place() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (distributed.get_rank(), distributed.get_world_size()) if _is_several() else (0, 1)


def gather_figures(own: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    if not _is_several():
        return [own]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


# Launches


def name_parallelism(args: Any) -> str:
    """How processes share the model: `none` (one process), `ddp`, `fsdp2`, or DeepSpeed's `zero1`, `zero2`, `zero3`."""
    if args.world_size == 1:
        return "none"
    if args.deepspeed or _is_true("ACCELERATE_USE_DEEPSPEED"):
        plugin = getattr(args, "deepspeed_plugin", None)
        # Accelerate's own default is 2.
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") if plugin is None else plugin.zero_stage
        return f"zero{stage}" if int(stage) else "ddp"
    return "fsdp2" if args.fsdp or _is_true("ACCELERATE_USE_FSDP") else "ddp"


def settle_launch(args: Any) -> None:
    """Make the launch what was asked for, or raise `ConfigError`; call it before the model is loaded.

    Accelerate takes FSDP and DeepSpeed for GPUs only: CPU processes would train DDP without a word. Here they are
    sharded over gloo, as tests and rehearsals need it.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise ConfigError(
            f"{started} processes were started and each would train alone, as this machine has no GPU: "
            "set use_cpu=True to train on CPU together"
        )
    on_cpu = PartialState().distributed_type == DistributedType.MULTI_CPU
    if bool(args.fsdp) or _is_true("ACCELERATE_USE_FSDP"):
        _refuse_bad_fsdp(args)
        if on_cpu:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    elif on_cpu and (bool(args.deepspeed) or _is_true("ACCELERATE_USE_DEEPSPEED")):
        import deepspeed

        deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # it would turn DeepSpeed off again; `args.device` is settled


def _refuse_bad_fsdp(args: Any) -> None:
    chosen = (args.fsdp_plugin_args or {}) if args.fsdp else {}
    version = int(chosen.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ConfigError(f"fsdp_version={version}: the loss runs inside the model's forward, which needs FSDP2; set 2")
    if _is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading=true loads the weights in one process only, and the teacher is made before "
            "they are shared out; set it to false"
        )


def count_own_rows(rows: int, batch_size: int, rank: int, ranks: int) -> int:
    """How many rows of a process's last batch of an epoch are its own; the rest repeat the epoch's first rows.

    Accelerate fills the last batches up so that all processes have as many.
    """
    left = rows % (batch_size * ranks)
    return batch_size if left == 0 else min(max(left - rank * batch_size, 0), batch_size)


def keep_fp32_results(accelerator: Any) -> None:
    """Under FSDP2 in 16 bits: reduce gradients in fp32, and return the loss and its figures as they were computed.

    Accelerate's own policy rounds both to 16 bits.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and policy is not None and policy.param_dtype is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def _is_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _device() -> torch.device:
    # FSDP's backend is "cuda:nccl,cpu:gloo".
    return torch.device("cuda" if "nccl" in str(distributed.get_backend()) else "cpu")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
