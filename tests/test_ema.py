"""The moving average: its arithmetic in fp32, of merged differences under LoRA, and the same over processes."""

from __future__ import annotations

import copy

import pytest
import torch
from ema_ranks import compare_average
from processes import run_in_processes
from weight_cases import LORA, make_inputs, make_student, project, shake, wrap_layers

from imagine_opd.errors import ConfigError
from imagine_opd.teacher.ema import Shadows
from imagine_opd.teacher.load import build_teacher
from imagine_opd.teacher.merging import compute_delta, find_lora_layers

CPU = torch.device("cpu")


def make_teacher(tiny, student, **options):
    teacher = build_teacher(student, tiny.processor, kind="ema", **options)
    teacher.prepare(CPU)
    return teacher


def test_steps_too_small_for_16_bits_add_up():
    """A rate of 0.05 on a step of 1e-6: 100 of them move the average where bf16 would stand still."""
    shadows = Shadows(0.05, 1)
    start = torch.full((4,), 0.5, dtype=torch.bfloat16)
    shadows.tensors["w"] = start.float()
    value, expected = start.double(), start.double()
    narrow = start.clone()
    for _ in range(100):
        value = value + 1e-6
        shadows.follow([("w", value.float())])
        expected += 0.05 * (value - expected)
        narrow.lerp_(value.bfloat16(), 0.05)
    assert torch.equal(narrow, start)
    moved = shadows.tensors["w"].double() - start.double()
    assert torch.allclose(moved, expected - start.double(), rtol=0.1)
    assert float(moved[0]) > 7e-5


@pytest.mark.parametrize("placement", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_weights_follow_by_the_formula(tiny, make_rows, tmp_path, dtype, placement):
    student = make_student(tiny, tmp_path, freeze_vision=True).to(dtype)
    teacher = make_teacher(tiny, student, placement=placement, update_rate=0.25, sync_steps=2)
    expected = {name: p.float().clone() for name, p in student.named_parameters() if p.requires_grad}
    for step in range(1, 5):
        shake(student, 0.01, seed=step)
        teacher.update(student)
        if step % 2 == 0:
            for name, parameter in student.named_parameters():
                if parameter.requires_grad:
                    expected[name] += 0.25 * (parameter.float() - expected[name])
    state = teacher.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype is torch.float32
        assert torch.allclose(state[name], value, atol=1e-7), name
    reference = copy.deepcopy(student)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(expected.get(name, parameter))
    inputs = make_inputs(tiny, make_rows)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    shown = teacher.run(student, project(inputs)).float()
    with torch.no_grad():
        expected = project(inputs)(reference.eval()).float()
    assert torch.allclose(shown, expected, atol=1e-4 if dtype is torch.float32 else 0.1)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_with_an_adapter_the_merged_difference_is_averaged(tiny, make_rows, tmp_path, extra):
    student = make_student(tiny, tmp_path, lora_modules_to_save=["lm_head"], **LORA, **extra)
    teacher = make_teacher(tiny, student, update_rate=0.3)
    base = copy.deepcopy(tiny.model)
    weights = dict(base.named_parameters())
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())  # trains apart from the embeddings
    start = {name: weights[name].detach().clone() for name in find_lora_layers(student)}
    differences = {name: torch.zeros_like(weight) for name, weight in start.items()}
    head = base.lm_head.weight.detach().clone()
    for step in range(3):
        shake(student, seed=step)
        teacher.update(student)
        merged = copy.deepcopy(student).merge_and_unload()
        for name, weight in dict(merged.named_parameters()).items():
            if name in differences:
                differences[name] += 0.3 * (weight.detach() - start[name] - differences[name])
        head += 0.3 * (merged.lm_head.weight.detach() - head)
    state = teacher.state_dict()
    assert state.keys() == {*differences, "lm_head.weight"}
    for name, value in differences.items():
        assert torch.allclose(state[name], value, atol=1e-5), name
        assert float(value.abs().max()) > 1e-3
    with torch.no_grad():
        for name, value in differences.items():
            weights[name].add_(value)
        base.lm_head.weight.copy_(head)
    inputs = make_inputs(tiny, make_rows)
    expected = project(inputs)(base.eval())
    assert torch.allclose(teacher.run(student, project(inputs)), expected, atol=1e-4)
    assert (expected - project(inputs)(tiny.model.eval())).abs().max() > 0.05


