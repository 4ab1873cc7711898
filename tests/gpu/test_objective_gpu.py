"""The objective's plain path on a GPU: bf16 operands and fp32 logits, against fp64, within the memory of a chunk."""

# N kept tokens, V vocabulary, D hidden

import pytest
import torch
from plain_objective import compute_objective

from imagine_opd.kernels import OutputHead
from imagine_opd.loss.objective import ObjectiveConfig, objective
from imagine_opd.types import Scores

pytestmark = pytest.mark.gpu

ROWS, HIDDEN, VOCABULARY = 48, 512, 151_936
MENU = {
    "clip": {"distillation_kl_clip": 0.01},
    "JSD, clip": {"distillation_kl_clip": 0.01, "distillation_alpha": 0.5},
    "top 100": {"distillation_mode": "topk_tail"},
    "top 100, JSD": {"distillation_mode": "topk_tail", "distillation_alpha": 0.5},
    "tilt behind a softcap": {"contrast_beta": 1.0},
}


def make_problem(rows: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hidden states of student, teacher and neutral pass, a head, token ids."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    teacher_ND = draw(rows, HIDDEN)
    hidden = [teacher_ND + 0.1 * draw(rows, HIDDEN), teacher_ND, teacher_ND + 0.2 * draw(rows, HIDDEN)]
    head_VD = draw(VOCABULARY, HIDDEN) * (4.0 / HIDDEN**0.5)
    ids_N = torch.randint(0, VOCABULARY, (rows,), generator=generator, device="cuda")
    return [states_ND.to(dtype) for states_ND in hidden], head_VD.to(dtype), ids_N


def run(fields: dict, hidden: list[torch.Tensor], head_VD: torch.Tensor, ids_N: torch.Tensor, plain: bool):
    student_ND = hidden[0].clone().requires_grad_()
    head = OutputHead(head_VD.clone().requires_grad_(), softcap=20.0)
    nothing_N = torch.zeros(len(ids_N), dtype=torch.promote_types(head_VD.dtype, torch.float32), device="cuda")
    neutral_ND = hidden[2] if "contrast_beta" in fields else None
    rows_N = torch.zeros_like(ids_N)
    scores = Scores(student_ND, hidden[1], ids_N, nothing_N, rows_N, rows_N, neutral_hidden_ND=neutral_ND)
    config = ObjectiveConfig(**fields)
    if plain:
        loss_N = compute_objective(scores, head, head, config)
        loss = loss_N.sum()
    else:
        result = objective(scores, head, head, config)
        loss_N, loss = result.loss_N, result.loss_sum
    return loss_N.detach().double(), *(g.double() for g in torch.autograd.grad(loss, [student_ND, head.weight_VD]))


@pytest.mark.parametrize("fields", MENU.values(), ids=MENU)
def test_bf16_operands_give_the_fp64_loss_and_gradients(fields):
    hidden, head_VD, ids_N = make_problem(ROWS, torch.bfloat16)
    found = run(fields, hidden, head_VD, ids_N, plain=False)
    truth = run(fields, [states_ND.double() for states_ND in hidden], head_VD.double(), ids_N, plain=True)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-3, atol=1e-5)
    for ours, exact in zip(found[1:], truth[1:], strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 0.01


def test_memory_is_that_of_a_chunk_not_of_all_logits():
    rows = 8192
    hidden, head_VD, ids_N = make_problem(rows, torch.bfloat16)
    student_ND, head = hidden[0].requires_grad_(), OutputHead(head_VD)
    rows_N = torch.zeros_like(ids_N)
    scores = Scores(student_ND, hidden[1], ids_N, torch.zeros(rows, device="cuda"), rows_N, rows_N)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    objective(scores, head, head, ObjectiveConfig(distillation_mode="topk_tail")).loss_sum.backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**30  # one fp32 [N, V] is 4.6 GiB
