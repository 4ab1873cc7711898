"""A teacher that follows the student: an exponential moving average, in fp32 whatever the weights' dtype.

    shadow <- shadow + rate * (student - shadow)          every `sync_steps` optimizer steps

At a rate of 0.05 a step of 1e-6 moves the shadow by 5e-8 of a weight, which bf16 (8 bits) rounds to nothing and fp32
keeps. With LoRA it is the merged difference that is averaged: the product of two averages is not the average of
products, so averaging A and B apart would follow another path than the student's.
"""

# O outputs, I inputs

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from imagine_opd.errors import ConfigError, TeacherError
from imagine_opd.models import adapters_off, get_base, open_forward, paused
from imagine_opd.parallel import gather_full_tensor, get_place, strip_wrappers, unwrap_parallel
from imagine_opd.teacher.kinds import AdapterOffTeacher, HeldTeacher, Teacher, refuse_zero3
from imagine_opd.teacher.merging import compute_delta, find_lora_layers, find_saved_modules, get_local

EMA_FILE = "teacher_ema.safetensors"


class Shadows:
    """The fp32 averages by name, each laid out over the processes as the weight it follows, and the steps seen."""

    def __init__(self, rate: float, sync_steps: int) -> None:
        self.rate = rate
        self.sync_steps = sync_steps
        self.steps = 0
        self.tensors: dict[str, Tensor] = {}

    def is_due(self) -> bool:
        """Count an optimizer step; whether the average moves at it."""
        self.steps += 1
        return self.steps % self.sync_steps == 0

    def follow(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Move every average towards its value."""
        with torch.no_grad():
            for name, value in values:
                shadow = self.tensors[name] = match_layout(self.tensors[name], value)
                get_local(shadow).lerp_(get_local(value).to(shadow.device, torch.float32), self.rate)

    def gather(self) -> dict[str, Tensor]:
        """Whole copies on CPU. Every process must call."""
        return {name: gather_full_tensor(shadow).detach().to("cpu", copy=True) for name, shadow in self.tensors.items()}

    def restore(self, state: Mapping[str, Tensor], known: Mapping[str, torch.Size]) -> None:
        """Take the averages of a `gather`. Raises `TeacherError` when they are not those of `known`."""
        if set(state) != set(known):
            name = sorted(set(state) ^ set(known))[0]
            where = "the checkpoint's" if name in state else "this run's"
            raise TeacherError(f"the averages do not fit: {name} is among {where} alone; train the same weights again")
        for name, value in state.items():
            if value.shape != known[name] or value.dtype != torch.float32:
                wanted = f"float32 {tuple(known[name])}"
                raise TeacherError(f"the average of {name} is {value.dtype} {tuple(value.shape)}; expected {wanted}")
        with torch.no_grad():
            for name, value in state.items():
                shadow = self.tensors.get(name)
                if shadow is None:
                    self.tensors[name] = value.clone()
                else:
                    write_into(shadow, value)


class _EmaFiles(Teacher):
    """The averages beside a checkpoint."""

    shadows: Shadows

    @abstractmethod
    def _list_known(self) -> dict[str, torch.Size]:
        """Names and shapes of what is averaged."""

    def state_dict(self) -> dict[str, Tensor]:
        """See `Teacher.state_dict`."""
        return self.shadows.gather()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Teacher.load_state_dict`."""
        self.shadows.restore(state, self._list_known())

    def save(self, folder: str | Path) -> None:
        """See `Teacher.save`: the averages first, so that a `teacher.json` never stands without them."""
        state = self.state_dict()
        if get_place()[0] == 0:
            save_file(state, Path(folder, EMA_FILE))
        super().save(folder)

    def load(self, folder: str | Path) -> None:
        """See `Teacher.load`. Raises `TeacherError` where the averages are missing or not readable."""
        description = self._read_description(Path(folder))
        path = Path(folder, EMA_FILE)
        try:
            if description is None:
                raise FileNotFoundError(f"no teacher.json in {folder}")
            steps = int(description["steps"])
            state = load_file(path)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise TeacherError(f"{path}: the teacher's averages cannot be read ({error})") from error
        self.load_state_dict(state)
        self.shadows.steps = steps

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "steps": self.shadows.steps}


