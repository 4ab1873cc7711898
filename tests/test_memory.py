"""The memory planner: shapes, what processes share, the teacher's place, advice and the page of its figures."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from memory_models import (
    CHECKPOINTING,
    VIEW,
    build_gemma_config,
    build_model,
    build_published_config,
    build_qwen3_config,
    build_qwen25_config,
    make_settings,
)
from transformers import (
    Gemma3Config,
    InternVLConfig,
    LlavaOnevisionConfig,
    SmolVLMConfig,
)
from weight_cases import make_student

from imagine_opd.config import ImagineOPDConfig
from imagine_opd.errors import ConfigError
from imagine_opd.memory import (
    MemorySettings,
    ViewSize,
    advise_memory,
    choose_teacher_placement,
    estimate_view,
    measure_views,
    plan_memory,
    read_memory_settings,
    read_model_shape,
)
from imagine_opd.memory.activations import ForwardLoad
from imagine_opd.memory.settings import PHASES
from imagine_opd.models.vision_tower import freeze_vision_tower
from imagine_opd.privilege import build_prompts
from imagine_opd.settings import make_privilege_config
from imagine_opd.teacher.load import build_teacher
from imagine_opd.views import make_views

# shapes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2048, 28, 16, 6144, True), 2_127_532_032),
        ((2560, 36, 32, 9728, True), 4_437_815_808),
        ((4096, 36, 32, 12288, False), 8_767_123_696),
        ((5120, 64, 64, 25600, False), 33_357_390_064),
    ],
)
def test_parameters_of_published_sizes_are_counted_exactly(sizes, expected):
    shape = read_model_shape(build_published_config(*sizes))
    assert shape.numel == expected
    assert shape.text.layers + shape.vision.layers == len(shape.block_numels)


@pytest.mark.parametrize("build", [build_qwen3_config, build_qwen25_config, build_gemma_config])
def test_a_config_counts_as_the_model_that_is_built_from_it(build):
    model = build_model(build())
    shape, loaded = read_model_shape(build()), read_model_shape(model)
    assert shape.numel == loaded.numel == sum(p.numel() for p in model.parameters())
    assert shape.block_numels == loaded.block_numels
    layer = model.get_decoder().layers[1]
    name = next(name for name, module in model.named_modules() if module is layer)
    assert shape.block_numels[name] == sum(p.numel() for p in layer.parameters())


SMOL_VISION = {"image_size": 512, "patch_size": 16, "hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("config", "pixels", "patches", "image_tokens"),
    [
        (build_qwen3_config(), [1024 * 1024, 512 * 512], 4096 + 1024, 1024 + 256),
        (build_qwen25_config(), [56 * 56], 16, 4),
        (InternVLConfig(), [448 * 448], 1024, 256),
        (InternVLConfig(), [4 * 448 * 448], 5 * 1024, 5 * 256),
        (LlavaOnevisionConfig(), [384 * 384], 729, 729),
        (SmolVLMConfig(vision_config=SMOL_VISION, scale_factor=4), [512 * 1024], 3 * 1024, 3 * 64),
        (Gemma3Config(), [896 * 896, 100], 2 * 196, 2 * 256),
    ],
)
def test_images_become_tokens_by_the_familys_arithmetic(config, pixels, patches, image_tokens):
    assert estimate_view(config, pixels, text_tokens=100) == ViewSize(100, image_tokens, patches)


def test_real_prompts_are_measured_at_their_longest(tiny, make_rows):
    rows = make_rows(3)
    config = make_privilege_config(ImagineOPDConfig(output_dir="unused", report_to=[]))
    pairs = [
        build_prompts(row, views, tiny.processor, config)
        for row, views in zip(rows, make_views(rows, tiny.view_config), strict=True)
    ]
    shape = read_model_shape(tiny.model)
    student = measure_views(shape, [pair.student for pair in pairs])
    teacher = measure_views(shape, [pair.teacher for pair in pairs])
    # 48 x 48 pixels are 9 tokens of 4 patches each; a crop of 32 x 32 adds 4
    assert (student.image_tokens, student.patches) == (9, 36)
    assert (teacher.image_tokens, teacher.patches) == (13, 52)
    assert student.tokens == max(len(pair.student.input_ids) for pair in pairs)


@pytest.mark.parametrize("build", [build_qwen3_config, build_gemma_config])
def test_what_freeze_vision_freezes_is_what_the_planner_leaves_out(build):
    """The tower and its projector, wherever a family keeps it."""
    model = build_model(build())
    numel = read_model_shape(model).numel
    freeze_vision_tower(model)
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert left < numel
    assert plan_memory(build(), make_settings(VIEW, freeze_vision=True)).trained_numel == left


@pytest.mark.parametrize("source", [torch.nn.Linear, 7])
def test_what_is_no_model_is_refused(source):
    with pytest.raises(ConfigError, match="neither a model nor a config"):
        read_model_shape(source)


def test_a_language_model_without_vision_is_refused():
    with pytest.raises(ConfigError, match="no vision"):
        read_model_shape(transformers.Qwen2Config(hidden_size=64, num_hidden_layers=1, intermediate_size=64))


def test_processes_share_what_their_kind_shares():
    config = build_qwen3_config()
    one = plan_memory(config, make_settings(VIEW))

    def share(parallelism: str, **fields: Any) -> Any:
        return plan_memory(config, make_settings(VIEW, parallelism=parallelism, num_processes=8, **fields))

    ddp, fsdp = share("ddp"), share("fsdp2")
    for name in ("student weights", "gradients", "optimizer states", "teacher weights"):
        assert ddp.get_bytes(name) == one.get_bytes(name)
        assert fsdp.get_bytes(name) == one.get_bytes(name) // 8
    # DDP holds each gradient twice: in its own tensor, and in a bucket on its way
    assert ddp.get_bytes("gradient buckets") == one.get_bytes("gradients")
    numel = read_model_shape(config).numel
    zero = share("zero3", compute_dtype="bfloat16")
    assert zero.get_bytes("student weights") == 2 * numel // 8
    assert zero.get_bytes("fp32 master weights") == 4 * numel // 8
    assert zero.get_bytes("optimizer states") == 8 * numel // 8
    # stages 1 and 2 of DeepSpeed split what the optimizer holds, and 2 the gradients; the weights stay whole
    for stage, gradients in ((1, 2 * numel), (2, 2 * numel // 8)):
        plan = share(f"zero{stage}", compute_dtype="bfloat16")
        assert plan.get_bytes("student weights") == 2 * numel
        assert plan.get_bytes("gradients") == gradients
        assert plan.get_bytes("fp32 master weights") == 4 * numel // 8
        assert plan.get_bytes("optimizer states") == 8 * numel // 8
        assert plan.get_bytes("gathered weights") == 0
        assert plan.get_bytes("teacher weights") == 4 * numel
    assert fsdp.get_bytes("gathered weights") == 4 * (
        2 * max(one.shape.block_numels.values()) + one.shape.resident_numel
    )


# the teacher's place


PUBLISHED_4B = build_published_config(2560, 36, 32, 9728, True)


@pytest.fixture(scope="module")
def shape_4b():
    return read_model_shape(PUBLISHED_4B)


@pytest.fixture
def big_settings() -> MemorySettings:
    student = estimate_view(PUBLISHED_4B, [2**20], 200)
    teacher = estimate_view(PUBLISHED_4B, [2**20, 2**18, 2**18, 2**18], 250)
    return MemorySettings(
        student, teacher, compute_dtype="bfloat16", teacher_dtype="bfloat16", activation_checkpointing=True
    )


def test_placement_follows_what_fits(shape_4b, big_settings):
    copy_plan = plan_memory(shape_4b, dataclasses.replace(big_settings, teacher_placement="copy"))
    just_enough = -(-copy_plan.device_bytes * 100 // 95) + 1
    roomy = choose_teacher_placement(shape_4b, big_settings, just_enough)
    assert roomy.placement == "copy"
    assert roomy.reason.startswith("a second copy (8.3 GiB) fits beside ")
    tight = choose_teacher_placement(shape_4b, big_settings, just_enough - 2**20)
    assert tight.placement == "cpu"
    assert "a second copy (8.3 GiB) does not fit beside" in tight.reason
    assert "held on the CPU and streamed block by block" in tight.reason
    assert "missing" not in tight.reason
    hopeless = choose_teacher_placement(shape_4b, big_settings, 24 * 2**30)
    assert hopeless.placement == "cpu"
    assert "GiB are missing" in hopeless.reason


@pytest.mark.parametrize(
    ("fields", "placement"),
    [
        ({"lora_r": 16}, "adapter_off"),
        ({"lora_r": 16, "teacher_model_kind": "ema"}, "adapter_off"),
        ({"teacher_model_kind": "live"}, "student"),
        ({"lora_r": 16, "teacher_model_kind": "live"}, "student"),
    ],
)
def test_no_second_copy_where_the_students_weights_serve(shape_4b, big_settings, fields, placement):
    settings = dataclasses.replace(big_settings, **fields)
    assert choose_teacher_placement(shape_4b, settings, 2**30).placement == placement
    plan = plan_memory(shape_4b, settings)
    assert plan.get_bytes("teacher weights") == plan.host_bytes == 0


def test_a_teacher_of_its_own_checkpoint_is_never_the_student_without_adapters(shape_4b, big_settings):
    settings = dataclasses.replace(big_settings, lora_r=16)
    teacher = build_published_config(4096, 36, 32, 12288, False)
    assert choose_teacher_placement(shape_4b, settings, 2**40, teacher).placement == "copy"
    assert plan_memory(shape_4b, settings, teacher).get_bytes("teacher weights") == 2 * 8_767_123_696
    wrong = dataclasses.replace(settings, teacher_placement="adapter_off")
    with pytest.raises(ConfigError, match="this teacher has weights of its own"):
        plan_memory(shape_4b, wrong, teacher)


def test_a_streamed_teacher_costs_two_blocks_and_what_stays_outside_blocks(shape_4b, big_settings):
    plan = plan_memory(shape_4b, dataclasses.replace(big_settings, teacher_placement="cpu"))
    text_block = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    outside = (
        shape_4b.numel - 36 * text_block - sum(size for name, size in shape_4b.block_numels.items() if "visual" in name)
    )
    assert plan.get_bytes("teacher blocks") == 2 * (2 * text_block + outside)
    assert plan.host_bytes == 2 * shape_4b.numel


@pytest.mark.parametrize("placement", ["device", "cpu"])
@pytest.mark.parametrize("teacher_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_and_average_take_what_the_plan_says(tiny, tmp_path, teacher_dtype, frozen, placement):
    """In fp32 the teacher's weights hold the average; what is frozen is not averaged, and in a like copy shared."""
    student = make_student(tiny, tmp_path, freeze_vision=frozen)
    options = {"teacher_dtype": teacher_dtype, "placement": placement}
    teacher = build_teacher(student, tiny.processor, kind="ema", **options)
    kept = [*teacher.get_weights().values(), *teacher.shadows.tensors.values()]
    own = {p.data_ptr() for p in student.parameters()}
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in kept}
    where: Any = "cpu" if placement == "cpu" else "copy"
    settings = make_settings(VIEW, teacher_model_kind="ema", teacher_dtype=teacher_dtype, teacher_placement=where)
    plan = plan_memory(student, settings)
    planned = plan.get_bytes("teacher weights") + plan.get_bytes("EMA of the weights")
    assert planned == sum(size for memory, size in held.items() if memory not in own)


