"""What is refused before a run begins: settings that do not go with its rows, its rewards or the machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import ConfigError, RowError
from imagine_opd.models import get_base, has_adapter
from imagine_opd.parallel import name_parallelism
from imagine_opd.rewards import RewardFunction
from imagine_opd.types import Row


def refuse_bad_run(args: ImagineOPDConfig, train_rows: Sequence[Row], eval_rows: Sequence[Row] | None) -> None:
    """Raise `ConfigError` or `RowError` for settings that do not go with the rows or the machine."""
    if args.kernel_backend == "triton" and args.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"kernel_backend='triton' needs a CUDA device, this run has {args.device}; use 'auto'")
    if args.teacher_model_kind == "ema" and name_parallelism(args) == "zero3":
        raise ConfigError(
            "teacher_model_kind='ema' cannot follow a student that DeepSpeed ZeRO-3 holds in pieces of its own: "
            "use FSDP2 (configs/accelerate/fsdp2.yaml), or teacher_model_kind='base'"
        )
    if args.use_vllm:
        _refuse_vllm_processes(args)
    if str(args.eval_strategy.value) != "no" and eval_rows is None:
        raise ConfigError(f"eval_strategy={args.eval_strategy.value!r} needs eval_data")
    if eval_rows is not None and not any(row.answer is not None for row in eval_rows):
        raise RowError(f"none of the {len(eval_rows)} rows of eval_data has an answer to compare with")
    loading = args.accelerator_config
    for name, value in {"split_batches": False, "even_batches": True}.items():
        if getattr(loading, name) != value:
            raise ConfigError(
                f"accelerator_config {name}={getattr(loading, name)!r}: batches would differ over the processes, which "
                f"then wait for each other; set {value!r}"
            )
    if loading.dispatch_batches:
        raise ConfigError("accelerator_config dispatch_batches=True: rows are no tensors to share out; set False")
    if args.dataloader_drop_last and len(train_rows) < args.train_batch_size:
        raise ConfigError(
            f"dataloader_drop_last=True with {len(train_rows)} rows and a batch of {args.train_batch_size} leaves none"
        )


def _refuse_vllm_processes(args: ImagineOPDConfig) -> None:
    parallelism = name_parallelism(args)
    if parallelism in ("fsdp2", "zero3"):
        raise ConfigError(
            f"use_vllm=True: weights that {parallelism} splits over the processes are not sent to vLLM; train with "
            "DDP, or set use_vllm=False"
        )
    if args.vllm_mode == "colocate" and args.world_size > 1:
        raise ConfigError(
            f"vllm_mode='colocate' with {args.world_size} processes: each would start an engine among the others' "
            "process groups; set vllm_mode='server'"
        )


def refuse_own_folder(student: Any, args: ImagineOPDConfig) -> None:
    """Raise `ConfigError` for an adapter that would be saved over the model it belongs to, and name itself as base."""
    base = getattr(get_base(student), "name_or_path", "")
    if has_adapter(student) and base and Path(base).resolve() == Path(args.output_dir).resolve():
        raise ConfigError(
            f"output_dir={args.output_dir!r} holds the model that the adapter is trained on: saved there it would name "
            "itself as its base; choose another output_dir"
        )


def refuse_idle_rewards(functions: tuple[RewardFunction, ...], args: ImagineOPDConfig) -> tuple[RewardFunction, ...]:
    """The functions. Raises `ConfigError` where they could change nothing, or are asked for and missing."""
    if not functions and args.distill_failures_only:
        raise ConfigError("distill_failures_only needs rewards to tell failures by: pass reward_funcs")
    if functions and args.num_generations == 1 and args.reward_weight > 0 and not args.distill_failures_only:
        raise ConfigError(
            "reward_funcs with num_generations=1: a reward counts relative to the row's other completions; set "
            "num_generations to 2 or more, or reward_weight=0 with distill_failures_only=True"
        )
    return functions
