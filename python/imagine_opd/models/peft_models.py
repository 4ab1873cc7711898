"""LoRA and DoRA through `peft`: put an adapter on a model, load one from a folder, switch it off for the teacher.

`peft` is imported by the first call that needs it; a model without adapter never does.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imagine_opd.errors import ConfigError
from imagine_opd.models.vision_tower import find_vision_names, freeze_vision_tower, is_inside, make_vision_pattern

if TYPE_CHECKING:
    from imagine_opd.config import ImagineOPDConfig

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def prepare_student(model: Any, config: ImagineOPDConfig, peft_config: Any = None) -> Any:
    """The model as it is trained: an adapter put on it where asked for, the vision tower frozen where asked for.

    A model that carries an adapter is taken as it is. `freeze_vision=None` freezes with an adapter made from the
    config's own fields, and leaves full weights and ready adapters alone. Adapter weights are fp32 whatever the
    base's dtype. Raises `ConfigError`.
    """
    freezes = config.freeze_vision
    refuse_learnt_prompts(getattr(model, "active_peft_config", None))
    if has_adapter(model):
        if peft_config is not None:
            raise ConfigError("the model carries an adapter already: leave peft_config out, or merge it first")
        _train_adapter(model)
    elif peft_config is not None or config.use_peft:
        freezes = config.use_peft if freezes is None and peft_config is None else freezes
        peft_config = peft_config or make_lora_config(model, config, bool(freezes))
        with torch.random.fork_rng(devices=[]):  # first weights of the run's seed: a run begun again begins the same
            torch.manual_seed(config.seed)
            model = add_adapter(model, peft_config)
    if freezes and has_adapter(model):
        _refuse_trained_vision(model)
    elif freezes:
        freeze_vision_tower(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("nothing to train: every weight of the model is frozen (requires_grad=False)")
    if has_adapter(model):
        _widen(model, trained, config)
        if config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
            _untie_original_head(model)
        # A reentrant checkpoint drops the gradient of a block whose inputs ask for none: behind frozen embeddings that
        # is every first block, and the adapters in it.
        if config.gradient_checkpointing and (config.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ConfigError(
                "gradient checkpointing with use_reentrant=True loses gradients behind frozen weights: set it to False"
            )
    return model


def import_peft() -> Any:
    """The `peft` package. Raises `ConfigError` where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs the package peft: pip install 'imagine-opd[peft]'") from error
    return peft


def make_lora_config(model: Any, config: ImagineOPDConfig, freezes_vision: bool) -> Any:
    """peft's `LoraConfig` of the config's fields."""
    return import_peft().LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        exclude_modules=make_vision_pattern(model) if freezes_vision else None,
        modules_to_save=config.lora_modules_to_save,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )


def add_adapter(model: Any, peft_config: Any) -> Any:
    """A `PeftModel` around the model; the given config is not changed. Raises `ConfigError`."""
    peft = import_peft()
    if not isinstance(peft_config, peft.PeftConfig):
        raise ConfigError(f"peft_config is {type(peft_config).__name__}; expected a config of peft, such as LoraConfig")
    refuse_learnt_prompts(peft_config)
    try:
        with _quiet_peft():
            adapted = peft.get_peft_model(model, copy.deepcopy(peft_config))
    except ValueError as error:
        targets = getattr(peft_config, "target_modules", None)
        raise ConfigError(
            f"the adapter (target_modules={targets!r}) does not go with {type(model).__name__}: {error}"
        ) from error
    return adapted


def refuse_learnt_prompts(peft_config: Any) -> None:
    """Raise `ConfigError` for an adapter that adds tokens to the prompt."""
    if getattr(peft_config, "is_prompt_learning", False):
        raise ConfigError(
            f"{type(peft_config).__name__}: prompts that are learnt shift the tokens that are scored; use LoraConfig"
        )


def is_adapter_folder(source: Any) -> bool:
    """Whether a name is a folder that holds an adapter instead of a model."""
    return isinstance(source, (str, Path)) and Path(source, ADAPTER_FILE).is_file()


