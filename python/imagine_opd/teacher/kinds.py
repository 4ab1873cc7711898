"""What a teacher is: weights that can be looked through, and the kinds whose weights stay or are the student's own."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from imagine_opd.errors import ConfigError, TeacherError
from imagine_opd.kernels import OutputHead
from imagine_opd.models import (
    adapters_off,
    describe_head,
    find_adapter_layers,
    find_head,
    get_base,
    list_tower,
    open_forward,
    paused,
)
from imagine_opd.parallel import gather_full_tensor, gather_parameters, get_place, is_gathered, unwrap_parallel
from imagine_opd.teacher.merging import has_no_effect
from imagine_opd.teacher.offload import hold_on_cpu

TEACHER_FILE = "teacher.json"
Result = TypeVar("Result")


class Teacher(ABC):
    """The teacher of a run. `student` is the model that trains, with or without what was wrapped around it.

    kind: `base`, frozen; `ema`, a moving average of the student; `live`, the student itself.
    placement: where its weights are. `copy` on the device, `cpu` in host memory, `adapter_off`: the student's own
        base weights, `student`: the student's weights.
    equals_student: at the start it holds the student's weights, so under one view the two must agree.
    fingerprint: a hash of the weights it started with; empty where the student is the teacher.
    """

    kind = "base"
    placement = "copy"
    equals_student = True
    fingerprint = ""

    @abstractmethod
    def loaded(self, student: nn.Module) -> Any:
        """A context: the module with the teacher's weights, in eval mode, without gradient.

        The student's modes, adapters and the random state are put back exactly afterwards, also after an error.
        Forwards of body and head belong into `run` wherever the model may be sharded.
        """

    def find_owner(self, student: nn.Module) -> Any:
        """The model, wrapped as it may be, whose weights the teacher's forward reads."""
        return student

    def list_tower(self, student: nn.Module) -> dict[str, Tensor]:
        """The weights of the vision tower and projector that the teacher's forward reads, by name; empty where an
        adapter inside of them is on for the student and off for the teacher."""
        tower = list_tower(get_base(student))
        is_adapted = any(".base_layer." in name or ".modules_to_save." in name for name in tower)
        return {} if is_adapted and self.kind != "live" else dict(tower)

    @contextmanager
    def gathered(self, student: nn.Module) -> Iterator[Any]:
        """As `loaded`, with whole weights on every process, to generate with and to read: outside of `run`.

        All processes enter and leave together; weights that are not split are left as they are.
        """
        with gather_parameters(self.find_owner(student)), self.loaded(student) as module:
            yield unwrap_parallel(module)

    def run(self, student: nn.Module, function: Callable[[Any], Result]) -> Result:
        """`function(module)` inside the module's forward, with the module as in `loaded`.

        Call it outside of the student's own forward: under FSDP2 a model's forward cannot contain itself.
        """
        found: list[Result] = []
        with self.loaded(student) as module:
            # Kept aside: what a forward returns may be cast on its way out.
            module(inside=lambda inner: found.append(function(inner)))
        return found[0]

    @contextmanager
    def open_head(self, student: nn.Module) -> Iterator[OutputHead]:
        """The teacher's head with whole weights, to project hidden states after the forward.

        The student's adapters are back on inside: its own head may be taken there too.
        """
        with self.loaded(student) as module:
            model = unwrap_parallel(module)
            head = describe_head(find_head(model), model)
        bias_V = None if head.bias_V is None else gather_full_tensor(head.bias_V)
        yield replace(head, weight_VD=gather_full_tensor(head.weight_VD), bias_V=bias_V)

    def prepare(self, device: torch.device, shard: Callable[[Any], Any] | None = None) -> None:  # noqa: B027
        """Bring own weights to where they are used: `device`, or split over the processes by `shard`."""

    def update(self, student: nn.Module) -> None:  # noqa: B027
        """Follow the student; to be called after each optimizer step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What moved since the start: fp32, on CPU, whole. Of a sharded teacher every process must call."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`. Raises `TeacherError` when it belongs to other weights."""
        if state:
            raise TeacherError(f"a {self.kind} teacher has no state, {len(state)} weights were given")

    def save(self, folder: str | Path) -> None:
        """Write `teacher.json`, by which a resumed run knows its teacher. Every process must call; the first writes."""
        if get_place()[0] == 0:
            text = json.dumps(self._describe())
            Path(folder, TEACHER_FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint. Raises `TeacherError` when it was made with another teacher: the run would go on
        towards elsewhere. A folder without `teacher.json` is taken as it is."""
        self._read_description(Path(folder))

    def _describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "fingerprint": self.fingerprint}

    def _read_description(self, folder: Path) -> dict[str, Any] | None:
        path = folder / TEACHER_FILE
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kind, fingerprint = found.get("kind", "base"), found["fingerprint"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TeacherError(f"{path}: not readable ({error})") from error
        if kind != self.kind:
            raise TeacherError(
                f"{folder} was trained with teacher_model_kind={kind!r}, this run has {self.kind!r}: "
                f"resume with {kind!r}"
            )
        # Where one process reads the weights for all, the others do not hold them yet.
        if fingerprint != self.fingerprint and get_place()[0] == 0:
            raise TeacherError(
                f"{folder} was trained with another teacher: resume with the model (or teacher=) the run began with, "
                "not with a checkpoint of it"
            )
        return found


class LiveTeacher(Teacher):
    """The student as it is at each step."""

    kind = "live"
    placement = "student"

    @contextmanager
    def loaded(self, student: nn.Module) -> Iterator[Any]:
        """See `Teacher.loaded`: the student itself."""
        model = open_forward(unwrap_parallel(student))
        with paused(model):
            yield model


class AdapterOffTeacher(Teacher):
    """The student's base weights, seen with its adapter off: no second copy."""

    placement = "adapter_off"

    def __init__(self, student: nn.Module) -> None:
        self.fingerprint = compute_fingerprint(student)
        self.equals_student = has_no_effect(student)

    @contextmanager
    def loaded(self, student: nn.Module) -> Iterator[Any]:
        """See `Teacher.loaded`: the student without its adapter."""
        model = open_forward(unwrap_parallel(student))
        with paused(model), adapters_off(model):
            yield model


class HeldTeacher(Teacher):
    """Weights of its own: on the device, or in host memory and brought in block by block."""

    def __init__(self, module: nn.Module, placement: str = "copy", equals_student: bool = True) -> None:
        module.requires_grad_(False)
        self.module = open_forward(module.eval())
        self.placement = placement
        self.equals_student = equals_student
        self.fingerprint = compute_fingerprint(module)
        self._held: dict[str, Tensor] | None = None
        if placement == "cpu":
            self.module.to("cpu")

    @contextmanager
    def loaded(self, student: nn.Module) -> Iterator[Any]:
        """See `Teacher.loaded`: the teacher's own module."""
        with paused(self.module):
            yield self.module

    def find_owner(self, student: nn.Module) -> Any:
        """See `Teacher.find_owner`: the teacher's own module."""
        return self.module

    def prepare(self, device: torch.device, shard: Callable[[Any], Any] | None = None) -> None:
        """See `Teacher.prepare`. Weights in host memory are not split: each process holds them."""
        if self.placement == "cpu":
            self._held = hold_on_cpu(self.module, device) if self._held is None else self._held
        elif shard is not None:
            self.module = shard(self.module)
        else:
            self.module.to(device)

    def list_tower(self, student: nn.Module) -> dict[str, Tensor]:
        """See `Teacher.list_tower`."""
        held = self._held or {}
        values = {id(p): held.get(name, p.data) for name, p in self.module.named_parameters()}
        return {name: values[id(p)] for name, p in list_tower(get_base(self.module)).items()}

    def get_weights(self) -> dict[str, Tensor]:
        """Every weight by parameter name, wherever it is held now."""
        held = self._held or {}
        return {name: held.get(name, parameter.data) for name, parameter in self.module.named_parameters()}


def refuse_zero3(model: nn.Module) -> None:
    """Raise `ConfigError` for a model whose weights DeepSpeed has split: they cannot be copied or followed here."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            "DeepSpeed ZeRO-3 holds the student's weights in pieces of its own, which a teacher can neither copy nor "
            "follow: train an adapter with teacher_model_kind='base', load whole weights for a frozen copy "
            "(zero3_init_flag: false), or use FSDP2"
        )


def copy_model(model: nn.Module, dtype: torch.dtype | None = None, device: str | None = None) -> nn.Module:
    """A copy for a teacher. What is frozen is shared where dtype and device stay: it is the same for ever.

    Weights that DeepSpeed ZeRO-3 split must be gathered around the call.
    """
    if any(hasattr(parameter, "ds_id") and not is_gathered(parameter) for parameter in model.parameters()):
        refuse_zero3(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        wanted = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        place = parameter.device if device is None else torch.device(device)
        stays = wanted == parameter.dtype and place == parameter.device
        if stays and not parameter.requires_grad and device is None and not hasattr(parameter, "ds_id"):
            memo[id(parameter)] = parameter
        else:
            # Cast on the way: a copy in the student's dtype would not have to fit first.
            value = parameter.detach().to(place, wanted, copy=True)
            memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(model, memo)


def compute_fingerprint(model: Any) -> str:
    """A hash of a model's weights without its adapter: up to 1024 values of every tensor, exact on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(list_base_tensors(model).items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            continue  # a process to which another one sends the weights
        values = tensor.detach().flatten()
        values = values[:: max(1, values.numel() // 1024)][:1024].float().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def list_base_tensors(model: Any) -> dict[str, Tensor]:
    """The state of a model under the names it had before an adapter was put on, without the adapter's own weights."""
    state: dict[str, Tensor] = get_base(model).state_dict()
    if not find_adapter_layers(model):
        return state
    own = {id(parameter) for parameter in _list_adapter_parameters(model)}
    named = {name for name, parameter in get_base(model).named_parameters() if id(parameter) in own}
    plain = {name: tensor for name, tensor in state.items() if name not in named}
    return {name.replace(".base_layer.", ".").replace(".original_module.", "."): t for name, t in plain.items()}


def _list_adapter_parameters(model: Any) -> Iterator[nn.Parameter]:
    for layer in find_adapter_layers(model):
        for name in layer.adapter_layer_names:
            part = getattr(layer, name, None)
            yield from part.parameters() if isinstance(part, (nn.ModuleDict, nn.ParameterDict)) else ()