def test_ema_of_adapters_is_the_dense_delta_and_of_weights_what_trains(shape_4b, big_settings):
    ema = dataclasses.replace(big_settings, teacher_model_kind="ema")
    assert plan_memory(shape_4b, ema).get_bytes("EMA of the weights") == 4 * shape_4b.numel
    frozen = plan_memory(shape_4b, dataclasses.replace(ema, freeze_vision=True))
    assert frozen.get_bytes("EMA of the weights") == 4 * frozen.trained_numel < 4 * shape_4b.numel
    alike = dataclasses.replace(ema, teacher_dtype=None)
    assert plan_memory(shape_4b, alike).get_bytes("EMA") == 0
    lora = dataclasses.replace(ema, lora_r=16, lora_targets=("q_proj",))
    assert plan_memory(shape_4b, lora).get_bytes("EMA of the merged delta") == 4 * 36 * 2560 * 4096
    streamed = plan_memory(shape_4b, dataclasses.replace(ema, teacher_placement="cpu"))
    assert streamed.host_bytes == (2 + 4) * shape_4b.numel


# text and advice


def read_gib(line: str) -> float:
    number, unit = line.rsplit(" ", 2)[1:]
    return float(number) / (1 if unit == "GiB" else 1024)


def test_description_adds_up_and_names_the_peak(shape_4b, big_settings):
    plan = plan_memory(shape_4b, big_settings)
    text = plan.describe(80 * 2**30)
    assert text.splitlines()[0] == (
        "memory plan: Qwen3VLForConditionalGeneration, 4.44 B parameters, all weights (4.44 B trained)"
    )
    assert f"peak on the device: always + {plan.peak_phase} = {plan.device_bytes / 2**30:.1f} GiB of 80.0 GiB" in text
    assert plan.device_bytes == max(plan.sum_bytes(phase) for phase in PHASES) == plan.sum_bytes(plan.peak_phase)
    (line,) = [line for line in text.splitlines() if line.startswith(plan.peak_phase)]
    assert read_gib(line) == pytest.approx((plan.device_bytes - plan.lasting_bytes) / 2**30, abs=0.051)
    for item in plan.items:
        assert (item.name in text) or item.nbytes == 0


