"""What a process holds during a step, item by item: settings and shapes in, named bytes by place and phase out."""

# N response tokens, V vocabulary, D hidden

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

from imagine_opd.errors import ConfigError
from imagine_opd.kernels import tuning
from imagine_opd.memory.activations import (
    AdapterLoad,
    ForwardLoad,
    Precision,
    Training,
    count_cache_bytes,
    count_feature_bytes,
    count_pixel_bytes,
    count_saved_bytes,
    count_workspace_bytes,
    sum_adapters,
)
from imagine_opd.memory.optimizers import count_state_bytes
from imagine_opd.memory.settings import (
    GIB,
    ITEMSIZES,
    MemoryItem,
    MemorySettings,
    Phase,
    TeacherPlacement,
    count_rollouts,
)
from imagine_opd.memory.shapes import LinearShape, ModelShape, ParameterShape, match_targets, read_adapter

CONTEXT_BYTES = 3 * GIB // 4
"""CUDA's context, its libraries and their workspaces. Torch's own statistics do not count it."""
_ZERO3_LIVE_NUMEL = 1_000_000_000
"""Weights that DeepSpeed keeps gathered at most, its default of stage3_max_live_parameters."""


class StepMemory:
    """The items of one process of a run."""

    def __init__(self, shape: ModelShape, settings: MemorySettings, teacher: ModelShape | None) -> None:
        self.shape, self.settings, self.own_teacher = shape, settings, teacher
        self.is_sharded = settings.parallelism in ("fsdp2", "zero3")
        self.shards = settings.num_processes if self.is_sharded else 1
        stage = int(settings.parallelism.removeprefix("zero")) if settings.parallelism.startswith("zero") else 0
        self.state_shards = settings.num_processes if stage >= 1 else self.shards
        self.gradient_shards = settings.num_processes if stage >= 2 else self.shards
        # DeepSpeed computes with 16-bit weights and keeps fp32 ones of its own beside the optimizer's states.
        self.has_masters = stage > 0 and settings.compute_dtype != "float32"
        length, packed = settings.max_completion_length, settings.padding_free
        rows = settings.per_device_train_batch_size * settings.num_generations
        if settings.max_tokens_per_forward is not None:
            longest = max(settings.student_view.tokens, settings.teacher_view.tokens) + length
            rows = min(rows, max(settings.max_tokens_per_forward // longest, 1))
        self.student_load = ForwardLoad(settings.student_view, rows, length, packed)
        self.teacher_load = ForwardLoad(settings.teacher_view, rows, length, packed)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained and not the model's own weights."""
        return self.settings.lora_r > 0 or any(p.is_adapter for p in self.shape.parameters)

    @property
    def needs_own_teacher(self) -> bool:
        """Whether the teacher's weights are not the student's own ones."""
        if self.own_teacher is not None:
            return True
        return self.settings.teacher_model_kind != "live" and not self.has_adapters

    @cached_property
    def placement(self) -> TeacherPlacement:
        """Where the teacher's weights are. Raises `ConfigError` for a place that this teacher cannot have."""
        asked = self.settings.teacher_placement
        if not self.needs_own_teacher:
            return asked or ("student" if self.settings.teacher_model_kind == "live" else "adapter_off")
        if asked in ("adapter_off", "student"):
            raise ConfigError(
                f"teacher_placement={asked!r}: this teacher has weights of its own; expected 'copy' or 'cpu'"
            )
        return asked or "copy"

    # what is trained

    @cached_property
    def adapted(self) -> list[LinearShape]:
        """The linear layers with adapters: those of the model, or those that the settings name."""
        settings = self.settings
        if found := [linear for linear in self.shape.linears if linear.is_adapted]:
            return found
        if not settings.lora_r:
            return []
        found = match_targets(self.shape.linears, settings.lora_targets)
        found = [linear for linear in found if not (settings.freeze_vision and linear.is_vision)]
        if not found:
            raise ConfigError(f"lora_targets={settings.lora_targets!r} names no linear layer of {self.shape.name}")
        return found

    @cached_property
    def adapters(self) -> list[ParameterShape]:
        """The adapters' weights: those of the model, or those that peft would add, in fp32."""
        if found := [p for p in self.shape.parameters if p.is_adapter]:
            return found
        rank, made = self.settings.lora_r, list[ParameterShape]()
        for linear in self.adapted:
            parts: dict[str, tuple[int, ...]] = {"A": (rank, linear.inputs), "B": (linear.outputs, rank)}
            if self.settings.use_dora:
                parts["magnitude_vector"] = (linear.outputs,)
            for part, sizes in parts.items():
                made.append(ParameterShape(f"{linear.name}.lora_{part}", sizes, 4, True, linear.is_vision, ""))
        return made

    @cached_property
    def base(self) -> list[ParameterShape]:
        """The model's weights without adapters."""
        return [p for p in self.shape.parameters if not p.is_adapter]

    @cached_property
    def trained(self) -> list[ParameterShape]:
        """All weights that get a gradient."""
        frozen_vision = self.settings.freeze_vision
        if self.has_adapters:
            own = [p for p in self.base if p.is_trained] if any(p.is_adapter for p in self.shape.parameters) else []
            return [*own, *(p for p in self.adapters if p.is_trained)]
        return [p for p in self.base if p.is_trained and not (frozen_vision and p.is_vision)]

    @property
    def trained_numel(self) -> int:
        return sum(p.numel for p in self.trained)

    @cached_property
    def trainings(self) -> tuple[Training, Training]:
        """How text and vision are trained."""
        if self.has_adapters:
            return "adapters", "adapters" if any(linear.is_vision for linear in self.adapted) else "frozen"
        return "full", "full" if any(p.is_vision for p in self.trained) else "frozen"

    # bytes of numbers

    def get_itemsize(self, parameter: ParameterShape) -> int:
        """Of a stored weight."""
        return parameter.itemsize if parameter.is_adapter else ITEMSIZES.get(self._model_dtype, parameter.itemsize)

    @property
    def _model_dtype(self) -> str:
        return self.settings.compute_dtype if self.has_masters else self.settings.model_dtype

    @cached_property
    def precision(self) -> Precision:
        """Of the student's forward."""
        weight = max((self.get_itemsize(p) for p in self.base if p.block), default=4)
        compute = ITEMSIZES[self.settings.compute_dtype]
        adapter = compute
        if self.is_sharded:  # weights are gathered in the compute dtype
            weight = min(weight, compute)
        operand = min(weight, compute)
        return Precision(weight, operand, weight, adapter, is_autocast=operand < weight)

    @property
    def teacher_precision(self) -> Precision:
        own = self.teacher_itemsize if self.needs_own_teacher else self.precision.weight
        operand = min(own, self.precision.operand)
        return Precision(own, operand, own, operand, is_autocast=operand < own)

    @property
    def teacher_itemsize(self) -> int:
        dtype = self.settings.teacher_dtype
        if dtype:
            return ITEMSIZES[dtype]
        if self.is_sharded:
            return max((self.get_itemsize(p) for p in self.base), default=4)
        # Copied before DeepSpeed casts a student that it does not split.
        return max((ITEMSIZES.get(self.settings.model_dtype, p.itemsize) for p in self.base), default=4)

    @property
    def shares_frozen(self) -> bool:
        """Whether a second copy leaves what is frozen to the student: split apart or cast, it has its own."""
        is_cast = self.settings.teacher_dtype is not None and any(
            self.get_itemsize(p) != self.teacher_itemsize for p in self.base
        )
        return self.own_teacher is None and not self.is_sharded and not is_cast

    # items

    def list_items(self) -> Iterator[MemoryItem]:
        """Everything, the persistent first."""
        yield from self.list_weights()
        yield from self.list_teacher()
        if self.settings.device_type == "cuda":
            yield MemoryItem("CUDA context and libraries", CONTEXT_BYTES)
        yield from self.list_features()
        yield from self.list_rollout()
        yield from self.list_teacher_forward()
        yield from self.list_student_forward()
        trained = sum(p.numel * self.get_itemsize(p) for p in self.trained)
        if self.settings.optim == "adamw_torch":
            yield MemoryItem("temporaries of the unfused optimizer", trained // self.shards, phases=("update",))

    def list_weights(self) -> Iterator[MemoryItem]:
        """Student, adapters, gradients, optimizer, and what sharing them among processes costs."""
        settings, shards = self.settings, self.shards
        base = sum(p.numel * self.get_itemsize(p) for p in self.base)
        yield MemoryItem(f"student weights ({self._name_dtype()})", base // shards)
        adapters = sum(p.numel * p.itemsize for p in self.adapters)
        yield MemoryItem(f"adapters on {len(self.adapted)} layers", adapters // shards)
        gradients = sum(p.numel * self.get_itemsize(p) for p in self.trained)
        yield MemoryItem("gradients", gradients // self.gradient_shards)
        if self.has_masters:
            yield MemoryItem("fp32 master weights", 4 * self.trained_numel // self.state_shards)
            states = sum(count_state_bytes(p, 4, settings.optim) for p in self.trained)
        else:
            states = sum(count_state_bytes(p, self.get_itemsize(p), settings.optim) for p in self.trained)
        yield MemoryItem(f"optimizer states ({settings.optim})", states // self.state_shards)
        if settings.parallelism == "ddp" and settings.num_processes > 1:
            yield MemoryItem("gradient buckets of DDP", gradients)
        if self.is_sharded:
            block, resident = self.shape.largest_block_numel, self.shape.resident_numel
            live = 2 * block + resident
            if settings.parallelism == "zero3":
                live = max(live, min(self.shape.numel, _ZERO3_LIVE_NUMEL))
            yield MemoryItem("gathered weights: two blocks, embeddings and head", live * self.precision.weight)

    def list_teacher(self) -> Iterator[MemoryItem]:
        """The teacher's weights by their place, and an EMA's fp32 state."""
        shape, itemsize = self.own_teacher or self.shape, self.teacher_itemsize
        whole = shape.numel * itemsize
        if self.placement == "copy":
            numel = self.trained_numel if self.shares_frozen else shape.numel
            yield MemoryItem("teacher weights, a second copy", numel * itemsize // self.shards)
            if self.is_sharded:
                live = (2 * shape.largest_block_numel + shape.resident_numel) * itemsize
                yield MemoryItem("teacher's gathered blocks, embeddings and head", live, phases=("teacher",))
        if self.placement == "cpu":
            resident = (2 * shape.largest_block_numel + shape.resident_numel) * itemsize
            yield MemoryItem("teacher blocks on their way, two, with embeddings and head", resident)
            yield MemoryItem("teacher weights", whole, place="host")
        if self.settings.teacher_model_kind == "ema":
            numel, name = sum(p.numel for p in self.trained if not p.is_adapter), "weights"
            if self.has_adapters:
                numel, name = numel + sum(linear.inputs * linear.outputs for linear in self.adapted), "merged delta"
            elif itemsize == 4:  # the teacher's own weights hold it
                return
            place: Literal["device", "host"] = "host" if self.placement == "cpu" else "device"
            yield MemoryItem(f"EMA of the {name} (fp32)", 4 * numel // self.shards, place=place)

    def list_features(self) -> Iterator[MemoryItem]:
        """What a frozen tower made of the step's images in the rollout, until the last backward pass."""
        settings = self.settings
        if not settings.share_vision_features or self.trainings[1] != "frozen" or self.is_sharded:
            return
        images = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        nbytes = count_feature_bytes(self.shape, settings.student_view, images, self.precision)
        until: tuple[Phase, ...] = ("rollout", "teacher", "student", "objective", "backward")
        yield MemoryItem(f"image features of {images} prompts", nbytes, phases=until)

    def list_rollout(self) -> Iterator[MemoryItem]:
        """The cache at the last token, and the pass over the prompts."""
        settings, shape = self.settings, self.shape
        rows = count_rollouts(settings)
        load = ForwardLoad(settings.student_view, rows, settings.max_completion_length)
        prompts = ForwardLoad(settings.student_view, rows, 0)
        yield MemoryItem(
            f"cache of {rows} completions", count_cache_bytes(shape, load, self.precision), phases=("rollout",)
        )
        yield MemoryItem("pixels", count_pixel_bytes(shape, prompts), phases=("rollout",))
        yield MemoryItem(
            "one block at work on the prompts",
            count_workspace_bytes(shape, prompts, self.precision),
            phases=("rollout",),
        )
        # model's logits, their fp32 form, the last step's for the log-probs, and the filtered ones
        yield MemoryItem("logits of one step", 4 * rows * shape.vocabulary * 4, phases=("rollout",))
        yield MemoryItem("weights converted by autocast", self._count_casts(False), phases=("rollout",))

    def list_teacher_forward(self) -> Iterator[MemoryItem]:
        """The forward without gradient over the longer view."""
        shape, load = self.own_teacher or self.shape, self.teacher_load
        yield MemoryItem("pixels", count_pixel_bytes(shape, load), phases=("teacher",))
        workspace = count_workspace_bytes(shape, load, self.teacher_precision)
        yield MemoryItem("one block at work", workspace, phases=("teacher",))
        if self.placement == "student":
            yield MemoryItem("weights converted by autocast", self._count_casts(False), phases=("teacher",))

    def list_student_forward(self) -> Iterator[MemoryItem]:
        """The forward with gradient, the objective and the backward."""
        shape, settings, load = self.shape, self.settings, self.student_load
        checkpointing = settings.activation_checkpointing
        loads = self._adapter_loads()
        saved, again = count_saved_bytes(shape, load, self.precision, self.trainings, loads, checkpointing)
        grad: tuple[Phase, ...] = ("student", "objective", "backward")
        yield MemoryItem("pixels", count_pixel_bytes(shape, load), grad)
        yield MemoryItem("saved activations", saved, grad)
        yield MemoryItem("activations of one block, made again", again, ("backward",))
        workspace = count_workspace_bytes(shape, load, self.precision)
        yield MemoryItem("one block at work", workspace, ("student", "backward"))
        # autocast forgets them after the forward; a graph without checkpointing does not
        kept: tuple[Phase, ...] = ("student", "objective") if checkpointing else grad
        yield MemoryItem("weights converted by autocast", self._count_casts(not checkpointing), kept)
        if checkpointing and self.precision.is_autocast:
            block = shape.largest_block_numel * self.precision.operand
            yield MemoryItem("weights of one block, converted again", block, ("backward",))
        # made whole before it is added to the one that stands; the largest is the embeddings'
        largest = max((p.numel * self.get_itemsize(p) for p in self.trained), default=0)
        yield MemoryItem("a gradient on its way", largest, ("backward",))
        if self.is_sharded and self.trainings[0] == "full":
            whole = (shape.largest_block_numel + shape.resident_numel) * self.precision.weight
            yield MemoryItem("whole gradients, before they are shared out", whole, ("backward",))
        yield from self.list_objective()

    def list_objective(self) -> Iterator[MemoryItem]:
        """What `linear_token_stats` allocates: chunks of logits, the head's gradient, converted heads."""
        head_numel = self.shape.vocabulary * self.shape.text.hidden
        on_gpu = self.settings.device_type == "cuda"
        operand = self.precision.operand if on_gpu else 4
        rows = self.student_load.rows * self.settings.max_completion_length
        row_bytes = self.shape.vocabulary * (2 * 4 + (operand if operand != 4 else 0))
        if on_gpu:
            most = max(128, tuning.CHUNK_BYTES // row_bytes // 128 * 128)
        else:
            most = max(16, tuning.CPU_CHUNK_BYTES // row_bytes)
        yield MemoryItem("chunk of logits", min(rows, most) * row_bytes, ("objective",))
        if self.trainings[0] == "full":
            yield MemoryItem("gradient of the head (fp32)", 4 * head_numel, ("objective", "backward"))
        heads = 0
        if self.is_sharded:  # gathered whole, in the dtype it is stored in
            heads += head_numel * max(self.get_itemsize(p) for p in self.base)
        if self.precision.weight != operand:
            heads += head_numel * operand
        if self.needs_own_teacher and self.teacher_itemsize != operand:
            heads += head_numel * operand
        yield MemoryItem("heads gathered or converted", heads, ("objective",))
        # both sides' states and the gradient of one
        hidden = 3 * rows * self.shape.text.hidden * self.precision.stream
        yield MemoryItem("hidden states of the completions", hidden, ("objective", "backward"))

    def _adapter_loads(self) -> tuple[AdapterLoad, AdapterLoad]:
        found = {"lora_r": self.settings.lora_r, "use_dora": self.settings.use_dora, **read_adapter(self.shape)}
        text, vision = (
            sum_adapters(
                [linear for linear in self.adapted if linear.is_vision is is_vision],
                found["lora_r"],
                found["use_dora"],
                self.settings.lora_dropout > 0,
            )
            for is_vision in (False, True)
        )
        return text, vision

    def _count_casts(self, keeps_frozen: bool) -> int:
        """16-bit forms of fp32 weights: autocast keeps those of trained ones, a graph those of frozen ones too."""
        # PEFT makes adapters in fp32 over weights of any dtype
        compute = ITEMSIZES[self.settings.compute_dtype]
        converted = sum(p.numel for p in self.adapters if p.itemsize > compute) * compute
        if not self.precision.is_autocast:
            return converted
        linears = [linear for linear in self.shape.linears if not linear.is_head]
        if self.has_adapters:
            linears = [linear for linear in linears if keeps_frozen and not linear.is_vision]
        elif self.trainings[1] == "frozen":
            linears = [linear for linear in linears if not linear.is_vision]
        return converted + sum(linear.inputs * linear.outputs for linear in linears) * self.precision.operand

    def _name_dtype(self) -> str:
        sizes = {self.get_itemsize(p) for p in self.base}
        return "/".join("fp32" if size == 4 else f"{8 * size}-bit" for size in sorted(sizes, reverse=True))
