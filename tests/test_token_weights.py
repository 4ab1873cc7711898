"""Token weights: each rule alone by hand, and in their order together."""

from __future__ import annotations

import pytest
import torch

from imagine_opd.config.objective import ObjectiveFields
from imagine_opd.loss.token_weights import make_token_weights
from imagine_opd.models.access import TokenIds, read_token_ids
from imagine_opd.types import Rollouts

EOS, PAD, THINK = 9, 0, 8
IDS = TokenIds(eos=(EOS,), pad=PAD, vision=(7,), special=(PAD, 7, THINK, EOS))
COMPLETIONS = [[1, 2, 3, EOS], [4, THINK, 5, 6, 2], [3, EOS], []]  # the second was cut


def make_rollouts():
    longest = max(map(len, COMPLETIONS))
    ids = torch.full((len(COMPLETIONS), longest), PAD)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, completion in enumerate(COMPLETIONS):
        ids[row, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        mask[row, : len(completion)] = True
    return Rollouts(ids, mask, torch.zeros(ids.shape))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]),
        ({"num_loss_tokens_to_skip": 2}, [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0] * 5, [0] * 5]),
        ({"mask_special_tokens": True}, [[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0] * 5]),
        ({"mask_truncated_completions": True}, [[1, 1, 1, 1, 0], [0] * 5, [1, 1, 0, 0, 0], [0] * 5]),
        ({"truncated_weight": 0.25}, [[1, 1, 1, 1, 0], [0.25] * 5, [1, 1, 0, 0, 0], [0] * 5]),
        (
            {"early_weight_half_life": 2.0},
            [[1, 0.5**0.5, 0.5, 0.5**1.5, 0], [1, 0.5**0.5, 0.5, 0.5**1.5, 0.25], [1, 0.5**0.5, 0, 0, 0], [0] * 5],
        ),
        ({"loss_aggregation": "sequence_mean"}, [[0.25] * 4 + [0], [0.2] * 5, [0.5, 0.5, 0, 0, 0], [0] * 5]),
        (
            {"loss_aggregation": "sequence_mean", "truncated_weight": 0.5, "num_loss_tokens_to_skip": 1}
            | {"early_weight_half_life": 1.0, "mask_special_tokens": True},
            [[0, 2 / 3, 1 / 3, 0, 0], [0, 0, 2 / 7, 1 / 7, 0.5 / 7], [0] * 5, [0] * 5],
        ),
    ],
)
def test_weights_by_hand(fields, expected):
    weights = make_token_weights(make_rollouts(), IDS, ObjectiveFields(**fields))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_masked_tokens_leave_the_mean_of_their_completion():
    rollouts = make_rollouts()
    masked_BT = torch.zeros_like(rollouts.completion_mask_BT)
    masked_BT[0, 1] = masked_BT[2, :2] = True
    weights = make_token_weights(rollouts, IDS, ObjectiveFields(loss_aggregation="sequence_mean"), masked_BT)
    expected = [[1 / 3, 0, 1 / 3, 1 / 3, 0], [0.2] * 5, [0] * 5, [0] * 5]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_no_completion_at_all_gives_no_weights():
    empty = Rollouts(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, 1))
    weights = make_token_weights(empty, IDS, ObjectiveFields(loss_aggregation="sequence_mean", truncated_weight=0.5))
    assert weights.shape == (0, 1)


def test_the_tokenizers_special_ids_are_known(tiny):
    ids = read_token_ids(tiny.model, tiny.processor)
    assert set(tiny.processor.tokenizer.all_special_ids) <= set(ids.special)
    assert {*ids.eos, ids.pad, *ids.vision} <= set(ids.special)
