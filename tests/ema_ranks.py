"""Run by test_ema.py in two processes: a sharded student and its average, beside the same in one process."""

import copy
import datetime
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh
from weight_cases import LORA, make_student, project, shake

from imagine_opd.demo import base_model_path
from imagine_opd.models.access import get_body, load_model, load_processor
from imagine_opd.models.student import open_forward
from imagine_opd.teacher.ema import reshard
from imagine_opd.teacher.load import build_teacher

KINDS = {"full": {}, "dora": {**LORA, "use_dora": True, "lora_modules_to_save": ["lm_head"]}}


def compare_average(kind: str, folder: Path) -> int:
    """How many averages were sharded; raises where one of them, or the teacher's forward, differs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    processor = load_processor(None, base_model_path())
    ids = processor.tokenizer("red circle", return_tensors="pt")
    inputs = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}

    def shard(model):
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def make_teacher(student):
        return build_teacher(student, processor, kind="ema", update_rate=0.3)

    torch.manual_seed(0)
    alone = make_student(SimpleNamespace(model=load_model(base_model_path())), folder / "run", **KINDS[kind])
    split = open_forward(copy.deepcopy(alone))
    one, two, resumed = (make_teacher(student) for student in (alone, split, copy.deepcopy(alone)))
    split = shard(split)
    one.prepare(torch.device("cpu"))
    two.prepare(torch.device("cpu"), shard)
    resumed.prepare(torch.device("cpu"), shard)

    def step(seed):
        shake(alone, 0.02, seed)
        moved = dict(alone.named_parameters())
        with torch.no_grad():
            for name, p in reshard(split).named_parameters():
                if p.requires_grad:
                    value = moved[name].detach()
                    p.copy_(distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None))

    def compare(teacher):
        mine, theirs = one.state_dict(), teacher.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.allclose(theirs[name], value, atol=1e-6), name
        expected = one.run(alone, project(inputs))
        shown = teacher.run(split, project(inputs))
        assert torch.allclose(shown, expected, atol=1e-4), (shown - expected).abs().max()
        hidden = teacher.run(split, lambda model: get_body(model)(**inputs, use_cache=False).last_hidden_state)
        with teacher.open_head(split) as head, torch.no_grad():
            assert not isinstance(head.weight_VD, DTensor)
            assert torch.allclose(torch.nn.functional.linear(hidden, head.weight_VD), expected, atol=1e-4)
        return expected

    first = compare(two)
    for seed in range(3):
        step(seed)
        one.update(alone)
        two.update(split)
        last = compare(two)
    assert (last - first).abs().max() > 0.05
    sharded = [tensor for tensor in two.shadows.tensors.values() if isinstance(tensor, DTensor)]
    assert sum(tensor.to_local().numel() for tensor in sharded) < 0.6 * sum(tensor.numel() for tensor in sharded)
    two.save(folder)
    dist.barrier()
    resumed.load(folder)
    compare(resumed)
    step(7)
    one.update(alone)
    resumed.update(split)
    compare(resumed)
    dist.destroy_process_group()
    return len(sharded)
