"""Traps that other trainers of this kind fell into, a test for each under its name.

Where the fault can be planted from outside, the end of a test plants it: either the package stops with its sentence, or
the figure that was just compared moves. Traps of the teacher's weights are in test_traps_weights.py.
"""

# B completions, T completion tokens, N kept response tokens, V vocabulary, L sequence tokens

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from test_trainer import largest_difference, make_trainer, take_micro_batches

from imagine_opd import scoring
from imagine_opd.compact import expand_pixels
from imagine_opd.errors import TeacherError
from imagine_opd.guards.image_identity import refuse_foreign_images
from imagine_opd.scoring import join_sequences, score_side
from imagine_opd.types import Row

CPU = torch.device("cpu")
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


def take_one(trainer, rows):
    (micro_batch,), total = take_micro_batches(trainer, rows, len(rows))
    return micro_batch, total


def spy_body(monkeypatch, model, seen: list) -> None:
    """Keeps what each forward of the model's body is called with."""
    body = model.model
    forward = body.forward

    def record(*args, **kwargs):
        seen.append({name: value for name, value in kwargs.items() if value is not None})
        return forward(*args, **kwargs)

    monkeypatch.setattr(body, "forward", record)


# Positions and pixels of each side


def record_positions(model, run) -> list[torch.Tensor]:
    """The position ids of each forward of the language model in one call."""
    seen = []
    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[1]), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_teacher_does_not_inherit_the_students_position_ids(tiny, make_rows, tmp_path, monkeypatch, weights):
    """modelscope/ms-swift#9126. With LoRA one module serves both sides, and remembers the last positions it made."""
    rows = make_rows(3)
    trainer = make_trainer(tiny, rows, tmp_path, **(LORA if weights == "lora" else {}))
    batch, total = take_one(trainer, rows)
    student = trainer.model.get_base_model() if weights == "lora" else trainer.model
    teacher = student if weights == "lora" else trainer.teacher.module

    def compute() -> None:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)

    expected = []
    for side in ("student", "teacher"):
        prompts = [getattr(pair, side) for pair in batch.prompts]
        inputs = join_sequences(prompts, batch.rollouts, trainer.token_ids.pad, CPU)
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        fresh = copy.deepcopy(tiny.model).model
        expected.append(fresh.get_rope_index(**{name: inputs[name] for name in names})[0])
    student_3BL, teacher_3BL = expected
    assert teacher_3BL.shape[-1] > student_3BL.shape[-1]  # the crops' tokens
    compute()  # whatever is remembered is there now
    assert torch.equal(record_positions(student, compute)[-1], student_3BL)
    assert torch.equal(record_positions(teacher, compute)[0], teacher_3BL)
    trainer.run_teacher_checks()

    exact = scoring.join_sequences

    def inherit(prompts, *args):
        inputs = exact(prompts, *args)
        if len(inputs["image_grid_thw"]) > len(prompts):  # the teacher's
            length = inputs["input_ids"].shape[1]
            more_3BL = student_3BL[..., -1:] + torch.arange(1, length)
            inputs["position_ids"] = torch.cat([student_3BL, more_3BL], -1)[..., :length]
        return inputs

    monkeypatch.setattr(scoring, "join_sequences", inherit)
    assert not torch.equal(record_positions(teacher, compute)[0], teacher_3BL)
    with pytest.raises(TeacherError, match="the teacher is misaligned, its positions are those of another prompt"):
        trainer.run_teacher_checks()


