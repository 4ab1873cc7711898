"""Figures over ranks, refused launches, and sharded weights: gathered, generated with, shared out again, trained."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run_command, run_in_processes
from torch import nn

from imagine_opd.errors import ConfigError
from imagine_opd.models.access import get_body, get_head, load_model
from imagine_opd.models.student import open_forward, run_inside
from imagine_opd.parallel.processes import (
    count_own_rows,
    gather_figures,
    keep_fp32_results,
    settle_launch,
    sum_over_ranks,
    sum_tensor_over_ranks,
)
from imagine_opd.parallel.sharding import (
    gather_full_tensor,
    gather_parameters,
    is_fsdp2,
    is_sharded,
    is_zero3,
    shard_like,
    unwrap_parallel,
)

KINDS = ("tied", "untied", "lora")
KEPT = (4, 3)  # tokens in the loss of rank 0 and of rank 1


def make_model(kind: str) -> Any:
    from imagine_opd.demo import base_model_path

    model = load_model(base_model_path()).eval()
    if kind == "untied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 0.01)
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return get_peft_model(open_forward(model), lora).eval()
    return open_forward(model)


def make_inputs(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    words = torch.randint(10, 40, (6 + 3 * rank,), generator=generator).tolist()
    ids = torch.tensor([[1, 9, 1, 3] + [5] * 9 + [4, *words]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 5).int(),
        "pixel_values": torch.rand(36, 192, generator=generator),
        "image_grid_thw": torch.tensor([[1, 6, 6]]),
    }


def compute_loss(model: Any, rank: int, kept: tuple[int, int] = KEPT) -> torch.Tensor:
    """The log-probs of the last `kept[rank]` tokens, by the package's kernel, inside the model's forward."""
    from imagine_opd.kernels import linear_token_stats

    inputs = make_inputs(rank)

    def compute(inner: Any) -> torch.Tensor:
        hidden_LD = get_body(inner)(**inputs, use_cache=False).last_hidden_state[0]
        start = hidden_LD.shape[0] - kept[rank]
        ids_N = inputs["input_ids"][0, start:]
        stats = linear_token_stats(
            hidden_LD[start - 1 : -1], get_head(inner), None, None, ids_N, lambda stats: -stats.student_logprob_N
        )
        assert stats.loss is not None
        return stats.loss

    return run_inside(model, compute)


def generate(model: Any, rank: int) -> list[int]:
    """Ranks write different numbers of tokens: 2 and 5."""
    count = 2 + 3 * rank
    with torch.no_grad():
        made = model.generate(**make_inputs(rank), do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return made[0, -count:].tolist()


def read_gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: gather_full_tensor(p.grad) for n, p in unwrap_parallel(model).named_parameters() if p.grad is not None}


def read_hidden(model: Any, rank: int) -> torch.Tensor:
    with torch.no_grad():
        return run_inside(model, lambda inner: get_body(inner)(**make_inputs(rank)).last_hidden_state)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    assert max(float(value.abs().max()) for value in right.values()) > 1e-2
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def count_elements(model: Any) -> int:
    """What this rank holds."""
    from torch.distributed.tensor import DTensor

    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def list_whole(model: Any) -> list[str]:
    from torch.distributed.tensor import DTensor

    return [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]


def check_figures() -> dict[str, Any]:
    from accelerate.state import PartialState

    rank = PartialState(cpu=True).process_index
    return {
        "sum": sum_over_ranks({"a": 1.5, "b": 2.0} if rank == 0 else {"b": 3.0, "c": 4.0}),
        "tensor": sum_tensor_over_ranks(torch.tensor([rank, 6])).tolist(),
        "gathered": gather_figures({"rank": rank}),
    }


def make_accelerator(precision: str = "no") -> Any:
    """As the Trainer makes it for `fsdp=True` on CPU processes."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    AcceleratorState._reset_state(reset_partial_state=False)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU  # as it starts
    settle_launch(SimpleNamespace(world_size=2, fsdp=True, fsdp_plugin_args={"fsdp_version": 2}, deepspeed=None))
    return Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=precision)


