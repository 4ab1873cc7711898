"""Every family, as a tiny random model of the real architecture: prompts and pixels are the processor's own, scores are
the model's own, on both padding sides, with one and with several images; and a step lowers the loss."""

from __future__ import annotations

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from family_cases import FIELDS, TEMPLATE, find_family, make_pairs, make_rows, project, sample
from model_families import BUILDERS, Built
from pictures import draw_image
from PIL import Image

import imagine_opd
from imagine_opd.adapters import find_adapter
from imagine_opd.config import build_config
from imagine_opd.errors import ConfigError, RowError, TeacherError
from imagine_opd.kernels import linear_token_stats
from imagine_opd.models.access import fit_inputs, get_body, get_head, load_processor, read_token_ids
from imagine_opd.prompts import build_prompt
from imagine_opd.rollout import HFEngine, SamplingConfig, finish_completions
from imagine_opd.rollout.hf import pad_prompts
from imagine_opd.scoring import join_sequences, score_side
from imagine_opd.settings import make_view_config
from imagine_opd.teacher.checks import check_teacher, refuse_blind_prompt
from imagine_opd.teacher.load import build_teacher
from imagine_opd.trainer import ImagineOPDTrainer
from imagine_opd.types import Row
from imagine_opd.views import make_views

FAMILIES = list(BUILDERS)
CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES)
def family(request) -> Built:
    """Shared by all tests: those that train copy the model first."""
    return find_family(request.param)


def open_images(row: Row) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for data in row.images]


def process(family: Built, texts: list[str], images: list[list[Image.Image]], side: str = "left"):
    """What the model's own processor makes of rendered prompts and pictures."""
    bos = family.processor.tokenizer.bos_token
    return family.processor(
        text=texts,
        images=images,
        padding=True,
        padding_side=side,
        add_special_tokens=bos is None or not texts[0].startswith(bos),
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )


def assert_equal_inputs(found: dict, expected: dict) -> None:
    expected = {name: torch.as_tensor(value) for name, value in expected.items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_batch_of_prompts_is_what_the_processor_makes_of_it(family, tmp_path):
    """Ids, attention, modality ids and every pixel input; rows of one and of two images, cut and not."""
    rows = make_rows()
    prompts = [pair.student for pair in make_pairs(family, rows, tmp_path)]
    expected = process(family, [prompt.text for prompt in prompts], [open_images(row) for row in rows])
    found = fit_inputs(family.model, pad_prompts(prompts, family.processor.tokenizer.pad_token_id, CPU))
    taken = {"mm_token_type_ids", "token_type_ids"} & found.keys()
    assert_equal_inputs(found, {name: expected[name] for name in expected if name in found or "token_type" not in name})
    assert not taken or sum(int(expected[name].sum()) for name in taken) == sum(sum(p.image_tokens) for p in prompts)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_prompt_of_one_row_is_what_the_processors_chat_call_makes(family, tmp_path, side):
    """From messages and pictures, as a user calls it; the teacher's view is the row's pictures and its crops."""
    for row in make_rows():
        # No budget of their own for the crops: one call has one for all.
        (pair,) = make_pairs(dataclasses.replace(family, options={}), [row], tmp_path)
        prompt = getattr(pair, side)
        images = open_images(row)
        if side == "teacher":
            box = row.boxes[0]
            images.append(images[box.image].crop((box.x0, box.y0, box.x1, box.y1)))
        text = FIELDS[f"{side}_prompt_template"].format(question=row.question)
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
        expected = family.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert prompt.input_ids == tuple(expected["input_ids"][0].tolist())
        found = pad_prompts([prompt], 0, CPU)
        names = [name for name in expected if name in found and "token_type" not in name]
        assert {"input_ids", "pixel_values"} <= set(names)
        assert_equal_inputs({name: found[name] for name in names}, {name: expected[name] for name in names})


def test_scores_are_the_models_own_logits(family, tmp_path):
    """Body and head at the response tokens of a right-padded batch, against the whole model on each row alone, with
    the processor's inputs."""
    rows = make_rows()
    prompts = [pair.student for pair in make_pairs(family, rows, tmp_path)]
    rollouts = sample(family, prompts)
    mask_BT = rollouts.completion_mask_BT
    assert mask_BT.any(dim=1).all()
    pad = family.processor.tokenizer.pad_token_id
    with torch.no_grad():
        hidden_ND = score_side(family.model, prompts, rollouts, mask_BT, pad)
        logits_NV = project(get_head(family.model), hidden_ND)
        expected = []
        for row, prompt, ids_T, mask_T in zip(rows, prompts, rollouts.completion_ids_BT, mask_BT, strict=True):
            inputs = process(family, [prompt.text], [open_images(row)])
            response_1T = ids_T[mask_T][None]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], response_1T], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.zeros_like(response_1T)], 1)
            if "mm_token_type_ids" not in fit_inputs(family.model, {"mm_token_type_ids": response_1T}):
                inputs.pop("mm_token_type_ids", None)
            output_1LV = family.model(**inputs).logits
            expected.append(output_1LV[0, -1 - response_1T.shape[1] : -1])
    torch.testing.assert_close(logits_NV, torch.cat(expected), atol=2e-5, rtol=1e-4)
    assert float(logits_NV.std()) > 0.05  # not all the same


