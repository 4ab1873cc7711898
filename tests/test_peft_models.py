"""Adapters: put on by fields or a ready config, fp32, vision left out, saved, loaded, merged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from weight_cases import LORA, make_config, make_inputs, make_student, project, shake, wrap_layers

from imagine_opd.errors import ConfigError, OutputError
from imagine_opd.models.access import find_head, load_model
from imagine_opd.models.peft_models import adapters_off, has_adapter, prepare_student
from imagine_opd.models.vision_tower import find_vision_names
from imagine_opd.teacher import merging
from imagine_opd.teacher.merging import save_merged_model

pytestmark = [  # what peft says where it is called directly, by a test or by transformers
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


def list_trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapter_by_fields_trains_every_linear_layer_but_vision_and_head(tiny, tmp_path):
    student = make_student(tiny, tmp_path, **LORA)
    trained = list_trained_names(student)
    layers = tiny.model.config.text_config.num_hidden_layers
    assert len(trained) == layers * 7 * 2  # q, k, v, o, gate, up, down; A and B
    assert not any("visual" in name or "lm_head" in name for name in trained)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    config = student.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)


def test_first_weights_of_an_adapter_are_those_of_the_seed_alone(tiny, tmp_path):
    def draw(state: int, **fields) -> torch.Tensor:
        torch.manual_seed(state)
        student = make_student(tiny, tmp_path, **LORA, **fields)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(state)))
        return torch.cat([p.detach().flatten() for name, p in student.named_parameters() if ".lora_A." in name])

    assert torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1), draw(1, seed=7))


def test_vision_is_trained_by_the_adapter_where_asked_for(tiny, tmp_path):
    trained = list_trained_names(make_student(tiny, tmp_path, freeze_vision=False, **LORA))
    assert any("visual.blocks.0.attn.qkv.lora_A" in name for name in trained)
    assert any("visual.merger" in name for name in trained)


def test_freeze_vision_with_full_weights_freezes_tower_and_projector_alone(tiny, tmp_path):
    assert list_trained_names(make_student(tiny, tmp_path)) == {name for name, _ in tiny.model.named_parameters()}
    trained = list_trained_names(make_student(tiny, tmp_path, freeze_vision=True))
    assert trained == {name for name, _ in tiny.model.named_parameters() if not name.startswith("model.visual.")}
    assert any(name.startswith("model.visual.merger.") for name, _ in tiny.model.named_parameters())


def test_fields_reach_the_adapter(tiny, tmp_path):
    fields = {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"], "use_rslora": True}
    student = make_student(tiny, tmp_path, **LORA, **fields, use_dora=True, lora_dropout=0.25)
    config = student.peft_config["default"]
    assert (config.use_dora, config.use_rslora, config.lora_dropout) == (True, True, 0.25)
    kinds = {name.split("q_proj.")[-1].split(".")[0] for name in list_trained_names(student) if "q_proj" in name}
    assert kinds == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert [name for name in list_trained_names(student) if "q_proj" not in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]


def test_trained_weights_are_fp32_on_a_bf16_base(tiny, tmp_path):
    tiny.model.to(torch.bfloat16)
    student = make_student(tiny, tmp_path, bf16=True, lora_modules_to_save=["lm_head"], **LORA)
    dtypes = {p.requires_grad: p.dtype for p in student.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert find_head(student).weight.dtype is torch.float32
    with pytest.raises(ConfigError, match="set bf16=True, or load the model in float32"):
        make_student(tiny, tmp_path, lora_modules_to_save=["lm_head"], **LORA)


def test_ready_config_is_taken_as_it_is_and_not_changed(tiny, tmp_path):
    ready = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    before = copy.deepcopy(ready.to_dict())
    student = make_student(tiny, tmp_path, ready)
    assert ready.to_dict() == before
    assert any("visual" in name for name in list_trained_names(student))  # its own choice
    with pytest.raises(ConfigError, match="freeze_vision=True, but the adapter trains .*visual"):
        make_student(tiny, tmp_path, ready, freeze_vision=True)


def test_adapted_model_is_taken_as_it_is_and_trains(tiny, tmp_path):
    adapted = get_peft_model(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules=["q_proj"]))
    assert prepare_student(adapted, make_config(tmp_path)) is adapted
    adapted.requires_grad_(False)
    prepare_student(adapted, make_config(tmp_path, use_peft=True))
    trained = list_trained_names(adapted)
    assert len(trained) == 2 * tiny.model.config.text_config.num_hidden_layers
    assert all("lora_" in name for name in trained)
    with pytest.raises(ConfigError, match="carries an adapter already"):
        prepare_student(adapted, make_config(tmp_path), LoraConfig())


@pytest.mark.parametrize(
    ("peft_config", "fields", "message"),
    [
        ({"r": 8}, {}, "peft_config is dict; expected a config of peft"),
        (PromptTuningConfig(num_virtual_tokens=2), {}, "PromptTuningConfig: prompts that are learnt shift the tokens"),
        (None, {**LORA, "lora_target_modules": ["no_such"]}, "the adapter .*no_such.* does not go with Qwen3VL"),
    ],
)
def test_unusable_adapter_is_refused(tiny, tmp_path, peft_config, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_student(tiny, tmp_path, peft_config, **fields)


def test_learnt_prompts_on_a_given_model_are_refused(tiny, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", num_layers=2, token_dim=8)
    config.num_attention_heads, config.num_transformer_submodules = 2, 1
    adapted = get_peft_model(tiny.model, config)
    with pytest.raises(ConfigError, match="prompts that are learnt"):
        prepare_student(adapted, make_config(tmp_path))


def test_nothing_to_train_is_refused(tiny, tmp_path):
    tiny.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        make_student(tiny, tmp_path)


def test_head_with_lora_is_refused_where_its_weights_are_read(tiny, tmp_path):
    student = make_student(tiny, tmp_path, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="lora_modules_to_save"):
        find_head(student)
    with adapters_off(student):
        assert find_head(student).weight.shape == tiny.model.lm_head.weight.shape


@pytest.mark.parametrize(
    "name", ["Qwen2_5_VL", "Qwen3VL", "InternVL", "LlavaOnevision", "Idefics3", "SmolVLM", "Gemma3"]
)
def test_vision_tower_and_projector_are_found_in_every_family(name):
    import transformers

    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    config = kind.config_class()
    for part in (config.get_text_config(), config.vision_config):
        for field in ("num_hidden_layers", "depth"):
            if hasattr(part, field):
                setattr(part, field, 1)
        if hasattr(part, "layer_types"):
            part.layer_types = part.layer_types[:1]
    with torch.device("meta"):
        model = kind(config)
    found = find_vision_names(model)
    expected = {
        "Qwen2_5_VL": {"model.visual"},
        "Qwen3VL": {"model.visual"},
        "InternVL": {"model.vision_tower", "model.multi_modal_projector"},
        "LlavaOnevision": {"model.vision_tower", "model.multi_modal_projector", "model.image_newline"},
        "Idefics3": {"model.vision_model", "model.connector"},
        "SmolVLM": {"model.vision_model", "model.connector"},
        "Gemma3": {"model.vision_tower", "model.multi_modal_projector"},
    }[name]
    assert set(found) == expected
    rest = [p for p, _ in model.named_parameters() if not any(p.startswith(owner) for owner in found)]
    assert all("language_model" in p or "text_model" in p or p == "lm_head.weight" for p in rest)


def test_model_without_a_tower_is_refused():
    with pytest.raises(ConfigError, match="no vision tower found in Linear"):
        find_vision_names(torch.nn.Linear(2, 2))


# saved and loaded


@pytest.fixture
def base_folder(tiny, tmp_path):
    folder = tmp_path / "base"
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_saved_adapter_is_loaded_by_us_and_by_transformers(base_folder, tiny, make_rows, tmp_path, extra):
    inputs = make_inputs(tiny, make_rows)
    student = prepare_student(load_model(base_folder), make_config(tmp_path, **LORA, **extra))
    shake(student)
    run = tmp_path / "run"
    student.save_pretrained(run)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)
    assert not (run / "model.safetensors").exists()
    student.eval()
    expected = project(inputs)(student)
    plain = project(inputs)(load_model(base_folder).eval())
    assert (expected - plain).abs().max() > 0.1
    ours = load_model(run)
    assert list_trained_names(ours) == list_trained_names(student)
    assert torch.equal(project(inputs)(ours.eval()), expected)
    if "use_dora" in extra:
        return  # transformers 5.24 by itself looks for DoRA's magnitudes under another name than peft writes
    theirs = AutoModelForImageTextToText.from_pretrained(run).eval()
    assert has_adapter(theirs)
    assert torch.equal(theirs(**inputs).logits, expected)


@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_merged_folder_is_a_plain_model_that_answers_alike(base_folder, tiny, make_rows, tmp_path, extra):
    inputs = make_inputs(tiny, make_rows)
    student = prepare_student(load_model(base_folder), make_config(tmp_path, **LORA, **extra))
    shake(student)
    weights = {name: parameter.clone() for name, parameter in student.named_parameters()}
    save_merged_model(student, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in student.named_parameters())
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert not has_adapter(merged)
    assert set(merged.state_dict()) == set(tiny.model.state_dict())
    expected = project(inputs)(student.eval())
    assert (merged(**inputs).logits - expected).abs().max() < 1e-4
    assert (tiny.model(**inputs).logits - expected).abs().max() > 0.1
    reference = student.merge_and_unload()
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(merged.state_dict()[name], tensor, atol=1e-6), name


def test_head_trained_apart_from_tied_embeddings_stays_apart_when_merged(tiny, make_rows, tmp_path):
    tiny.model.save_pretrained(tmp_path / "base")
    tied = load_model(tmp_path / "base")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    student = prepare_student(tied, make_config(tmp_path, **LORA, lora_modules_to_save=["lm_head"]))
    shake(student)
    save_merged_model(student, tmp_path / "merged")
    inputs = make_inputs(tiny, make_rows)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    assert (merged(**inputs).logits - project(inputs)(student.eval())).abs().max() < 1e-4


def test_adapter_files_stay_until_the_merged_weights_have_their_shapes(base_folder, tmp_path, monkeypatch):
    student = prepare_student(load_model(base_folder), make_config(tmp_path, **LORA))
    student.save_pretrained(tmp_path / "run")
    state = merging.compute_merged_state(student)
    name = next(name for name, tensor in state.items() if tensor.dim() == 2)
    torn = {**state, name: torch.empty(0)}
    monkeypatch.setattr(merging, "compute_merged_state", lambda model: torn)
    with pytest.raises(OutputError, match=rf"{name} is \(0,\), expected .*the adapter stays"):
        merging.replace_adapter(student, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names


def test_merged_state_looks_through_fsdps_activation_checkpoints(tiny, tmp_path):
    student = make_student(tiny, tmp_path, **LORA)
    shake(student)
    expected = merging.compute_merged_state(student)
    wrap_layers(student)
    found = merging.compute_merged_state(student)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_damaged_adapter_folders_are_refused(base_folder, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = folder / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(ConfigError, match="not readable as the config of an adapter"):
        load_model(folder)
    config.write_text('{"base_model_name_or_path": ""}')
    with pytest.raises(ConfigError, match="trained on a model that has no name"):
        load_model(folder)
    config.write_text(json.dumps({"base_model_name_or_path": f"{folder}/../adapter"}))
    with pytest.raises(ConfigError, match="names its own folder as its base"):
        load_model(folder)
    config.write_text(json.dumps({"base_model_name_or_path": str(base_folder)}))
    with pytest.raises(ConfigError, match="but no adapter_model.safetensors"):
        load_model(folder)
    config.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="gone.*cannot be loaded"):
        load_model(folder)


def test_peft_is_not_imported_without_an_adapter():
    code = "import sys, imagine_opd.models, imagine_opd.rollout; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("fields", [{}, LORA, {**LORA, "use_dora": True}], ids=["full", "lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_checkpointing_equal_those_without(tiny, make_rows, tmp_path, fields, dtype):
    inputs = make_inputs(tiny, make_rows)
    student = make_student(tiny, tmp_path, **fields)
    shake(student)
    student.train()
    found, calls = [], []
    enable = "activation_checkpointing_enable"  # before transformers 5.24: gradient_...
    for checkpointed in (False, True):
        if checkpointed:
            getattr(student, enable if hasattr(student, enable) else "gradient_checkpointing_enable")()
            layer = student.get_decoder().layers[0]
            layer.register_forward_hook(lambda *_: calls.append(1))
            layer.self_attn.register_forward_hook(lambda *_: calls.append(2))
        student.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            project(inputs)(student).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert calls == [2, 1, 2]  # the layer's inside ran again in backward
    assert len(plain) == len(checkpointed) >= len([p for p in student.parameters() if p.requires_grad]) - 6
    for name, grad in plain.items():
        assert float(grad.abs().max()) > 0 or ".bias" in name, name
        assert torch.equal(checkpointed[name], grad), name


def test_reentrant_checkpoints_with_an_adapter_are_refused(tiny, tmp_path):
    fields = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ConfigError, match="loses gradients behind frozen weights"):
        make_student(tiny, tmp_path, **LORA, **fields)
