"""Image features made once are those of making them again, for every family, and no image is given another's."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps

import pytest
import torch
from family_cases import find_family, make_pairs, make_rows
from model_families import BUILDERS

from imagine_opd.adapters import ADAPTERS, find_adapter
from imagine_opd.models import get_body, list_tower
from imagine_opd.models.access import read_token_ids
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.rollout.prefill import can_copy_cache
from imagine_opd.scoring import score_side, score_student, score_teacher
from imagine_opd.vision_features import VisionFeatures, make_vision_features, supplying

FAMILIES = [name for name in BUILDERS if name not in ("llava_onevision", "aya_vision")]


class Batch:
    def __init__(self, pairs, rollouts):
        self.prompts, self.rollouts = pairs, rollouts


def run_step(family, pairs, features, greedy=True):
    """Rollout, teacher and student of one batch: completions, and hidden states of both sides."""
    ids = read_token_ids(family.model, family.processor)
    engine = HFEngine(ids, features)
    prompts = [pair.student for pair in pairs]
    rollouts = engine.generate(family.model, prompts, SamplingConfig(5, 0.0 if greedy else 1.0), seed=1)
    batch, mask_BT = Batch(pairs, rollouts), rollouts.completion_mask_BT
    teacher_ND = score_teacher(family.model, batch, mask_BT, ids.pad, features=features)
    scores = score_student(family.model, teacher_ND, batch, mask_BT, ids.pad, features)
    return rollouts.completion_ids_BT, teacher_ND, scores.student_hidden_ND


def copy_rows(pairs, copies):
    return [pair for pair in pairs for _ in range(copies)]


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_features_give_what_making_them_again_gives(name, tmp_path) -> None:
    family = find_family(name)
    pairs = copy_rows(make_pairs(family, make_rows(), tmp_path), 2)
    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    plain, shared = run_step(family, pairs, None), run_step(family, pairs, features)
    assert torch.equal(plain[0], shared[0])
    for left, right in zip(plain[1:], shared[1:], strict=True):
        torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tower_runs_once_on_each_image_of_a_step(name, tmp_path) -> None:
    family = find_family(name)
    pairs = make_pairs(family, make_rows(), tmp_path)
    seen: list[int] = []
    body = get_body(family.model)
    original = body.get_image_features

    @wraps(original)
    def count(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    vars(body)["get_image_features"] = count
    try:
        run_step(family, copy_rows(pairs, 3), features)
    finally:
        del vars(body)["get_image_features"]
    wholes = sum(len(pair.student.view.frame_counts) for pair in pairs)
    crops = sum(len(pair.teacher.view.frame_counts) for pair in pairs) - wholes
    assert crops > 0
    assert features.computed == wholes + crops
    asked_by_rollout = wholes if can_copy_cache(family.model) else 3 * wholes  # whose prompts go through once
    assert features.asked == asked_by_rollout + 3 * (2 * wholes + crops)
    assert len(seen) == 2  # one call in the rollout, one for the teacher's crops, none for the student


def test_tower_that_trains_is_run_for_the_students_own_forward(tmp_path) -> None:
    family = find_family("qwen3_vl")
    pairs = copy_rows(make_pairs(family, make_rows(), tmp_path), 2)
    features = VisionFeatures(is_frozen=False, teacher_shares=False)
    gradients = []
    for shared in (None, features):
        family.model.zero_grad(set_to_none=True)
        run_step(family, pairs, shared)[2].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in family.model.named_parameters() if p.grad is not None})
    family.model.zero_grad(set_to_none=True)
    assert any("visual" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_features_of_a_former_step_are_forgotten(tmp_path) -> None:
    family = find_family("qwen3_vl")
    pairs = make_pairs(family, make_rows(), tmp_path)
    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    run_step(family, pairs, features)
    features.start_step()
    run_step(family, pairs, features)
    assert features.computed == sum(len(pair.teacher.view.frame_counts) for pair in pairs)


def test_teacher_with_another_tower_runs_its_own(tmp_path) -> None:
    family = find_family("qwen3_vl")
    pairs = make_pairs(family, make_rows(), tmp_path)
    family.model.requires_grad_(False)
    try:
        other = {name: weight + 0.1 for name, weight in list_tower(family.model).items()}
        apart = make_vision_features(family.model, "qwen_vl", other)
        same = make_vision_features(family.model, "qwen_vl", dict(list_tower(family.model)))
    finally:
        family.model.requires_grad_(True)
    assert apart is not None
    assert same is not None
    assert (apart.is_frozen, apart.teacher_shares, same.teacher_shares) == (True, False, True)
    run_step(family, pairs, apart)
    run_step(family, pairs, same)
    wholes = sum(len(pair.student.view.frame_counts) for pair in pairs)
    assert apart.computed == same.computed + wholes


def test_an_image_is_never_given_the_features_of_another(tmp_path) -> None:
    family = find_family("qwen3_vl")
    rows = make_rows(((((40, 24)),), ((40, 24),)))
    pairs = make_pairs(family, rows, tmp_path)
    prompts = [pair.student for pair in pairs]
    ids = read_token_ids(family.model, family.processor)
    rollouts = HFEngine(ids).generate(family.model, prompts, SamplingConfig(3, 0.0))
    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    found = []
    for order in ((0, 1), (1, 0)):
        shown = [replace(prompts[0], view=prompts[index].view) for index in order]
        with supplying(features, get_body(family.model), shown, "rollout"), torch.no_grad():
            found.append(score_side(family.model, shown, rollouts, rollouts.completion_mask_BT, ids.pad, False))
    assert features.computed == 2
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_what_the_teacher_made_serves_the_student_where_another_engine_samples(tmp_path) -> None:
    family = find_family("qwen3_vl")
    pairs = make_pairs(family, make_rows(), tmp_path)
    ids = read_token_ids(family.model, family.processor)
    prompts = [pair.student for pair in pairs]
    rollouts = HFEngine(ids).generate(family.model, prompts, SamplingConfig(3, 0.0))
    batch, mask_BT = Batch(pairs, rollouts), rollouts.completion_mask_BT
    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    features.expect(prompts)
    teacher_ND = score_teacher(family.model, batch, mask_BT, ids.pad, features=features)
    assert features.computed == sum(len(pair.teacher.view.frame_counts) for pair in pairs)
    shared = score_student(family.model, teacher_ND, batch, mask_BT, ids.pad, features).student_hidden_ND
    assert features.computed == sum(len(pair.teacher.view.frame_counts) for pair in pairs)
    plain = score_student(family.model, teacher_ND, batch, mask_BT, ids.pad).student_hidden_ND
    torch.testing.assert_close(plain, shared, rtol=2e-4, atol=2e-5)


def test_method_of_the_model_is_its_own_again_after_an_error(tmp_path) -> None:
    family = find_family("qwen3_vl")
    pairs = make_pairs(family, make_rows(), tmp_path)
    body = get_body(family.model)
    features = VisionFeatures(is_frozen=True, teacher_shares=True)
    with pytest.raises(ZeroDivisionError), features.supply(body, [pairs[0].student], "rollout"):
        raise ZeroDivisionError
    assert "get_image_features" not in vars(body)


def test_family_whose_features_depend_on_the_prompt_shares_nothing() -> None:
    family = find_family("llava_onevision")
    assert not ADAPTERS[find_adapter(family.processor).family].shares_features
    assert make_vision_features(family.model, "llava_onevision", {}) is None
