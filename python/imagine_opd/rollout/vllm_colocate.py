"""vLLM in this process, through its public Python API (`vllm.LLM`); vLLM is imported by the first rollout."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from imagine_opd.errors import ConfigError, EngineError
from imagine_opd.models import get_base, get_device
from imagine_opd.rollout.vllm import ReadWeights
from imagine_opd.rollout.vllm_files import WEIGHTS_FILE, write_weights
from imagine_opd.rollout.vllm_inputs import EngineOutput, EngineRequest
from imagine_opd.types import ViewConfig


@dataclass(frozen=True, slots=True)
class ColocateSettings:
    """What `vllm.LLM` is built with. dtype: of the engine's weights. temperature: what rollouts are sampled at."""

    dtype: str
    temperature: float = 1.0
    gpu_memory_utilization: float = 0.3
    tensor_parallel_size: int = 1
    max_model_length: int | None = None
    model_impl: str = "vllm"
    enable_sleep_mode: bool = False


class ColocateBackend:
    """A `VLLMBackend` whose engine shares this process and its device.

    The engine is built from a folder with the model's config, processor and weights; from then on weights are handed
    over in memory. With several GPUs, whose workers are processes of their own, they go through a file.
    """

    def __init__(
        self, processor: Any, view_config: ViewConfig, settings: ColocateSettings, read_weights: ReadWeights
    ) -> None:
        self.processor = processor
        self.view_config = view_config
        self.settings = settings
        self.read_weights = read_weights
        self._folder: Path | None = None
        self._llm: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights."""
        dtype: torch.dtype = getattr(torch, self.settings.dtype)
        return dtype

    def start(self, model: Any) -> None:
        """See `VLLMBackend.start`. Raises `ConfigError` where vLLM is not installed."""
        vllm = import_vllm()
        folder = self._folder = Path(tempfile.mkdtemp(prefix="imagine-opd-vllm-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        on_cpu = get_device(model).type == "cpu"
        write_model_folder(model, self.processor, self.view_config, folder, untie=on_cpu)
        # Not "dummy" weights: vLLM fills what normalises the pixels with noise too, and no reload puts that right.
        write_weights(self.read_weights(model), folder, self.dtype)
        with _keeping_random_state():  # vLLM seeds the process
            try:
                self._llm = vllm.LLM(**make_engine_arguments(self.settings, folder, on_cpu))
            except (ValueError, RuntimeError) as error:
                raise EngineError(f"vLLM cannot be started for {type(get_base(model)).__name__}: {error}") from error
        (folder / WEIGHTS_FILE).unlink()

    def send_weights(self, model: Any) -> bool:
        """See `VLLMBackend.send_weights`."""
        weights = self.read_weights(model)
        if self.settings.tensor_parallel_size > 1:
            assert self._folder is not None
            write_weights(weights, self._folder, self.dtype)
            arguments: dict[str, Any] = {"weights_path": str(self._folder)}
        else:
            arguments = {"weights_iterator": iter(weights.items())}
        with torch.no_grad():
            self._llm.collective_rpc("reload_weights", kwargs=arguments)
        return True

    def complete(
        self, requests: Sequence[EngineRequest], params: Sequence[dict[str, Any]], salt: str
    ) -> list[EngineOutput]:
        """See `VLLMBackend.complete`."""
        vllm = import_vllm()
        prompts = [
            {
                "prompt_token_ids": list(request.token_ids),
                "multi_modal_data": {"image": [Image.fromarray(image) for image in request.images]},
                # vLLM keeps what it made of an image under its name: other weights make other features of it.
                "multi_modal_uuids": {"image": [f"{salt}-{name}" for name in request.image_names]},
                "cache_salt": salt,
            }
            for request in requests
        ]
        found = self._llm.generate(prompts, [vllm.SamplingParams(**fields) for fields in params], use_tqdm=False)
        return [read_output(output) for output in found]

    def sleep(self) -> None:
        """See `VLLMBackend.sleep`. Level 2: the weights are sent again anyway, and need no copy on the CPU."""
        self._llm.sleep(level=2)

    def wake(self) -> None:
        """See `VLLMBackend.wake`."""
        self._llm.wake_up()


def import_vllm() -> Any:
    """The `vllm` package, set to keep its engine in this process. Raises `ConfigError` where it is not installed."""
    # Before the import: weights are handed to the engine as tensors, which only works in one process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"use_vllm=True needs the package vllm ({error}): pip install 'imagine-opd[vllm]', or set use_vllm=False"
        ) from error
    return vllm


def make_engine_arguments(settings: ColocateSettings, folder: Path, on_cpu: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    return {
        "model": str(folder),
        "dtype": settings.dtype,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_length or -1,  # -1: what fits
        "model_impl": settings.model_impl,
        "enable_sleep_mode": settings.enable_sleep_mode,
        "limit_mm_per_prompt": {"video": 0},
        # Raw: before temperature and shaping. Processed: after both, which is the same as between where only the
        # temperature shapes; banned tokens, which a student gives next to nothing, are left out of the sum.
        "logprobs_mode": "raw_logprobs" if settings.temperature == 1.0 else "processed_logprobs",
        "generation_config": "vllm",  # not the checkpoint's sampling defaults
        "enforce_eager": on_cpu,  # compiling takes minutes there and gives nothing
    }


def write_model_folder(model: Any, processor: Any, view_config: ViewConfig, folder: Path, untie: bool) -> None:
    """Config and processor of the model as vLLM loads them.

    The processor gets a pixel budget that leaves every image of the run as it is: some sizes that a resize gives would
    be changed by a second one, where the least and the most pixels lie close together.
    untie: the head apart from the embeddings, whose weights vLLM packs on CPUs and reloads only where they are its own.
    """
    config = copy.deepcopy(get_base(model).config)
    if untie:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    smallest = (view_config.patch_size * view_config.merge_size) ** 2
    budget = {"shortest_edge": smallest, "longest_edge": max(view_config.max_pixels, 2 * view_config.min_pixels)}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            fields = json.loads(path.read_text(encoding="utf-8"))
            image_fields = fields.get("image_processor", fields if "image_processor_type" in fields else None)
            if image_fields is not None:
                image_fields["size"] = budget
                for old in ("min_pixels", "max_pixels"):
                    image_fields.pop(old, None)
                path.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def read_output(output: Any) -> EngineOutput:
    """One of vLLM's `RequestOutput` with one completion."""
    completion = output.outputs[0]
    token_ids = tuple(int(token) for token in completion.token_ids)
    logprobs = tuple(
        float(found[token].logprob) for token, found in zip(token_ids, completion.logprobs or (), strict=False)
    )
    return EngineOutput(tuple(output.prompt_token_ids), token_ids, logprobs)


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