def check_fsdp2(kind: str) -> dict[str, Any]:
    """Generate, train, generate again, with one sharded model."""
    accelerator = make_accelerator()
    rank = accelerator.process_index
    whole = make_model(kind)
    texts = generate(whole, rank)
    model = make_model(kind)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    found: dict[str, Any] = {"kind": (is_fsdp2(model), is_sharded(model), is_zero3(model))}
    found["held"] = count_elements(model) / count_elements(whole)
    with gather_parameters(model) as gathered:
        found["whole inside"] = len(list_whole(model)) == len(list(model.parameters()))
        found["written before training"] = generate(gathered, rank) == texts
    found["whole after"] = list_whole(model)
    for name, kept in (("gradients with no token on one rank", (4, 0)), ("gradients", KEPT)):
        whole.zero_grad()
        (sum(compute_loss(whole, r, kept) for r in range(2)) / 2).backward()
        optimizer.zero_grad()
        compute_loss(model, rank, kept).backward()
        found[name] = largest_difference(read_gradients(model), read_gradients(whole))
    layer = next(module for module in get_body(whole).modules() if "DecoderLayer" in type(module).__name__)
    path = next(name for name, module in whole.named_modules() if module is layer)
    read_hidden(model, rank)
    found["layer whole after a forward"] = list_whole(model.get_submodule(path))
    try:
        with gather_parameters(model):
            raise KeyError
    except KeyError:
        found["whole after an error"] = list_whole(model)
    optimizer.step()
    whole_optimizer = torch.optim.SGD((p for p in whole.parameters() if p.requires_grad), lr=0.1)
    whole_optimizer.step()
    with gather_parameters(model) as gathered:
        found["written after a step"] = generate(gathered, rank) == generate(whole, rank)
        weights = {name: p.detach().clone() for name, p in gathered.named_parameters()}
    found["weights"] = largest_difference(weights, {n: p.detach() for n, p in whole.named_parameters()})
    return found


def check_teacher(kind: str) -> dict[str, Any]:
    """A frozen copy sharded as the student is."""
    accelerator = make_accelerator()
    rank = accelerator.process_index
    whole = make_model(kind)
    teacher = copy.deepcopy(whole).requires_grad_(False)
    model = make_model(kind)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    teacher = shard_like(teacher, model)
    hidden = read_hidden(teacher, rank)
    found = {
        "drift": float((hidden - read_hidden(whole, rank)).abs().max()),
        "held": count_elements(teacher) / count_elements(whole),
        "whole after": list_whole(teacher),
        "trained": [name for name, p in teacher.named_parameters() if p.requires_grad],
    }
    with gather_parameters(teacher) as gathered:
        found["written"] = generate(gathered, rank) == generate(whole, rank)
    found["layers"] = [name for name, module in teacher.named_modules() if is_fsdp2(module)]
    return found


def check_precision() -> dict[str, Any]:
    """The dtype of a loss and of reduced gradients under bf16."""
    found = {}
    for name in ("accelerate", "kept"):
        accelerator = make_accelerator("bf16")
        if name == "kept":
            keep_fp32_results(accelerator)
        model = make_model("untied")
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = compute_loss(model, accelerator.process_index)
        policy = model._get_fsdp_state()._mp_policy
        found[name] = str(loss.dtype), str(policy.param_dtype), str(policy.reduce_dtype)
    return found


def check_ddp() -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make_model("tied"))
    with gather_parameters(model) as gathered:
        same = gathered is model.module
    teacher = make_model("tied")
    return {"same": same, "sharded": is_sharded(model), "teacher": shard_like(teacher, model) is teacher}


def check_all() -> dict[str, Any]:
    found: dict[str, Any] = {"figures": check_figures(), "ddp": check_ddp()}
    for kind in KINDS:
        found[f"fsdp2 {kind}"] = check_fsdp2(kind)
    found["teacher"] = check_teacher("tied")
    found["precision"] = check_precision()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_in_processes(check_all, timeout_s=240)


