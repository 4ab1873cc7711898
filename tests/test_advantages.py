"""Advantages: bounds, baselines that leave the expected gradient alone, whitening over a step cut in any way."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from imagine_opd.loss.advantages import compute_advantages, measure_advantages, shape_advantages
from imagine_opd.loss.objective import ObjectiveConfig

CPU = torch.device("cpu")


def shape(advantages, weights, positions, **fields):
    config = ObjectiveConfig(distillation_mode="sampled_token", **fields)
    return shape_advantages(advantages, weights, positions, config, 8, lambda table: table, CPU)


def make_step(seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = [torch.arange(4), torch.arange(6), torch.arange(2)]
    advantages = [3 + torch.randn(len(part), generator=generator, dtype=torch.float64) for part in positions]
    weights = [torch.ones(len(part), dtype=torch.float64) for part in positions]
    weights[1][5] = 0.0
    return advantages, weights, positions


def test_advantages_are_bounded_as_asked():
    teacher, sampling = torch.tensor([-1.0, -20.0, -0.5, -12.0]), torch.tensor([-9.0, -1.0, -0.7, -14.0])
    found = compute_advantages(teacher, sampling, ObjectiveConfig())
    torch.testing.assert_close(found, torch.tensor([8.0, -19.0, 0.2, 2.0]))
    found = compute_advantages(teacher, sampling, ObjectiveConfig(log_ratio_clamp=5.0))
    torch.testing.assert_close(found, torch.tensor([5.0, -5.0, 0.2, 2.0]))
    found = compute_advantages(teacher, sampling, ObjectiveConfig(log_prob_min_clamp=-10.0))
    torch.testing.assert_close(found, torch.tensor([8.0, -9.0, 0.2, 0.0]))


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_of_the_step():
    advantages, weights, positions = make_step()
    found = torch.cat(shape(advantages, weights, positions, whiten_advantages=True))
    counted = found[torch.cat(weights) > 0]
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(counted.std(unbiased=False)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("baseline", ["none", "position"])
def test_shaping_does_not_depend_on_how_the_step_is_cut(baseline):
    advantages, weights, positions = make_step()
    fields = {"whiten_advantages": True, "advantage_baseline": baseline}
    cut = torch.cat(shape(advantages, weights, positions, **fields))
    whole = shape([torch.cat(advantages)], [torch.cat(weights)], [torch.cat(positions)], **fields)[0]
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def test_shaping_over_ranks_equals_one_process_and_a_rank_without_tokens_takes_part():
    advantages, weights, positions = make_step()
    fields = {"whiten_advantages": True, "advantage_baseline": "position"}
    expected = shape(advantages, weights, positions, **fields)
    config = ObjectiveConfig(distillation_mode="sampled_token", **fields)
    ranks = [[0, 2], [1], []]
    barrier, tables, found = threading.Barrier(len(ranks), timeout=20), {}, {}

    def run(rank):
        def reduce(table):
            tables[rank] = table
            barrier.wait()  # a rank that calls less often than another breaks the barrier
            total = sum(tables[other] for other in range(len(ranks)))
            barrier.wait()
            return total

        parts = [[group[index] for index in ranks[rank]] for group in (advantages, weights, positions)]
        found.update(zip(ranks[rank], shape_advantages(*parts, config, 8, reduce, CPU), strict=True))

    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(run, range(len(ranks))))
    for index, expected_N in enumerate(expected):
        torch.testing.assert_close(found[index], expected_N, rtol=1e-12, atol=1e-12)


def test_position_baseline_is_the_mean_of_the_other_tokens_there():
    advantages = [torch.tensor([1.0, 5.0, 9.0]), torch.tensor([3.0, 7.0]), torch.tensor([8.0])]
    positions = [torch.arange(3), torch.arange(2), torch.arange(1)]
    found = shape(advantages, [torch.ones(3), torch.ones(2), torch.ones(1)], positions, advantage_baseline="position")
    expected = [[1.0 - 5.5, 5.0 - 7.0, 9.0], [3.0 - 4.5, 7.0 - 5.0], [8.0 - 2.0]]  # alone at position 2: as it is
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.tensor(other))


def test_equal_advantages_whiten_to_zero_not_to_noise():
    found = shape([torch.full((3,), 2.5)], [torch.ones(3)], [torch.arange(3)], whiten_advantages=True)[0]
    assert float(found.abs().max()) < 1e-6


def test_measured_advantages_are_the_teachers_log_probs_over_the_samplers():
    torch.manual_seed(0)
    head, hidden = nn.Linear(4, 7, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    ids, sampling = torch.arange(5), -torch.rand(5, dtype=torch.float64)
    found = measure_advantages(hidden, head, ids, sampling, ObjectiveConfig(temperature=0.5))
    logprobs = (head(hidden) / 0.5).log_softmax(-1)[torch.arange(5), ids]
    torch.testing.assert_close(found, (logprobs - sampling).detach())
    assert not found.requires_grad
