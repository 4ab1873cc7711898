"""The token budget: parts that fit, as few as can be, and a step that is the whole micro-batch's, in figures too."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from test_trainer import RUN, largest_difference, make_trainer, read_metrics, weights_of

from imagine_opd.config import build_config
from imagine_opd.demo import base_model_path, make_scenes, scenes_to_rows
from imagine_opd.micro_batches import (
    count_tokens,
    cut_further,
    cut_rows,
    split_batch,
    take_rows,
)
from imagine_opd.scoring import join_sequences
from imagine_opd.trainer import ImagineOPDTrainer

UNEQUAL = [(200, 260), (1500, 1560), (300, 310), (900, 1400), (250, 700), (210, 220)]


@pytest.mark.parametrize(
    ("packed", "budget", "expected"),
    [
        # With padding like lengths go together: 1560, 1400, 700 and 3 x 310 tokens.
        (False, 2000, [(1,), (3,), (4,), (0, 2, 5)]),
        (False, 9360, [(0, 1, 2, 3, 4, 5)]),
        (True, 2400, [(1, 4), (0, 2, 3, 5)]),
        (True, 4450, [(0, 1, 2, 3, 4, 5)]),
        (True, 100, [(1,), (3,), (4,), (2,), (0,), (5,)]),
    ],
)
def test_parts_are_few_and_even_and_keep_the_order_of_rows(packed, budget, expected):
    assert cut_rows(UNEQUAL, budget, packed) == expected


def count_fewest(lengths, budget, packed) -> int:
    """By trying all ways to deal the rows out."""
    for count in range(1, len(lengths) + 1):
        for places in itertools.product(range(count), repeat=len(lengths)):
            parts = [[row for row, place in enumerate(places) if place == part] for part in range(count)]
            if all(not part or len(part) == 1 or count_tokens(part, lengths, packed) <= budget for part in parts):
                return count
    raise AssertionError


@pytest.mark.parametrize("packed", [False, True])
def test_any_rows_are_cut_into_parts_that_fit_and_seldom_one_more_than_can_be(packed):
    draw, more = random.Random(0), 0
    for _ in range(60):
        lengths = [(a, a + draw.randint(0, 40)) for a in (draw.randint(5, 90) for _ in range(draw.randint(1, 6)))]
        budget = draw.randint(20, 250)
        parts = cut_rows(lengths, budget, packed)
        assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
        assert all(part == tuple(sorted(part)) for part in parts)
        assert all(len(part) == 1 or count_tokens(part, lengths, packed) <= budget for part in parts)
        fewest = count_fewest(lengths, budget, packed)
        assert len(parts) <= fewest + 1
        more += len(parts) - fewest
    assert more <= (0 if not packed else 2)


def test_ranks_with_fewer_parts_cut_the_largest_further_and_then_add_spare_ones():
    parts = cut_rows(UNEQUAL, 3000, True)
    assert parts == [(1, 4), (0, 2, 3, 5)]
    assert cut_further(parts, UNEQUAL, 3, True) == [(4,), (1,), (0, 2, 3, 5)]
    assert cut_further(parts, UNEQUAL, 7, True)[6:] == [()]
    assert sorted(row for part in cut_further(parts, UNEQUAL, 7, True) for row in part) == list(range(6))


def make_unequal(make_rows, count=4):
    rows = make_rows(count)
    rows[1] = dataclasses.replace(rows[1], boxes=rows[1].boxes * 2, question=rows[1].question + " what digit ?")
    return rows


def take_step(tiny, rows, tmp_path, reward_funcs=None, **fields):
    """Gradients, loss and figures of one micro-batch through the Trainer's own step, and the parts it went in."""
    args = build_config(tmp_path / "run", {**RUN, "per_device_train_batch_size": len(rows), **fields})
    trainer = ImagineOPDTrainer(
        copy.deepcopy(tiny.model), args, rows, processor=tiny.processor, reward_funcs=reward_funcs
    )
    trainer.create_optimizer_and_scheduler(1)
    (batch,), total = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    loss = trainer.training_step(trainer.model, batch, total)
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    figures = trainer.step_metrics.drain(lambda own: [own])
    return float(loss), gradients, figures, batch


def pay_by_letters(rows: list[Any], texts: list[str]) -> list[float]:
    return [float(sum(map(ord, text)) % 5) for text in texts]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_generations": 3, "reward_funcs": pay_by_letters, "distillation_mode": "sampled_token"},
        {"distillation_mode": "sampled_token", "whiten_advantages": True, "advantage_baseline": "position"},
        {"distillation_mode": "sampled_token", "whiten_advantages": True, "contrast": "mean", "contrast_beta": 2.0},
        {"leak_action": "unlikelihood", "leak_phrases": ["left", "digit", "red"], "loss_aggregation": "sequence_mean"},
    ],
    ids=["plain", "rewards", "step advantages", "contrast", "leaks"],
)
def test_gradients_loss_and_figures_are_those_of_the_uncut_micro_batch(tiny, make_rows, tmp_path, fields, packed):
    rows = make_unequal(make_rows)
    whole = take_step(tiny, rows, tmp_path, **fields)
    cut = take_step(tiny, rows, tmp_path, padding_free=packed, max_tokens_per_forward=110, **fields)
    assert not whole[3].parts
    assert len(cut[3].parts) > 1
    assert max(map(len, cut[3].parts)) > 1
    assert abs(whole[0]) > (1e-4 if "whiten_advantages" not in fields else 0.0)  # white advantages sum to 0
    assert cut[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in whole[1].values())
    assert scale > 1e-3
    assert largest_difference(whole[1], cut[1]) < 1e-4 * scale
    # The share of the largest 5 % is one of each forward's own tokens; smaller forwards share less of their images.
    apart = ("time/", "step_time", "kl/top5_share", "vision/shared")
    named = {name for name in whole[2] if not name.startswith(apart)}
    assert {"reverse_kl", "kl/quarter_1", "self_distillation/distillation_loss", "entropy"} < named
    for name in sorted(named):
        assert cut[2][name] == pytest.approx(whole[2][name], rel=2e-4, abs=1e-5), name