def test_figures_of_all_ranks_are_joined(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["figures"]["sum"] == {"a": 1.5, "b": 5.0, "c": 4.0}
        assert found["figures"]["tensor"] == [1, 12]
        assert found["figures"]["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_one_process_is_its_own_sum() -> None:
    assert sum_over_ranks({"a": 1.5}) == {"a": 1.5}
    assert gather_figures("own") == ["own"]
    assert sum_tensor_over_ranks(torch.tensor([2])).tolist() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_are_whole_inside_and_shards_after(kind: str, ranks: list[dict[str, Any]]) -> None:
    for found in (rank[f"fsdp2 {kind}"] for rank in ranks):
        assert found["kind"] == (True, True, False)
        assert found["held"] == pytest.approx(0.5, abs=0.01)
        assert found["whole inside"]
        for when in ("whole after", "whole after an error", "layer whole after a forward"):
            assert found[when] == [], when


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_write_texts_of_different_lengths_as_one_process_does(kind: str, ranks: list[dict[str, Any]]) -> None:
    for found in (rank[f"fsdp2 {kind}"] for rank in ranks):
        assert found["written before training"]
        assert found["written after a step"]


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_gradients_and_step_are_those_of_one_process(kind: str, ranks: list[dict[str, Any]]) -> None:
    for found in (rank[f"fsdp2 {kind}"] for rank in ranks):
        for name in ("gradients", "gradients with no token on one rank", "weights"):
            assert found[name] < 1e-5, name


def test_sharded_teacher_scores_as_the_whole_one_and_frees_its_weights(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["teacher"] for rank in ranks):
        assert found["drift"] < 1e-6
        assert found["held"] == pytest.approx(0.5, abs=0.01)
        assert found["whole after"] == []
        assert found["trained"] == []
        assert found["written"]
        blocks = [
            *(f"model.visual.blocks.{n}" for n in range(2)),
            *(f"model.language_model.layers.{n}" for n in range(3)),
        ]
        assert found["layers"] == ["", *blocks]


def test_16_bit_sharding_returns_and_reduces_in_fp32(ranks: list[dict[str, Any]]) -> None:
    for found in (rank["precision"] for rank in ranks):
        assert found["accelerate"] == ("torch.bfloat16", "torch.bfloat16", "torch.bfloat16")  # what is cured
        assert found["kept"] == ("torch.float32", "torch.bfloat16", "torch.float32")


def test_ddp_holds_whole_weights(ranks: list[dict[str, Any]]) -> None:
    assert all(found["ddp"] == {"same": True, "sharded": False, "teacher": True} for found in ranks)


def test_gathering_without_processes_gives_the_model(tiny: Any) -> None:
    with gather_parameters(tiny.model) as whole:
        assert whole is tiny.model
    assert not is_sharded(tiny.model)
    weight = tiny.model.lm_head.weight
    assert torch.equal(gather_full_tensor(weight), weight)
    assert not gather_full_tensor(weight).requires_grad


# Launches


def make_args(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"world_size": 2, "fsdp": None, "fsdp_plugin_args": None, "deepspeed": None, **fields})


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return monkeypatch


def test_processes_that_would_train_alone_are_refused(launched: pytest.MonkeyPatch) -> None:
    settle_launch(make_args())
    with pytest.raises(ConfigError, match="2 processes were started and each would train alone.*use_cpu=True"):
        settle_launch(make_args(world_size=1))
    launched.setenv("WORLD_SIZE", "1")
    settle_launch(make_args(world_size=1))


@pytest.mark.parametrize("asked_by", ["launcher", "arguments"])
def test_fsdp1_is_refused(asked_by: str, launched: pytest.MonkeyPatch) -> None:
    if asked_by == "launcher":
        launched.setenv("ACCELERATE_USE_FSDP", "true")
        launched.setenv("FSDP_VERSION", "1")
        args = make_args()
    else:
        args = make_args(fsdp=True, fsdp_plugin_args={"fsdp_version": 1})
    with pytest.raises(ConfigError, match="fsdp_version=1.*needs FSDP2"):
        settle_launch(args)


def test_loading_in_one_process_only_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    settle_launch(make_args())  # of no matter without FSDP
    with pytest.raises(ConfigError, match="fsdp_cpu_ram_efficient_loading=true.*set it to false"):
        settle_launch(make_args(fsdp=True, fsdp_plugin_args={"fsdp_version": 2}))


@pytest.mark.parametrize(
    ("rows", "size", "ranks"), [(8, 2, 2), (9, 2, 2), (10, 2, 2), (11, 2, 2), (3, 2, 2), (1, 2, 3), (7, 3, 1)]
)
def test_rows_that_repeat_the_first_ones_are_found(rows: int, size: int, ranks: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    kept = []
    for rank in range(ranks):
        batches = list(BatchSamplerShard(BatchSampler(range(rows), size, False), ranks, rank))
        own = count_own_rows(rows, size, rank, ranks)
        kept += [row for batch in batches[:-1] for row in batch] + batches[-1][:own]
    assert sorted(kept) == list(range(rows))


# The helper of tests with processes


def test_failed_rank_ends_the_others_and_is_shown() -> None:
    code = (
        "import os, time\nif os.environ['RANK'] == '1': raise KeyError('broken here')\nprint('waits')\ntime.sleep(60)"
    )
    with pytest.raises(AssertionError, match=r"(?s)process 0 ended by.*waits.*process 1 ended with 1.*'broken here'"):
        run_in_processes(exec, code, timeout_s=30)


def test_command_out_of_time_is_killed_with_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    child += f"open({str(note)!r}, 'w').write(str(p.pid)); print('started', flush=True); time.sleep(60)"
    with pytest.raises(AssertionError, match=r"(?s)process 0 did not end within 2 s.*started"):
        run_command(["-c", child], timeout_s=2)
    give_up = time.monotonic() + 10
    while is_running(int(note.read_text())):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """A zombie is dead, if not yet cleared away."""
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