def read_base_name(folder: str | Path) -> str:
    """The model that a saved adapter belongs to. Raises `ConfigError`."""
    path = Path(folder, ADAPTER_FILE)
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not readable as the config of an adapter ({error})") from error
    if not base:
        raise ConfigError(
            f"{path}: base_model_name_or_path is empty, the adapter was trained on a model that has no name; load that "
            "model and put the adapter on it with peft.PeftModel.from_pretrained"
        )
    if Path(str(base)).resolve() == Path(folder).resolve():
        raise ConfigError(
            f"{path}: the adapter names its own folder as its base ({str(base)!r}); write the model it was trained on "
            "into base_model_name_or_path"
        )
    return str(base)


def load_adapter(base: Any, folder: str | Path) -> Any:
    """The adapter of a folder on its base, ready to be trained further (safetensors only). Raises `ConfigError`."""
    if not Path(folder, ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"{str(folder)!r} holds {ADAPTER_FILE} but no {ADAPTER_WEIGHTS}")
    peft = import_peft()
    try:
        with _quiet_peft():
            model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"adapter {str(folder)!r} cannot be loaded: {error}") from error
    return model


def get_base(model: Any) -> Any:
    """The model inside a `PeftModel`; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_adapter_layers(model: nn.Module) -> list[Any]:
    """Every layer that an adapter changes or stands in for."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def has_adapter(model: nn.Module) -> bool:
    """Whether the model carries an adapter, by `peft` or by transformers' own integration."""
    return bool(find_adapter_layers(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapter: the base weights, and the originals of `modules_to_save`.

    Flags alone: peft's `disable_adapter` also takes `requires_grad` off the adapter and puts it on again, which a
    sharded or partly frozen adapter would not survive.
    """
    layers = [(layer, layer.disable_adapters) for layer in find_adapter_layers(model)]
    try:
        for layer, _ in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in layers:
            layer._disable_adapters = was_off


def get_running_module(module: Any) -> Any:
    """The plain module that runs where peft may have put a wrapper. Raises `ConfigError` for a head with LoRA."""
    if "peft" not in sys.modules:
        return module
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer) and module.disable_adapters:
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper) and (module.disable_adapters or not module.active_adapters):
        return module.original_module
    if isinstance(module, ModulesToSaveWrapper):
        return module.modules_to_save[module.active_adapters[0]]
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ConfigError(
            "the adapter changes the output head, whose weights are read as a whole: leave it out of "
            "lora_target_modules, or train it with lora_modules_to_save=['lm_head']"
        )
    return module


def _train_adapter(model: Any) -> None:
    """An adapter that was loaded for inference is trained, as one that was loaded for training is."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    for layer in find_adapter_layers(model):
        layer.set_adapter(layer.active_adapters)
        if hasattr(layer, "set_requires_grad"):
            layer.set_requires_grad(layer.active_adapters, True)


def _refuse_trained_vision(model: Any) -> None:
    names = find_vision_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_inside(name, names):
            raise ConfigError(
                f"freeze_vision=True, but the adapter trains {name}: give its config exclude_modules, "
                "or set freeze_vision=False"
            )


def _untie_original_head(model: Any) -> None:
    """A frozen head that stands beside its trained copy gets weights of its own where it shares the embeddings': FSDP2
    refuses a weight in two of its groups, and accelerate sees the trained copy alone."""
    from peft.utils.other import ModulesToSaveWrapper

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, ModulesToSaveWrapper):
        return
    weight: Any = head.original_module.weight
    if id(weight) == id(embeddings.weight):
        head.original_module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _widen(model: Any, trained: list[nn.Parameter], config: ImagineOPDConfig) -> None:
    """fp32 for what is trained: updates of a small learning rate round to nothing in 16 bits."""
    narrow = [parameter for parameter in trained if parameter.dtype in (torch.bfloat16, torch.float16)]
    if narrow and not (config.bf16 or config.fp16):
        raise ConfigError(
            "weights trained beside the adapter (lora_modules_to_save) are 16-bit and become fp32, which goes with a "
            "16-bit base only under autocast: set bf16=True, or load the model in float32"
        )
    for parameter in narrow:
        parameter.data = parameter.data.float()


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without two warnings of peft: it reads a name that transformers 5.24 deprecates, and of a head that trains apart
    from embeddings it was tied to it says that merging is complicated; `save_merged_model` unties them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield
