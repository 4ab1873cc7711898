"""Which engine a config names, and checkpoint weights of full, tied and adapted models."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.engines import build_engine, choose_dtype, read_checkpoint_weights
from imagine_opd.errors import ConfigError
from imagine_opd.loss import ObjectiveConfig
from imagine_opd.metrics import StepMetrics, note_mismatch
from imagine_opd.models import get_base, prepare_student
from imagine_opd.models.access import read_token_ids
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.rollout.vllm import VLLMEngine
from imagine_opd.rollout.vllm_files import write_weights
from imagine_opd.rollout.vllm_server import ServerBackend
from imagine_opd.run_checks import refuse_bad_run
from imagine_opd.settings import make_sampling_config, make_view_config
from imagine_opd.trainer import ImagineOPDTrainer

SERVER = {"use_vllm": True, "vllm_mode": "server"}


def make_config(folder, **fields):
    base = {**TINY_RECIPE, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    return build_config(folder, {**base, "disable_tqdm": True, **fields})


def build(tiny, args):
    ids = read_token_ids(tiny.model, tiny.processor)
    return build_engine(tiny.model, args, ids, tiny.processor, make_view_config(tiny.processor, args))


def test_the_model_itself_samples_unless_vllm_is_asked_for(tiny, tmp_path):
    assert isinstance(build(tiny, make_config(tmp_path)), HFEngine)


def test_a_server_is_found_by_url_or_by_host_and_port_and_reads_from_the_runs_folder(tiny, tmp_path):
    found = []
    for fields in ({}, {"vllm_server_host": "gpu7", "vllm_server_port": 81}, {"vllm_server_base_url": "http://a:1"}):
        engine = build(tiny, make_config(tmp_path, **SERVER, **fields))
        assert isinstance(engine, VLLMEngine)
        assert isinstance(engine.backend, ServerBackend)
        found.append(engine.backend.settings.url)
        assert engine.backend.settings.sync_folder == (tmp_path / "vllm_weights").resolve()
    assert found == ["http://127.0.0.1:8000", "http://gpu7:81", "http://a:1"]
    keeps = build(tiny, make_config(tmp_path, **SERVER, vllm_server_sync="none"))
    assert keeps.backend.settings.sync_folder is None


def test_colocate_without_vllm_is_refused_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"imagine-opd\[vllm\]"):
        build(tiny, make_config(tmp_path, use_vllm=True))


def test_the_engine_computes_in_what_the_student_computes_in(tiny, tmp_path):
    assert choose_dtype(tiny.model, make_config(tmp_path)) == torch.float32
    assert choose_dtype(tiny.model, dataclasses.replace(make_config(tmp_path), bf16=True)) == torch.bfloat16


def test_checkpoint_weights_have_the_names_and_values_of_the_saved_model(tiny):
    weights = read_checkpoint_weights(tiny.model)
    saved = load_file(base_model_path() / "model.safetensors")
    assert set(weights) - set(saved) == {"lm_head.weight"}  # tied: for an engine with a head of its own
    for name, tensor in saved.items():
        assert torch.equal(weights[name], tensor.float()), name
    assert torch.equal(weights["lm_head.weight"], weights["model.language_model.embed_tokens.weight"])


def test_an_adapter_is_merged_for_the_engine_and_left_alone_in_training(tiny, tmp_path):
    student = prepare_student(tiny.model, make_config(tmp_path, use_peft=True, lora_r=4))
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = get_base(student).get_submodule(name)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    weights = read_checkpoint_weights(student)
    assert set(weights) == {*load_file(base_model_path() / "model.safetensors"), "lm_head.weight"}
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(weights[f"{name}.weight"], expected.detach())
    assert not torch.equal(weights[f"{name}.weight"], layer.base_layer.weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation_kwargs": {"typical_p": 0.9}, "distillation_mode": "sampled_token"}, "'typical_p' cannot be"),
        ({"generation_kwargs": {"cache_implementation": "static"}}, "'cache_implementation' cannot be"),
        ({"rollout_cache_implementation": "static"}, "transformers' generate"),
        ({"temperature": 0.7, "top_p": 0.9, "distillation_mode": "sampled_token"}, "top_p=0.9 at temperature=0.7"),
        (
            {"temperature": 0.7, "generation_kwargs": {"suppress_tokens": [3]}, "distillation_mode": "sampled_token"},
            r"suppress_tokens=\[3\] at temperature=0.7",
        ),
        (
            {"temperature": 0.7, "generation_kwargs": {"min_new_tokens": 2}, "distillation_mode": "sampled_token"},
            "min_new_tokens=2 at temperature=0.7",
        ),
        ({**SERVER, "vllm_server_base_url": "localhost:8000"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_base_url": "http://gpu7:port"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_base_url": "http://gpu7:99999"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_base_url": "http://:8000"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_base_url": "http://me:secret@gpu7:8000"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_base_url": "http://gpu 7:8000"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_base_url": "http://[::1:8000"}, "expected http://host:port"),
        ({**SERVER, "vllm_server_host": "http://gpu7"}, "expected a name or an address alone"),
        ({**SERVER, "vllm_server_host": "gpu7:8000"}, "expected a name or an address alone"),
        ({**SERVER, "vllm_server_host": "::1"}, "expected a name or an address alone"),
        ({"vllm_mode": "remote"}, "expected one of colocate, server"),
        ({"vllm_gpu_memory_utilization": 1.5}, "at most 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_vllm_cannot_do_is_refused_when_the_config_is_built(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **{"use_vllm": True, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"vllm_server_host": "[::1]"}, {"vllm_server_host": "GPU7"}, {"vllm_server_base_url": "https://gpu7/vllm"}],
    ids=str,
)
def test_addresses_of_other_forms_are_taken(tmp_path, fields):
    make_config(tmp_path, **SERVER, **fields)


@pytest.mark.parametrize(
    ("fields", "is_shaped"),
    [
        ({}, False),
        ({"generation_kwargs": {"min_new_tokens": 0, "suppress_tokens": []}}, False),
        ({"generation_kwargs": {"min_new_tokens": 1}}, True),
        ({"generation_kwargs": {"suppress_tokens": [3]}}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
    ids=str,
)
def test_a_server_is_told_apart_by_all_that_shapes_the_draw(tiny, tmp_path, fields, is_shaped):
    engine = build(tiny, make_config(tmp_path, **SERVER, distillation_mode="sampled_token", **fields))
    assert engine.backend.settings.is_shaped is is_shaped


def copy_model(folder):
    shutil.copytree(base_model_path(), folder)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (copy_model, "config.json says that it holds a model"),
        (lambda folder: write(folder / "model.safetensors.index.json", b"{}"), "index.json says"),
        (
            lambda folder: write(folder / "model.safetensors", save({"a": torch.ones(1)}, {"format": "pt"})),
            "not written",
        ),
        (lambda folder: write(folder / "part.safetensors", b"no weights"), "part.safetensors was not written for vLLM"),
    ],
    ids=["model", "index", "foreign", "broken"],
)
def test_weights_for_vllm_do_not_go_where_others_lie(tiny, tmp_path, fill, message):
    fill(tmp_path / "served")
    before = {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()}
    with pytest.raises(ConfigError, match=rf"served: .*{message}.*set vllm_sync_dir to a new folder"):
        build(tiny, make_config(tmp_path / "run", **SERVER, vllm_sync_dir=str(tmp_path / "served")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()} == before


def test_weights_for_vllm_go_neither_to_the_model_nor_to_output_dir(tiny, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ConfigError, match="it is output_dir"):
        build(tiny, make_config(tmp_path / "run", **SERVER, vllm_sync_dir=str(tmp_path / "link")))
    monkeypatch.setattr(tiny.model, "name_or_path", str(tmp_path / "base"))
    with pytest.raises(ConfigError, match="folder of the model that is trained"):
        build(tiny, make_config(tmp_path / "run", **SERVER, vllm_sync_dir=str(tmp_path / "base")))


def test_a_resumed_run_writes_over_its_own_weights_for_vllm(tiny, tmp_path):
    for value in (1.0, 2.0):
        engine = build(tiny, make_config(tmp_path, **SERVER))
        write_weights({"a": torch.full((1,), value)}, engine.backend.settings.sync_folder, None)
    assert load_file(tmp_path / "vllm_weights" / "model.safetensors")["a"].item() == 2.0


def write(path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)


def test_importance_clip_is_two_with_vllm_unless_set_or_the_mode_has_its_own(tmp_path):
    assert make_config(tmp_path).distillation_is_clip is None
    assert make_config(tmp_path, **SERVER).distillation_is_clip == 2.0
    assert make_config(tmp_path, **SERVER, distillation_is_clip=5.0).distillation_is_clip == 5.0
    assert make_config(tmp_path, **SERVER, distillation_mode="sampled_token").distillation_is_clip is None


def test_colocate_in_several_processes_is_refused(tmp_path, make_rows, monkeypatch):
    args = make_config(tmp_path, use_vllm=True)
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ConfigError, match=r"with 2 processes.*vllm_mode='server'"):
        refuse_bad_run(args, make_rows(8), None)


def test_a_static_cache_gives_the_dynamic_caches_rollouts_token_by_token(tiny, tmp_path, make_rows):
    args = make_config(tmp_path, teacher_checks=False)
    trainer = ImagineOPDTrainer(tiny.model, args, make_rows(6), processor=tiny.processor)
    prompts = [pair.student for pair in trainer.builder.build_pairs(make_rows(6)) if pair is not None]
    found = []
    for cache in ("dynamic", "static"):
        sampling = make_sampling_config(make_config(tmp_path, rollout_cache_implementation=cache, temperature=1.5))
        found.append(trainer.engine.generate(tiny.model, prompts, sampling, list(range(6))))
    assert torch.equal(found[0].completion_ids_BT, found[1].completion_ids_BT)
    assert torch.equal(found[0].completion_mask_BT, found[1].completion_mask_BT)
    torch.testing.assert_close(found[0].sampling_logprobs_BT, found[1].sampling_logprobs_BT, atol=2e-5, rtol=1e-4)
    assert len({tuple(row) for row in found[0].completion_ids_BT.tolist()}) > 1


def test_a_static_cache_compiles_only_where_it_is_asked_to(tmp_path):
    static = {"rollout_cache_implementation": "static"}
    assert make_sampling_config(make_config(tmp_path)) == SamplingConfig(18)
    quiet, compiled = (
        make_sampling_config(make_config(tmp_path, **static, rollout_compile=on)) for on in (False, True)
    )
    assert quiet.generation_kwargs == {"cache_implementation": "static", "disable_compile": True}
    assert compiled.generation_kwargs == {"cache_implementation": "static", "disable_compile": False}
    with pytest.raises(ConfigError, match="rollout_cache_implementation='static'"):
        make_config(tmp_path, rollout_compile=True)
    with pytest.raises(ConfigError, match="says it twice"):
        make_config(tmp_path, **static, generation_kwargs={"cache_implementation": "offloaded"})


def test_mismatch_figures_are_those_of_the_ratio_before_it_is_clipped():
    metrics = StepMetrics()
    student_N, sampled_N = torch.tensor([0.5, 0.25, 0.9]).log(), torch.tensor([0.25, 0.5, 0.3]).log()
    note_mismatch(metrics, student_N, sampled_N, ObjectiveConfig(distillation_is_clip=2.5).ratio_bounds)
    note_mismatch(metrics, student_N[:0], sampled_N[:0], (0.0, 1.0))  # a micro-batch without tokens
    found = metrics.drain()
    ratio = "sampling/importance_sampling_ratio"
    expected = {f"{ratio}/min": 0.5, f"{ratio}/mean": 5.5 / 3, f"{ratio}/max": 3.0, f"{ratio}/clipped": 1 / 3}
    logs = torch.tensor([2.0, 2.0, 3.0]).log()
    name = "sampling/sampling_logp_difference"
    expected |= {f"{name}/mean": float(logs.mean()), f"{name}/max": float(logs.max())}
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_ratio_bounds_are_those_of_the_mode():
    assert ObjectiveConfig().ratio_bounds == (0.0, float("inf"))
    assert ObjectiveConfig(distillation_mode="sampled_token").ratio_bounds == (0.8, 1.3)
