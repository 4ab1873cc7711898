"""Traps of test_traps.py that lie in weights: what is frozen, drops out, has another vocabulary or another dtype."""

# N kept response tokens, V vocabulary, D hidden

from __future__ import annotations

import copy

import pytest
import torch
from test_trainer import compute_gradients, largest_difference, make_trainer, weights_of
from test_traps import LORA, take_one

from imagine_opd.errors import ConfigError, TeacherError
from imagine_opd.kernels import OutputHead, linear_token_stats
from imagine_opd.teacher.load import build_teacher

MODES = ["full", "sampled_token", "topk_tail"]


@pytest.mark.parametrize("mode", MODES)
def test_teacher_is_frozen_after_prepare_and_no_gradient_passes_its_head(tiny, make_rows, tmp_path, mode):
    """huggingface/trl: `prepare_model` does not freeze. A live teacher's head is the student's own, which trains."""
    rows = make_rows(3)
    given = copy.deepcopy(tiny.model).train().requires_grad_()
    trainer = make_trainer(tiny, rows, tmp_path, teacher=given, distillation_mode=mode, max_steps=1)
    before = weights_of(given)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for parameter in trainer.teacher.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert id(parameter) not in held
    assert largest_difference(before, weights_of(trainer.teacher.module)) == 0.0
    gradients = {
        kind: compute_gradients(
            make_trainer(tiny, rows, tmp_path / kind, distillation_mode=mode, teacher_model_kind=kind), rows, 3
        )
        for kind in ("base", "live")
    }
    scale = max(float(gradient.abs().max()) for gradient in gradients["base"].values())
    assert scale > 1e-3
    assert largest_difference(gradients["base"], gradients["live"]) < 1e-6 * scale


@pytest.mark.parametrize(
    "fields",
    [{}, {**LORA, "lora_dropout": 0.5}, {"teacher_model_kind": "live"}],
    ids=["copy", "adapter off", "live"],
)
def test_dropout_is_off_in_the_teacher_and_on_in_the_student(tiny, make_rows, tmp_path, fields):
    rows = make_rows(3)
    for layer in tiny.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    trainer = make_trainer(tiny, rows, tmp_path, **fields)
    batch, total = take_one(trainer, rows)
    stats = []
    for train_mode in (True, True, False):
        trainer.model.train(train_mode)
        _, result = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=total)
        assert trainer.model.training is train_mode
        stats.append(result.stats)
    first, second, still = stats
    assert torch.equal(first.teacher_logprob_N, second.teacher_logprob_N)
    assert torch.equal(first.teacher_logprob_N, still.teacher_logprob_N)
    assert float((first.student_logprob_N - second.student_logprob_N).detach().abs().max()) > 1e-2


def test_vocabularies_of_151936_and_152064_are_not_mixed(tiny):
    """Sizes of one family's heads (huggingface/trl#6252): the longer one's last entries are padding, not words."""
    hidden = tiny.model.lm_head.in_features
    heads = {}
    for size in (151936, 152064):
        heads[size] = copy.deepcopy(tiny.model)
        heads[size].lm_head = torch.nn.Linear(hidden, size, bias=False)
    for student_size, teacher_size, longer in ((151936, 152064, "teacher"), (152064, 151936, "student")):
        with pytest.raises(TeacherError) as caught:
            build_teacher(heads[student_size], tiny.processor, heads[teacher_size])
        text = str(caught.value)
        assert f"the teacher's vocabulary has {teacher_size} entries, the student's {student_size}: " in text
        assert f"the student's tokenizer has {len(tiny.processor.tokenizer)} words." in text
        assert f"entries 151936 to 152063 are padding: cut them with {longer}.resize_token_embeddings(151936)" in text
    build_teacher(heads[151936], tiny.processor, copy.deepcopy(heads[151936]))
    # The kernels take heads of two lengths only where they are told which tokens both know.
    student, teacher = (OutputHead(heads[size].lm_head.weight.detach()) for size in (151936, 152064))
    hidden_ND = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    ids_N = torch.tensor([5, 70000, 151935])
    with pytest.raises(ConfigError, match="the heads have 151936 and 152064 rows; give vocab_size"):
        linear_token_stats(hidden_ND, student, hidden_ND, teacher, ids_N)
    stats = linear_token_stats(hidden_ND, student, hidden_ND, teacher, ids_N, vocab_size=151936)
    logits_NV = torch.nn.functional.linear(hidden_ND, teacher.weight_VD)
    shared_N, whole_N = (
        logits.log_softmax(-1).gather(1, ids_N[:, None])[:, 0] for logits in (logits_NV[:, :151936], logits_NV)
    )
    torch.testing.assert_close(stats.teacher_logprob_N, shared_N, atol=1e-4, rtol=0.0)
    assert float((shared_N - whole_N).min()) > 5e-4  # what padding would take


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ("full", {}),
        ("topk_tail", {}),
        ("sampled_token", {"bf16": True}),
        ("full", {"bf16": True, "lora_modules_to_save": ["lm_head"]}),
        ("topk_tail", {"bf16": True, "lora_modules_to_save": ["lm_head"]}),
    ],
    ids=["full", "topk", "sampled autocast", "full with trained head", "topk with trained head"],
)
def test_fp32_lora_on_a_bf16_base_does_not_clash_in_heads_and_objective(tiny, make_rows, tmp_path, mode, fields):
    rows = make_rows(4)
    options = {**LORA, **fields, "distillation_mode": mode, "max_steps": 1, "learning_rate": 1e-6, "warmup_steps": 0}
    torch.manual_seed(0)  # of the adapter's first weights
    exact = make_trainer(tiny, rows, tmp_path / "fp32", **{**options, "bf16": False})
    batch, total = take_one(exact, rows)
    tiny.model.to(torch.bfloat16)
    torch.manual_seed(0)
    trainer = make_trainer(tiny, rows, tmp_path / "bf16", **options)
    found = []
    for each in (exact, trainer):
        each.model.eval()
        loss = each.compute_loss(each.model, batch, num_items_in_batch=total)
        loss.backward()
        assert loss.dtype == torch.float32
        grads = {name: p.grad for name, p in each.model.named_parameters() if p.requires_grad}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        found.append((float(loss.detach()), torch.cat([grad.flatten() for grad in grads.values()])))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1)
    assert float(torch.cosine_similarity(found[0][1], found[1][1], dim=0)) > 0.95
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    moved = [float((after[name].detach() - start).abs().max()) for name, start in before.items()]
    assert 0.0 < max(moved) < 1e-5  # a step that 16 bits would round away beside weights of 0.1
