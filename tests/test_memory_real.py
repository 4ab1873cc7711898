"""The memory planner against what real models hold: weights, gradients, states, cache, activations, peak."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from memory_models import (
    TEXT_LAYERS,
    VIEW,
    add_adapters,
    build_gemma_config,
    build_model,
    build_qwen3_config,
    build_qwen25_config,
    get_base,
    make_inputs,
    make_settings,
    sum_storages,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagine_opd.kernels import linear_token_stats
from imagine_opd.memory import (
    ViewSize,
    plan_memory,
)
from imagine_opd.memory.settings import PHASES

# what stays: weights, gradients, optimizer states


def take_step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """One step whose gradients reach every trained weight."""
    sum(p.float().square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["full", "frozen vision", "lora", "dora", "lora on all"])
def test_weights_gradients_and_optimizer_states_are_those_of_a_real_step(way, dtype):
    config = build_qwen3_config()
    model = build_model(config, dtype)
    fields: dict[str, Any] = {"model_dtype": str(dtype).removeprefix("torch.")}
    if way == "frozen vision":
        model.model.visual.requires_grad_(False)
        fields["freeze_vision"] = True
    if "ora" in way:
        targets = "all-linear" if way == "lora on all" else TEXT_LAYERS
        model = add_adapters(model, use_dora=way == "dora", target_modules=targets)
        fields |= {"lora_r": 8, "lora_targets": targets, "use_dora": way == "dora"}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    take_step(model, optimizer)
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    weights = sum_storages(model.parameters())
    # from the config before anything exists, and from the model with its adapters on
    for plan in (
        plan_memory(config, make_settings(VIEW, **fields)),
        plan_memory(model, make_settings(VIEW, use_dora=way == "dora")),
    ):
        assert plan.get_bytes("student weights") + plan.get_bytes("adapters") == weights
        assert plan.get_bytes("gradients") == sum_storages(p.grad for p in trained)
        assert plan.get_bytes("optimizer states") == sum_storages(states)
        assert plan.trained_numel == sum(p.numel() for p in trained)


@pytest.mark.parametrize("name", ["adafactor", "sgd", "rmsprop", "adagrad"])
def test_states_of_other_optimizers_are_those_of_a_real_step(name):
    model = build_model(build_qwen3_config())
    builders = {"adafactor": transformers.Adafactor, "sgd": torch.optim.SGD}
    builders |= {"rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
    optimizer = builders[name](model.parameters())
    take_step(model, optimizer)
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    plan = plan_memory(model, make_settings(VIEW, optim=name))
    assert plan.get_bytes("optimizer states") == sum_storages(value for value in states if value.ndim)


def test_8_bit_adamw_takes_two_bytes_and_a_scale_except_for_embeddings():
    """bitsandbytes: blocks of 256 with an fp32 scale, tensors under 4096 in fp32; transformers exempts embeddings."""
    model = build_model(build_qwen3_config())
    expected = 0
    for name, p in model.named_parameters():
        is_exempt = p.numel() < 4096 or "embed" in name.split(".")[-2]
        expected += 8 * p.numel() if is_exempt else 2 * p.numel() + 8 * -(-p.numel() // 256)
    for name in ("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit"):
        plan = plan_memory(model, make_settings(VIEW, optim=name))
        assert plan.get_bytes("optimizer states") == expected


# what comes and goes: cache, activations


@pytest.mark.parametrize("way", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("build", [build_qwen3_config, build_qwen25_config, build_gemma_config])
def test_cache_is_that_of_a_real_rollout(build, way):
    model = build_model(build(), torch.bfloat16 if way == "bf16" else torch.float32).eval()
    inputs, view = make_inputs(model, rows=2, length=60)
    is_autocast = way == "autocast"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        out = model.generate(
            **inputs, max_new_tokens=9, min_new_tokens=9, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        )
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in out.past_key_values.layers
        for tensor in (layer.keys, layer.values)
    )
    settings = make_settings(
        view, max_completion_length=9, compute_dtype="bfloat16" if is_autocast else "float32", freeze_vision=True
    )
    assert plan_memory(model, settings).get_bytes("cache of 2 completions") == held


def count_saved_storages(model: Any, inputs: dict[str, torch.Tensor], is_autocast: bool) -> int:
    """Bytes that autograd keeps of one forward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage  # held, or its address could be used again
        return tensor

    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        model.base_model(**inputs, use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())


