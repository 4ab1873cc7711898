"""Teachers by kind and place: the weights they show, what they leave untouched, their memory, their checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_cases import LORA, make_inputs, make_student, measure_bytes, project, read_modes, shake

from imagine_opd.errors import ConfigError, TeacherError
from imagine_opd.models.access import find_head, get_body, get_device
from imagine_opd.teacher.load import Teacher, build_teacher
from imagine_opd.teacher.offload import find_blocks

KINDS = {
    "copy": ({}, {}),
    "cpu": ({}, {"placement": "cpu"}),
    "ema": ({}, {"kind": "ema"}),
    "ema on cpu": ({}, {"kind": "ema", "placement": "cpu"}),
    "live": ({}, {"kind": "live"}),
    "adapter off": ({**LORA, "lora_modules_to_save": ["lm_head"]}, {}),
    "adapter ema": ({**LORA, "lora_modules_to_save": ["lm_head"]}, {"kind": "ema"}),
    "adapter live": (LORA, {"kind": "live"}),
}
CPU = torch.device("cpu")


def make_teacher(tiny, student, **options) -> Teacher:
    teacher = build_teacher(student, tiny.processor, **options)
    teacher.prepare(CPU)
    return teacher


@pytest.fixture(params=KINDS)
def pair(request, tiny, tmp_path):
    """A student that has moved since the start, and its teacher of each kind."""
    fields, options = KINDS[request.param]
    student = make_student(tiny, tmp_path, **fields)
    teacher = make_teacher(tiny, student, **options)
    shake(student)
    return student, teacher


def test_teacher_shows_the_weights_of_its_kind(pair, tiny, make_rows):
    student, teacher = pair
    inputs = make_inputs(tiny, make_rows)
    start = project(inputs)(tiny.model.eval())
    now = project(inputs)(student.eval())
    assert (now - start).abs().max() > 0.1
    shown = teacher.run(student, project(inputs))
    if teacher.kind == "live":
        assert torch.equal(shown, now)
    elif teacher.kind == "ema" and teacher.placement == "adapter_off":
        assert torch.allclose(shown, start, atol=1e-5)  # 0 is added; of the same weights
    else:
        assert torch.equal(shown, start)


def test_looking_through_the_teacher_leaves_the_student_as_it_was(pair, tiny, make_rows):
    student, teacher = pair
    inputs = make_inputs(tiny, make_rows)
    student.train()
    part = student.get_decoder().layers[0]
    part.eval()  # a mode that is not the whole model's
    before = read_modes(student)
    trains_head = not hasattr(student, "peft_config") or bool(student.peft_config["default"].modules_to_save)

    def look(module):
        assert not any(inner.training for inner in module.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
        hidden = get_body(module)(**inputs, use_cache=False).last_hidden_state
        assert not hidden.requires_grad
        return hidden

    assert teacher.run(student, look).shape[-1] == find_head(student).in_features
    assert read_modes(student) == before
    with teacher.loaded(student) as module:
        look(module)
    assert read_modes(student) == before
    with pytest.raises(KeyError), teacher.loaded(student):
        raise KeyError
    assert read_modes(student) == before
    with pytest.raises(KeyError):
        teacher.run(student, lambda module: {}["missing"])
    assert read_modes(student) == before
    with teacher.open_head(student):
        assert read_modes(student) == before
        assert find_head(student).weight.requires_grad == trains_head
    assert read_modes(student) == before


def test_open_head_is_the_head_that_the_forward_uses(pair, tiny, make_rows):
    student, teacher = pair
    inputs = make_inputs(tiny, make_rows)
    whole = teacher.run(student, project(inputs))
    hidden = teacher.run(student, lambda module: get_body(module)(**inputs, use_cache=False).last_hidden_state)
    with teacher.open_head(student) as head, torch.no_grad():
        assert torch.equal(torch.nn.functional.linear(hidden, head.weight_VD), whole)


def test_the_students_gradients_are_those_without_a_teacher(pair, tiny, make_rows):
    """Under autocast a weight that was cast without gradient must not be found again by the student's forward."""
    student, teacher = pair
    inputs = make_inputs(tiny, make_rows)
    student.train()
    found = []
    for asked in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if asked:
                teacher.run(student, project(inputs))
                with teacher.open_head(student):
                    pass
            project(inputs)(student).float().square().mean().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 10
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name


def test_frozen_teachers_do_not_move_with_the_student(pair, tiny, make_rows):
    student, teacher = pair
    inputs = make_inputs(tiny, make_rows)
    before = teacher.run(student, project(inputs))
    shake(student, seed=2)
    assert torch.equal(teacher.run(student, project(inputs)), before) == (teacher.kind != "live")
    teacher.update(student)
    assert torch.equal(teacher.run(student, project(inputs)), before) == (teacher.kind == "base")