def test_one_row_with_fewer_image_tokens_than_features_does_not_blind_the_batch(tiny, make_rows, tmp_path, monkeypatch):
    """A trainer that drops the pixels of the whole batch there goes on, and learns blind."""
    rows = make_rows(4)
    rows[1] = dataclasses.replace(rows[1], images=(rows[1].images[0][:200],), source="data.jsonl:2")
    plain = {"prefetch_views": False, "share_vision_features": False}
    trainer = make_trainer(tiny, rows, tmp_path, teacher_checks=True, teacher_check_rows=4, max_steps=1, **plain)
    batch, total = take_one(trainer, rows)
    assert [row.id for row in batch.rows] == [rows[index].id for index in (0, 2, 3)]
    seen = []
    spy_body(monkeypatch, trainer.model, seen)
    spy_body(monkeypatch, trainer.teacher.module, seen)
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)
    for side, inputs in zip(("teacher", "student"), seen, strict=True):
        views = [getattr(trainer.builder.build_pairs([rows[index]])[0], side).view for index in (0, 2, 3)]
        pixels = expand_pixels(np.concatenate([view.pixel_values for view in views]), trainer.view_config)
        assert torch.equal(inputs["pixel_values"], pixels)

    exact = trainer.builder.build_pairs

    def lose_token(rows, moves_it):
        pairs = exact(rows)
        if len(rows) == 4:  # a step's, not the checks' own
            for index, change in ((0, -1), (2, 1 if moves_it else 0)):
                pairs[index] = dataclasses.replace(pairs[index], teacher=resize_run(pairs[index].teacher, change))
        return pairs

    def resize_run(prompt, change):
        at = prompt.mm_token_type_ids.index(1)
        cut = {-1: (at + 1, ()), 0: (at, ()), 1: (at, (at,))}[change]
        ids, types = (
            (*values[:at], *(values[place] for place in cut[1]), *values[cut[0] :])
            for values in (prompt.input_ids, prompt.mm_token_type_ids)
        )
        return dataclasses.replace(prompt, input_ids=ids, mm_token_type_ids=types)

    # One token short, and one short that another row has too many of: the sum is right, every later image is shifted.
    for moves_it in (False, True):
        monkeypatch.setattr(trainer.builder, "build_pairs", lambda rows, moves_it=moves_it: lose_token(rows, moves_it))
        with pytest.raises(TeacherError, match="the teacher's prompt holds 12 image tokens where its pixels give 13"):
            trainer.train()
    trainer.args.teacher_checks = False
    monkeypatch.setattr(trainer.builder, "build_pairs", lambda rows: lose_token(rows, moves_it=False))
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        trainer.train()


def test_every_multimodal_key_reaches_both_forwards_and_no_positions_do(tiny, make_rows, tmp_path, monkeypatch):
    """`mm_token_type_ids` was collected by a trainer and never passed to the forward of the loss."""
    trainer = make_trainer(tiny, make_rows(2), tmp_path)
    batch, total = take_one(trainer, make_rows(2))
    seen = {"student": [], "teacher": []}
    spy_body(monkeypatch, trainer.model, seen["student"])
    spy_body(monkeypatch, trainer.teacher.module, seen["teacher"])
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)
    needed = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"}
    for calls in seen.values():
        (inputs,) = calls
        assert needed <= inputs.keys()
        assert "position_ids" not in inputs
        merged = int(inputs["image_grid_thw"].prod(dim=1).sum()) // 4
        assert int(inputs["mm_token_type_ids"].sum()) == merged
    assert len(seen["student"][0]["image_grid_thw"]) == 2
    assert len(seen["teacher"][0]["image_grid_thw"]) == 4
    assert not torch.equal(trainer.model.model.rope_deltas, trainer.teacher.module.model.rope_deltas)


# Tokens and normalisation


def test_end_token_is_kept_where_the_padding_id_is_the_end_id(tiny, make_rows, tmp_path):
    """huggingface/trl#6357: a mask by `ids != pad` drops the very token that teaches where to stop."""
    rows = make_rows(6)
    processor = copy.deepcopy(tiny.processor)
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    found = []
    for name, world in (("apart", tiny), ("same", dataclasses.replace(tiny, processor=processor))):
        trainer = make_trainer(world, rows, tmp_path / name, temperature=1.5)
        (end,), pad = trainer.token_ids.eos, trainer.token_ids.pad
        assert (pad == end) is (name == "same")
        batch, total = take_one(trainer, rows)
        ids_BT, weights_BT = batch.rollouts.completion_ids_BT, batch.weights_BT
        lengths_B = batch.rollouts.completion_mask_BT.sum(dim=1)
        assert len(set(lengths_B.tolist())) > 1  # there is padding behind ends
        last_B = ids_BT[torch.arange(len(rows)), lengths_B - 1]
        assert torch.equal((weights_BT * (ids_BT == end)).sum(dim=1), (last_B == end).float())
        assert int((last_B == end).sum()) > 1
        loss, result = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=total)
        kept_N = ids_BT[weights_BT > 0] != end
        found.append((float(loss.detach()), float(result.loss_N[kept_N].mean())))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-3)  # without its ends it would be another loss


