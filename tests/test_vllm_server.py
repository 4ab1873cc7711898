"""vLLM over HTTP against a small server that speaks its protocol: payloads, probes, weight files, error sentences."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagine_opd.errors import EngineError
from imagine_opd.rollout import vllm_http
from imagine_opd.rollout.vllm_inputs import EngineOutput, EngineRequest
from imagine_opd.rollout.vllm_server import GENERATE, ServerBackend, ServerSettings

VOCABULARY = 57


class Server:
    """Answers as `vllm serve` does. `requests` holds what came, `missing` the paths that it lacks."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict]] = []
        self.missing: set[str] = set()
        self.vocabulary, self.logprob, self.delay_s = VOCABULARY, -0.25, 0.0
        self.max_model_length = 256
        self.models: object = None
        """What `/v1/models` answers; `None`: what vLLM does."""
        self.changes: dict[str, object] = {}
        """Of a completion's choice."""
        self.raw: bytes | None = None
        """Sent in place of an HTTP answer."""
        self.headers: list[tuple[str, str]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, {}))
                if outer.raw is not None:
                    self.wfile.write(outer.raw)
                    return
                models = {"data": [{"id": "tiny", "max_model_len": outer.max_model_length}]}
                self.answer(outer.status, models if outer.models is None else outer.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body))
                time.sleep(outer.delay_s)
                if self.path in outer.missing:
                    return self.answer(404, {"detail": "Not Found"})
                if self.path != GENERATE:
                    return self.answer(200, {})
                if max(body["token_ids"]) >= outer.vocabulary:
                    return self.answer(400, {"error": "token id is out of vocabulary"})
                ids = [9, 2][: body["sampling_params"]["max_tokens"]]
                content = [{"token_id": token, "logprob": outer.logprob} for token in ids]
                choice = {"token_ids": ids, "logprobs": {"content": content}, **outer.changes}
                return self.answer(200, {"choices": [choice], "prompt_token_ids": body["token_ids"]})

            def answer(self, status: int, body: object) -> None:
                self.send_response(status)
                for header in outer.headers:
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def make_backend(server: Server, is_main: bool = True, **fields) -> ServerBackend:
    settings = ServerSettings(url=server.url, timeout_s=5.0, **fields)
    return ServerBackend(settings, lambda model: model.state_dict(), is_main, lambda: None)


def test_request_carries_token_ids_and_the_image_without_loss(server):
    image = np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3)
    backend = make_backend(server)
    backend.model_name, backend.vocabulary = "tiny", VOCABULARY
    request = EngineRequest((7, 3, 5, 4), (image,), ("name",))
    params = {"max_tokens": 3, "seed": 8, "logit_bias": {5: -100.0}, "detokenize": False, "stop_token_ids": None}
    outputs = backend.complete([request, request], [params, {**params, "seed": 9}], "salt")
    assert outputs == [EngineOutput((7, 3, 5, 4), (9, 2), (-0.25, -0.25))] * 2
    bodies = sorted((body for _, body in server.requests), key=lambda body: body["sampling_params"]["seed"])
    (part,) = bodies[0].pop("content_parts")
    sampling = {"max_tokens": 3, "seed": 8, "logit_bias": {"5": -100.0}, "detokenize": False}
    assert bodies[0] == {
        "model": "tiny", "token_ids": [7, 3, 5, 4], "sampling_params": sampling, "cache_salt": "salt",
        "return_token_ids": True,
    }  # fmt: skip
    assert (part["type"], part["uuid"]) == ("image_url", "salt-name")
    head, encoded = part["url"].split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), image)


def test_weights_are_written_whole_and_the_server_told_to_read_them(server, tmp_path):
    model = torch.nn.Linear(3, 2)
    assert make_backend(server, sync_folder=tmp_path / "new", dtype=torch.bfloat16).send_weights(model)
    command = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "new")}}
    assert server.requests == [("/collective_rpc", command)]
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(written["weight"], model.weight.detach().to(torch.bfloat16))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model.safetensors"]


