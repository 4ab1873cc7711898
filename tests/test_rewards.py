"""Rewards: normalised within a row's completions, mixed with the teacher's loss, the teacher for failures alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import ConfigError
from imagine_opd.rewards import compute_rewards, normalise_rewards, read_reward_functions, reward_accuracy
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Row


def row_with(answer, options=()):
    return Row((b"",), "what ?", answer=answer, options=options)


def test_accuracy_pays_for_the_right_answer_alone():
    rows = [row_with("7"), row_with("7"), row_with("B", ("a", "b")), row_with(None), row_with("7")]
    texts = ["<answer>7</answer>", "<answer>8</answer>", "<answer>B</answer>", "<answer>7</answer>", "no answer"]
    assert reward_accuracy(rows, texts) == [1.0, 0.0, 1.0, None, 0.0]


def test_rewards_of_several_functions_are_summed_and_missing_ones_left_out():
    rows = [row_with("7"), row_with(None)]
    functions = read_reward_functions(["accuracy", lambda rows, texts: [0.5, None]])
    total_B = compute_rewards(functions, rows, ["<answer>7</answer>", "x"])
    assert total_B[0] == 1.5
    assert math.isnan(total_B[1])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda rows, texts: [1.0], "gave 1 rewards for 2 completions"),
        (lambda rows, texts: [1.0, math.inf], "gave inf"),
    ],
)
def test_bad_reward_function_is_named(function, words):
    with pytest.raises(ConfigError, match=words):
        compute_rewards([function], [row_with("7")] * 2, ["a", "b"])


def test_advantages_are_those_of_grpo_within_each_row():
    rewards_B = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, math.nan, 1.0, 3.0, math.nan])
    found_B = normalise_rewards(rewards_B, 4)
    group = rewards_B[:4]
    torch.testing.assert_close(found_B[:4], (group - group.mean()) / (group.std() + 1e-4))
    assert found_B[4:8].tolist() == [0.0] * 4
    torch.testing.assert_close(found_B[8:], torch.tensor([0.0, -1.0, 1.0, 0.0]) / (math.sqrt(2.0) + 1e-4))
    assert normalise_rewards(rewards_B, 4, scale=False)[0] == 0.75


def make_trainer(tiny, rows, tmp_path, reward_funcs, **fields):
    args = build_config(
        tmp_path / "run",
        {
            **TINY_RECIPE,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_generations": 3,
            "max_steps": 1,
            "save_strategy": "no",
            "teacher_checks": False,
            "disable_tqdm": True,
            "use_cpu": True,
            **fields,
        },
    )
    model = copy.deepcopy(tiny.model)
    return ImagineOPDTrainer(model, args, rows, processor=tiny.processor, reward_funcs=reward_funcs)


def test_loss_is_the_teachers_for_failures_and_the_rewards_policy_gradient(tiny, make_rows, tmp_path):
    rows = make_rows(2)
    pays = lambda rows, texts: [float(index % 3 == 0) for index in range(len(texts))]  # noqa: E731
    trainer = make_trainer(tiny, rows, tmp_path, pays, distill_failures_only=True, reward_weight=0.7)
    (batch,), _, total = trainer.builder.build(trainer.model, [rows], 0)
    loss, result = trainer.compute_loss(trainer.model, batch, True, total)
    plain = make_trainer(tiny, rows, tmp_path, None)
    _, teachers = plain.compute_loss(plain.model, batch_without_rewards(batch), True, total)
    mask_BT = batch.weights_BT > 0
    row_N = mask_BT.nonzero()[:, 0]
    won_N = row_N % 3 == 0
    advantage_N = normalise_rewards(torch.tensor([1.0, 0.0, 0.0] * 2), 3)[row_N]
    # The completions are fresh: the ratio is 1 and the policy gradient's value minus the advantage.
    expected_N = torch.where(won_N, 0.0, teachers.loss_N) - 0.7 * advantage_N
    torch.testing.assert_close(result.loss_N, expected_N, atol=2e-5, rtol=1e-4)
    assert float(loss.detach()) == pytest.approx(float(expected_N.sum() / total), abs=1e-5)
    figures = trainer.step_metrics.drain()
    assert figures["reward"] == pytest.approx(1 / 3)
    assert figures["reward/failures"] == pytest.approx(2 / 3)


def test_completions_without_a_reward_are_no_failures(tiny, make_rows, tmp_path):
    rows = make_rows(2)
    pays = lambda rows, texts: [1.0, 0.0, None, None, 1.0, 1.0]  # noqa: E731
    trainer = make_trainer(tiny, rows, tmp_path, pays, distill_failures_only=True)
    trainer.builder.build(trainer.model, [rows], 0)
    assert trainer.step_metrics.drain()["reward/failures"] == pytest.approx(1 / 4)


def batch_without_rewards(batch):
    import dataclasses

    return dataclasses.replace(batch, distill_B=None, reward_advantages_B=None)


def test_reward_alone_raises_what_it_pays_for(tiny, make_rows, tmp_path):
    rows = make_rows(2)
    shorter = lambda rows, texts: [-float(len(text)) for text in texts]  # noqa: E731
    trainer = make_trainer(tiny, rows, tmp_path, shorter, temperature=2.0)
    (batch,), _, total = trainer.builder.build(trainer.model, [rows], 0)
    batch = batch_with(batch, distill_B=torch.zeros_like(batch.distill_B))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=total).backward()
    before = logprobs_of(trainer, batch)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter -= 1e-2 * parameter.grad
    gain_B = logprobs_of(trainer, batch) - before
    best, worst = batch.reward_advantages_B.argmax(), batch.reward_advantages_B.argmin()
    assert gain_B[best] > 0 > gain_B[worst]


def batch_with(batch, **changes):
    import dataclasses

    return dataclasses.replace(batch, **changes)


def logprobs_of(trainer, batch):
    from imagine_opd.kernels import linear_token_stats
    from imagine_opd.models.access import get_head
    from imagine_opd.scoring import score_side

    mask_BT = batch.rollouts.completion_mask_BT
    prompts = [pair.student for pair in batch.prompts]
    with torch.no_grad():
        hidden_ND = score_side(trainer.model, prompts, batch.rollouts, mask_BT, trainer.token_ids.pad)
        ids_N = batch.rollouts.completion_ids_BT[mask_BT]
        stats = linear_token_stats(hidden_ND, get_head(trainer.model), None, None, ids_N, temperature=2.0)
    return torch.zeros(len(mask_BT)).index_add_(0, mask_BT.nonzero()[:, 0], stats.student_logprob_N)


def test_rewards_that_could_change_nothing_are_refused(tiny, make_rows, tmp_path):
    with pytest.raises(ConfigError, match="num_generations=1"):
        make_trainer(tiny, make_rows(2), tmp_path, "accuracy", num_generations=1)
    with pytest.raises(ConfigError, match="pass reward_funcs"):
        make_trainer(tiny, make_rows(2), tmp_path, None, distill_failures_only=True)
    with pytest.raises(ConfigError, match="expected functions"):
        make_trainer(tiny, make_rows(2), tmp_path, ["exact"])