def test_zero_valid_micro_batch_stays_attached_to_the_graph(tiny, make_rows, tmp_path):
    """Detached, or without some weights, the other processes wait for gradients that never come."""
    trainer = make_trainer(tiny, make_rows(2), tmp_path)
    batch, _ = take_one(trainer, make_rows(2))
    batch.weights_BT.zero_()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
    loss.backward()
    assert float(loss.detach()) == 0.0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) == 0.0, name


def test_temperature_is_on_both_sides_and_in_sampling(tiny, make_rows, tmp_path):
    """One knob (huggingface/trl#6449): on one side only, two equal sides would have a loss."""
    rows = make_rows(3)
    trainer = make_trainer(tiny, rows, tmp_path, temperature=0.6)
    batch, total = take_one(trainer, rows)
    active_BT = batch.weights_BT > 0
    _, result = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=total)
    logits = {}
    for side, model in (("student", trainer.model), ("teacher", trainer.teacher.module)):
        prompts = [getattr(pair, side) for pair in batch.prompts]
        with torch.no_grad():
            hidden_ND = score_side(model, prompts, batch.rollouts, active_BT, trainer.token_ids.pad)
            logits[side] = model.lm_head(hidden_ND).double()

    def kl(student_temperature, teacher_temperature):
        p, q = (logits["student"] / student_temperature), (logits["teacher"] / teacher_temperature)
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)

    ids_N = batch.rollouts.completion_ids_BT[active_BT]
    sampled_N = (logits["student"] / 0.6).log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    sampling_N = batch.rollouts.sampling_logprobs_BT[active_BT].double()
    torch.testing.assert_close(result.loss_N.double(), kl(0.6, 0.6), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sampling_N, sampled_N, atol=1e-4, rtol=1e-4)
    for other in (kl(0.6, 1.0), kl(1.0, 0.6), kl(1.0, 1.0)):
        assert float((result.loss_N - other).abs().max()) > 1e-2
    plain = [Row(row.images, row.question) for row in rows]  # no box: the teacher sees what the student sees
    alike = make_trainer(tiny, plain, tmp_path / "alike", temperature=0.6)
    batch, total = take_one(alike, plain)
    assert abs(float(alike.compute_loss(alike.model, batch, num_items_in_batch=total).detach())) < 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        {"distillation_is_clip": 2.0},
        {"distillation_mode": "sampled_token"},
        {"distillation_mode": "sampled_token", "top_p": 0.8},
    ],
    ids=["full", "sampled", "nucleus"],
)
def test_importance_ratio_is_one_where_the_student_itself_sampled(tiny, make_rows, tmp_path, fields):
    """It corrects for another sampler, and must leave fresh completions alone, top-p and bans included."""
    rows = make_rows(4)
    trainer = make_trainer(tiny, rows, tmp_path, temperature=0.8, generation_batch_size=3, **fields)
    batch, total = take_one(trainer, rows)
    active_BT = batch.weights_BT > 0

    def compute(target, rollouts):
        changed = dataclasses.replace(batch, rollouts=rollouts)
        loss, result = target.compute_loss(target.model, changed, return_outputs=True, num_items_in_batch=total)
        ratio_N = (result.stats.student_logprob_N.detach() - rollouts.sampling_logprobs_BT[active_BT]).exp()
        return float(loss.detach()), result, ratio_N

    fresh, result, ratio_N = compute(trainer, batch.rollouts)
    torch.testing.assert_close(ratio_N, torch.ones_like(ratio_N), atol=1e-4, rtol=0.0)
    if "distillation_mode" in fields:
        plain = -(result.stats.teacher_logprob_N - batch.rollouts.sampling_logprobs_BT[active_BT]).mean()
    else:
        plain = compute(make_trainer(tiny, rows, tmp_path / "plain", temperature=0.8), batch.rollouts)[0]
    assert fresh == pytest.approx(float(plain), rel=1e-3)
    # Another engine's log-probs, half as likely: the ratio is 2, and counts.
    stale = dataclasses.replace(
        batch.rollouts, sampling_logprobs_BT=batch.rollouts.sampling_logprobs_BT - float(np.log(2.0))
    )
    off, _, ratio_N = compute(trainer, stale)
    torch.testing.assert_close(ratio_N, torch.full_like(ratio_N, 2.0), atol=1e-3, rtol=0.0)
    assert abs(off - fresh) > 0.1 * abs(fresh)