def test_a_process_that_is_not_the_main_one_sends_nothing(server, tmp_path):
    backend = make_backend(server, is_main=False, sync_folder=tmp_path / "new")
    backend.read_weights = lambda model: pytest.fail("the whole model was copied for nothing")
    assert backend.send_weights(torch.nn.Linear(3, 2))
    backend.sleep()
    backend.wake()
    assert server.requests == []
    assert not (tmp_path / "new").exists()


def test_a_server_that_keeps_its_weights_is_not_told_to_reload(server):
    backend = make_backend(server)
    assert backend.send_weights(torch.nn.Linear(3, 2)) is False
    backend.sleep()
    assert [path for path, _ in server.requests] == ["/sleep?level=1"]


def test_start_finds_model_vocabulary_and_log_probs(server, tiny):
    backend = make_backend(server)
    backend.start(tiny.model)
    assert (backend.model_name, backend.max_model_length) == ("tiny", 256)
    assert [body["token_ids"] for path, body in server.requests if path == GENERATE] == [
        [VOCABULARY - 1],
        [VOCABULARY],
        [0],
    ]


@pytest.mark.parametrize(
    ("changes", "fields", "message"),
    [
        ({"missing": {GENERATE}}, {}, "vllm >= 0.32 with --enable-scale-out"),
        ({"vocabulary": 50}, {}, "refuses token 56 of our vocabulary of 57"),
        ({"vocabulary": 60}, {}, "larger than our 57"),
        ({}, {"temperature": 0.7}, "--logprobs-mode processed_logprobs"),
        ({"logprob": 0.0}, {"is_shaped": True}, "--logprobs-mode raw_logprobs"),
    ],
    ids=["old", "smaller", "larger", "raw", "processed"],
)
def test_a_server_that_does_not_fit_is_refused_with_the_fix(server, tiny, changes, fields, message):
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(EngineError, match=message):
        make_backend(server, **fields).start(tiny.model)


def test_processed_log_probs_fit_a_temperature(server, tiny):
    server.logprob = 0.0
    make_backend(server, temperature=0.7).start(tiny.model)


def test_a_server_without_weight_sync_is_refused_with_both_ways_out(server, tmp_path):
    server.missing = {"/collective_rpc"}
    with pytest.raises(EngineError, match=r"VLLM_SERVER_DEV_MODE=1.*vllm_server_sync='none'"):
        make_backend(server, sync_folder=tmp_path).send_weights(torch.nn.Linear(3, 2))


def test_an_unreachable_server_is_named_with_its_url_and_timeout(tiny):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    backend = ServerBackend(ServerSettings(url, 5.0), lambda model: {}, True, lambda: None)
    with pytest.raises(EngineError, match=rf"answers at {url}/v1/models .*waited up to 5 s"):
        backend.start(tiny.model)


def test_a_slow_server_is_given_up_after_the_timeout(server, tiny):
    server.delay_s = 1.0
    backend = ServerBackend(ServerSettings(server.url, 0.2), lambda model: {}, True, lambda: None)
    with pytest.raises(EngineError, match=r"timed out; waited up to 0.2 s"):
        backend.start(tiny.model)


