"""`linear_token_stats` in parts: chunks, their memory, micro-batches, halves of a vocabulary, processes, shards."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from kernel_cases import DEVICE, TOLERANCE, measure_error
from linear_cases import (
    HIDDEN,
    ROWS,
    TEACHER_HIDDEN,
    Case,
    cast,
    compute_formula,
    make_case,
    paths,
    run,
    select,
    small_blocks,  # noqa: F401
    ways,
    weigh_all,
    weigh_kl,
)
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from imagine_opd.kernels import OutputHead, StatsOptions, linear, linear_autograd, linear_token_stats, matmul, tuning
from imagine_opd.kernels.backends import load_backend
from imagine_opd.kernels.reference import compute_state, compute_stats, finish_state, merge_states
from imagine_opd.kernels.types import Logits, make_spec

pytestmark = pytest.mark.usefixtures("small_blocks")
INF, NAN = math.inf, math.nan


# Chunks


@contextlib.contextmanager
def watch_allocations() -> Iterator[list[int]]:
    """Bytes of what every operator makes."""
    found: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            found.append(made.untyped_storage().nbytes() if isinstance(made, Tensor) else 0)
            return made

    run_linear = linear_autograd.run_linear

    def run_watched(*args: Any) -> Any:  # a custom operator hides what it does from modes around it
        with Watch():
            return run_linear(*args)

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(linear_autograd, "run_linear", run_watched)
        yield found


@ways
@paths
def test_whole_logits_never_exist(through: str, arguments: dict[str, Any]) -> None:
    case = make_case(rows=40, vocabulary=160)
    with watch_allocations() as sizes:
        run(case, loss=weigh_kl, through=through, **arguments)
    assert max(sizes) == 160 * max(HIDDEN, TEACHER_HIDDEN) * 4  # the heads themselves; logits would be 160 * 40


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU 16-bit logits take 16-bit operands")
def test_16_bit_logits_round_the_product_and_nothing_else() -> None:
    case = cast(cast(make_case(bias=False), torch.bfloat16), torch.float32)
    answer = run(case, logits_dtype=torch.bfloat16)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    student_NV = hidden_ND @ case.head.weight_VD.T
    teacher_NV = case.teacher_hidden_NE @ case.teacher_head.weight_VD.T
    rounded_NV = student_NV + (student_NV.bfloat16() - student_NV).detach()
    stats = compute_formula(
        rounded_NV.double(), teacher_NV.bfloat16().double(), case.token_ids_N, case.temperature, case.options
    )
    weigh_all(stats, case.weights_N).sum().backward()
    assert measure_error(answer.values["reverse_kl_N"], stats.reverse_kl_N.detach()) <= TOLERANCE[torch.float32]
    assert measure_error(answer.gradients["hidden"], hidden_ND.grad.double()) <= 2 * TOLERANCE[torch.float32]


def test_fp16_weights_are_scaled_to_one_and_the_factor_comes_back() -> None:
    weights_5C = torch.tensor([[1e-7, -4e-6], [0.0, 2e-6]])
    scaled_5C, factor = linear.scale_weights(weights_5C, torch.float16)
    assert scaled_5C.abs().max() == 1.0
    torch.testing.assert_close(scaled_5C * factor, weights_5C)
    assert linear.scale_weights(weights_5C, torch.bfloat16) == (weights_5C, None)
    for odd in (0.0, NAN, INF):
        assert linear.scale_weights(torch.full((5, 2), odd), torch.float16)[1] == 1.0


@pytest.mark.parametrize("first_part", [True, False])
@pytest.mark.parametrize("factor", [None, 0.25])
def test_gradients_are_added_with_their_factor(
    factor: float | None, first_part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "SLAB_ROWS", 3)
    generator = torch.Generator().manual_seed(0)
    grad_CV, hidden_ND, weight_VD = (torch.randn(*shape, generator=generator) for shape in ((2, 4), (5, 6), (9, 6)))
    side = linear.Side(hidden_ND, weight_VD, None, 1.0, 0.0)
    start = 0.0 if first_part else 1.0
    gradients = linear.Gradients(torch.full((5, 6), start), torch.ones(9, 6), torch.ones(9))
    rows, columns, tensor = slice(1, 3), slice(3, 7), None if factor is None else torch.tensor(factor)
    grad_CV[1], hidden_ND[2] = 0.0, NAN  # a row that no loss uses
    used_C = torch.tensor([True, False])
    linear.add_gradients(gradients, rows, side, grad_CV, tensor, columns, used_C, first_part=first_part)
    hidden_ND[2] = 0.0
    grad_CV = grad_CV * (factor or 1.0)
    expected = [torch.full((5, 6), start), torch.ones(9, 6), torch.ones(9)]
    expected[0][rows] += grad_CV @ weight_VD[columns]
    expected[1][columns] += grad_CV.T @ hidden_ND[rows]
    expected[2][columns] += grad_CV.sum(0)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("rows", "hidden", "expected"),
    [(8192, 2560, 1664), (8192, 4096, 1024), (2000, 2560, 1024), (1500, 2560, 1500), (700, 4096, 700), (0, 2560, 1)],
)
def test_chunks_fill_waves_of_132_multiprocessors(
    rows: int, hidden: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 13 x 10 tiles of 128 x 256 fill 98 % of one wave, 8 x 16 fill 97 %; 1664 rows are all that 2.5 GiB allow.
    monkeypatch.setattr(tuning, "count_multiprocessors", lambda _: 132)
    row_bytes, device = 151936 * (4 + 4 + 2), torch.device("cuda")  # fp32 logits of both sides, a bf16 gradient
    with tuning.override(tuning.Tuning()):
        assert tuning.choose_chunk_rows(rows, hidden, row_bytes, False, device) == expected
    with tuning.override(tuning.Tuning(chunk_rows={"2560": 640, "2560+dW": 1 << 20})):
        measured = {"is_measured": True}
        assert tuning.choose_chunk_rows(8192, 2560, row_bytes, False, device, **measured) == 640
        assert tuning.choose_chunk_rows(8192, 2560, row_bytes, True, device, **measured) == 1664  # as memory allows
        assert tuning.choose_chunk_rows(8192, 2560, row_bytes, False, device) == 1664  # measured with other buffers


@pytest.mark.parametrize(
    ("rows", "hidden", "expected"),
    [
        # Two groups in 3 GiB with the sum's 742 MiB: 6 chunks of 768 rows each (890 MiB), gradients of 4608 (1,335).
        (8192, 2560, (768, 4608)),
        (8192, 4096, (512, 4096)),  # the sum takes 1,187 MiB
        (2000, 2560, (1024, 2048)),
        (300, 2560, (384, 384)),
        (65536, 2560, (640, 5120)),
        (0, 2560, None),
    ],
)
def test_gradients_of_several_chunks_wait_for_one_product_with_a_trained_head(
    rows: int, hidden: int, expected: tuple[int, int] | None
) -> None:
    columns = 151936
    found = tuning.choose_group(rows, columns * 8, columns * 2, columns * hidden * 2)
    assert found == expected
    if found is not None:
        chunk, group = found
        assert group % chunk == 0
        held = chunk * columns * 8 + min(group, rows) * columns * 2 + columns * hidden * 2
        assert held <= 3 * 2**30


def test_no_group_where_the_heads_sum_leaves_no_room() -> None:
    assert tuning.choose_group(8192, 8 * 151936, 2 * 151936, 3 * 2**30 - 2**28) is None


@pytest.mark.parametrize("through", ["row_loss", "statistics"])
def test_one_product_for_a_shared_head_equals_two(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    student_ND, teacher_ND, head_VD = (torch.randn(*shape, generator=generator) for shape in ((7, 6), (7, 6), (40, 6)))
    ids_N = torch.arange(7)
    products: list[tuple[int, ...]] = []
    multiply = linear.project
    monkeypatch.setattr(linear, "project", lambda *args: (products.append(args[0].shape), multiply(*args))[1])

    def run() -> tuple[torch.Tensor, ...]:
        hidden_ND, weight_VD = student_ND.clone().requires_grad_(), head_VD.clone().requires_grad_()
        row_loss = (lambda stats: stats.reverse_kl_N) if through == "row_loss" else None
        stats = linear_token_stats(hidden_ND, weight_VD, teacher_ND, weight_VD, ids_N, row_loss, chunk_rows=3)
        (stats.reverse_kl_N.sum() if stats.loss is None else stats.loss).backward()
        return stats.reverse_kl_N.detach(), hidden_ND.grad, weight_VD.grad

    apart = run()
    assert set(products) == {(3, 6), (1, 6)}
    products.clear()
    monkeypatch.setattr(linear, "shares_head", lambda student, teacher: True)
    together = run()
    assert set(products) == {(6, 6), (2, 6)}
    for found, wanted in zip(together, apart, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


# Micro-batches


@ways
@paths
def test_micro_batches_with_one_normaliser_add_up_to_the_batch(
    through: str, arguments: dict[str, Any], backend: str
) -> None:
    case = make_case(mask_N=torch.tensor([1, 1, 0, 1, 0], device=DEVICE))
    case = replace(case, weights_N=torch.full((ROWS,), 1 / 3, device=DEVICE))  # of the whole batch's kept tokens
    whole = run(case, backend, through=through, **arguments)
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]  # the second keeps no token
    answers = [run(select(case, part), backend, through=through, **arguments) for part in parts]
    assert not any(gradient.any() for gradient in answers[1].gradients.values())
    hidden_ND = torch.cat([answer.gradients["hidden"] for answer in answers])
    torch.testing.assert_close(hidden_ND, whole.gradients["hidden"], rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        total = torch.stack([answer.gradients[name] for answer in answers]).sum(0)
        torch.testing.assert_close(total, whole.gradients[name], rtol=1e-5, atol=1e-6)


# Halves of a vocabulary, as tensor parallel ranks hold them


HARD = ("max", "opposed", "dead", "excluded", "partly")


def make_halves(where: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Logits of both sides, token ids and the cut, with what is hard lying in one half or on the cut."""
    vocabulary, cut = 30, 13
    generator = torch.Generator().manual_seed(1)
    student_NV = torch.randn(4, vocabulary, generator=generator) * 3
    teacher_NV = torch.randn(4, vocabulary, generator=generator) * 3
    ids_N = torch.tensor([0, cut - 1, cut, vocabulary - 1])
    half = {"left": slice(0, cut), "right": slice(cut, vocabulary)}.get(where.split("_")[0])
    if where.endswith("max"):
        student_NV[:, half] += 50
    elif where.endswith("opposed"):
        student_NV[:, half] += 20
        teacher_NV[:, half] -= 20
    elif where.endswith("dead"):
        student_NV[:, half] = teacher_NV[:, half] = -INF
    elif where.endswith("excluded"):
        teacher_NV[:, half] = -INF
    elif where.endswith("partly"):
        student_NV[:2, half] = -INF
        teacher_NV[1:3, half.start : half.start + 4] = torch.finfo(torch.float32).min
    return student_NV.to(DEVICE), teacher_NV.to(DEVICE), ids_N.to(DEVICE), cut