class EmaTeacher(_EmaFiles, HeldTeacher):
    """The average of full weights, in a model of its own.

    Averaged are the weights that train. A model in fp32 holds them itself; for one in 16 bits they are kept apart in
    fp32, and the model gets them rounded.
    """

    kind = "ema"

    def __init__(
        self, student: nn.Module, module: nn.Module, placement: str, equals_student: bool, rate: float, sync_steps: int
    ) -> None:
        super().__init__(module, placement, equals_student)
        self.shadows = Shadows(rate, sync_steps)
        self._names = tuple(name for name, parameter in student.named_parameters() if parameter.requires_grad)
        self._take_weights()

    def _take_weights(self) -> None:
        """Shadows out of the module's weights: the same memory where these are fp32."""
        weights = self.get_weights()
        for name in self._names:
            if weights[name].dtype == torch.float32 or name not in self.shadows.tensors:
                self.shadows.tensors[name] = weights[name].float()

    def prepare(self, device: torch.device, shard: Any = None) -> None:
        """See `Teacher.prepare`."""
        super().prepare(device, shard)
        self._take_weights()  # moved or split, the weights are other memory
        for name, weight in self.get_weights().items():
            if name in self.shadows.tensors:
                self.shadows.tensors[name] = match_layout(self.shadows.tensors[name].to(weight.device), weight)

    def update(self, student: nn.Module) -> None:
        """See `Teacher.update`."""
        if self.shadows.is_due():
            trained = list_trained(student)
            self.shadows.follow((name, trained[name]) for name in self._names)
            self._write_weights()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Teacher.load_state_dict`."""
        super().load_state_dict(state)
        self._write_weights()

    def _write_weights(self) -> None:
        weights = self.get_weights()
        with torch.no_grad():
            for name, shadow in self.shadows.tensors.items():
                if get_local(weights[name]).data_ptr() != get_local(shadow).data_ptr():
                    write_into(weights[name], shadow)

    def _list_known(self) -> dict[str, torch.Size]:
        weights = self.get_weights()
        return {name: weights[name].shape for name in self._names}


class EmaAdapterTeacher(_EmaFiles, AdapterOffTeacher):
    """The average of an adapter: the student's base weights, with the averaged difference of each layer beside them.

    The difference is a dense fp32 matrix per layer. It is applied to a layer's input and added to its output, as the
    student's own adapter is: no base weight is copied, and where 16 bits round, both round alike.
    """

    kind = "ema"

    def __init__(self, student: nn.Module, rate: float, sync_steps: int) -> None:
        super().__init__(student)
        refuse_uncovered(student)
        self.equals_student = True
        self.shadows = Shadows(rate, sync_steps)
        for name, value in list_differences(student):
            self.shadows.tensors[name] = value.detach().clone().float()

    def update(self, student: nn.Module) -> None:
        """See `Teacher.update`."""
        if self.shadows.is_due():
            self.shadows.follow(list_differences(reshard(unwrap_parallel(student))))

    @contextmanager
    def loaded(self, student: nn.Module) -> Iterator[Any]:
        """See `Teacher.loaded`."""
        model = open_forward(unwrap_parallel(student))
        tensors = self.shadows.tensors
        with paused(model), adapters_off(model), ExitStack() as stack:
            for name, layer in find_lora_layers(model).items():
                weight = layer.get_base_layer().weight
                tensors[name] = match_layout(tensors[name].to(weight.device), weight)
                hook = layer.register_forward_hook(partial(add_difference, delta_OI=tensors[name]))
                stack.callback(hook.remove)
            for name, wrapper in find_saved_modules(model).items():
                original = wrapper.original_module
                wrapper._modules["original_module"] = make_twin(original, name, tensors)
                stack.callback(wrapper._modules.__setitem__, "original_module", original)
            yield model

    def _list_known(self) -> dict[str, torch.Size]:
        return {name: shadow.shape for name, shadow in self.shadows.tensors.items()}


def add_difference(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, delta_OI: Tensor) -> Tensor:
    """Forward hook of a linear layer: its output with the averaged difference of its weight."""
    # Narrow first: half as much is gathered.
    return output + nn.functional.linear(args[0], gather_full_tensor(delta_OI.to(args[0].dtype)))


def make_twin(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module of the same kind that holds the averages of its weights, in its weights' dtype and on their device."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = parameters = dict(module._parameters)
    for last, old in module.named_parameters():
        value = gather_full_tensor(tensors[f"{name}.{last}"]).to(old.device, old.dtype)
        parameters[last] = nn.Parameter(value, requires_grad=False)
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):  # of FSDP2: these weights are whole already
        twin.__dict__[hooks] = type(module.__dict__[hooks])()
    return twin


def list_differences(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What an adapter trains, one by one: merged differences of LoRA layers, weights of `modules_to_save`."""
    for name, layer in find_lora_layers(model).items():
        yield name, as_sharded(compute_delta(layer), layer.get_base_layer().weight)
    for name, wrapper in find_saved_modules(model).items():
        for last, parameter in wrapper.modules_to_save[wrapper.active_adapters[0]].named_parameters():
            yield f"{name}.{last}", parameter.data


def list_trained(student: nn.Module) -> dict[str, Tensor]:
    """The student's weights by name."""
    named = reshard(unwrap_parallel(student)).named_parameters()
    return {strip_wrappers(name): parameter.data for name, parameter in named}


def reshard(model: Any) -> Any:
    """The model with the shards that the optimizer writes: what is whole since a forward is of before the step."""
    refuse_zero3(model)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return model


def refuse_uncovered(student: nn.Module) -> None:
    """Raise `ConfigError` where the adapter trains something of which no average is kept."""
    modules: list[nn.Module] = list(find_lora_layers(student).values())
    modules += [wrapper.modules_to_save for wrapper in find_saved_modules(student).values()]
    covered = {id(parameter) for module in modules for parameter in module.parameters()}
    for name, parameter in get_base(student).named_parameters():
        if parameter.requires_grad and (id(parameter) not in covered or ".base_layer." in name):
            raise ConfigError(f"teacher_model_kind='ema' follows an adapter's weights alone, but {name} trains too")


def as_sharded(local: Tensor, like: Tensor) -> Tensor:
    """A shard as part of a tensor that is split as `like` is; beside a tensor that is not split, itself."""
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def match_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor split over the processes as `like` is (it must be the same on each), or whole as `like` is."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor if isinstance(like, DTensor) else gather_full_tensor(tensor)


def write_into(target: Tensor, value: Tensor) -> None:
    """Copy values in place, whatever either's dtype, device and split."""
    get_local(target).copy_(get_local(match_layout(value.to(target.device), target)))