def logprobs_of(*values: object) -> dict:
    return {"logprobs": {"content": [{"logprob": value} for value in values]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [9, VOCABULARY]}, "has the token 57: expected whole numbers below 57"),
        ({"token_ids": [9, -1]}, "has the token -1"),
        ({"token_ids": ["9", 2]}, "has the token '9'"),
        ({"token_ids": [True, 2]}, "has the token True"),
        ({"token_ids": [9.5, 2]}, r"has the token 9\.5"),
        ({"token_ids": [[9], 2]}, r"has the token \[9\]"),
        ({"token_ids": 9}, "lacks"),
        ({"token_ids": [9, 2, 2, 2]}, "has 4 tokens, and 3 were asked for"),
        (logprobs_of(-0.25, float("nan")), "has the log-prob nan"),
        (logprobs_of(-0.25, float("-inf")), "has the log-prob -inf"),
        (logprobs_of(-0.25, 0.5), r"has the log-prob 0\.5.*--logprobs-mode"),
        (logprobs_of(-0.25, "-0.25"), "has the log-prob '-0.25'"),
        (logprobs_of(None, -0.25), "has the log-prob None"),
        ({"logprobs": {"content": [None, None]}}, "lacks"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_answers_that_are_no_tokens_of_ours_are_refused_by_what_came(server, changes, message):
    backend = make_backend(server)
    backend.model_name, backend.vocabulary = "tiny", VOCABULARY
    server.changes = changes
    with pytest.raises(EngineError, match=message):
        backend.complete([EngineRequest((7, 3), (), ())], [{"max_tokens": 3}], "salt")


def test_rounding_above_zero_is_a_log_prob(server):
    backend = make_backend(server)
    backend.model_name, backend.vocabulary = "tiny", VOCABULARY
    server.logprob = 5e-4
    (output,) = backend.complete([EngineRequest((7, 3), (), ())], [{"max_tokens": 1}], "salt")
    assert output == EngineOutput((7, 3), (9,), (5e-4,))


def test_a_server_without_log_probs_is_refused(server, tiny):
    server.changes = {"logprobs": None}
    with pytest.raises(EngineError, match="gives no log-probs"):
        make_backend(server).start(tiny.model)


@pytest.mark.parametrize(
    "models",
    [{"error": "no"}, {"data": []}, [], {"data": [{}]}, {"data": [{"id": 3}]}, {"data": ["tiny"]}, "tiny", 3,
     {"data": [{"id": "tiny", "max_model_len": "256"}]}],
    ids=str,
)  # fmt: skip
def test_a_list_without_a_model_is_refused(server, tiny, models):
    server.models = models
    with pytest.raises(EngineError, match="/v1/models names no model: .*vllm serve MODEL"):
        make_backend(server).start(tiny.model)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 90\r\n\r\n{}", "cut off, 88 bytes are missing"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", "no vLLM server answers.*IncompleteRead"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no vLLM server answers.*SSH"),
        (b"", "no vLLM server answers"),
        (b"HTTP/1.0 500 Oops\r\nContent-Length: 90\r\n\r\nbad", "answered 500"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 200_000, "something else than JSON"),
        (b"HTTP/1.0 200 OK\r\n\r\n\xff", "something else than JSON"),
    ],
    ids=["length", "chunked", "ssh", "nothing", "error", "nested", "bytes"],
)
def test_what_is_no_whole_answer_is_an_error_of_the_engine(server, tiny, raw, message):
    server.raw = raw
    with pytest.raises(EngineError, match=message):
        make_backend(server).start(tiny.model)


def test_an_answer_without_end_is_not_read_to_it(server, tiny, monkeypatch):
    monkeypatch.setattr(vllm_http, "MOST_BYTES", 1000)
    server.models = ["x" * 1000]
    with pytest.raises(EngineError, match="answered more than 1000 bytes"):
        make_backend(server).start(tiny.model)


def test_the_environments_proxy_is_not_asked(server, tiny, monkeypatch):
    other = Server()
    monkeypatch.setenv("http_proxy", other.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vllm_http, "_OPENER", vllm_http.make_opener())  # which would read the environment
    try:
        make_backend(server).start(tiny.model)
    finally:
        other.close()
    assert server.requests
    assert other.requests == []


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_is_not_followed(server, tiny, status):
    other = Server()
    server.status, server.headers = status, [("Location", f"{other.url}/v1/models")]
    try:
        with pytest.raises(EngineError, match=rf"answered {status}: a redirect to {other.url}/v1/models"):
            make_backend(server).start(tiny.model)
    finally:
        other.close()
    assert other.requests == []


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_sent(server, tiny):
    backend = make_backend(server)
    backend.max_model_length = 20
    with pytest.raises(EngineError, match=r"takes 20 tokens.*--max-model-len"):
        backend.complete([EngineRequest((7,) * 10, (), ())], [{"max_tokens": 11}], "salt")
    assert server.requests == []


def test_weights_that_cannot_be_written_name_the_folder(server, tmp_path):
    from imagine_opd.errors import OutputError

    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set vllm_sync_dir"):
        make_backend(server, sync_folder=Path(tmp_path, "file")).send_weights(torch.nn.Linear(3, 2))