@pytest.mark.parametrize("missing", ["clamp", "drop", "inf"])
@pytest.mark.parametrize("temperatures", [(1.0, None), (0.7, 1.3)], ids=["T", "two_T"])
@pytest.mark.parametrize(
    "where",
    ["even"]
    + [f"{half}_{what}" for half in ("left", "right") for what in ("max", "opposed", "dead", "excluded", "partly")],
)
def test_halves_of_a_vocabulary_merge_to_the_whole(
    where: str, temperatures: tuple[float, float | None], missing: Any, backend: str
) -> None:
    student_NV, teacher_NV, ids_N, cut = make_halves(where)
    spec = make_spec(temperatures[0], StatsOptions(temperatures[1], forward_kl=True, missing=missing))
    vocabulary = student_NV.shape[1]
    states = []
    for part in (slice(0, cut), slice(cut, vocabulary)):
        sides = (Logits(student_NV[:, part]), Logits(teacher_NV[:, part]))
        states.append(compute_state(*sides, ids_N, spec, part.start, part.stop - part.start))
    if backend == "reference":
        table = finish_state(merge_states(torch.stack(states), spec), ids_N, spec, vocabulary)
    else:
        table = load_backend(backend).finish_state(torch.stack(states), ids_N, spec, vocabulary)
    truth = compute_stats(Logits(student_NV.double()), Logits(teacher_NV.double()), ids_N, spec, vocabulary)
    torch.testing.assert_close(table.double(), truth, rtol=1e-5, atol=2e-6, equal_nan=True)