def test_dropout_of_the_student_does_not_reach_its_teacher(tiny, make_rows, tmp_path):
    inputs = make_inputs(tiny, make_rows)
    student = make_student(tiny, tmp_path, lora_dropout=0.5, **LORA)
    teacher = make_teacher(tiny, student, kind="live")
    shake(student)
    student.train()
    assert not torch.equal(project(inputs)(student), project(inputs)(student))
    assert torch.equal(teacher.run(student, project(inputs)), project(inputs)(student.eval()))


def test_teachers_forward_is_not_checkpointed(tiny, make_rows, tmp_path, monkeypatch):
    inputs = make_inputs(tiny, make_rows)
    student = make_student(tiny, tmp_path, **LORA)
    name = "activation_checkpointing_enable"
    getattr(student, name if hasattr(student, name) else "gradient_checkpointing_enable")()
    student.train()
    calls = []
    for module in student.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            exact = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, _exact=exact: (calls.append(1), _exact(*args))[1]
    project(inputs)(student)
    assert calls
    calls.clear()
    make_teacher(tiny, student).run(student, project(inputs))
    assert not calls


# memory and place


def test_adapter_off_takes_no_second_copy(tiny, make_rows, tmp_path):
    student = make_student(tiny, tmp_path, **LORA)
    before = {name: p.data_ptr() for name, p in student.named_parameters()}
    teacher = make_teacher(tiny, student)
    assert teacher.placement == "adapter_off"
    assert not any(isinstance(value, (torch.nn.Module, torch.Tensor)) for value in vars(teacher).values())
    with teacher.loaded(student) as module:
        assert module is student
        assert {name: p.data_ptr() for name, p in module.named_parameters()} == before
    added = sum(p.numel() * 4 for p in student.parameters() if p.requires_grad)
    assert measure_bytes(student) == measure_bytes(tiny.model) + added


def test_copy_shares_what_is_frozen_and_nothing_that_trains(tiny, tmp_path):
    student = make_student(tiny, tmp_path, freeze_vision=True)
    teacher = make_teacher(tiny, student)
    own = {name: p.data_ptr() for name, p in student.named_parameters()}
    shared = {name for name, p in teacher.module.named_parameters() if p.data_ptr() == own[name]}
    assert shared == {name for name in own if name.startswith("model.visual.")}
    assert all(p.requires_grad for name, p in student.named_parameters() if name not in shared)
    held = make_teacher(tiny, student, placement="cpu")
    assert not {p.data_ptr() for p in held.module.parameters() if not p.is_meta} & set(own.values())
    assert not any(p.is_meta for p in student.parameters())


def test_teacher_on_cpu_holds_blocks_only_while_they_run(tiny, make_rows, tmp_path):
    inputs = make_inputs(tiny, make_rows)
    student = make_student(tiny, tmp_path)
    whole = make_teacher(tiny, student)
    held = make_teacher(tiny, student, placement="cpu")
    blocks = dict(find_blocks(held.module))
    layers = tiny.model.config.text_config.num_hidden_layers
    assert len([name for name in blocks if name.startswith("model.language_model.layers.")]) == layers
    assert any(name.startswith("model.visual.blocks.") for name in blocks)
    of_blocks = {id(p) for block in blocks.values() for p in block.parameters()}
    assert all(p.is_meta == (id(p) in of_blocks) for p in held.module.parameters())
    resident = measure_bytes(held.module)
    peaks = []
    for block in blocks.values():
        block.register_forward_hook(lambda *_: peaks.append(measure_bytes(held.module)))
        for child in block.children():
            child.register_forward_hook(lambda *_: peaks.append(measure_bytes(held.module)))
    assert torch.equal(held.run(student, project(inputs)), whole.run(student, project(inputs)))
    largest = max(sum(p.numel() * 4 for p in block.parameters()) for block in blocks.values())
    assert max(peaks) == resident + largest  # never two blocks at once
    assert measure_bytes(held.module) == resident
    assert resident < measure_bytes(whole.module) / 2
    assert get_device(held.module) == CPU
    assert sum(tensor.numel() for tensor in held.get_weights().values()) == sum(
        p.numel() for p in whole.module.parameters()
    )


