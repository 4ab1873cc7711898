"""`linear_token_stats` on a GPU: bf16 operands, fp32 logits, real head sizes, against fp64 and within its memory."""

# N kept tokens, V vocabulary, D hidden

import pytest
import torch
from torch import Tensor

from imagine_opd.kernels import OutputHead, TokenStats, linear_token_stats

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCABULARY, HIDDEN = 151936, 1024


def make_problem(rows: int, noise: float, dtype: torch.dtype, vocabulary: int = VOCABULARY, hidden: int = HIDDEN):
    """Student and teacher that differ by `noise` in their hidden states: (student, teacher, head, ids)."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    teacher_ND = draw(rows, hidden)
    head_VD = draw(vocabulary, hidden) * (4.0 / hidden**0.5)
    ids_N = torch.randint(0, vocabulary, (rows,), generator=generator, device="cuda")
    student_ND = teacher_ND + noise * draw(rows, hidden)
    return student_ND.to(dtype), teacher_ND.to(dtype), head_VD.to(dtype), ids_N


def compute_truth(student_ND: Tensor, teacher_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL, and its summed gradient in hidden states and head, in fp64 a few rows at a time."""
    head_VD = head_VD.double()
    kl_N, hidden_grads, head_grad_VD = [], [], torch.zeros_like(head_VD)
    for student_CD, teacher_CD in zip(student_ND.double().split(16), teacher_ND.double().split(16), strict=True):
        log_p_CV, log_q_CV = (student_CD @ head_VD.T).log_softmax(1), (teacher_CD @ head_VD.T).log_softmax(1)
        kl_C = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1)
        grad_CV = log_p_CV.exp() * (log_p_CV - log_q_CV - kl_C[:, None])
        kl_N.append(kl_C)
        hidden_grads.append(grad_CV @ head_VD)
        head_grad_VD += grad_CV.T @ student_CD
    return torch.cat(kl_N), torch.cat(hidden_grads), head_grad_VD


def sum_kl(stats: TokenStats) -> Tensor:
    return stats.reverse_kl_N


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("min_memory", [False, True])
@pytest.mark.parametrize("row_loss", [sum_kl, None], ids=["row_loss", "recompute"])
@pytest.mark.parametrize("noise", [0.3, 0.01])
def test_kl_and_gradients_near_and_far(noise: float, row_loss: object, min_memory: bool) -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(96, noise, BF16)
    kl_N, hidden_grad_ND, head_grad_VD = compute_truth(student_ND, teacher_ND, head_VD)
    student_ND.requires_grad_()
    head_VD.requires_grad_()
    stats = linear_token_stats(
        student_ND, head_VD, teacher_ND, head_VD, ids_N, row_loss, chunk_rows=40, min_memory=min_memory
    )
    (stats.reverse_kl_N.sum() if stats.loss is None else stats.loss).backward()
    torch.testing.assert_close(stats.reverse_kl_N.detach().double(), kl_N, atol=2e-6, rtol=1e-4)
    assert relative_error(student_ND.grad, hidden_grad_ND) <= 1e-2
    assert relative_error(head_VD.grad, head_grad_VD) <= 1e-2


def test_bf16_logits_would_drown_the_gradient_near_zero() -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(96, 0.01, BF16)
    _, hidden_grad_ND, _ = compute_truth(student_ND, teacher_ND, head_VD)
    errors = {}
    for dtype in (FP32, BF16):
        leaf_ND = student_ND.clone().requires_grad_()
        linear_token_stats(leaf_ND, head_VD, teacher_ND, head_VD, ids_N, sum_kl, logits_dtype=dtype).loss.backward()
        errors[dtype] = relative_error(leaf_ND.grad, hidden_grad_ND)
    assert errors[FP32] <= 1e-2
    assert errors[BF16] >= 0.2


def test_identical_sides_of_two_heads_give_exactly_zero() -> None:
    student_ND, _, head_VD, ids_N = make_problem(300, 0.0, BF16)
    leaf_ND = student_ND.clone().requires_grad_()
    stats = linear_token_stats(leaf_ND, head_VD, student_ND, head_VD.clone(), ids_N, sum_kl)
    stats.loss.backward()
    assert not stats.reverse_kl_N.any()
    assert not leaf_ND.grad.any()


def test_identical_sides_of_one_head_differ_by_rounding_at_most() -> None:
    # One product serves both sides there, and a library may sum its rows in more than one order.
    student_ND, _, head_VD, ids_N = make_problem(300, 0.0, BF16)
    stats = linear_token_stats(student_ND, head_VD, student_ND, head_VD, ids_N)
    assert stats.reverse_kl_N.max() <= 1e-6


