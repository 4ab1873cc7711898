"""What an adapter adds to the base weights, as one dense fp32 matrix per layer, and a model with it added.

LoRA: W' = W + s B A. DoRA: W' = m (W + s B A) / |W + s B A|, norms over a row, m the learnt magnitudes.
"""

# O outputs, I inputs, R rank

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from imagine_opd.errors import ConfigError, OutputError
from imagine_opd.models import ADAPTER_FILE, ADAPTER_WEIGHTS, find_adapter_layers, get_base, has_adapter
from imagine_opd.parallel import building_whole, gather_full_tensor, strip_wrappers


def get_local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_lora_layers(model: Any) -> dict[str, Any]:
    """LoRA and DoRA layers by the name of the base weight they change. Raises `ConfigError` for any other adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, layer in get_base(model).named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        refuse_other_adapter(name, layer)
        found[f"{strip_wrappers(name)}.weight"] = layer
    return found


def find_saved_modules(model: Any) -> dict[str, Any]:
    """The wrappers of `modules_to_save` by name. Raises `ConfigError` for a module that has parts of its own."""
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    found = {}
    for name, wrapper in get_base(model).named_modules():
        if not isinstance(wrapper, AuxiliaryTrainingWrapper):
            continue
        if not isinstance(wrapper, ModulesToSaveWrapper) or any(wrapper.original_module.children()):
            raise ConfigError(f"the adapter trains {name} in a way that cannot be merged here")
        found[strip_wrappers(name)] = wrapper
    return found


def refuse_other_adapter(name: str, layer: Any) -> None:
    """Raise `ConfigError` unless the layer is LoRA or DoRA on a linear layer."""
    linear = isinstance(layer.get_base_layer(), nn.Linear) and hasattr(layer, "lora_A")
    plain = linear and not getattr(layer, "fan_in_fan_out", False) and not any(layer.lora_bias.values())
    variants = layer.lora_variant.values() if linear else ()
    names = {(variant if isinstance(variant, type) else type(variant)).__name__ for variant in variants}
    if not plain or names - {"DoraLinearVariant"} or layer.merged:
        raise ConfigError(
            f"{name}: its adapter ({type(layer).__name__}) has no merged difference here; expected LoRA or DoRA on a "
            "linear layer, without bias and not merged"
        )


def compute_delta(layer: Any, whole: bool = False) -> Tensor:
    """`[O, I]` fp32: the merged weight minus the base weight. Of a sharded layer the process's own rows, or with
    `whole` all of them (every process must call)."""
    take = gather_full_tensor if whole else get_local
    with torch.no_grad():
        base_OI = take(layer.get_base_layer().weight).float()
        delta_OI = torch.zeros_like(base_OI)
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            a_RI = gather_full_tensor(layer.lora_A[adapter].weight).float()
            b_OR = take(layer.lora_B[adapter].weight).float()
            low_rank_OI = layer.scaling[adapter] * (b_OR @ a_RI)
            if adapter in layer.lora_magnitude_vector:
                merged_OI = base_OI + low_rank_OI
                magnitude_O = take(layer.lora_magnitude_vector[adapter].weight).float()
                low_rank_OI = merged_OI * (magnitude_O / torch.linalg.norm(merged_OI, dim=1))[:, None] - base_OI
            delta_OI += low_rank_OI
    return delta_OI


def has_no_effect(model: Any) -> bool:
    """Whether the adapter is a fresh LoRA or DoRA, which changes nothing yet."""
    matrices = [b for layer in find_adapter_layers(model) for b in getattr(layer, "lora_B", {}).values()]
    return bool(matrices) and all(not bool(gather_full_tensor(matrix.weight).any()) for matrix in matrices)


def compute_merged_state(model: Any) -> dict[str, Tensor]:
    """The weights of the plain model with its adapter merged in fp32 and rounded once to the base's dtype, on CPU.

    Of a sharded model every process must call.
    """
    base = get_base(model)
    layers, saved = find_lora_layers(model), find_saved_modules(model)
    state: dict[str, Tensor] = {}
    # `keep_vars`: without it DeepSpeed's weights come detached from what gathers them.
    for name, tensor in base.state_dict(keep_vars=True).items():
        owner, _, last = name.rpartition(".")
        if owner.endswith(".base_layer"):
            name = f"{owner.removesuffix('.base_layer')}.{last}"
        elif ".lora_" in name or name.startswith(tuple(f"{wrapper}." for wrapper in saved)):
            continue
        value = gather_full_tensor(tensor)
        if name in layers:
            value = (value.float() + compute_delta(layers[name], whole=True)).to(tensor.dtype)
        state[name] = value.detach().cpu()
    for name, wrapper in saved.items():
        active = wrapper.modules_to_save[wrapper.active_adapters[0]]
        for last, tensor in active.state_dict(keep_vars=True).items():
            original = wrapper.original_module.state_dict()[last]
            state[f"{name}.{last}"] = gather_full_tensor(tensor).detach().to(original.dtype).cpu()
    return state


def save_merged_model(model: Any, folder: str | Path, is_main_process: bool = True) -> None:
    """Write the plain model with its adapter merged, as `save_pretrained` would; the model itself stays as it is."""
    state = compute_merged_state(model)
    if not is_main_process:
        return
    base = get_base(model)
    config = _untie_trained_head(base, state)
    with building_whole(), torch.device("meta"):
        shell = type(base)(config)
    _refuse_torn(shell, state, folder)
    if base.generation_config is not None:
        shell.generation_config = base.generation_config
    shell.save_pretrained(folder, state_dict=state)


def replace_adapter(model: Any, folder: str | Path, is_main_process: bool = True) -> None:
    """In a folder that holds the adapter: the merged model in its place. Of a sharded model every process must call.

    Raises `OutputError`, with the adapter left as it is, for merged weights that are not those of the model.
    """
    save_merged_model(model, folder, is_main_process)
    if is_main_process:
        for name in (ADAPTER_FILE, ADAPTER_WEIGHTS):  # last: until then the folder is the adapter's
            Path(folder, name).unlink(missing_ok=True)


def refuse_unmergeable(model: Any) -> None:
    """Raise `ConfigError` where nothing can be merged at the end: before the run, not after."""
    if not has_adapter(model):
        raise ConfigError("merge_adapter=True, but no adapter is trained: set use_peft=True, or leave it out")
    find_lora_layers(model)
    find_saved_modules(model)


def _refuse_torn(shell: nn.Module, state: dict[str, Tensor], folder: str | Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != wanted:
        name = next(name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name))
        raise OutputError(
            f"{folder}: the merged {name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}; "
            "nothing was written and the adapter stays: merge it in one process (load_model, save_merged_model)"
        )


def _untie_trained_head(base: Any, state: dict[str, Tensor]) -> Any:
    """The config, with the head apart from the embeddings where training made them differ: loading would tie them."""
    config = copy.deepcopy(base.config)
    names = {id(module): name for name, module in base.named_modules()}
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    pair = [state.get(f"{names.get(id(module))}.weight") for module in (head, embeddings)]
    if pair[0] is not None and pair[1] is not None and not torch.equal(pair[0], pair[1]):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    return config
