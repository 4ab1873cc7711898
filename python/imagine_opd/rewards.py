"""Rewards beside the teacher: functions of completions to advantages, normalised within the completions of a row.

A_i = (r_i - mean of the row's) / (deviation of the row's + 1e-4), as in GRPO; `scale_rewards=False`: the mean alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from imagine_opd.answers import judge_row
from imagine_opd.errors import ConfigError
from imagine_opd.types import Row

# B completions, G completions of a row

RewardFunction = Callable[[Sequence[Row], Sequence[str]], Sequence[float | None]]
"""Rows and their completions' texts, one each, to rewards; `None` where the function has none to give."""

_EPSILON = 1e-4


def reward_accuracy(rows: Sequence[Row], completions: Sequence[str]) -> list[float | None]:
    """1 for the right answer, 0 for a wrong or missing one, `None` for a row without an answer to compare with."""
    return [
        None if row.answer is None else float(judge_row(text, row) is True)
        for row, text in zip(rows, completions, strict=True)
    ]


def read_reward_functions(functions: Any) -> tuple[RewardFunction, ...]:
    """The functions of `reward_funcs`: one, a list, or `"accuracy"`. Raises `ConfigError`."""
    if functions is None:
        return ()
    if callable(functions) or isinstance(functions, str):
        functions = [functions]
    found: list[RewardFunction] = []
    for function in functions:
        if function == "accuracy":
            found.append(reward_accuracy)
        elif callable(function):
            found.append(function)
        else:
            raise ConfigError(f"reward_funcs has {function!r}; expected functions of (rows, completions) or 'accuracy'")
    return tuple(found)


def compute_rewards(
    functions: Sequence[RewardFunction], rows: Sequence[Row], completions: Sequence[str]
) -> torch.Tensor:
    """`[B]` fp32: the sum of what the functions give; NaN where none gives anything.

    Raises `ConfigError` for a function that gives another number of rewards, or one that is not finite.
    """
    total_B = torch.full((len(rows),), math.nan)
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        rewards = list(function(rows, completions))
        if len(rewards) != len(rows):
            raise ConfigError(f"reward function {name} gave {len(rewards)} rewards for {len(rows)} completions")
        for index, reward in enumerate(rewards):
            if reward is None:
                continue
            if not math.isfinite(reward):
                raise ConfigError(f"reward function {name} gave {reward} for {completions[index]!r}; expected a number")
            total_B[index] = float(reward) + total_B[index].nan_to_num()
    return total_B


def normalise_rewards(rewards_B: torch.Tensor, group_size: int, scale: bool = True) -> torch.Tensor:
    """`[B]` advantages: each reward minus its group's mean, over its deviation with `scale`; 0 for NaN.

    Groups are `group_size` completions in a row each. Where all of a group are alike nothing is to be learnt: 0.
    """
    rewards_RG = rewards_B.view(-1, group_size)
    centred_RG = rewards_RG - rewards_RG.nanmean(dim=1, keepdim=True)
    if scale:
        counts_R1 = (~rewards_RG.isnan()).sum(dim=1, keepdim=True)
        variance_R1 = centred_RG.square().nansum(dim=1, keepdim=True) / (counts_R1 - 1).clamp(min=1)
        centred_RG = centred_RG / (variance_R1.sqrt() + _EPSILON)
    return centred_RG.nan_to_num(nan=0.0).view(-1)