def test_advice_is_ordered_and_each_number_is_what_the_change_saves(shape_4b, big_settings):
    settings = dataclasses.replace(big_settings, activation_checkpointing=False, teacher_dtype=None)
    plan = plan_memory(shape_4b, settings)
    advice = advise_memory(plan)
    savings = [read_gib(line) for line in advice]
    assert savings == sorted(savings, reverse=True)
    changes: dict[str, dict[str, Any]] = {
        "activation_checkpointing": {"activation_checkpointing": True},
        "micro-batch 4 -> 2": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 16,
            "generation_batch_size": 32,
        },
        "teacher weights in bfloat16": {"teacher_dtype": "bfloat16"},
        "the teacher on the CPU": {"teacher_placement": "cpu"},
        "LoRA r=16": {"lora_r": 16, "freeze_vision": True, "model_dtype": "bfloat16"},
        "optim adafactor": {"optim": "adafactor"},
    }
    for start, fields in changes.items():
        (line,) = [line for line in advice if line.startswith(start)]
        other = plan_memory(shape_4b, dataclasses.replace(settings, **fields))
        assert read_gib(line) == pytest.approx((plan.device_bytes - other.device_bytes) / 2**30, abs=0.051)


def test_advice_is_only_what_still_helps(shape_4b, big_settings):
    lora = dataclasses.replace(big_settings, lora_r=16, freeze_vision=True, model_dtype="bfloat16")
    text = "\n".join(advise_memory(plan_memory(shape_4b, lora)))
    for spent in ("activation_checkpointing", "LoRA", "adafactor", "on the CPU", "freeze_vision", "bfloat16"):
        assert spent not in text
    # after checkpointing the rollout of 32 prompts at once is the peak
    assert "generation_batch_size 32 -> 16" in text


