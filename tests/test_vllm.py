"""The vLLM engine around any backend: one sync a step, sleep means new weights, foreign weights are refused."""

from __future__ import annotations

import math

import pytest
import torch

from imagine_opd.demo.recipe import TINY_RECIPE
from imagine_opd.errors import EngineError
from imagine_opd.models.access import read_token_ids
from imagine_opd.prompts import build_prompt
from imagine_opd.rollout import HFEngine, SamplingConfig
from imagine_opd.rollout.vllm import VLLMEngine, measure_drift
from imagine_opd.rollout.vllm_inputs import EngineOutput
from imagine_opd.types import Rollouts
from imagine_opd.views import make_views


class ModelBackend:
    """Stands for vLLM: a copy of the weights, that answers as the model would; `calls` is what it was asked."""

    def __init__(self, tiny, prompts, copies: bool = True) -> None:
        self.model, self.prompts, self.copies = tiny.model, prompts, copies
        self.ids = read_token_ids(tiny.model, tiny.processor)
        self.calls: list[str] = []
        self.salts: list[str] = []

    def start(self, model) -> None:
        self.calls.append("start")

    def send_weights(self, model) -> bool:
        self.calls.append("send")
        if self.copies:
            self.model.load_state_dict(model.state_dict())
        return True

    def complete(self, requests, params, salt) -> list[EngineOutput]:
        self.calls.append("complete")
        self.salts.append(salt)
        known = {request_ids(prompt): prompt for prompt in self.prompts}
        prompts = [known[request.token_ids] for request in requests]
        sampling = SamplingConfig(params[0]["max_tokens"], params[0]["temperature"])
        made = HFEngine(self.ids).generate(self.model, prompts, sampling, [each["seed"] for each in params])
        lengths = made.completion_mask_BT.sum(dim=1).tolist()
        return [
            EngineOutput(
                prompt.input_ids,
                tuple(made.completion_ids_BT[row, :length].tolist()),
                tuple(made.sampling_logprobs_BT[row, :length].tolist()),
            )
            for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def sleep(self) -> None:
        self.calls.append("sleep")
        for parameter in self.model.parameters():  # as level 2 leaves them
            parameter.data.zero_()

    def wake(self) -> None:
        self.calls.append("wake")


def request_ids(prompt) -> tuple[int, ...]:
    from imagine_opd.rollout.vllm_inputs import collapse_placeholders

    return collapse_placeholders(prompt)


@pytest.fixture
def prompts(tiny, make_rows):
    views = make_views(make_rows(3), tiny.view_config)
    template = TINY_RECIPE["student_prompt_template"]
    return [build_prompt(row, v.student, tiny.processor, template) for row, v in zip(make_rows(3), views, strict=True)]


@pytest.fixture
def model(tiny_session):
    import copy

    return copy.deepcopy(tiny_session.model)


def move(model) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)


def test_weights_are_sent_once_a_step_and_whenever_they_moved(tiny, model, prompts):
    backend = ModelBackend(tiny, prompts)
    engine = VLLMEngine(backend.ids, tiny.view_config, backend)
    for step in (0, 0, 1):
        with engine.opened(model, step):
            engine.generate(model, prompts, SamplingConfig(18), [1, 2, 3])
            engine.generate(model, prompts, SamplingConfig(18), [4, 5, 6])
    assert backend.calls.count("send") == engine.syncs == 2
    move(model)  # outside of a step: a checkpoint was loaded
    with engine.opened(model, 1):
        theirs = engine.generate(model, prompts, SamplingConfig(18), [1, 2, 3])
    assert engine.syncs == 3
    ours = HFEngine(backend.ids).generate(model, prompts, SamplingConfig(18), [1, 2, 3])
    assert torch.equal(theirs.completion_ids_BT, ours.completion_ids_BT)
    torch.testing.assert_close(theirs.sampling_logprobs_BT, ours.sampling_logprobs_BT)
    assert len(set(backend.salts)) == 3  # what was cached under old weights is not found again
    assert backend.calls.count("start") == 1


def test_an_engine_that_slept_is_given_the_weights_again_and_compared_again(tiny, model, prompts):
    backend = ModelBackend(tiny, prompts)
    engine = VLLMEngine(backend.ids, tiny.view_config, backend, sleeps=True)
    made = []
    for _ in range(2):
        with engine.opened(model, 0):
            made.append(engine.generate(model, prompts, SamplingConfig(18), [1, 2, 3]))
    assert torch.equal(made[0].completion_ids_BT, made[1].completion_ids_BT)
    once = ["send", "complete", "complete", "sleep"]
    assert backend.calls == ["start", *once, "wake", *once]


