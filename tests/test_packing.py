"""Packed equals padded: hidden states, loss, gradients of every family, a whole run; what cannot be, is refused."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from family_cases import FIELDS, find_family, make_pairs, make_rows, sample
from model_families import BUILDERS
from test_trainer import compute_gradients, largest_difference, make_trainer, read_metrics, weights_of

from imagine_opd import packing
from imagine_opd.config import build_config
from imagine_opd.errors import ConfigError
from imagine_opd.guards.forwards import measure_packing, refuse_mixed_packing
from imagine_opd.models.access import fit_inputs, get_body, read_token_ids
from imagine_opd.packing import describe_packing, refuse_unpackable
from imagine_opd.scoring import join_sequences, score_side
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Rollouts

REFUSED = {
    "gemma3": "in gemma3 the tokens of an image see each other both ways",
    "qwen3_5": "qwen3_5 has layers of linear_attention, which run on",
}
PACKED = [name for name in BUILDERS if name not in REFUSED]
# One single frame, one row of two images: sequences as unequal as a family's images can be.
SIZES = (((40, 24),), ((20, 52), (33, 31)), ((16, 16),), ((70, 22),))


def score_both_ways(family, prompts, rollouts):
    mask_BT, pad_id = rollouts.completion_mask_BT, read_token_ids(family.model, family.processor).pad
    with torch.no_grad():
        return [score_side(family.model, prompts, rollouts, mask_BT, pad_id, packed=packed) for packed in (False, True)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_hidden_states_of_every_side_are_those_of_the_padded_forward(name, attention, tmp_path):
    family = find_family(name)
    pairs = make_pairs(family, make_rows(SIZES), tmp_path)
    family.model.set_attn_implementation(attention)
    try:
        for side in ("student", "teacher"):
            prompts = [getattr(pair, side) for pair in pairs]
            rollouts = sample(family, prompts)
            assert len({len(prompt.input_ids) for prompt in prompts}) > 1
            padded_ND, packed_ND = score_both_ways(family, prompts, rollouts)
            assert relative(packed_ND, padded_ND) < 1e-5
    finally:
        family.model.set_attn_implementation("sdpa")


def compute_family_gradients(name, rows, tmp_path, **fields):
    family = find_family(name)
    run = {
        **FIELDS,
        **family.options,
        "max_completion_length": 6,
        "per_device_train_batch_size": len(rows),
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "check_rows": 1,
        **fields,
    }
    args = build_config(tmp_path / "run", run)
    trainer = ImagineOPDTrainer(copy.deepcopy(family.model), args, rows, processor=family.processor)
    torch.manual_seed(0)
    (batch,), total = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PACKED)
def test_loss_and_gradients_are_those_of_the_padded_forward(name, tmp_path):
    rows = make_rows(SIZES[:3])
    (padded, before), (packed, after) = (
        compute_family_gradients(name, rows, tmp_path, padding_free=packed) for packed in (False, True)
    )
    scale = max(float(gradient.abs().max()) for gradient in before.values())
    assert abs(padded) > 1e-4
    assert packed == pytest.approx(padded, rel=1e-4)
    assert largest_difference(before, after) < 1e-4 * scale


@pytest.mark.parametrize(
    "fields",
    [
        {"use_peft": True, "lora_r": 4},
        {"checkpointing": True},
        {"num_generations": 3},
        {"contrast": "mean", "contrast_beta": 2.0},
        {"distillation_mode": "sampled_token", "whiten_advantages": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_gradients_are_the_same_with_adapters_checkpointing_generations_and_a_neutral_pass(
    tiny, make_rows, tmp_path, fields
):
    rows = make_rows(4)
    rows[1] = dataclasses.replace(rows[1], boxes=rows[1].boxes * 2, question=rows[1].question + " what digit ?")
    has_checkpoints = "checkpointing" in fields
    fields = {name: value for name, value in fields.items() if name != "checkpointing"}
    found = []
    for packed in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(tiny, rows, tmp_path, padding_free=packed, merge_overlap=1.0, **fields)
        if has_checkpoints:
            enable = "activation_checkpointing_enable"  # before transformers 5.24: gradient_...
            model = trainer.model
            getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
            flag = "is_activation_checkpointing"
            assert getattr(model, flag if hasattr(type(model), flag) else "is_gradient_checkpointing")
        found.append(compute_gradients(trainer, rows, 4))
    scale = max(float(gradient.abs().max()) for gradient in found[0].values())
    assert scale > 1e-4
    assert largest_difference(*found) < 1e-4 * scale


def change_first(rollouts: Rollouts) -> Rollouts:
    ids_BT = rollouts.completion_ids_BT.clone()
    ids_BT[0] = ids_BT[0].roll(1) + 1
    return dataclasses.replace(rollouts, completion_ids_BT=ids_BT)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_a_token_of_one_sequence_does_not_reach_the_next(name, tmp_path):
    """Bit for bit: the numbers of the second sequence are made by the same operations on the same numbers."""
    family = find_family(name)
    prompts = [pair.student for pair in make_pairs(family, make_rows(SIZES[:2]), tmp_path)]
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    rollouts = Rollouts(torch.full((2, 3), 70), mask_BT, torch.zeros(2, 3))
    (_, before_ND), (_, after_ND) = (
        score_both_ways(family, prompts, shown) for shown in (rollouts, change_first(rollouts))
    )
    assert float((before_ND[:3] - after_ND[:3]).abs().max()) > 1e-3
    assert torch.equal(before_ND[3:], after_ND[3:])


def lose_restarts(monkeypatch):
    """Plants what a model without block masks does: positions run on, so that one sequence sees the one before."""
    exact = packing.pack_inputs

    def run_on(body, inputs):
        packed = exact(body, inputs)
        positions = packed["position_ids"].clone()
        (positions[0] if positions.ndim == 3 else positions)[:] = torch.arange(positions.shape[-1])
        return {**packed, "position_ids": positions}

    monkeypatch.setattr("imagine_opd.scoring.pack_inputs", run_on)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_sequences_that_see_each_other_would_be_told(name, tmp_path, monkeypatch):
    family = find_family(name)
    prompts = [pair.student for pair in make_pairs(family, make_rows(SIZES), tmp_path)]
    rollouts, ids = sample(family, prompts), read_token_ids(family.model, family.processor)
    assert measure_packing(family.model, prompts[:2], ids) < 1e-5
    lose_restarts(monkeypatch)
    padded_ND, packed_ND = score_both_ways(family, prompts, rollouts)
    assert relative(packed_ND, padded_ND) > 1e-2
    assert measure_packing(family.model, prompts[:2], ids) > 1e-2


@pytest.mark.parametrize("name", ["qwen3_vl", "aya_vision"])  # aya_vision: where such a leak shows least
def test_the_limit_of_16_bits_lets_rounding_pass_and_no_leak(name, tmp_path, monkeypatch):
    family = find_family(name)
    ids, pairs = read_token_ids(family.model, family.processor), make_pairs(family, make_rows(SIZES[:2]), tmp_path)
    for side in ("student", "teacher"):
        prompts = [getattr(pair, side) for pair in pairs]
        with torch.autocast("cpu", torch.bfloat16):
            refuse_mixed_packing(family.model, prompts, ids, side)
            with monkeypatch.context() as patch:
                lose_restarts(patch)
                with pytest.raises(ConfigError, match=r"of packed sequences .*limit 0\.035"):
                    refuse_mixed_packing(family.model, prompts, ids, side)


def test_a_run_whose_sequences_would_see_each_other_ends_before_step_0(tiny, make_rows, tmp_path, monkeypatch):
    lose_restarts(monkeypatch)
    trainer = make_trainer(tiny, make_rows(4), tmp_path, padding_free=True)
    with pytest.raises(ConfigError, match=r"the student's hidden states of packed sequences are .* away .*sdpa"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_positions_of_each_packed_sequence_are_its_own(tmp_path):
    """As the model derives them for that sequence alone, with its own images' grids."""
    family = find_family("qwen3_vl")
    prompts = [pair.teacher for pair in make_pairs(family, make_rows(SIZES), tmp_path)]
    rollouts = sample(family, prompts)
    body, cpu = get_body(family.model), torch.device("cpu")
    packed = packing.pack_inputs(body, fit_inputs(body, join_sequences(prompts, rollouts, 0, cpu)))
    start = 0
    for row, prompt in enumerate(prompts):
        alone = fit_inputs(body, join_sequences([prompt], rollouts.select([row]), 0, cpu))
        length = alone["input_ids"].shape[1]
        own = body.get_rope_index(alone["input_ids"], alone["mm_token_type_ids"], alone["image_grid_thw"])[0]
        part = packed["position_ids"][:, 0, start : start + length]
        assert torch.equal(part[0], torch.arange(length))
        assert torch.equal(part[1:], own[:, 0])
        assert torch.equal(packed["input_ids"][0, start : start + length], alone["input_ids"][0])
        start += length
    assert packed["input_ids"].shape == (1, start)


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_sequences_run_into_each_other_are_refused_by_name(name, tmp_path):
    family = find_family(name)
    with pytest.raises(ConfigError, match=REFUSED[name]):
        compute_family_gradients(name, make_rows(SIZES[:2]), tmp_path, padding_free=True)
    prompts = [pair.teacher for pair in make_pairs(family, make_rows(SIZES[:2]), tmp_path)]
    if name == "qwen3_5":  # and rightly
        assert measure_packing(family.model, prompts, read_token_ids(family.model, family.processor)) > 1e-2
    for kept in PACKED:
        refuse_unpackable(find_family(kept).model)