def test_teacher_on_cpu_can_generate(tiny, make_rows, tmp_path):
    inputs = make_inputs(tiny, make_rows)
    student = make_student(tiny, tmp_path)
    expected = student.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    with make_teacher(tiny, student, placement="cpu").loaded(student) as module:
        assert torch.equal(module.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


def test_own_dtype_is_the_teachers_alone(tiny, tmp_path):
    student = make_student(tiny, tmp_path, freeze_vision=True)
    teacher = build_teacher(student, tiny.processor, teacher_dtype="bfloat16")
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {b.dtype for b in teacher.module.buffers()} == {b.dtype for b in student.buffers()}
    assert not teacher.equals_student
    assert build_teacher(student, tiny.processor).equals_student


def test_checkpoint_of_its_own_takes_the_teachers_dtype(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    student = make_student(tiny, tmp_path, **LORA)
    teacher = build_teacher(student, tiny.processor, tmp_path / "model", teacher_dtype="bfloat16", placement="cpu")
    assert (teacher.placement, teacher.equals_student) == ("cpu", False)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}


def test_equal_start_is_known_of_fresh_and_of_trained_adapters(tiny, tmp_path):
    student = make_student(tiny, tmp_path, **LORA)
    assert make_teacher(tiny, student).equals_student
    shake(student)
    assert not make_teacher(tiny, student).equals_student
    assert make_teacher(tiny, student, kind="ema").equals_student


def test_tied_weights_stay_tied_in_the_copy(tiny, tmp_path):
    student = make_student(tiny, tmp_path)
    assert student.lm_head.weight is student.get_input_embeddings().weight
    for placement in ("device", "cpu"):
        module = make_teacher(tiny, student, placement=placement).module
        assert module.lm_head.weight is module.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("fields", "options", "error", "message"),
    [
        ({}, {"kind": "ema", "teacher": "model"}, ConfigError, "teacher= names weights of its own"),
        ({}, {"kind": "live", "teacher": "model"}, ConfigError, "teacher= names weights of its own"),
        ({}, {"kind": "old"}, ConfigError, "teacher_model_kind='old'"),
        (LORA, {"placement": "cpu"}, ConfigError, "teacher_placement='cpu': with an adapter"),
        (LORA, {"teacher_dtype": "bfloat16"}, ConfigError, "teacher_dtype='bfloat16': with an adapter"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, tmp_path, fields, options, error, message):
    with pytest.raises(error, match=message):
        build_teacher(make_student(tiny, tmp_path, **fields), tiny.processor, **options)


# checkpoints


def test_teacher_file_names_kind_and_weights(pair, tmp_path):
    _, teacher = pair
    teacher.save(tmp_path)
    found = json.loads((tmp_path / "teacher.json").read_text())
    assert found["kind"] == teacher.kind
    assert found["fingerprint"] == teacher.fingerprint
    assert (tmp_path / "teacher_ema.safetensors").exists() == (teacher.kind == "ema")
    teacher.load(tmp_path)


def test_fingerprint_is_of_the_base_whatever_is_put_on_it(tiny, tmp_path):
    plain = make_teacher(tiny, make_student(tiny, tmp_path)).fingerprint
    for extra in ({}, {"use_dora": True}, {"lora_modules_to_save": ["lm_head"]}):
        student = make_student(tiny, tmp_path, **LORA, **extra)
        assert make_teacher(tiny, student).fingerprint == plain
        shake(student)
        assert make_teacher(tiny, student).fingerprint == plain
    with torch.no_grad():
        student.get_decoder().layers[0].mlp.up_proj.base_layer.weight[0, 0] += 1e-3
    assert make_teacher(tiny, student).fingerprint != plain


def test_checkpoint_of_another_kind_is_refused(tiny, tmp_path):
    student = make_student(tiny, tmp_path)
    make_teacher(tiny, student, kind="ema").save(tmp_path)
    with pytest.raises(TeacherError, match="was trained with teacher_model_kind='ema', this run has 'base'"):
        make_teacher(tiny, student).load(tmp_path)


def test_files_of_earlier_versions_are_read(tiny, tmp_path):
    teacher = make_teacher(tiny, make_student(tiny, tmp_path))
    (tmp_path / "teacher.json").write_text(json.dumps({"fingerprint": teacher.fingerprint}))
    teacher.load(tmp_path)
    (tmp_path / "teacher.json").write_text("[]")
    with pytest.raises(TeacherError, match=r"teacher\.json: not readable"):
        teacher.load(tmp_path)


def test_averages_that_do_not_fit_are_refused(tiny, tmp_path):
    teacher = make_teacher(tiny, make_student(tiny, tmp_path), kind="ema")
    with pytest.raises(TeacherError, match=r"averages cannot be read \(no teacher.json"):
        teacher.load(tmp_path)
    teacher.save(tmp_path)
    path = tmp_path / "teacher_ema.safetensors"
    good = load_file(path)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in good.items() if key != name}, path)
    with pytest.raises(TeacherError, match=f"{name} is among this run's alone"):
        teacher.load(tmp_path)
    save_file({**good, name: good[name][:-1].clone()}, path)
    with pytest.raises(TeacherError, match=f"the average of {name} is torch.float32"):
        teacher.load(tmp_path)
    path.write_bytes(b"torn")
    with pytest.raises(TeacherError, match="averages cannot be read"):
        teacher.load(tmp_path)
    path.unlink()
    with pytest.raises(TeacherError, match="averages cannot be read"):
        teacher.load(tmp_path)