def enable_checkpointing(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# name: how it is built, and the least and the most that the plan may be of what autograd holds
WAYS: dict[str, tuple[dict[str, Any], tuple[float, float], tuple[float, float]]] = {
    "fp32": ({}, (0.98, 1.03), (0.95, 1.30)),
    "bf16": ({"dtype": torch.bfloat16}, (0.98, 1.03), (0.95, 1.30)),
    "autocast": ({"is_autocast": True}, (0.97, 1.03), (0.70, 1.30)),
    "fp32 frozen vision": ({"freeze": True}, (0.98, 1.03), (0.95, 1.30)),
    "lora fp32": ({"lora": {}}, (0.98, 1.25), (0.95, 1.30)),
    "lora bf16": ({"lora": {}, "dtype": torch.bfloat16}, (0.98, 1.06), (0.95, 1.30)),
    "lora bf16 autocast": ({"lora": {}, "dtype": torch.bfloat16, "is_autocast": True}, (0.98, 1.06), (0.95, 1.30)),
    "dora bf16 autocast": (
        {"lora": {"use_dora": True}, "dtype": torch.bfloat16, "is_autocast": True},
        (0.97, 1.05),
        (0.95, 1.30),
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_activations_are_what_autograd_keeps(name, checkpointing):
    """Measured on transformers 5.24 and torch 2.15: the plan is 0.99 to 1.02 of the real bytes (LoRA in fp32, where
    layers share one input: 1.20); with checkpointing 0.72 to 1.27."""
    way, plain, checkpointed = WAYS[name]
    model = build_model(build_qwen3_config(), way.get("dtype", torch.float32))
    if way.get("freeze"):
        model.model.visual.requires_grad_(False)
    if "lora" in way:
        model = add_adapters(model, **way["lora"])
    if checkpointing:
        enable_checkpointing(get_base(model))
    inputs, view = make_inputs(model, rows=2, length=200)
    is_autocast = way.get("is_autocast", False)
    held = count_saved_storages(get_base(model), inputs, is_autocast)
    settings = make_settings(
        view,
        compute_dtype="bfloat16" if is_autocast else "float32",
        activation_checkpointing=checkpointing,
        freeze_vision=way.get("freeze", False),
        use_dora="use_dora" in way.get("lora", {}),
    )
    plan = plan_memory(model, settings)
    planned = plan.get_bytes("saved activations")
    if not checkpointing:  # else the converted weights are in autocast's own cache
        planned += sum(i.nbytes for i in plan.items if i.name.startswith("weights conv") and "student" in i.phases)
    least, most = checkpointed if checkpointing else plain
    assert least <= planned / held <= most


@pytest.mark.parametrize("build", [build_qwen25_config, build_gemma_config])
def test_activations_of_other_families_are_near_what_autograd_keeps(build):
    model = build_model(build())
    inputs, view = make_inputs(model, rows=2, length=200)
    held = count_saved_storages(model, inputs, is_autocast=False)
    planned = plan_memory(model, make_settings(view)).get_bytes("saved activations")
    assert 0.8 <= planned / held <= 1.2


class PeakBytes(TorchDispatchMode):
    """The most bytes in storages that lived at once, those given from the start."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        for tensor in held:
            self.watch(tensor)

    def watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.storages:
            return
        self.live += nbytes
        self.peak = max(self.peak, self.live)

        def forget(_: Any) -> None:
            self.live -= nbytes
            self.storages.pop(key, None)

        self.storages[key] = weakref.ref(storage, forget)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor)
        return out


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("fp32", False), ("fp32", True), ("autocast", True), ("lora bf16 autocast", False)],
)
def test_peak_of_a_whole_step_is_the_planned_one(name, checkpointing):
    """Teacher, student, objective, backward, AdamW, twice. Measured: the plan is 1.00 to 1.06 of the real peak here,
    1.04 to 1.22 where activations outweigh weights (3 rows of 300 tokens, 4 layers)."""
    way, new_tokens, rows = WAYS[name][0], 10, 2
    model = build_model(build_qwen3_config(num_hidden_layers=2), way.get("dtype", torch.float32))
    if "lora" in way:
        model = add_adapters(model)
    student: Any = get_base(model)
    if checkpointing:
        enable_checkpointing(student)
    teacher: Any = student if "lora" in way else copy.deepcopy(student).requires_grad_(False).eval()
    inputs, view = make_inputs(model, rows, length=80)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    is_autocast = way.get("is_autocast", False)
    ids_N = inputs["input_ids"][:, -new_tokens:].flatten()

    def score(side: Any) -> torch.Tensor:
        hidden_BLD = side.model(**inputs, use_cache=False).last_hidden_state
        return hidden_BLD[:, -new_tokens - 1 : -1].flatten(0, 1)

    student.train()
    with PeakBytes([*model.parameters(), *teacher.parameters(), *inputs.values()]) as tracker:
        for _ in range(2):  # in the second micro-batch gradients and states exist
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                with torch.no_grad():
                    teacher_hidden_ND = score(teacher)
                stats = linear_token_stats(
                    score(student),
                    student.lm_head,
                    teacher_hidden_ND,
                    teacher.lm_head,
                    ids_N,
                    lambda stats: stats.reverse_kl_N,
                )
            stats.loss.backward()
            optimizer.step()
            del stats, teacher_hidden_ND
    settings = make_settings(
        ViewSize(view.text_tokens - new_tokens, view.image_tokens, view.patches),
        max_completion_length=new_tokens,
        compute_dtype="bfloat16" if is_autocast else "float32",
        activation_checkpointing=checkpointing,
    )
    plan = plan_memory(model, settings)
    planned = max(plan.sum_bytes(phase) for phase in PHASES if phase != "rollout")
    assert 0.97 <= planned / tracker.peak <= 1.25
