"""A teacher with a planted fault stops `ImagineOPDTrainer.train()` before step 0, with the sentence of its fault.

The faults lie where such faults are made: in the prompts' pixels, in the teacher's weights, in what its forward does.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from imagine_opd.config import build_config
from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import TeacherError
from imagine_opd.trainer import ImagineOPDTrainer

RUN = {
    **TINY_RECIPE,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "save_strategy": "no",
    "teacher_check_rows": 3,
    "disable_tqdm": True,
    "use_cpu": True,
    "prefetch_views": False,  # some plants stand where a step's prompts are built
}


@pytest.fixture
def make_trainer(tiny, make_rows, tmp_path):
    def make(teacher: str) -> ImagineOPDTrainer:
        """teacher: `copy`, made by the trainer; `own`, given; `adapter_off`, the student's own weights."""
        args = build_config(tmp_path, {**RUN, **({"use_peft": True, "lora_r": 4} if teacher == "adapter_off" else {})})
        own = copy.deepcopy(tiny.model) if teacher == "own" else None
        return ImagineOPDTrainer(copy.deepcopy(tiny.model), args, make_rows(4), processor=tiny.processor, teacher=own)

    return make


def find_body(trainer) -> torch.nn.Module:
    """The teacher's network below the head; with LoRA the student's, too."""
    with trainer.teacher.loaded(trainer.model) as module:
        return module.get_base_model().model if hasattr(module, "get_base_model") else module.model


def is_teachers(kwargs) -> bool:
    """Whether these inputs hold the teacher's view: two images a row."""
    return len(kwargs["image_grid_thw"]) == 2 * len(kwargs["input_ids"])


def kill(trainer) -> None:
    with trainer.teacher.loaded(trainer.model) as module, torch.no_grad():
        module.get_output_embeddings().weight.zero_()


def black_out_pixels(trainer) -> None:
    exact = trainer.builder.build_pairs

    def build(rows):
        pairs = exact(rows)
        return [dataclasses.replace(pair, teacher=black_out(pair.teacher)) for pair in pairs]

    def black_out(prompt):
        pixels = np.zeros_like(prompt.view.pixel_values)
        return dataclasses.replace(prompt, view=dataclasses.replace(prompt.view, pixel_values=pixels))

    trainer.builder.build_pairs = build


def lose_vision_weights(trainer) -> None:
    with torch.no_grad():
        for parameter in find_body(trainer).visual.parameters():
            parameter.zero_()


def drop_images_on_the_way(trainer) -> None:
    """The vision tower works; what it makes never reaches the language model, for the teacher's view alone."""
    body = find_body(trainer)
    exact = body.get_image_features

    def forget(pixel_values, image_grid_thw, *args, **kwargs):
        found = exact(pixel_values, image_grid_thw, *args, **kwargs)
        if len(image_grid_thw) % 2 == 0:
            found.pooler_output = [torch.zeros_like(part) for part in found.pooler_output]
            found.deepstack_features = [torch.zeros_like(part) for part in found.deepstack_features]
        return found

    body.get_image_features = forget


def score_one_token_late(trainer) -> None:
    """Whole forwards only: what is sampled, with a cache, is sound."""

    def shift(module, args, kwargs, output):
        if kwargs.get("use_cache") is False and is_teachers(kwargs):
            output.last_hidden_state = output.last_hidden_state.roll(1, 1)
        return output

    find_body(trainer).register_forward_hook(shift, with_kwargs=True)


def inherit_positions(trainer) -> None:
    """A response of the teacher stands where the student's would: as many places earlier as the crop takes."""
    body = find_body(trainer)
    seen = {}

    def look(module, args, kwargs):
        seen["teacher"] = kwargs.get("use_cache") is False and is_teachers(kwargs)

    def move(module, args, kwargs):
        if seen["teacher"]:
            positions_3BL = kwargs["position_ids"].clone()
            positions_3BL[:, :, 30:] -= 4
            kwargs = {**kwargs, "position_ids": positions_3BL}
        return args, kwargs

    body.register_forward_pre_hook(look, with_kwargs=True)
    body.language_model.register_forward_pre_hook(move, with_kwargs=True)


FAULTS = [
    (kill, "copy", "the teacher is uniform: entropy"),
    (black_out_pixels, "copy", "the teacher's pixels of all 3 prompts are all zero: it would learn blind"),
    (black_out_pixels, "adapter_off", "the teacher's pixels of all 3 prompts are all zero: it would learn blind"),
    (lose_vision_weights, "copy", "the teacher is blind: its hidden states stay as they are"),
    (lose_vision_weights, "own", "the teacher is blind: its hidden states stay as they are"),
    (lose_vision_weights, "adapter_off", "the student is blind: its hidden states stay as they are"),
    (drop_images_on_the_way, "own", "the teacher is blind: its hidden states stay as they are"),
    (score_one_token_late, "copy", "it is misaligned, its scores belong to other positions"),
    (score_one_token_late, "own", "it is misaligned, its scores belong to other positions"),
    (score_one_token_late, "adapter_off", "it is misaligned, its scores belong to other positions"),
    (inherit_positions, "copy", r"token 30 of probe row 0 stands at position \(t, h, w\) = \(18, .* gives \(22, "),
    (inherit_positions, "own", "the teacher is misaligned, its positions are those of another prompt"),
    (inherit_positions, "adapter_off", "the teacher is misaligned, its positions are those of another prompt"),
]


@pytest.mark.parametrize(("plant", "teacher", "sentence"), FAULTS, ids=lambda item: getattr(item, "__name__", item))
def test_planted_teacher_stops_the_run_before_its_first_step(make_trainer, plant, teacher, sentence):
    trainer = make_trainer(teacher)
    plant(trainer)
    planted = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(TeacherError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(tensor, planted[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("teacher", ["copy", "own", "adapter_off"])
def test_sound_teacher_of_each_kind_is_let_through_with_its_figures(make_trainer, teacher):
    report = make_trainer(teacher).run_teacher_checks()
    assert report.teacher_drift < 1e-4
    assert report.image_effect_student > 0.01
    assert report.image_effect_teacher > 0.01
