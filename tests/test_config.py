"""The config refuses what cannot work, naming the field, the value and the fix."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from imagine_opd import ImagineOPDConfig
from imagine_opd.cli.train import read_numbers
from imagine_opd.config import RECIPE_FILE, build_config, load_recipe, save_recipe
from imagine_opd.errors import ConfigError
from imagine_opd.loss.config import ObjectiveConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distillation_mode": "both"}, "distillation_mode='both': expected one of full, sampled_token"),
        ({"teacher_model_kind": "old"}, "teacher_model_kind='old': expected one of base, ema, live"),
        ({"temperature": 0.0}, "temperature=0.0: expected at least"),
        ({"temperature": "hot"}, "temperature='hot': expected a finite number"),
        ({"temperature": float("inf")}, "temperature=inf: expected a finite number"),
        ({"box_margin": float("nan")}, "box_margin=nan: expected a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: expected a finite number"),
        ({"num_generations": 1.5}, "num_generations=1.5: expected a whole number"),
        ({"answer_hint": "false"}, "answer_hint='false': expected true or false"),
        ({"dual_clip": None}, "dual_clip=None: expected a finite number"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs: 'num_beams'"),
        ({"generation_kwargs": {"beams": 2}}, "generation_kwargs: 'beams' is unknown"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 3}}, "'prompt_lookup_num_tokens' is unknown, has a field"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "'typical_p' changes where the student is trained"),
        ({"distillation_mode": "topk_tail", "generation_kwargs": {"min_new_tokens": 4}}, "'min_new_tokens' changes"),
        ({"generation_kwargs": [1]}, "generation_kwargs=[1]: expected a mapping"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize'"),
        ({"repetition_penalty": 1.3}, "distillation_mode='full' needs 1.0"),
        ({"train_sampling_strategy": "group_by_length"}, "expected 'random' or 'sequential'"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"num_generations": 0}, "num_generations=0: expected at least 1"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"advantage_baseline": "expected"}, "goes with distillation_mode='sampled_token'"),
        ({"whiten_advantages": True}, "goes with distillation_mode='sampled_token'"),
        ({"log_ratio_clamp": 5.0}, "goes with distillation_mode='sampled_token'"),
        ({"distillation_mode": "topk_logits"}, "plain truncation is no divergence"),
        ({"distillation_mode": "k1"}, "does not depend on the teacher"),
        ({"distillation_mode": "topk_tail", "top_k": 20}, "distillation_mode='topk_tail' needs top_p=1.0"),
        ({"distillation_alpha": 1.5}, "distillation_alpha=1.5: expected at least 0.0 and at most 1.0"),
        ({"distillation_alpha": 0.001}, "expected 0, 1, or 0.01 to 0.99"),
        ({"distillation_mode": "sampled_token", "distillation_alpha": 0.5}, "the estimator is one of the reverse KL"),
        ({"distillation_mode": "sampled_token", "distillation_kl_clip": 0.05}, "log_ratio_clamp bounds it"),
        ({"distillation_mode": "sampled_token", "distillation_is_clip": 2.0}, "clipped by epsilon already"),
        ({"distillation_mode": "sampled_token", "loss_max_clamp": 10.0}, "use log_ratio_clamp"),
        ({"distillation_mode": "sampled_token", "log_prob_min_clamp": 0.0}, "log_prob_min_clamp=0.0: expected less"),
        (
            {"distillation_mode": "sampled_token", "whiten_advantages": True, "advantage_baseline": "expected"},
            "takes the mean out already",
        ),
        ({"distillation_kl_clip": 0.05, "kernel_backend": "triton"}, "is not in the kernels"),
        ({"distillation_mode": "topk_tail", "kernel_backend": "triton"}, "is not in the kernels"),
        ({"mask_truncated_completions": True, "truncated_weight": 0.5}, "set one of them"),
        ({"truncated_weight": 1.5}, "truncated_weight=1.5: expected at least 0.0 and at most 1.0"),
        ({"early_weight_half_life": 0.0}, "early_weight_half_life=0.0: expected at least 1.0"),
        ({"loss_aggregation": "mean"}, "loss_aggregation='mean': expected one of token_mean, sequence_mean"),
        ({"contrast_token_weight": True}, "set contrast"),
        ({"beta": 0.5}, "at 0.5 the loss is 4 times theirs"),
        ({"jsd_token_clip": 0.05}, "0.05 there is 0.2 here"),
        ({"loss_mode": "k1"}, "a gradient that does not depend on the teacher"),
        ({"top_p": 0.9}, "distillation_mode='full' needs top_p=1.0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: expected more than 1"),
        ({"min_pixels": 100, "max_pixels": 50}, "min_pixels=100 is above max_pixels=50"),
        ({"student_prompt_template": "look"}, "expected the placeholder {question}"),
        ({"teacher_prompt_template": "{question} {crop}"}, "expected the placeholder {question}"),
        ({"answer_hint_template": "{answer"}, "answer_hint_template"),
        ({"num_loss_tokens_to_skip": 256}, "leaves nothing"),
        ({"remove_unused_columns": True}, "would strip the rows"),
        ({"lr_scheduler_type": "zigzag"}, "zigzag"),
        ({"box_format": "cxcywh"}, "box_format='cxcywh'"),
    ],
)
def test_bad_value_is_refused_with_field_value_and_fix(tmp_path, fields, message):
    with pytest.raises(ConfigError) as caught:
        build_config(tmp_path, fields)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_unknown_field_names_the_nearest(tmp_path):
    with pytest.raises(
        ConfigError, match="unknown config field 'max_completion_len'; did you mean 'max_completion_length'"
    ):
        build_config(tmp_path, {"max_completion_len": 3})


def test_either_name_of_activation_checkpointing_is_taken(tmp_path):
    assert build_config(tmp_path, {"activation_checkpointing": True}).gradient_checkpointing


def test_trls_name_of_the_full_mode_is_taken(tmp_path):
    assert build_config(tmp_path, {"distillation_mode": "full_logits"}).distillation_mode == "full"


def test_objective_reads_the_config_under_the_same_names_and_defaults(tmp_path):
    config = build_config(tmp_path, {})
    ours = ObjectiveConfig()
    assert {name: getattr(config, name) for name in ours.__dataclass_fields__} == dataclasses.asdict(ours)


def test_defaults_are_the_papers(tmp_path):
    config = ImagineOPDConfig(output_dir=str(tmp_path))
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert (config.num_generations, config.temperature, config.max_completion_length) == (1, 1.0, 256)
    assert (config.epsilon, config.epsilon_high, config.dual_clip) == (0.2, 0.3, 3.0)


def test_recipe_travels_with_the_model(tmp_path):
    config = build_config(tmp_path, {"min_pixels": 2304, "max_pixels": 2304, "student_prompt_template": "{question}!"})
    save_recipe(config, tmp_path)
    recipe = load_recipe(tmp_path)
    assert recipe["student_prompt_template"] == "{question}!"
    assert build_config(tmp_path, recipe).max_pixels == 2304
    assert load_recipe("some/hub-name") == {}
    (tmp_path / RECIPE_FILE).write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        load_recipe(tmp_path)
    (tmp_path / RECIPE_FILE).write_text(json.dumps({"output_dir": "/"}))
    with pytest.raises(ConfigError, match="output_dir"):
        load_recipe(tmp_path)


def test_yaml_numbers_in_exponent_form_are_numbers(tmp_path):
    assert yaml.safe_load("1e-6") == "1e-6"  # the trap
    assert read_numbers({"learning_rate": "1e-6"}) == {"learning_rate": 1e-6}
    with pytest.raises(ConfigError, match="learning_rate='fast'"):
        read_numbers({"learning_rate": "fast"})