def test_no_forward_has_more_tokens_than_the_budget(tiny, make_rows, tmp_path, monkeypatch):
    seen = []

    def note(*args):
        inputs = join_sequences(*args)
        seen.append(inputs["input_ids"].numel())
        return inputs

    monkeypatch.setattr("imagine_opd.scoring.join_sequences", note)
    rows = make_unequal(make_rows, 6)
    take_step(tiny, rows, tmp_path, max_tokens_per_forward=110)
    assert max(seen) <= 110
    assert len(seen) > 4
    seen.clear()
    take_step(tiny, rows, tmp_path)
    assert len(seen) == 2
    assert max(seen) > 220


def test_a_sequence_longer_than_the_budget_goes_alone_and_is_said_once(tiny, make_rows, tmp_path, capsys):
    trainer = make_trainer(tiny, make_rows(8), tmp_path, max_tokens_per_forward=30, max_steps=2)
    plain = make_trainer(tiny, make_rows(8), tmp_path / "plain", max_steps=2)
    for run in (trainer, plain):
        run.train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("max_tokens_per_forward=30: ")]
    assert len(said) == 1
    assert said[0].startswith("max_tokens_per_forward=30: sequences of more tokens go alone; max_pixels, ")
    losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert largest_difference(weights_of(trainer.model), weights_of(plain.model)) < 1e-4


def test_spare_forward_adds_nothing(tiny, make_rows, tmp_path):
    rows = make_unequal(make_rows)
    trainer = make_trainer(tiny, rows, tmp_path, max_tokens_per_forward=110)
    (batch,), total = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    spare = take_rows(batch, ())
    assert len(spare.rows) == 1
    assert not spare.is_used
    trainer.compute_loss(trainer.model, spare, num_items_in_batch=total).backward()
    found = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in found)
    parts = split_batch(dataclasses.replace(batch, parts=(*batch.parts, ())))
    assert sum(float(part.weights_BT.sum()) for part in parts) == float(batch.weights_BT.sum())


def test_a_step_that_is_not_finite_is_left_out_and_dumped_once_for_all_parts(tiny, make_rows, tmp_path):
    trainer = make_trainer(tiny, make_rows(4), tmp_path, max_tokens_per_forward=60, max_steps=1)
    exact, calls = trainer.compute_loss, []

    def spoil(*args, **kwargs):
        calls.append(1)
        return exact(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1.0)

    trainer.compute_loss = spoil
    before = weights_of(trainer.model)
    trainer.train()
    assert len(calls) == 4
    assert largest_difference(before, weights_of(trainer.model)) == 0.0
    dump = (tmp_path / "run" / "nonfinite" / "step-1" / "rank-0.json").read_text()
    assert dump.count('"completion_ids"') == 4


def count_in_process(folder: Path) -> dict[str, Any]:
    """A rank's forwards of the student, its gradient syncs and its parts, of steps where the ranks differ."""
    rows = list(scenes_to_rows(make_scenes(8, 77, "small"), "right"))
    # The second process's rows are longer: more parts for the same budget.
    for place in (2, 3, 6, 7):
        rows[place] = dataclasses.replace(rows[place], question=rows[place].question + " what digit ?" * 12)
    fields = {
        **RUN,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_tokens_per_forward": 100,
        "report_to": [],
    }
    trainer = ImagineOPDTrainer(str(base_model_path()), build_config(folder, fields), rows)
    forwards, plans, exact, draw = [], [], trainer.compute_loss, trainer.get_batch_samples

    def note(model, batch, *args, **kwargs):
        forwards.append((len(batch.rows), bool(batch.is_used), bool(model.require_backward_grad_sync)))
        return exact(model, batch, *args, **kwargs)

    def keep(*args):
        micro_batches, total = draw(*args)
        plans.extend(batch.parts for batch in micro_batches)
        return micro_batches, total

    trainer.compute_loss, trainer.get_batch_samples = note, keep
    trainer.train()
    return {
        "forwards": forwards,
        "plans": plans,
        "weights": weights_of(trainer.accelerator.unwrap_model(trainer.model)),
    }


def test_ranks_go_through_as_many_forwards_and_sync_gradients_once_a_step(tmp_path):
    one, other = run_in_processes(count_in_process, tmp_path / "run")
    assert len(one["forwards"]) == len(other["forwards"])
    assert [len(parts) for parts in one["plans"]] == [len(parts) for parts in other["plans"]]
    for rank in (one, other):
        syncs = [syncs for _, _, syncs in rank["forwards"]]
        assert syncs == [False] * (len(syncs) - 1) + [True]
    assert largest_difference(one["weights"], other["weights"]) == 0.0
