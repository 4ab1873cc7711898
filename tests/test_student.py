"""The open forward: code runs inside a model's call, whatever is wrapped around it, and nothing else changes."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments

from imagine_opd.models.access import find_head, get_body
from imagine_opd.models.student import is_open, open_forward, run_inside


@pytest.fixture
def text_inputs(tiny):
    ids = tiny.processor.tokenizer("red circle", return_tensors="pt")
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_function_runs_inside_and_other_calls_are_the_models_own(tiny, text_inputs):
    plain = tiny.model(**text_inputs).logits
    signature = inspect.signature(tiny.model.forward)
    assert open_forward(tiny.model) is tiny.model
    assert torch.equal(tiny.model(**text_inputs).logits, plain)
    assert inspect.signature(tiny.model.forward) == signature
    calls = []
    tiny.model.register_forward_pre_hook(lambda *_: calls.append("before"))
    tiny.model.register_forward_hook(lambda *_: calls.append("after"))
    seen = run_inside(tiny.model, lambda model: (calls.append("inside"), model)[1])
    assert seen is tiny.model
    assert calls == ["before", "inside", "after"]


def test_opening_twice_is_opening_once(tiny):
    open_forward(tiny.model)
    forward = tiny.model.forward
    open_forward(tiny.model)
    assert tiny.model.forward == forward
    assert not is_open(tiny.model.model)


def test_generate_takes_the_models_inputs_and_refuses_others(tiny, text_inputs):
    expected = tiny.model.generate(**text_inputs, max_new_tokens=3, do_sample=False)
    open_forward(tiny.model)
    assert torch.equal(tiny.model.generate(**text_inputs, max_new_tokens=3, do_sample=False), expected)
    with pytest.raises(ValueError, match="colour"):
        tiny.model.generate(**text_inputs, max_new_tokens=3, do_sample=False, colour="red")


def test_a_copy_runs_its_own_weights(tiny, text_inputs):
    open_forward(tiny.model)
    twin = copy.deepcopy(tiny.model)
    before = twin(**text_inputs).logits
    with torch.no_grad():
        find_head(tiny.model).weight.zero_()
    assert torch.equal(twin(**text_inputs).logits, before)
    assert before.abs().max() > 0
    assert run_inside(twin, lambda model: model) is twin


def test_a_forward_of_the_instance_is_kept_and_copied(tiny, text_inputs):
    expected = tiny.model(**text_inputs).logits

    class Double(ModelHook):
        def post_forward(self, module, output):
            output.logits = output.logits * 2
            return output

    add_hook_to_module(tiny.model, Double())
    open_forward(tiny.model)
    twin = copy.deepcopy(tiny.model)
    with torch.no_grad():
        find_head(tiny.model).weight.zero_()
    assert torch.equal(twin(**text_inputs).logits, expected * 2)
    assert run_inside(twin, lambda model: model) is twin


def test_accelerates_autocast_reaches_the_function(tiny, text_inputs):
    open_forward(tiny.model)
    AcceleratorState._reset_state()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(tiny.model)
    assert is_open(prepared)
    forward = prepared.forward
    assert open_forward(prepared).forward == forward

    def measure(model):
        hidden = get_body(model)(**text_inputs).last_hidden_state[0]
        return {"fp32": hidden @ hidden.T, "kept": Box((hidden @ hidden.T).dtype), "model": model}

    found = run_inside(prepared, measure)
    assert found["kept"].value is torch.bfloat16
    assert found["fp32"].dtype is torch.float32
    assert found["model"] is tiny.model
    twin = copy.deepcopy(prepared)
    assert run_inside(twin, lambda model: Box(model)).value is twin


class Box:
    def __init__(self, value):
        self.value = value


def test_ddp_synchronises_a_loss_made_inside(tiny, text_inputs, one_process):
    open_forward(tiny.model)
    wrapped = nn.parallel.DistributedDataParallel(tiny.model, find_unused_parameters=True)
    reduced = []

    def note(state, bucket):
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, note)
    loss = run_inside(wrapped, lambda model: get_body(model)(**text_inputs).last_hidden_state.square().sum())
    loss.backward()
    assert sum(reduced) == sum(p.numel() for p in tiny.model.parameters() if p.requires_grad)


def test_fsdp2_gathers_the_weights_that_the_function_sees(tiny, text_inputs, one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    expected = tiny.model(**text_inputs).logits
    open_forward(tiny.model)
    fully_shard(tiny.model, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(find_head(tiny.model).weight, DTensor)
    assert is_open(tiny.model)

    def project(model):
        assert not isinstance(find_head(model).weight, DTensor)
        return find_head(model)(get_body(model)(**text_inputs).last_hidden_state)

    assert torch.equal(run_inside(tiny.model, project), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 reads the old name
@pytest.mark.parametrize("opened", ["adapter", "base"])
def test_peft_passes_the_function_on(tiny, text_inputs, opened):
    from peft import LoraConfig, get_peft_model

    if opened == "base":
        open_forward(tiny.model)
    model = get_peft_model(tiny.model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    if opened == "adapter":
        open_forward(model)
    assert run_inside(model, lambda inner: inner) is (model if opened == "adapter" else tiny.model)
    assert model(**text_inputs).logits.shape[:2] == text_inputs["input_ids"].shape


def test_the_trainer_reads_the_same_columns(tiny, tmp_path):
    def read(model):
        trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[]), data_collator=list)
        trainer._set_signature_columns_if_needed()
        return trainer._signature_columns, trainer.model_accepts_loss_kwargs

    expected = read(copy.deepcopy(tiny.model))
    assert read(open_forward(tiny.model)) == expected