def test_an_engine_whose_weights_are_lost_is_refused(tiny, model, prompts):
    backend = ModelBackend(tiny, prompts, copies=False)
    backend.sleep()
    engine = VLLMEngine(backend.ids, tiny.view_config, backend)
    with pytest.raises(EngineError, match="not the model's"), engine.opened(model, 0):
        engine.generate(model, prompts, SamplingConfig(18), 1)


class DeafBackend(ModelBackend):
    """Takes the weights of the first sync, which it may have been started with, and no more."""

    def send_weights(self, model) -> bool:
        self.copies = "send" not in self.calls
        return super().send_weights(model)


def nudge(model) -> None:
    """Moves greedy completions by less than what two engines may differ."""
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(0.5)


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_engine_that_takes_no_trained_weights_is_refused_once_training_moved_them(tiny, model, prompts, sleeps):
    backend = DeafBackend(tiny, prompts)
    backend.sleep = lambda: None
    engine = VLLMEngine(backend.ids, tiny.view_config, backend, sleeps)
    with engine.opened(model, 0):
        engine.generate(model, prompts, SamplingConfig(18), 1)
    with engine.opened(model, 1):  # not moved yet: nothing to tell
        engine.generate(model, prompts, SamplingConfig(18), 1)
    nudge(model)
    if not sleeps:
        with engine.opened(model, 2):  # compared are the syncs 1, 2, 4, or each after a sleep
            engine.generate(model, prompts, SamplingConfig(18), 1)
    with pytest.raises(EngineError, match=r"are 0 away .* does not take the weights"), engine.opened(model, 3):
        engine.generate(model, prompts, SamplingConfig(18), 1)


def test_an_engine_that_takes_trained_weights_is_compared_until_it_is_seen_to(tiny, model, prompts):
    backend = ModelBackend(tiny, prompts)
    engine = VLLMEngine(backend.ids, tiny.view_config, backend)
    compared = []
    for step in range(10):
        if step == 3:
            nudge(model)
        before = backend.calls.count("complete")
        with engine.opened(model, step):
            engine.generate(model, prompts, SamplingConfig(18), 1)
        compared.append(backend.calls.count("complete") - before == 2)
    assert [step for step, was in enumerate(compared) if was] == [0, 1, 3]


def test_an_engine_that_sees_other_images_is_refused(tiny, model, prompts):
    """Its template tokens are the model's; only what it says of the images is not."""
    backend = ModelBackend(tiny, prompts)
    engine = VLLMEngine(backend.ids, tiny.view_config, backend)
    backend.send_weights = lambda model: bool(
        backend.model.model.visual.patch_embed.proj.weight.data.zero_().sum() == 0
    )
    with pytest.raises(EngineError, match="what it makes of images"), engine.opened(model, 0):
        engine.generate(model, prompts, SamplingConfig(18), 1)


def test_greedy_completions_leave_the_random_state_alone(tiny, model, prompts):
    backend = ModelBackend(tiny, prompts)
    engine = VLLMEngine(backend.ids, tiny.view_config, backend)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with engine.opened(model, 0):
        engine.generate(model, prompts, SamplingConfig(18, 0.0))
    assert torch.equal(torch.rand(2), expected)


def rollouts_of(ids: list[int], probabilities: list[float]) -> Rollouts:
    logprobs = torch.tensor([[math.log(p) for p in probabilities]])
    return Rollouts(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), logprobs)


@pytest.mark.parametrize(
    ("own", "theirs", "expected"),
    [
        (([7, 8], [0.5, 0.5]), ([7, 8], [0.5, 0.5]), 0.0),
        (([7, 8], [0.5, 0.5]), ([7, 8], [0.5, 0.25]), math.log(2) / 2),
        (([7, 8, 9], [0.9, 0.5, 0.9]), ([7, 5, 9], [0.9, 0.5, 0.9]), 0.0),  # a tie
        (([7, 8, 9], [0.9, 1.0, 0.9]), ([7, 5, 9], [0.9, 1.0, 0.9]), 1.0),  # both certain
        (([7, 8], [0.9, 0.8]), ([7, 5], [0.9, 0.6]), 0.4),
        (([7, 8], [0.9, 1.0]), ([7, 5], [0.9, 0.01]), 0.99),  # one knows nothing
    ],
    ids=["same", "log-probs", "tie", "certain", "between", "uniform"],
)
def test_drift_of_two_greedy_completions(own, theirs, expected):
    assert measure_drift(rollouts_of(*own), rollouts_of(*theirs)) == pytest.approx(expected, abs=1e-6)