def test_loss_is_normalised_by_the_tokens_of_all_ranks_not_of_each(tiny, make_rows, tmp_path, monkeypatch):
    """huggingface/trl#6478. Two ranks of 3 completions and of 2 tokens; DDP takes the mean of their gradients."""
    rows = make_rows(4)
    trainer = make_trainer(tiny, rows, tmp_path)
    micro_batches, _ = take_micro_batches(trainer, rows, 3)
    micro_batches[1].weights_BT[:, 2:] = 0.0
    own = [batch.weights_BT.sum() for batch in micro_batches]
    total = own[0] + own[1]
    assert float(own[0]) > 10 * float(own[1])

    def average(totals):
        trainer.model.zero_grad()
        for batch, divisor in zip(micro_batches, totals, strict=True):
            (trainer.compute_loss(trainer.model, batch, num_items_in_batch=divisor) / 2).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}

    trainer.model.zero_grad()
    losses = []
    for batch in micro_batches:
        loss, result = trainer.compute_loss(
            trainer.model, batch, return_outputs=True, num_items_in_batch=torch.tensor(1.0)
        )
        loss.backward()
        losses.append(result.loss_N)
    expected = {name: p.grad / total for name, p in trainer.model.named_parameters()}
    assert len(torch.cat(losses)) == int(total)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert largest_difference(average([total, total]), expected) < 1e-5 * scale
    per_rank = average([own[0] * 2, own[1] * 2])  # the mean of the ranks' own means
    assert largest_difference(per_rank, expected) > 0.1 * scale


# Batches


def test_images_stay_with_their_rows_in_buffered_batches(tiny, make_rows, tmp_path, monkeypatch):
    """One buffer of rollouts for all micro-batches of a step, in calls of another size, with a row left out of it."""
    rows = make_rows(7)
    rows[2] = dataclasses.replace(rows[2], images=(rows[2].images[0][:200],), source="data.jsonl:3")
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 2}
    fields["share_vision_features"] = False
    trainer = make_trainer(tiny, rows, tmp_path, generation_batch_size=5, temperature=1.5, **fields)
    asked, seen = [], []
    generate = trainer.engine.generate

    def note(model, prompts, sampling, seeds, **kwargs):
        asked.extend(zip(prompts, seeds, strict=True))
        return generate(model, prompts, sampling, seeds, **kwargs)

    monkeypatch.setattr(trainer.engine, "generate", note)
    micro_batches, total = take_micro_batches(trainer, rows, 2)
    shown = [row for batch in micro_batches for row in batch.rows]
    assert [row.id for row in shown] == [row.id for row in rows if row is not rows[2] for _ in range(2)]
    spy_body(monkeypatch, trainer.teacher.module, seen)
    seeds = iter(seed for _, seed in asked)
    for batch in micro_batches:
        pixels = []
        for place, row in enumerate(batch.rows):
            (own,) = trainer.builder.build_pairs([row])
            assert batch.prompts[place].student.input_ids == own.student.input_ids
            alone = generate(trainer.model, [own.student], trainer.builder.sampling, [next(seeds)])
            length = int(batch.rollouts.completion_mask_BT[place].sum())
            assert torch.equal(batch.rollouts.completion_ids_BT[place, :length], alone.completion_ids_BT[0, :length])
            pixels.append(own.teacher.view.pixel_values)
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)
        assert torch.equal(seen[-1]["pixel_values"], expand_pixels(np.concatenate(pixels), trainer.view_config))
    pairs = [pair for batch in micro_batches for pair in batch.prompts]
    refuse_foreign_images(shown, pairs, trainer.builder.build_pairs)
    views = [pair.teacher.view for pair in pairs]
    shuffled = [
        dataclasses.replace(pair, teacher=dataclasses.replace(pair.teacher, view=view))
        for pair, view in zip(pairs, views[2:] + views[:2], strict=True)
    ]
    with pytest.raises(TeacherError, match="image 0 of the teacher is not its own but that of"):
        refuse_foreign_images(shown, shuffled, trainer.builder.build_pairs)
