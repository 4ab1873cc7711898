"""vLLM over HTTP: a server that `vllm serve` runs, asked with token ids and images as images.

Used are `/v1/models`, `/inference/v1/generate` (token ids in and out; `--enable-scale-out`) and, with
VLLM_SERVER_DEV_MODE=1, `/collective_rpc` with `reload_weights`, `/sleep` and `/wake_up`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from imagine_opd.errors import EngineError
from imagine_opd.models import find_head
from imagine_opd.pictures import Pixels
from imagine_opd.rollout.vllm import ReadWeights
from imagine_opd.rollout.vllm_files import write_weights
from imagine_opd.rollout.vllm_http import RefusedError, ask
from imagine_opd.rollout.vllm_inputs import BAN_BIAS, EngineOutput, EngineRequest

_MOST_CONNECTIONS = 64
_MOST_LOGPROB = 1e-3  # rounding
GENERATE = "/inference/v1/generate"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server is and how it gets weights.

    timeout_s: wait for an answer. sync_folder: what it reads weights from; `None`: it keeps its own. dtype: of the
    weights in the file; `None`: as they are. temperature: what rollouts are sampled at. is_shaped: other things
    than the temperature shape the draw (top-k, top-p, min-p, a penalty, suppressed tokens, a least length).
    """

    url: str
    timeout_s: float = 240.0
    sync_folder: Path | None = None
    dtype: torch.dtype | None = None
    temperature: float = 1.0
    is_shaped: bool = False