@pytest.mark.parametrize("fields", [{}, {"max_tokens_per_forward": 100}], ids=["whole", "budget"])
def test_a_packed_run_has_the_padded_runs_losses_and_weights(tiny, make_rows, tmp_path, capsys, fields):
    rows, runs = make_rows(16), []
    for packed in (False, True):
        run = {"max_steps": 4, "gradient_accumulation_steps": 2, "teacher_checks": True, "adam_epsilon": 1e-3}
        trainer = make_trainer(
            tiny, rows, tmp_path / str(packed), padding_free=packed, **run, **(fields if packed else {})
        )
        trainer.train()
        runs.append(trainer)
    losses = [[line["loss"] for line in read_metrics(trainer) if "loss" in line] for trainer in runs]
    assert len(losses[0]) == 4
    assert min(losses[0]) > 1e-3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert largest_difference(*(weights_of(trainer.model) for trainer in runs)) < 1e-5
    assert runs[0].teacher_report == runs[1].teacher_report
    said = capsys.readouterr().out
    assert said.count("padding_free: sdpa keeps the sequences of a row apart by a mask of the packed row's length") == 1


def test_the_way_in_which_sequences_are_kept_apart_is_named(tiny):
    config = tiny.model.config.get_text_config()
    for attention, words in {
        "flash_attention_2": "flash_attention_2 keeps the sequences of a row apart by the bounds of the sequences",
        "kernels-community/flash-attn3": "flash-attn3 keeps .* by the bounds",
        "flex_attention": "by a block mask, whose empty blocks are skipped",
        "eager": "by a mask of the packed row's length squared",
    }.items():
        config._attn_implementation_internal = attention
        assert re.search(words, describe_packing(tiny.model)), attention
