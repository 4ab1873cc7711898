"""`linear_token_stats` near KL 0, repeated, inside compile, checkpoint and autocast, with tied heads, and refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from linear_cases import (
    CHUNKED,
    HIDDEN,
    ROWS,
    SLABBED,
    VOCABULARY,
    Case,
    assert_bitwise_equal,
    make_case,
    paths,
    run,
    run_formula,
    select,
    small_blocks,  # noqa: F401
    ways,
    weigh_all,
    weigh_kl,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imagine_opd.errors import ConfigError
from imagine_opd.kernels import (
    OutputHead,
    StatsOptions,
    TokenStats,
    linear_token_stats,
    planning,
    token_stats,
)

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("small_blocks")


# Student and teacher nearly agree


def make_close_case(noise: float, dtype: torch.dtype, deviation: float = 3.0, **fields: Any) -> Case:
    """One head for both sides; the student's hidden states are the teacher's with so much noise."""
    generator = torch.Generator().manual_seed(3)
    teacher_hidden_ND = torch.randn(8, 64, generator=generator)
    hidden_ND = teacher_hidden_ND + noise * torch.randn(8, 64, generator=generator)
    head = OutputHead((torch.randn(300, 64, generator=generator) * deviation / 8).to(DEVICE, dtype))
    ids_N = torch.randint(0, 300, (8,), generator=generator).to(DEVICE)
    sides = [side_ND.to(DEVICE, dtype) for side_ND in (hidden_ND, teacher_hidden_ND)]
    return Case(sides[0], head, sides[1], head, ids_N, torch.ones(8, device=DEVICE), **fields)


@pytest.mark.parametrize("exact_kl", [False, True], ids=["usual", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ways
def test_identical_sides_give_exactly_zero(
    dtype: torch.dtype, exact_kl: bool, arguments: dict[str, Any], backend: str
) -> None:
    case = make_close_case(0.0, dtype, options=StatsOptions(exact_kl=exact_kl))
    answer = run(case, backend, weigh_kl, **arguments)
    assert not answer.values["reverse_kl_N"].any()
    assert not answer.gradients["hidden"].any()
    assert not answer.gradients["weight"].any()


@pytest.mark.parametrize("arguments", [{}, SLABBED], ids=["chunks", "slabs"])
def test_bf16_operands_leave_the_gradient_of_a_small_kl_sharp(arguments: dict[str, Any], backend: str) -> None:
    # Measured: 0.16 % with fp32 logits, half of a bf16 digit; 126 to 151 % with bf16 logits.
    case = make_close_case(0.01, torch.bfloat16, deviation=5.0)
    truth = run_formula(case, weigh_kl)
    assert 5e-4 <= truth.values["reverse_kl_N"].mean() <= 5e-3

    def measure(**arguments: Any) -> list[float]:
        found = run(case, backend, weigh_kl, **arguments).gradients
        errors = {name: found[name].double() - expected for name, expected in truth.gradients.items()}
        return [float(errors[name].norm() / truth.gradients[name].norm()) for name in ("hidden", "weight")]

    assert max(measure(**arguments)) <= 0.01
    assert min(measure(logits_dtype=torch.bfloat16)) >= 0.2


@pytest.mark.parametrize("arguments", [{}, SLABBED], ids=["chunks", "slabs"])
def test_exact_kl_is_right_to_1e_9_near_zero(arguments: dict[str, Any], backend: str) -> None:
    case = make_close_case(6e-4, torch.float32, deviation=2.0, options=StatsOptions(exact_kl=True))
    truth_N = run_formula(case, weigh_kl).values["reverse_kl_N"]
    assert 3e-7 <= truth_N.mean() <= 3e-6
    kl_N = run(case, backend, weigh_kl, **arguments).values["reverse_kl_N"]
    assert kl_N.min() >= 0
    assert (kl_N.double() - truth_N).abs().max() <= 1e-9


# Repeatability and wiring


@ways
@paths
def test_runs_repeat_bit_by_bit(through: str, arguments: dict[str, Any], backend: str) -> None:
    first = run(make_case(), backend, through=through, **arguments)
    for _ in range(3):
        assert_bitwise_equal(run(make_case(), backend, through=through, **arguments), first)


@pytest.mark.parametrize(
    "arguments", [{"chunk_rows": 1}, {"chunk_rows": ROWS}, SLABBED], ids=["rows", "whole", "slabs"]
)
def test_permuted_rows_give_permuted_answers(arguments: dict[str, Any], backend: str) -> None:
    case, order = make_case(), [4, 2, 0, 1, 3]
    answer, permuted = run(case, backend, **arguments), run(select(case, order), backend, **arguments)
    # Bit by bit where each row is its own product: within one, BLAS may sum rows in different orders.
    close = {"rtol": 0, "atol": 0} if arguments.get("chunk_rows") == 1 else {"rtol": 1e-5, "atol": 1e-6}
    for name, value in answer.values.items():
        torch.testing.assert_close(permuted.values[name], value[order], **close)
    torch.testing.assert_close(permuted.gradients["hidden"], answer.gradients["hidden"][order], **close)
    torch.testing.assert_close(permuted.gradients["weight"], answer.gradients["weight"], rtol=1e-5, atol=1e-5)


@ways
@paths
def test_every_buffer_element_read_was_written(
    through: str, arguments: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(padding=53, mask_N=torch.tensor([1, 1, 0, 1, 1], device=DEVICE))
    expected, allocated = run(case, backend, through=through, **arguments), []

    def poison(allocate: Any) -> Any:
        return lambda *args, **kwargs: allocated.append(allocate(*args, **kwargs).fill_(NAN)) or allocated[-1]

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    assert_bitwise_equal(run(case, backend, through=through, **arguments), expected)
    assert allocated


def test_gradients_of_a_row_loss_are_used_up_once(backend: str) -> None:
    hidden_ND = make_case().hidden_ND.requires_grad_()
    loss = project(hidden_ND, backend=backend, row_loss=weigh_kl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


def test_statistics_can_be_differentiated_again(backend: str) -> None:
    hidden_ND = make_case().hidden_ND.requires_grad_()
    kl_N = project(hidden_ND, backend=backend).reverse_kl_N
    (first_ND,) = torch.autograd.grad(kl_N.sum(), hidden_ND, retain_graph=True)
    (second_ND,) = torch.autograd.grad(kl_N.sum(), hidden_ND)
    assert torch.equal(first_ND, second_ND)
    assert first_ND.any()


@paths
def test_second_derivative_raises(through: str) -> None:
    hidden_ND = make_case().hidden_ND.requires_grad_()
    stats = project(hidden_ND, row_loss=weigh_kl if through == "row_loss" else None)
    loss = stats.loss if through == "row_loss" else stats.reverse_kl_N.square().sum()
    (grad_ND,) = torch.autograd.grad(loss, hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once|differentiate twice"):
        (grad_ND.sum() + hidden_ND.sum()).backward()


def project(hidden_ND: Tensor, head: Any = None, row_loss: Any = None, **arguments: Any) -> TokenStats:
    """The door on the tensors of `make_case()` but for hidden states and head."""
    case = make_case()
    inputs = () if row_loss is None else (case.weights_N,)
    return linear_token_stats(
        hidden_ND, case.head if head is None else head, case.teacher_hidden_NE, case.teacher_head, case.token_ids_N,
        row_loss, row_inputs=inputs, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("min_memory", [False, True], ids=["chunks", "slabs"])
def test_gradcheck_fp64(min_memory: bool) -> None:
    case = make_case(2, 7, torch.float64, options=StatsOptions(forward_kl=True, jsd_beta=0.3), softcap=4.0)
    fields = ("student_logprob_N", "reverse_kl_N", "entropy_N", "forward_kl_N", "jsd_N")

    def compute(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        head = replace(case.head, weight_VD=weight_VD, bias_V=bias_V)
        stats = linear_token_stats(
            hidden_ND, head, case.teacher_hidden_NE, case.teacher_head, case.token_ids_N,
            options=case.options, temperature=0.7, min_memory=min_memory,
        )  # fmt: skip
        return tuple(getattr(stats, field) for field in fields)

    leaves = (case.hidden_ND, case.head.weight_VD, case.head.bias_V)
    assert torch.autograd.gradcheck(compute, tuple(leaf.requires_grad_() for leaf in leaves), fast_mode=True)


# What it is used inside of


@pytest.mark.parametrize("kind", ["weight", "linear", "output_head"])
def test_heads_of_each_kind_agree(kind: str) -> None:
    case = make_case(bias=kind != "weight")
    layer = nn.Linear(HIDDEN, VOCABULARY, bias=kind != "weight", device=DEVICE)
    layer.weight.data.copy_(case.head.weight_VD)
    if layer.bias is not None:
        layer.bias.data.copy_(case.head.bias_V)
    head = {"weight": layer.weight, "linear": layer, "output_head": OutputHead(layer.weight, layer.bias)}[kind]
    linear_token_stats(
        case.hidden_ND, head, case.teacher_hidden_NE, case.teacher_head, case.token_ids_N, weigh_all,
        row_inputs=(case.weights_N,),
    ).loss.backward()  # fmt: skip
    expected = run(case).gradients
    torch.testing.assert_close(layer.weight.grad, expected["weight"])
    assert (layer.bias is None) == ("bias" not in expected)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, expected["bias"])


@paths
def test_tied_embedding_gets_the_sum_of_both_uses(through: str) -> None:
    case = make_case()
    inputs_N = torch.tensor([5, 7, 5, 0, VOCABULARY - 1], device=DEVICE)
    table_VD = case.head.weight_VD.clone().requires_grad_()
    stats = project(table_VD[inputs_N].tanh(), table_VD, weigh_kl if through == "row_loss" else None)
    (stats.loss if through == "row_loss" else stats.reverse_kl_N @ case.weights_N).backward()
    hidden_ND = case.head.weight_VD[inputs_N].tanh()
    apart = run_formula(replace(case, head=OutputHead(case.head.weight_VD), hidden_ND=hidden_ND), weigh_kl).gradients
    inner_ND = apart["hidden"] * (1 - hidden_ND.double().square())
    expected_VD = apart["weight"].index_add(0, inputs_N, inner_ND)
    torch.testing.assert_close(table_VD.grad.double(), expected_VD, rtol=1e-5, atol=1e-5)


@paths
def test_checkpointing_changes_nothing(through: str) -> None:
    case, row_loss = make_case(), weigh_kl if through == "row_loss" else None

    def compute(hidden_ND: Tensor) -> Tensor:
        stats = project(hidden_ND.tanh() * 2, row_loss=row_loss, chunk_rows=2)
        return stats.loss if row_loss else stats.reverse_kl_N @ case.weights_N

    plain_ND, saved_ND = (case.hidden_ND.clone().requires_grad_() for _ in range(2))
    loss, saved_loss = compute(plain_ND), checkpoint(compute, saved_ND, use_reentrant=False)
    loss.backward()
    saved_loss.backward()
    assert torch.equal(loss, saved_loss)
    assert torch.equal(plain_ND.grad, saved_ND.grad)


@paths
def test_autocast_on_cpu_keeps_products_in_fp32(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linear_cases.DEVICE", "cpu")
    plain = run(make_case(), through=through, **CHUNKED)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(make_case(), through=through, **CHUNKED)
    assert_bitwise_equal(cast, plain)


# Under torch.compile


def compute_compiled(hidden_ND: Tensor, weight_VD: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    sides, mask_N = (case.teacher_hidden_NE, case.teacher_head, case.token_ids_N), case.mask_N
    summed = linear_token_stats(hidden_ND, weight_VD, *sides, weigh_all, row_inputs=(case.weights_N,), mask_N=mask_N)
    stats = linear_token_stats(hidden_ND, weight_VD, *sides, mask_N=mask_N, chunk_rows=2)
    teacher_NV = case.teacher_hidden_NE @ case.teacher_head.weight_VD.T
    dense = token_stats(hidden_ND @ weight_VD.T, teacher_NV, case.token_ids_N, mask_N=mask_N)
    return summed.loss + whiten(stats) + whiten(dense), summed.loss_N


def whiten(stats: TokenStats) -> Tensor:
    return (stats.reverse_kl_N * stats.entropy_N / (1 + stats.reverse_kl_N.mean())).sum()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.11 itself
def test_compiled_equals_eager_in_one_graph_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # once for the first size, once for any
    compiled = torch.compile(compute_compiled, fullgraph=True)
    for rows in (5, 7, 9):
        case = make_case(rows, mask_N=torch.arange(rows, device=DEVICE) % 3 != 1)
        case.hidden_ND[1], case.token_ids_N[4] = 1e4, -100
        results = []
        for compute in (compute_compiled, compiled):
            leaves = [tensor.clone().requires_grad_() for tensor in (case.hidden_ND, case.head.weight_VD)]
            loss, loss_N = compute(*leaves, case)
            loss.backward()
            results.append([loss.detach(), loss_N, *(leaf.grad for leaf in leaves)])
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
        assert not results[1][1][~case.mask_N].any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("min_memory", [False, True], ids=["chunks", "slabs"])
def test_operators_keep_the_rules_of_torch(min_memory: bool) -> None:
    case = make_case(options=StatsOptions(forward_kl=True, jsd_beta=0.5), mask_N=torch.arange(ROWS, device=DEVICE) != 1)
    tensors, plan = planning.plan_linear(
        case.hidden_ND, case.head, case.teacher_hidden_NE, case.teacher_head, case.token_ids_N, case.mask_N,
        temperature=1.0, options=case.options, backend="reference", vocab_size=None, logits_dtype=None, chunk_rows=2,
        min_memory=min_memory,
    )  # fmt: skip
    ops, weights_5N = torch.ops.imagine_opd, torch.randn(5, ROWS, device=DEVICE)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    text = plan.encode()
    torch.library.opcheck(ops.linear_token_stats.default, (*leaves, *tensors[3:], text))
    table = ops.linear_token_stats(*tensors, text)
    for needs in ([True, True, True], [True, False, False], [False, True, True]):
        torch.library.opcheck(ops.linear_token_stats_gradient.default, (*tensors, table, weights_5N, text, needs))
    if not min_memory:
        dense = (torch.randn(ROWS, 9, device=DEVICE), torch.randn(ROWS, 9, device=DEVICE), case.token_ids_N % 9)
        spec = plan.spec.encode()
        leaf_NV = dense[0].clone().requires_grad_()
        torch.library.opcheck(ops.token_stats.default, (leaf_NV, *dense[1:], case.mask_N, spec, "reference"))
        table = ops.token_stats(*dense, case.mask_N, spec, "reference")
        torch.library.opcheck(ops.token_stats_gradient.default, (*dense, table, weights_5N, spec, "reference"))


# What the door refuses

H, G, Y = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
W, U = torch.zeros(5, 3), torch.zeros(5, 4)
ALONE = {"teacher_hidden_ND": None, "teacher_head": None}


def return_kl(stats: TokenStats, *_: Tensor) -> Tensor:
    return stats.reverse_kl_N


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student_hidden_ND": H[None]},
            r"student hidden states are \[1, 2, 3\]; expected \[2, D\].*flatten batch and time",
        ),
        ({"student_hidden_ND": H[:1]}, r"student hidden states are \[1, 3\]; expected \[2, D\]"),
        ({"teacher_hidden_ND": G[:1]}, r"teacher hidden states are \[1, 4\]; expected \[2, D\]"),
        ({"student_head": U}, r"student head is \[5, 4\]; expected \[V, 3\], the student's hidden size"),
        ({"teacher_head": W}, r"teacher head is \[5, 3\]; expected \[V, 4\], the teacher's hidden size"),
        ({"student_head": W[0]}, r"student head is \[3\]; expected \[V, 3\]"),
        ({"student_head": W[:0]}, r"student head is \[0, 3\]"),
        ({"student_head": "lm_head"}, "student head is str; expected a weight"),
        ({"teacher_head": [U]}, "teacher head is list; expected a weight"),
        ({"student_head": OutputHead(W, W[0])}, r"student bias is \[3\]; expected \[5\]"),
        ({"student_hidden_ND": H.long()}, "student hidden states: torch.int64; expected a floating-point tensor"),
        ({"teacher_head": U.int()}, "teacher head: torch.int32; expected a floating-point tensor"),
        ({"token_ids_N": Y[:, None]}, r"token ids are \[2, 1\]; expected \[2\]"),
        ({"token_ids_N": Y.float()}, "token ids are torch.float32; expected an integer tensor"),
        ({"token_ids_N": Y.bool()}, "token ids are torch.bool"),
        ({"student_head": W.to("meta")}, "student head on meta, .*expected one device"),
        ({"mask_N": Y[:1]}, r"mask_N is \[1\]; expected \[2\], one for each token id"),
        ({"mask_N": Y.to("meta")}, "mask_N is on meta, token ids on cpu"),
        ({"teacher_head": None}, "the teacher has no head; give both, or neither"),
        ({"teacher_hidden_ND": None}, "the teacher has no hidden states"),
        ({**ALONE, "options": StatsOptions(forward_kl=True)}, "forward_kl needs a teacher"),
        ({**ALONE, "options": StatsOptions(exact_kl=True)}, "exact_kl needs a teacher"),
        ({**ALONE, "options": StatsOptions(0.5, jsd_beta=0.5)}, "jsd_beta, teacher_temperature needs a teacher"),
        ({"row_inputs": (Y,)}, "row_inputs go with row_loss"),
        ({"row_loss": return_kl, "row_inputs": (Y, Y[:1])}, r"row_inputs\[1\] is \[1\]; expected 2 entries"),
        ({"row_loss": return_kl, "row_inputs": (H.requires_grad_(),)}, r"row_inputs\[0\] requires a gradient"),
        ({"row_loss": lambda stats: stats.reverse_kl_N.mean()}, r"row_loss returned \[\]; expected \[2\]"),
        ({"row_loss": lambda stats: stats.reverse_kl_N[:, None]}, r"row_loss returned \[2, 1\]; expected \[2\]"),
        ({"row_loss": lambda stats: 0.0}, r"row_loss returned float; expected \[2\]"),
        ({"teacher_head": U[:4]}, "the heads have 5 and 4 rows; give vocab_size"),
        ({"vocab_size": 0}, "vocab_size is 0; expected 1 to 5"),
        ({"teacher_head": U[:4], "vocab_size": 5}, "vocab_size is 5; expected 1 to 4, the rows of the smaller head"),
        ({"chunk_rows": 0}, "chunk_rows is 0; expected a whole number of at least 1"),
        ({"logits_dtype": torch.int64}, "logits_dtype is torch.int64; expected a floating-point dtype"),
        ({"logits_dtype": torch.bfloat16, "min_memory": True}, "torch.bfloat16 with min_memory=True"),
        ({"student_head": OutputHead(W, Y.new_zeros(5))}, "student bias: torch.int64; expected a floating-point"),
        ({"teacher_head": OutputHead(U, U[:, 0].to("meta"))}, "teacher bias on meta: expected one device"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of 'auto', 'triton', 'reference'"),
        ({"student_hidden_ND": H.double(), "backend": "triton"}, "backend 'triton' takes float32"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    fitting = {
        "student_hidden_ND": H.detach(), "student_head": W, "teacher_hidden_ND": G, "teacher_head": U, "token_ids_N": Y,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message) as caught:
        linear_token_stats(**{**fitting, **changes})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OutputHead(W, logit_scale=0.0), "logit_scale is 0.0; expected a finite number other than 0"),
        (lambda: OutputHead(W, logit_scale=NAN), "logit_scale is nan"),
        (lambda: OutputHead(W, softcap=0.0), "softcap is 0.0; expected a finite number above 0, or None"),
        (lambda: OutputHead(W, softcap=INF), "softcap is inf"),
        (lambda: StatsOptions(jsd_beta=1.0), "jsd_beta is 1.0; expected a number between 0 and 1"),
        (lambda: StatsOptions(missing="skip"), "missing is 'skip'; expected one of clamp, drop, inf"),
        (lambda: StatsOptions(teacher_temperature=-1.0), "teacher_temperature is -1.0"),
        (
            lambda: planning.read_logits_dtype(torch.float16, torch.float32, torch.bfloat16, torch.bfloat16, True),
            "logits_dtype is torch.float16 and the products' operands are torch.bfloat16",
        ),
    ],
)
def test_refuses_bad_options(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
