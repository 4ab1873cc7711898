"""Which engine a run samples with, and the weights that one with a copy of its own is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from imagine_opd.config import ImagineOPDConfig
from imagine_opd.config.vllm import list_shaping, make_url
from imagine_opd.models import TokenIds, get_base, has_adapter
from imagine_opd.parallel import strip_wrappers
from imagine_opd.rollout import HFEngine, RolloutEngine
from imagine_opd.rollout.vllm import VLLMBackend, VLLMEngine
from imagine_opd.rollout.vllm_colocate import ColocateBackend, ColocateSettings, import_vllm
from imagine_opd.rollout.vllm_files import refuse_foreign_folder
from imagine_opd.rollout.vllm_server import ServerBackend, ServerSettings
from imagine_opd.teacher.merging import compute_merged_state
from imagine_opd.types import ViewConfig
from imagine_opd.vision_features import VisionFeatures

SYNC_FOLDER = "vllm_weights"
"""In `output_dir`: the weights that a server reads, where `vllm_sync_dir` names no other folder."""


def build_engine(
    student: Any,
    args: ImagineOPDConfig,
    token_ids: TokenIds,
    processor: Any,
    view_config: ViewConfig,
    features: VisionFeatures | None = None,
) -> RolloutEngine:
    """The engine that the config names; vLLM itself starts with the first rollout. Raises `ConfigError`.

    features: of a step's images, made and kept where the model itself samples.
    """
    if not args.use_vllm:
        return HFEngine(token_ids, features, args.share_prefill)
    dtype = choose_dtype(student, args)
    backend: VLLMBackend
    if args.vllm_mode == "colocate":
        import_vllm()  # missing: said before views and teacher are made
        settings = ColocateSettings(
            dtype=str(dtype).removeprefix("torch."),
            temperature=args.temperature,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            max_model_length=args.vllm_max_model_length,
            model_impl=args.vllm_model_impl,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
        )
        backend = ColocateBackend(processor, view_config, settings, read_checkpoint_weights)
    else:
        folder = Path(args.vllm_sync_dir or Path(args.output_dir, SYNC_FOLDER)).resolve()
        is_synced = args.vllm_server_sync == "reload"
        if is_synced:
            refuse_foreign_folder(folder, getattr(get_base(student), "name_or_path", ""), Path(args.output_dir))
        address = ServerSettings(
            url=make_url(args),
            timeout_s=args.vllm_server_timeout,
            sync_folder=folder if is_synced else None,
            dtype=dtype,
            temperature=args.temperature,
            is_shaped=bool(list_shaping(args)),
        )
        state = args.distributed_state
        is_main = state is None or state.is_main_process
        backend = ServerBackend(
            address, read_checkpoint_weights, is_main, state.wait_for_everyone if state is not None else lambda: None
        )
    return VLLMEngine(token_ids, view_config, backend, args.vllm_enable_sleep_mode)


def choose_dtype(student: Any, args: ImagineOPDConfig) -> torch.dtype:
    """What the student computes in: the engine's weights are of that dtype."""
    if args.bf16:
        return torch.bfloat16
    if args.fp16:
        return torch.float16
    dtype: torch.dtype = next(p.dtype for p in get_base(student).parameters() if p.is_floating_point())
    return dtype


def read_checkpoint_weights(model: Any) -> Mapping[str, torch.Tensor]:
    """The weights by the names and in the shapes that a checkpoint has, which is what vLLM's own loader reads.

    An adapter is merged into copies of the base's weights; the model stays as it is. Without one these are the model's
    own tensors, not copies.
    """
    base = get_base(model)
    state = compute_merged_state(model) if has_adapter(model) else _read_own_state(base)
    weights: Mapping[str, torch.Tensor] = revert_weight_conversion(base, state)
    return weights


def _read_own_state(model: Any) -> dict[str, torch.Tensor]:
    # With tied weights under each of their names: an engine may have a head of its own.
    return {strip_wrappers(name): tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