@pytest.mark.parametrize("rows", [1, 2, 129])
@pytest.mark.parametrize("min_memory", [False, True])
def test_padded_heads_with_bias_and_softcap(rows: int, min_memory: bool) -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(rows, 0.2, BF16)
    tokens = 151_669
    head_VD[tokens:] = float("nan")
    bias_V = torch.randn(VOCABULARY, device="cuda")
    head = OutputHead(head_VD, bias_V, 0.9, 20.0)
    leaf_ND = student_ND.clone().requires_grad_()
    stats = linear_token_stats(
        leaf_ND, head, teacher_ND, head_VD, ids_N % tokens, sum_kl, vocab_size=tokens, min_memory=min_memory
    )
    stats.loss.backward()

    wide_ND = student_ND.double().requires_grad_()
    logits_NV = (wide_ND @ head_VD[:tokens].double().T + bias_V[:tokens].double()) * 0.9
    log_p_NV = (20.0 * (logits_NV / 20.0).tanh()).log_softmax(1)
    log_q_NV = (teacher_ND.double() @ head_VD[:tokens].double().T).log_softmax(1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)
    kl_N.sum().backward()
    torch.testing.assert_close(stats.reverse_kl_N.double(), kl_N.detach(), atol=5e-6, rtol=1e-4)
    assert relative_error(leaf_ND.grad, wide_ND.grad) <= 1e-2


def test_half_precision_gradients_do_not_underflow() -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(64, 0.05, FP16)
    _, hidden_grad_ND, head_grad_VD = compute_truth(student_ND, teacher_ND, head_VD)
    student_ND.requires_grad_()
    head_VD.requires_grad_()
    stats = linear_token_stats(student_ND, head_VD, teacher_ND, head_VD, ids_N, lambda stats: stats.reverse_kl_N * 1e-4)
    (stats.loss * 1e4).backward()
    assert relative_error(student_ND.grad, hidden_grad_ND) <= 1e-2
    assert relative_error(head_VD.grad, head_grad_VD) <= 1e-2


def test_autocast_multiplies_in_bf16_and_returns_fp32_gradients() -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(64, 0.1, FP32)
    rounded = [tensor.to(BF16) for tensor in (student_ND, teacher_ND, head_VD)]
    kl_N, hidden_grad_ND, head_grad_VD = compute_truth(*rounded)
    student_ND.requires_grad_()
    head_VD.requires_grad_()
    with torch.autocast("cuda", dtype=BF16):
        stats = linear_token_stats(student_ND, head_VD, teacher_ND, head_VD, ids_N, sum_kl)
    stats.loss.backward()
    assert student_ND.grad.dtype == head_VD.grad.dtype == FP32
    torch.testing.assert_close(stats.reverse_kl_N.double(), kl_N, atol=2e-6, rtol=1e-4)
    assert relative_error(student_ND.grad, hidden_grad_ND) <= 1e-2
    assert relative_error(head_VD.grad, head_grad_VD) <= 1e-2


def test_twenty_runs_repeat_bit_by_bit() -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(300, 0.1, BF16)
    grads = []
    for _ in range(20):
        leaf_ND = student_ND.clone().requires_grad_()
        linear_token_stats(leaf_ND, head_VD, teacher_ND, head_VD, ids_N, sum_kl, chunk_rows=128).loss.backward()
        grads.append(leaf_ND.grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


@pytest.mark.parametrize(("min_memory", "most_gib"), [(False, 3.0), (True, 0.75)])
def test_memory_beyond_inputs_and_outputs(min_memory: bool, most_gib: float) -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(8192, 0.1, BF16, hidden=2560)
    student_ND.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_token_stats(student_ND, head_VD, teacher_ND, head_VD, ids_N, sum_kl, min_memory=min_memory).loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - student_ND.grad.numel() * student_ND.grad.element_size()
    assert extra <= most_gib * 2**30


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch 2.11 itself
def test_compiled_whole_equals_eager() -> None:
    student_ND, teacher_ND, head_VD, ids_N = make_problem(64, 0.1, BF16, vocabulary=5003)
    mask_N = torch.arange(64, device="cuda") % 3 > 0

    def run(student_ND: Tensor) -> Tensor:
        stats = linear_token_stats(student_ND, head_VD, teacher_ND, head_VD, ids_N, sum_kl, mask_N=mask_N)
        return stats.loss

    grads = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaf_ND = student_ND.clone().requires_grad_()
        function(leaf_ND).backward()
        grads.append(leaf_ND.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=2**-7)
