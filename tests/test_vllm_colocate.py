"""vLLM in this process, without vLLM: what it is built of, what it is handed, and what a missing one says."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor

from imagine_opd.errors import ConfigError, EngineError
from imagine_opd.rollout.vllm_colocate import ColocateBackend, ColocateSettings, import_vllm, make_engine_arguments
from imagine_opd.rollout.vllm_inputs import EngineOutput, EngineRequest


class FakeLLM:
    """Stands for `vllm.LLM`: keeps what it was given, and disturbs the random states as vLLM does."""

    made: FakeLLM

    def __init__(self, **arguments) -> None:
        folder = Path(arguments["model"])
        self.arguments = arguments
        self.weights = load_file(folder / "model.safetensors")
        self.config, self.processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        self.calls: list[tuple] = []
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        FakeLLM.made = self

    def collective_rpc(self, method, kwargs) -> None:
        self.calls.append((method, dict(kwargs["weights_iterator"])))

    def generate(self, prompts, params, use_tqdm) -> list:
        self.calls.append((prompts, [each.fields for each in params]))
        entry = types.SimpleNamespace
        completion = entry(
            token_ids=[9, 2], logprobs=[{9: entry(logprob=-0.5), 8: entry(logprob=-0.1)}, {2: entry(logprob=-1.0)}]
        )
        return [entry(prompt_token_ids=[7, 5, 5], outputs=[completion]) for _ in prompts]

    def sleep(self, level) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self) -> None:
        self.calls.append(("wake_up",))


class FakeParams:
    def __init__(self, **fields) -> None:
        self.fields = fields


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=FakeLLM, SamplingParams=FakeParams))


def make_backend(tiny, dtype: str = "float32") -> ColocateBackend:
    return ColocateBackend(
        tiny.processor, tiny.view_config, ColocateSettings(dtype=dtype), lambda model: model.state_dict()
    )


def test_engine_is_built_of_the_models_weights_and_a_budget_that_resizes_nothing(tiny, fake_vllm):
    backend = make_backend(tiny, "bfloat16")
    backend.start(tiny.model)
    llm = FakeLLM.made
    assert torch.equal(llm.weights["lm_head.weight"], tiny.model.lm_head.weight.detach().to(torch.bfloat16))
    assert llm.config.get_text_config().tie_word_embeddings is False  # on a CPU
    assert tiny.model.config.get_text_config().tie_word_embeddings is True
    for height, width in ((16, 16), (48, 48), (16, 128), (64, 48)):  # 16: one side of merged patches
        picture = torch.zeros(3, height, width, dtype=torch.uint8)
        grid = llm.processor.image_processor(images=[picture], return_tensors="pt")["image_grid_thw"]
        assert grid.tolist() == [[1, height // 8, width // 8]]
    assert not Path(llm.arguments["model"], "model.safetensors").exists()  # it lies in the engine's memory now


def test_building_the_engine_leaves_every_random_state_as_it_was(tiny, fake_vllm):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    make_backend(tiny).start(tiny.model)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_weights_go_in_memory_under_their_checkpoint_names(tiny, fake_vllm):
    backend = make_backend(tiny)
    backend.start(tiny.model)
    assert backend.send_weights(tiny.model)
    method, weights = FakeLLM.made.calls[-1]
    assert method == "reload_weights"
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    assert weights[name].data_ptr() == tiny.model.get_parameter(name).data_ptr()  # no copy


def test_each_image_is_given_once_under_a_name_of_its_weights(tiny, fake_vllm):
    backend = make_backend(tiny)
    backend.start(tiny.model)
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    outputs = backend.complete([EngineRequest((7, 5), (image,), ("a",))], [{"seed": 4}], "salt-1")
    assert outputs == [EngineOutput((7, 5, 5), (9, 2), (-0.5, -1.0))]
    (prompt,), fields = FakeLLM.made.calls[-1]
    assert fields == [{"seed": 4}]
    (given,) = prompt["multi_modal_data"].pop("image")
    np.testing.assert_array_equal(np.asarray(given), image)
    assert prompt == {
        "prompt_token_ids": [7, 5],
        "multi_modal_data": {},
        "multi_modal_uuids": {"image": ["salt-1-a"]},
        "cache_salt": "salt-1",
    }


def test_sleep_drops_the_weights_which_are_sent_again(tiny, fake_vllm):
    backend = make_backend(tiny)
    backend.start(tiny.model)
    backend.sleep()
    backend.wake()
    assert FakeLLM.made.calls == [("sleep", 2), ("wake_up",)]


def test_log_probs_are_raw_at_temperature_one_and_tempered_at_another(tmp_path):
    modes = [
        make_engine_arguments(ColocateSettings("float32", temperature), tmp_path, True)["logprobs_mode"]
        for temperature in (1.0, 0.7)
    ]
    assert modes == ["raw_logprobs", "processed_logprobs"]


def test_vllm_is_told_to_stay_in_this_process_before_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("import os\nSEEN = os.environ.get('VLLM_ENABLE_V1_MULTIPROCESSING')\n")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    try:
        assert import_vllm().SEEN == "0"
    finally:
        sys.modules.pop("vllm", None)


def test_a_missing_vllm_names_the_extra(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'imagine-opd\[vllm\]'"):
        make_backend(tiny).start(tiny.model)


def test_an_engine_that_cannot_start_says_why(tiny, fake_vllm, monkeypatch):
    def fail(**arguments):
        raise ValueError("Sleep mode is not supported on current platform.")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", fail)
    with pytest.raises(EngineError, match=r"Qwen3VLForConditionalGeneration: Sleep mode is not supported"):
        make_backend(tiny).start(tiny.model)
