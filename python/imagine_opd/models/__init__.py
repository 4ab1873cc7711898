"""The Hugging Face model: loaded, reached into, adapted, run."""

from imagine_opd.models.access import (
    TokenIds,
    describe_head,
    find_head,
    fit_inputs,
    get_body,
    get_device,
    get_head,
    load_model,
    load_processor,
    read_token_ids,
)
from imagine_opd.models.peft_models import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    adapters_off,
    find_adapter_layers,
    get_base,
    has_adapter,
    prepare_student,
)
from imagine_opd.models.student import open_forward, paused, run_inside
from imagine_opd.models.vision_tower import is_tower_frozen, is_vision_name, list_tower

__all__ = [
    "ADAPTER_FILE",
    "ADAPTER_WEIGHTS",
    "TokenIds",
    "adapters_off",
    "describe_head",
    "find_adapter_layers",
    "find_head",
    "fit_inputs",
    "get_base",
    "get_body",
    "get_device",
    "get_head",
    "has_adapter",
    "is_tower_frozen",
    "is_vision_name",
    "list_tower",
    "load_model",
    "load_processor",
    "open_forward",
    "paused",
    "prepare_student",
    "read_token_ids",
    "run_inside",
]