def test_a_token_budget_and_packing_count_as_they_cut_and_pack(shape_4b, big_settings):
    def plan(**fields):
        return plan_memory(shape_4b, dataclasses.replace(big_settings, padding_free=False, **fields))

    longest = big_settings.teacher_view.tokens + big_settings.max_completion_length
    rows = big_settings.per_device_train_batch_size * big_settings.num_generations
    assert rows > 2
    activations = "saved activations"
    for budget, expected in ((longest * rows, rows), (2 * longest + 5, 2), (longest - 1, 1)):
        smaller = plan(per_device_train_batch_size=expected, num_generations=1)
        assert plan(max_tokens_per_forward=budget).get_bytes(activations) == smaller.get_bytes(activations)
    padded = ForwardLoad(big_settings.student_view, rows, big_settings.max_completion_length)
    packed = dataclasses.replace(padded, packed=True)
    assert packed.scores == rows * padded.scores == (rows * padded.length) ** 2
    settings = dataclasses.replace(big_settings, padding_free=True)
    masks = (packed.scores - padded.scores) * 2  # in bfloat16, of the block at work
    assert plan_memory(shape_4b, settings).sum_bytes("student") == plan().sum_bytes("student") + masks


def test_settings_are_read_from_the_runs_config():
    config = ImagineOPDConfig(
        output_dir="unused",
        report_to=[],
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_completion_length=77,
        optim="adafactor",
        **{CHECKPOINTING: True},
        model_dtype="bfloat16",
        use_cpu=True,
    )
    settings = read_memory_settings(config, VIEW, VIEW, lora_r=4, device_type="cpu")
    assert settings == MemorySettings(
        VIEW,
        VIEW,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_completion_length=77,
        optim="adafactor",
        activation_checkpointing=True,
        model_dtype="bfloat16",
        lora_r=4,
        device_type="cpu",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_dtype": "int8"}, "model_dtype='int8': expected one of auto, float32, bfloat16, float16"),
        ({"num_processes": 2}, "num_processes=2: say how they share the model"),
        ({"lora_r": 4, "lora_targets": ("no_such",)}, "names no linear layer"),
    ],
)
def test_settings_that_make_no_plan_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        plan_memory(build_qwen3_config(), make_settings(VIEW, **fields))


def test_scaling_page_holds_the_planners_figures():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("write_scaling", root / "scripts" / "write_scaling.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (root / "docs" / "scaling.md").read_text(encoding="utf-8") == script.render_page(), "run `make docs`"