def test_average_of_products_is_not_the_product_of_averages(tiny, tmp_path):
    """Two adapters of opposite sign are one weight: A and B apart would average to nothing."""
    student = make_student(tiny, tmp_path, **LORA)
    shake(student)
    teacher = make_teacher(tiny, student, update_rate=0.5)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.neg_()
    name, layer = next(iter(find_lora_layers(student).items()))
    delta = compute_delta(layer)
    teacher.update(student)
    assert torch.allclose(teacher.state_dict()[name], delta)
    assert float(delta.abs().max()) > 1e-3


def test_average_that_caught_up_rounds_as_a_16_bit_student_does(tiny, make_rows, tmp_path):
    inputs = make_inputs(tiny, make_rows)
    tiny.model.to(torch.bfloat16)
    torch.manual_seed(0)
    student = make_student(tiny, tmp_path, bf16=True, **LORA)
    teacher = make_teacher(tiny, student, update_rate=1.0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        start = teacher.run(student, project(inputs)).float()
        shake(student)
        teacher.update(student)
        shown = teacher.run(student, project(inputs)).float()
        expected = project(inputs)(student.eval()).float()
    scale = expected.square().mean().sqrt()
    assert (shown - expected).square().mean().sqrt() < 2.0**-6 * scale  # two units of bf16, over the whole network
    assert (start - expected).square().mean().sqrt() > 2.0**-3 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {**LORA, "lora_modules_to_save": ["lm_head"]}], ids=["full", "lora"])
def test_saved_average_goes_on_bit_for_bit(tiny, make_rows, tmp_path, fields, dtype):
    inputs = make_inputs(tiny, make_rows)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    tiny.model.to(dtype)
    student = make_student(tiny, tmp_path, bf16=True, **fields)
    first = copy.deepcopy(student)
    teacher = make_teacher(tiny, student, sync_steps=2)
    for step in range(3):
        shake(student, seed=step)
        teacher.update(student)
    teacher.save(tmp_path)
    other = make_teacher(tiny, first, sync_steps=2)
    other.load(tmp_path)
    for _ in range(2):
        shake(student, seed=9)
        for one in (teacher, other):
            one.update(student)
        mine, theirs = teacher.state_dict(), other.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(teacher.run(student, project(inputs)), other.run(student, project(inputs)))


def test_weights_that_no_average_covers_are_refused(tiny, tmp_path):
    from peft import LoraConfig

    options = {"target_modules": ["q_proj", "patch_embed.proj"]}
    with pytest.raises(ConfigError, match="patch_embed.proj: its adapter"):
        make_teacher(tiny, make_student(tiny, tmp_path, LoraConfig(**options)))
    student = make_student(tiny, tmp_path, **LORA)
    student.get_decoder().norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"norm\.weight trains too"):
        make_teacher(tiny, student)


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_average_over_two_fsdp2_processes_equals_one(tmp_path, kind):
    """Sharded lerp, gathered save, restored shards and the teacher's forward, against one process."""
    assert min(run_in_processes(compare_average, kind, tmp_path)) > 10


@pytest.mark.parametrize("fields", [{}, LORA])
def test_weights_that_deepspeed_split_are_refused(tiny, tmp_path, fields):
    student = make_student(tiny, tmp_path, **fields)
    teacher = make_teacher(tiny, student)
    next(student.parameters()).ds_id = 0  # DeepSpeed's mark of a parameter in pieces
    with pytest.raises(ConfigError, match="ZeRO-3 holds the student.s weights in pieces"):
        teacher.update(student)
    with pytest.raises(ConfigError, match="use FSDP2"):
        build_teacher(student, tiny.processor, kind="ema")
    if not fields:
        with pytest.raises(ConfigError, match="use FSDP2"):
            build_teacher(student, tiny.processor)


def test_whole_weights_that_deepspeed_holds_are_no_average_either(tiny, tmp_path):
    """Gathered while the teacher is built, they are in pieces at the first step."""
    student = make_student(tiny, tmp_path)
    for parameter in student.parameters():
        parameter.ds_id, parameter.ds_numel = 0, parameter.numel()
    with pytest.raises(ConfigError, match="teacher can neither copy nor follow"):
        build_teacher(student, tiny.processor, kind="ema")


@pytest.mark.parametrize("fields", [{}, LORA], ids=["full", "lora"])
def test_average_follows_through_fsdps_activation_checkpoints(tiny, tmp_path, fields):
    student = make_student(tiny, tmp_path, **fields)
    plain = copy.deepcopy(student)
    teacher, expected = (make_teacher(tiny, model, update_rate=0.5) for model in (student, plain))
    wrap_layers(student)
    for model, follower in ((student, teacher), (plain, expected)):
        shake(model)
        follower.update(model)
    state = expected.state_dict()
    assert teacher.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
