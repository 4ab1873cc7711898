"""Advantages over a whole step: the same gradient however the step is cut into micro-batches."""

from __future__ import annotations

import pytest
import torch
from test_trainer import compute_gradients, largest_difference, make_trainer, take_micro_batches

FIELDS = {"distillation_mode": "sampled_token", "whiten_advantages": True, "log_ratio_clamp": 5.0}


@pytest.mark.parametrize(
    "fields",
    [
        FIELDS,
        {**FIELDS, "advantage_baseline": "position"},
        {"loss_aggregation": "sequence_mean", "early_weight_half_life": 4.0, "truncated_weight": 0.5},
        {
            "distillation_mode": "topk_tail",
            "distillation_topk": 5,
            "distillation_alpha": 0.5,
            "mask_special_tokens": True,
        },
    ],
)
def test_gradients_do_not_depend_on_how_the_step_is_cut(tiny, make_rows, tmp_path, fields):
    rows = make_rows(4)
    gradients = [
        compute_gradients(make_trainer(tiny, rows, tmp_path, per_device_train_batch_size=size, **fields), rows, size)
        for size in (4, 1, 3)
    ]
    scale = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    assert scale > 1e-3
    for other in gradients[1:]:
        assert largest_difference(gradients[0], other) < 1e-5 * scale


def test_shaped_advantages_are_white_and_the_teacher_runs_once(tiny, make_rows, tmp_path, monkeypatch):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, **FIELDS)
    calls = []
    score = trainer._score_teacher
    monkeypatch.setattr(trainer, "_score_teacher", lambda *args: calls.append(1) or score(*args))
    micro_batches, total = take_micro_batches(trainer, make_rows(4), 2)
    advantages_N = torch.cat([batch.advantages_N for batch in micro_batches])
    assert len(advantages_N) == int(total)
    assert float(advantages_N.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantages_N.std(unbiased=False)) == pytest.approx(1.0, abs=1e-4)
    for micro_batch in micro_batches:
        trainer.compute_loss(trainer.model, micro_batch, num_items_in_batch=total).backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "fields",
    [{"early_weight_half_life": 2.0}, {"early_weight_half_life": 3.0, "loss_aggregation": "sequence_mean"}],
)
def test_the_trainers_loss_is_the_weighted_mean_over_the_steps_tokens(tiny, make_rows, tmp_path, fields):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, per_device_train_batch_size=2, **fields)
    micro_batches, total = take_micro_batches(trainer, make_rows(4), 2)
    found, losses, weights = 0.0, [], []
    for micro_batch in micro_batches:
        loss, result = trainer.compute_loss(trainer.model, micro_batch, True, num_items_in_batch=total)
        found += float(loss.detach())
        losses.append(result.stats.reverse_kl_N)
        weights.append(micro_batch.weights_BT[micro_batch.weights_BT > 0])
    losses_N, weights_N = torch.cat(losses), torch.cat(weights)
    assert len(set(weights_N.tolist())) > 1
    assert found == pytest.approx(float((weights_N * losses_N).sum() / weights_N.sum()), rel=1e-5)


@pytest.mark.parametrize("fields", [{"contrast_beta": 2.0}, {"contrast_beta": 0.0, "contrast_token_weight": True}])
def test_a_contrast_changes_the_gradient_and_whitening_sees_its_target(tiny, make_rows, tmp_path, fields):
    rows = make_rows(4)
    plain = compute_gradients(make_trainer(tiny, rows, tmp_path), rows, 4)
    tilted = compute_gradients(make_trainer(tiny, rows, tmp_path, contrast="mean", **fields), rows, 4)
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    assert largest_difference(plain, tilted) > 0.01 * scale
    advantages = [
        torch.cat([batch.advantages_N for batch in take_micro_batches(trainer, rows, 2)[0]])
        for trainer in (
            make_trainer(tiny, rows, tmp_path, **FIELDS, **more) for more in ({}, {"contrast": "mean"} | fields)
        )
    ]
    same = torch.equal(advantages[0], advantages[1])
    assert same == (fields["contrast_beta"] == 0.0)