# Processes


class Model(nn.Module):
    """A body, a head, and the loss inside of forward when there are targets."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, len(case.head.weight_VD), bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(HIDDEN) + 0.1)
            self.body.bias.fill_(0.1)
            self.lm_head.weight.copy_(case.head.weight_VD)

    def forward(self, inputs_ND: Tensor, case: Case | None = None, through: str = "row_loss") -> Tensor:
        hidden_ND = self.body(inputs_ND).tanh() * 2
        return hidden_ND if case is None else compute_loss(hidden_ND, self.lm_head.weight, case, through)


def compute_loss(hidden_ND: Tensor, weight_VD: Tensor, case: Case, through: str) -> Tensor:
    has_row_loss = through == "row_loss"
    stats = linear_token_stats(
        hidden_ND, weight_VD, case.teacher_hidden_NE, case.teacher_head, case.token_ids_N,
        weigh_all if has_row_loss else None, row_inputs=(case.weights_N,) if has_row_loss else (), chunk_rows=2,
    )  # fmt: skip
    return stats.loss if has_row_loss else weigh_all(stats, case.weights_N).sum()


def make_shared_case() -> Case:
    """The batch of all ranks, on CPU."""
    case = make_case(rows=7, vocabulary=50)
    sides = {"teacher_hidden_NE": case.teacher_hidden_NE.cpu(), "hidden_ND": case.hidden_ND.cpu()}
    heads = {
        name: OutputHead(getattr(case, name).weight_VD.cpu(), getattr(case, name).bias_V.cpu())
        for name in ("head", "teacher_head")
    }
    return replace(case, **sides, **heads, token_ids_N=case.token_ids_N.cpu(), weights_N=case.weights_N.cpu())


def run_rank(rank: int, folder: str) -> None:
    """One of two processes: its gradients by DDP and FSDP2, to a file."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=240))
    case = make_shared_case()
    mine = select(case, slice(0, 3) if rank == 0 else slice(3, 7))
    found: dict[str, Any] = {}
    for through in ("row_loss", "statistics"):
        wrapped = DistributedDataParallel(Model(case))
        wrapped(mine.hidden_ND, mine, through).backward()
        found[f"ddp {through}"] = {name: value.grad for name, value in wrapped.module.named_parameters()}
        for groups in ("own", "root"):
            model = Model(case)
            mesh = init_device_mesh("cpu", (2,))
            if groups == "own":
                fully_shard(model.lm_head, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
            hidden_ND = model(mine.hidden_ND)
            assert isinstance(model.lm_head.weight, DTensor)
            compute_loss(hidden_ND, model.lm_head.weight, mine, through).backward()
            assert all(value.grad.placements == value.placements for value in model.parameters())
            grads = {name: value.grad.full_tensor() for name, value in model.named_parameters()}
            found[f"fsdp2 {groups} {through}"] = grads
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(run_rank, (str(folder),), nprocs=2, join=False)
    give_up = time.monotonic() + 240
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < give_up, "the two processes did not end within four minutes"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]


@paths
@pytest.mark.parametrize("how", ["ddp", "fsdp2 own", "fsdp2 root"])
def test_gradients_are_the_mean_over_processes(how: str, through: str, ranks: list[dict[str, Any]]) -> None:
    case = make_shared_case()
    model = Model(case)
    (model(case.hidden_ND, case, through) / 2).backward()  # a sum over all rows, halved, is the mean of both sums
    for found in ranks:
        gradients = found[f"{how} {through}"]
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, value in model.named_parameters():
            assert measure_error(gradients[name], value.grad.double()) <= 2 * TOLERANCE[torch.float32], name
