"""Full weights under `bf16=True`: forwards in bfloat16, weights and optimizer in fp32, and no small update is lost."""

from __future__ import annotations

import pytest
import torch
from test_trainer import make_trainer, read_metrics, weights_of

STEP = {"bf16": True, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 3}


def measure_moves(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far each weight that is not near 0 has moved."""
    moves = [(after[name] - before[name]).abs()[before[name].abs() > 4e-3].flatten() for name in before]
    return torch.cat(moves).double()


def test_bf16_steps_of_1e_6_add_up_in_fp32_weights(tiny, make_rows, tmp_path):
    """Near a weight of 0.004 bfloat16 has a grid of 1.5e-5: rounded to it, none of these steps would be left."""
    trainer = make_trainer(tiny, make_rows(8), tmp_path, **STEP)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    states = trainer.optimizer.optimizer.state
    assert {states[parameter]["exp_avg_sq"].dtype for parameter in trained if parameter in states} == {torch.float32}
    moves = measure_moves(before, after)
    assert float((moves > 2e-7).double().mean()) > 0.9
    assert 2e-6 < float(moves.max()) < 4e-6  # three Adam steps, none larger than the rate
    rounded = [{name: weight.bfloat16().float() for name, weight in weights.items()} for weights in (before, after)]
    assert float((measure_moves(*rounded) > 0).double().mean()) < 0.2  # but for those on an edge of the grid


def test_bf16_step_goes_where_the_fp32_step_goes(tiny, make_rows, tmp_path):
    rows = make_rows(4)
    moved, losses = [], []
    for name, bf16 in (("fp32", False), ("bf16", True)):
        fields = {**STEP, "bf16": bf16, "learning_rate": 5e-4, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
        trainer = make_trainer(tiny, rows, tmp_path / name, **fields)
        before = weights_of(trainer.model)
        trainer.train()
        after = weights_of(trainer.model)
        moved.append(torch.cat([(after[key] - before[key]).flatten() for key in before]).double())
        losses.append(read_metrics(trainer)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert float(torch.nn.functional.cosine_similarity(*moved, dim=0)) > 0.98


def test_sixteen_bit_weights_stand_still_and_the_run_says_so(tiny, make_rows, tmp_path, capsys):
    tiny.model.to(torch.bfloat16)
    trainer = make_trainer(tiny, make_rows(8), tmp_path, **STEP)
    said = capsys.readouterr().out
    assert "the trained weights are 16-bit: updates at small learning rates round to nothing" in said
    before = weights_of(trainer.model)
    trainer.train()
    assert float(measure_moves(before, weights_of(trainer.model)).max()) == 0.0