class ServerBackend:
    """A `VLLMBackend` of a server. Of several processes the main one alone sends weights and commands; all wait for it.

    is_main, wait: this process is the main one; return when all processes are here.
    """

    def __init__(
        self, settings: ServerSettings, read_weights: ReadWeights, is_main: bool, wait: Callable[[], None]
    ) -> None:
        self.settings = settings
        self.read_weights = read_weights
        self.is_main = is_main
        self.wait = wait
        self.model_name = ""
        self.max_model_length: int | None = None
        self.vocabulary = 0
        """Rows of the model's head, known from `start` on."""

    def start(self, model: Any) -> None:
        """See `VLLMBackend.start`: the server answers, and its model has our vocabulary and usable log-probs."""
        self.model_name, self.max_model_length = read_models(self._ask("/v1/models"), self.settings.url)
        self.vocabulary = len(find_head(model).weight)
        self._refuse_other_vocabulary(self.vocabulary)
        self._refuse_other_logprobs()
        self.wait()

    def send_weights(self, model: Any) -> bool:
        """See `VLLMBackend.send_weights`."""
        folder = self.settings.sync_folder
        if folder is None:
            return False
        if self.is_main:  # alone: weights that are split over processes are refused with vLLM
            write_weights(self.read_weights(model), folder, self.settings.dtype)
            self._command("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self.wait()
        return True

    def complete(
        self, requests: Sequence[EngineRequest], params: Sequence[dict[str, Any]], salt: str
    ) -> list[EngineOutput]:
        """See `VLLMBackend.complete`."""
        for request, fields in zip(requests, params, strict=True):
            self._refuse_long(request, fields["max_tokens"])
        bodies = [make_body(*pair, salt, self.model_name) for pair in zip(requests, params, strict=True)]
        if not bodies:
            return []
        with ThreadPoolExecutor(min(len(bodies), _MOST_CONNECTIONS)) as pool:
            answers = pool.map(lambda body: self._ask(GENERATE, body), bodies)
            return [
                read_answer(answer, self.vocabulary, fields["max_tokens"])
                for answer, fields in zip(answers, params, strict=True)
            ]

    def sleep(self) -> None:
        """See `VLLMBackend.sleep`. Weights that are not sent again are kept on the CPU."""
        self.wait()
        if self.is_main:
            self._command(f"/sleep?level={1 if self.settings.sync_folder is None else 2}")

    def wake(self) -> None:
        """See `VLLMBackend.wake`."""
        if self.is_main:
            self._command("/wake_up")
        self.wait()

    def _refuse_long(self, request: EngineRequest, max_tokens: int) -> None:
        # Placeholders are one token here: the rest is found by the server, whose answer then names both numbers.
        if self.max_model_length is not None and len(request.token_ids) + max_tokens > self.max_model_length:
            raise EngineError(
                f"{self.settings.url} takes {self.max_model_length} tokens of prompt and completion; a prompt of at "
                f"least {len(request.token_ids)} and max_completion_length={max_tokens} do not fit: start it with a "
                "larger --max-model-len"
            )

    def _refuse_other_vocabulary(self, size: int) -> None:
        body = {"model": self.model_name, "token_ids": [size - 1], "sampling_params": {"max_tokens": 1}}
        try:
            self._ask(GENERATE, body)
        except RefusedError as error:
            if error.status in (403, 404):
                raise EngineError(
                    f"{self.settings.url} does not offer {GENERATE} ({error.status}): start vllm >= 0.32 with "
                    "--enable-scale-out"
                ) from error
            raise EngineError(
                f"{self.settings.url} serves {self.model_name!r}, which refuses token {size - 1} of our vocabulary of "
                f"{size}: {error.text}; serve the model that is trained"
            ) from error
        try:
            self._ask(GENERATE, {**body, "token_ids": [size]})
        except RefusedError:
            return
        raise EngineError(
            f"{self.settings.url} serves {self.model_name!r}, whose vocabulary is larger than our {size}: serve the "
            "model that is trained"
        )

    def _refuse_other_logprobs(self) -> None:
        """Whether log-probs are raw is told by one token drawn from the likeliest one: after shaping it is certain."""
        # The bias: of two tokens that are likeliest alike top_k keeps both.
        fields = {"max_tokens": 1, "top_k": 1, "logit_bias": {0: -BAN_BIAS}, "logprobs": 0, "detokenize": False}
        body = {"model": self.model_name, "token_ids": [0], "sampling_params": fields}
        logprobs = read_answer(self._ask(GENERATE, body), self.vocabulary, 1).logprobs
        if not logprobs:
            raise EngineError(f"{self.settings.url} gives no log-probs of sampled tokens; expected vllm >= 0.32")
        is_raw = logprobs[0] < 0.0
        if is_raw and self.settings.temperature != 1.0:
            raise EngineError(
                f"{self.settings.url} gives log-probs before the temperature, and the run samples at "
                f"{self.settings.temperature}: start it with --logprobs-mode processed_logprobs"
            )
        if not is_raw and self.settings.is_shaped:
            raise EngineError(
                f"{self.settings.url} gives log-probs after top-k, top-p, min-p, penalties and bans, and the loss "
                "needs them before: start it with --logprobs-mode raw_logprobs"
            )

    def _command(self, path: str, body: dict[str, Any] | None = None) -> None:
        try:
            self._ask(path, body or {})
        except RefusedError as error:
            if error.status not in (404, 405):
                raise
            raise EngineError(
                f"{self.settings.url} has no {path.split('?')[0]}: start it with VLLM_SERVER_DEV_MODE=1, or set "
                "vllm_server_sync='none' and vllm_enable_sleep_mode=False to sample from the weights it has now"
            ) from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON; a GET without a body."""
        return ask(f"{self.settings.url.rstrip('/')}{path}", body, self.settings.timeout_s)


def make_body(request: EngineRequest, params: dict[str, Any], salt: str, model_name: str) -> dict[str, Any]:
    """The JSON of one completion."""
    return {
        "model": model_name,
        "token_ids": list(request.token_ids),
        "content_parts": [
            # What vLLM makes of an image it keeps under its name: other weights make other features of it.
            {"type": "image_url", "url": encode_image(image), "uuid": f"{salt}-{name}"}
            for image, name in zip(request.images, request.image_names, strict=True)
        ],
        "sampling_params": {name: value for name, value in params.items() if value is not None},
        "cache_salt": salt,
        "return_token_ids": True,
    }


def encode_image(image: Pixels) -> str:
    """The picture as a PNG in a data URL: no level is lost."""
    return _encode(image.tobytes(), image.shape[0], image.shape[1])


@lru_cache(maxsize=_MOST_CONNECTIONS)
def _encode(pixels: bytes, height: int, width: int) -> str:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_models(answer: Any, url: str) -> tuple[str, int | None]:
    """Name and longest sequence (tokens) of the first model. Raises `EngineError` for an answer that names none."""
    try:
        name, longest = answer["data"][0]["id"], answer["data"][0].get("max_model_len")
    except (KeyError, IndexError, TypeError, AttributeError):
        name = longest = None
    if not isinstance(name, str) or not (longest is None or type(longest) is int):
        raise EngineError(f"{url}/v1/models names no model: {str(answer)[:200]}; start it with `vllm serve MODEL`")
    return name, longest


def read_answer(answer: Any, vocabulary: int, max_tokens: int) -> EngineOutput:
    """The answer to one request. Raises `EngineError` for one that lacks tokens or log-probs, or whose are none."""
    try:
        choice = answer["choices"][0]
        entries = (choice["logprobs"] or {}).get("content") or []
        prompt_ids = tuple(answer.get("prompt_token_ids") or ())
        token_ids = tuple(choice["token_ids"])
        logprobs = tuple(entry["logprob"] for entry in entries)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EngineError(f"the server's answer lacks {error}: {str(answer)[:200]}; expected vllm >= 0.32") from error
    for token in (*prompt_ids, *token_ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise EngineError(
                f"the server's answer has the token {token!r:.80}: expected whole numbers below {vocabulary}, the size "
                "of our vocabulary; serve the model that is trained, with vllm >= 0.32"
            )
    if len(token_ids) > max_tokens:
        raise EngineError(
            f"the server's answer has {len(token_ids)} tokens, and {max_tokens} were asked for; expected vllm >= 0.32"
        )
    for logprob in logprobs:
        if type(logprob) not in (int, float) or not -math.inf < logprob <= _MOST_LOGPROB:
            raise EngineError(
                f"the server's answer has the log-prob {logprob!r:.80}: expected finite numbers of at most 0; start it "
                "with --logprobs-mode raw_logprobs (processed_logprobs at another temperature than 1)"
            )
    return EngineOutput(prompt_ids, token_ids, tuple(map(float, logprobs)))
