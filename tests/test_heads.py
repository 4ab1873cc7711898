"""Heads as the objective reads them: scale, softcap and bias as the model's own forward has them; under LoRA too."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from family_cases import find_family, make_pairs, make_rows, project

from imagine_opd.errors import ConfigError
from imagine_opd.kernels import linear_token_stats
from imagine_opd.models.access import get_body, get_head, read_token_ids
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.scoring import score_side

# peft still asks transformers by the old name.
ignore_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXT_ONLY = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
TEXT_ONLY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.5}


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("Phi", {}, (1.0, None)),  # a bias
        ("Cohere", {"logit_scale": 0.25}, (0.25, None)),
        ("Granite", {"logits_scaling": 4.0}, (0.25, None)),
        ("Gemma2", {"final_logit_softcapping": 3.0}, (1.0, 3.0)),
    ],
)
def test_head_is_what_the_models_own_forward_does(kind, fields, expected):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TEXT_ONLY, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    head = get_head(model)
    if head.bias_V is not None:
        torch.nn.init.normal_(head.bias_V)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        found = project(head, get_body(model)(ids).last_hidden_state)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert (head.logit_scale, head.softcap) == expected
    assert (head.bias_V is not None) == (kind == "Phi")


def test_softcap_that_the_models_forward_leaves_out_is_left_out():
    model = copy.deepcopy(find_family("gemma3").model)
    model.config.text_config.final_logit_softcapping = 2.0
    ids = torch.tensor([[2, 20, 21, 22]])
    with torch.no_grad():
        found = project(get_head(model), get_body(model)(ids).last_hidden_state)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


@ignore_old_name
@pytest.mark.parametrize("name", ["qwen3_vl", "llava_onevision", "gemma3"])
def test_scores_look_through_lora(name, tmp_path):
    peft = pytest.importorskip("peft")
    family = find_family(name)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(family.model), config).eval()
    prompts = [pair.student for pair in make_pairs(family, make_rows(), tmp_path)]
    ids = read_token_ids(model, family.processor)
    rollouts = HFEngine(ids).generate(model, prompts, SamplingConfig(5), seed=1)
    mask_BT = rollouts.completion_mask_BT

    def score_tokens(scored):
        with torch.no_grad():
            hidden_ND = score_side(scored, prompts, rollouts, mask_BT, ids.pad)
            stats = linear_token_stats(hidden_ND, get_head(scored), None, None, rollouts.completion_ids_BT[mask_BT])
        return stats.student_logprob_N

    torch.testing.assert_close(score_tokens(model), rollouts.sampling_logprobs_BT[mask_BT], atol=5e-5, rtol=1e-4)
    plain_N = score_tokens(family.model)
    assert float((score_tokens(model) - plain_N).abs().max()) > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(score_tokens(model), plain_N)


@ignore_old_name
def test_head_trained_in_full_beside_lora_is_the_copy_in_use():
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(find_family("qwen3_vl").model)
    original = base.lm_head.weight
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config)
    head = get_head(model)
    assert head.weight_VD is not original
    assert head.weight_VD.requires_grad
    with model.disable_adapter():
        assert get_head(model).weight_VD is original
    assert get_head(model).weight_VD is head.weight_VD


@ignore_old_name
def test_lora_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(copy.deepcopy(find_family("qwen3_vl").model), config)
    with pytest.raises(ConfigError, match="the adapter changes the output head"):
        get_head(model)