def test_left_and_right_padding_score_the_same(family, tmp_path):
    prompts = [side for pair in make_pairs(family, make_rows(), tmp_path) for side in (pair.student, pair.teacher)]
    assert len({len(prompt.input_ids) for prompt in prompts}) > 3
    rollouts = sample(family, prompts)
    mask_BT = rollouts.completion_mask_BT
    pad = family.processor.tokenizer.pad_token_id
    left = pad_prompts(prompts, pad, CPU)
    width = left["input_ids"].shape[1]
    zeros_BT = torch.zeros_like(rollouts.completion_ids_BT)
    left["input_ids"] = torch.cat([left["input_ids"], rollouts.completion_ids_BT], 1)
    left["attention_mask"] = torch.cat([left["attention_mask"], mask_BT.long()], 1)
    left["mm_token_type_ids"] = torch.cat([left["mm_token_type_ids"], zeros_BT], 1)
    body = get_body(family.model)
    with torch.no_grad():
        right_ND = score_side(family.model, prompts, rollouts, mask_BT, pad)
        hidden_BLD = body(**fit_inputs(body, left), use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden_BLD[:, width - 1 : -1][mask_BT], right_ND, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_when_sampled_are_those_when_scored(family, tmp_path, temperature):
    prompts = [side for pair in make_pairs(family, make_rows(), tmp_path) for side in (pair.student, pair.teacher)]
    rollouts = sample(family, prompts, temperature=temperature)
    mask_BT = rollouts.completion_mask_BT
    assert int(mask_BT.sum()) > 3 * len(prompts)
    with torch.no_grad():
        hidden_ND = score_side(family.model, prompts, rollouts, mask_BT, family.processor.tokenizer.pad_token_id)
        ids_N = rollouts.completion_ids_BT[mask_BT]
        stats = linear_token_stats(hidden_ND, get_head(family.model), None, None, ids_N, temperature=temperature)
    torch.testing.assert_close(stats.student_logprob_N, rollouts.sampling_logprobs_BT[mask_BT], atol=5e-5, rtol=1e-4)


def test_pixels_reach_the_scores(family, tmp_path):
    """Other pixels of any image of a row, other hidden states."""
    prompts = [make_pairs(family, make_rows(), tmp_path)[1].teacher]
    completions = torch.tensor([[70, 71, 72]])
    ids = read_token_ids(family.model, family.processor)
    rollouts = finish_completions(completions, torch.zeros(completions.shape), ids)
    mask_BT = rollouts.completion_mask_BT
    view, first = prompts[0].view, 0
    with torch.no_grad():
        before_ND = score_side(family.model, prompts, rollouts, mask_BT, ids.pad)
        for count in view.frame_counts:
            pixels = view.pixel_values.copy()
            pixels[first : first + count] = -pixels[first : first + count]
            first += count
            changed = dataclasses.replace(prompts[0], view=dataclasses.replace(view, pixel_values=pixels))
            after_ND = score_side(family.model, [changed], rollouts, mask_BT, ids.pad)
            assert float((after_ND - before_ND).abs().max()) > 1e-3
    assert len(view.frame_counts) == 3


def test_vision_ids_are_those_of_the_expansion_and_no_text(family, tmp_path):
    """Every special token that the processor adds to a prompt is banned; text it adds, and the end, are not."""
    tokenizer = family.processor.tokenizer
    ids = read_token_ids(family.model, family.processor)
    assert set(tokenizer.convert_tokens_to_ids(list(family.special))) <= set(ids.vision)
    assert not set(ids.eos) & set(ids.vision)
    special = set(tokenizer.added_tokens_decoder)
    placeholder = find_adapter(family.processor).placeholder(family.processor)
    assert set(ids.vision) <= special
    for pair in make_pairs(family, make_rows(), tmp_path):
        plain = set(tokenizer(pair.teacher.text.replace(placeholder, ""))["input_ids"])
        added = set(pair.teacher.input_ids) - plain
        assert added & special <= set(ids.vision)
        assert added & special


def test_vision_ids_are_never_sampled(family, tmp_path):
    model = copy.deepcopy(family.model)
    ids = read_token_ids(model, family.processor)
    head = torch.nn.Linear(*reversed(get_head(model).weight_VD.shape))
    head.weight.data = get_head(model).weight_VD.data.clone()
    head.bias.data.zero_()
    head.bias.data[list(ids.vision)] = 100.0
    model.lm_head = head
    prompts = [pair.student for pair in make_pairs(family, make_rows(), tmp_path)]
    rollouts = HFEngine(ids).generate(model, prompts, SamplingConfig(4), seed=0)
    assert not torch.isin(rollouts.completion_ids_BT, torch.tensor(ids.vision)).any()
    assert rollouts.dropped == {}
    unbanned = HFEngine(dataclasses.replace(ids, vision=())).generate(model, prompts[:1], SamplingConfig(1), seed=0)
    assert int(unbanned.completion_ids_BT[0, 0]) in ids.vision  # the plant works


def record_positions(model, run) -> torch.Tensor:
    """The position ids that reach the language model's rotary embedding in one call."""
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    language = get_body(model).get_decoder() if hasattr(get_body(model), "get_decoder") else get_body(model)
    hooks = [language.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


def test_each_side_has_the_positions_of_its_own_view(family, tmp_path):
    """A response token stands where its side's prompt ends: the teacher's further on than the student's, each as the
    whole model places it for that prompt alone."""
    (pair,) = make_pairs(family, make_rows()[:1], tmp_path)
    ids = read_token_ids(family.model, family.processor)
    rollouts = finish_completions(torch.tensor([[70, 71, 72]]), torch.zeros(1, 3), ids)
    last = {}
    with torch.no_grad():
        for side in ("student", "teacher"):
            prompt = getattr(pair, side)
            score = lambda prompt=prompt: score_side(  # noqa: E731
                family.model, [prompt], rollouts, rollouts.completion_mask_BT, ids.pad
            )
            found = record_positions(family.model, score)
            inputs = fit_inputs(family.model, join_sequences([prompt], rollouts, ids.pad, CPU))
            expected = record_positions(family.model, lambda inputs=inputs: family.model(**inputs, use_cache=False))
            assert torch.equal(found, expected)
            assert found.shape[-1] == len(prompt.input_ids) + 3
            last[side] = int(found[..., -1].max())
    assert last["teacher"] > last["student"]


def test_teacher_passes_the_start_up_checks(family, tmp_path):
    pairs = make_pairs(family, make_rows(), tmp_path)
    engine = HFEngine(read_token_ids(family.model, family.processor))
    teacher = build_teacher(family.model, family.processor)
    report = check_teacher(family.model, teacher, pairs, engine, SamplingConfig(6), 0, expect_identical=True)
    assert report.rollout_drift < 1e-3
    assert report.identical_view_drift < 1e-4
    assert report.image_tokens_teacher > report.image_tokens_student


def test_image_whose_tokens_are_not_the_models_features_is_named(family, tmp_path):
    prompt = make_pairs(family, make_rows(), tmp_path)[1].teacher
    refuse_blind_prompt(prompt, "teacher", family.model)
    first, second, third = prompt.image_tokens
    moved = dataclasses.replace(prompt, image_tokens=(first, second + 1, third - 1))  # the same sum
    with pytest.raises(TeacherError, match=f"image 1 has {second + 1} tokens in the teacher's prompt"):
        refuse_blind_prompt(moved, "teacher", family.model)


def make_trainer(family: Built, rows, tmp_path, **fields) -> ImagineOPDTrainer:
    run = {
        **FIELDS,
        **family.options,
        "max_completion_length": 6,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "check_rows": 1,
    }
    args = build_config(tmp_path / "run", {**run, **fields})
    return ImagineOPDTrainer(copy.deepcopy(family.model), args, rows, processor=family.processor)


def test_one_step_lowers_the_loss_on_the_same_rollouts(family, tmp_path):
    rows = make_rows()
    trainer = make_trainer(family, rows, tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    kept = []
    draw = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *args: kept.append(draw(*args)) or kept[-1]
    trainer.train()
    (micro_batches, total), trainer.model = kept[0], trainer.model.eval()
    with torch.no_grad():
        after = float(trainer.compute_loss(trainer.model, micro_batches[0], num_items_in_batch=total))
        trainer.model.load_state_dict(before)
        start = float(trainer.compute_loss(trainer.model, micro_batches[0], num_items_in_batch=total))
    assert start > 1e-4
    assert after < 0.98 * start


def test_evaluate_and_ask_answer_in_words(family, tmp_path):
    rows = [{"image": draw_image(40, 24, seed=n), "question": "what digit ?", "boxes": [[4, 4, 20, 16]], "answer": "7"}
            for n in range(2)]  # fmt: skip
    run = {**FIELDS, **family.options, "max_completion_length": 4, "use_cpu": True}
    result = imagine_opd.evaluate(family.model, rows, processor=family.processor, **run)
    assert {mode: found.rows for mode, found in result.modes.items()} == dict.fromkeys(
        ("direct", "imagine", "zoom", "teacher"), 2
    )
    reply = imagine_opd.ask(family.model, rows[0]["image"], "what digit ?", processor=family.processor, **run)
    assert reply.text == result["imagine"].completions[0].strip()


def test_saved_processor_makes_the_same_prompts(family, tmp_path):
    rows = make_rows()
    trainer = make_trainer(family, rows, tmp_path)
    family.model.save_pretrained(tmp_path / "saved")
    trainer.processor.save_pretrained(tmp_path / "saved")
    again = Built(family.model, load_processor(None, tmp_path / "saved"), family.special, family.options)
    for old, new in zip(make_pairs(family, rows, tmp_path), make_pairs(again, rows, tmp_path), strict=True):
        assert old.teacher.input_ids == new.teacher.input_ids
        # Within two levels: some versions of transformers load the other backend than was saved.
        np.testing.assert_allclose(old.teacher.view.pixel_values, new.teacher.view.pixel_values, atol=0.04)


def test_text_that_asks_for_pixels_is_refused(family, tmp_path):
    (row,) = make_rows()[:1]
    (view,) = make_views([row], make_view_config(family.processor, build_config(tmp_path, family.options)))
    adapter = find_adapter(family.processor)
    for token in {adapter.placeholder(family.processor), adapter.feature_token(family.processor)}:
        bad = dataclasses.replace(row, question=f"what {token} ?", source="rows.jsonl:9")
        with pytest.raises(RowError, match="rows.jsonl:9: the text contains the image placeholder"):
            build_prompt(bad, view.student, family.processor, TEMPLATE)


# Beside the table


def test_unknown_processor_is_refused_with_the_known_ones():
    kind = type("Pix2StructProcessor", (), {})
    with pytest.raises(
        ConfigError, match=r"Pix2StructProcessor is of no known family; .*InternVLProcessor.*families.md"
    ):
        find_adapter(kind())


def test_model_of_another_family_than_its_processor_is_refused():
    with pytest.raises(ConfigError, match="the model is a gemma3, its processor a InternVLProcessor for internvl"):
        read_token_ids(find_family("gemma3").model, find_family("internvl").processor)
