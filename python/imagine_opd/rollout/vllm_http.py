"""One question to a vLLM server over HTTP, JSON in and out; what goes wrong on the way is an `EngineError`."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from imagine_opd.errors import EngineError

MOST_BYTES = 1 << 28
"""Of an answer: a completion takes about 200 bytes a token, a prompt 10."""
_MOST_ERROR_BYTES = 1 << 16
_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out"


class RefusedError(EngineError):
    """An HTTP error that the server itself gave."""

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"{url} answered {status}: {text[:500]}")
        self.status, self.text = status, text[:500]


class _RefuseRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Prompts, images and commands go to the server that the config names and to no other: the 3xx is an error."""


def make_opener() -> urllib.request.OpenerDirector:
    """Without a proxy: one that the environment names for the internet does not reach a server of this network."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), _RefuseRedirect)


_OPENER = make_opener()


def ask(url: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
    """The answer's JSON, `None` for an empty one; a GET without a body.

    Raises `RefusedError` for a status of the server's, `EngineError` where no whole JSON of at most `MOST_BYTES` comes.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with _OPENER.open(request, timeout=timeout_s) as answer:
            text = answer.read(MOST_BYTES + 1)
            missing = answer.length  # `read` with a size says nothing of an answer that was cut off
    except urllib.error.HTTPError as error:
        with error:
            raise RefusedError(url, error.code, _read_error(error)) from error
    except (OSError, http.client.HTTPException) as error:  # refused, unknown host, timed out, cut off, not HTTP
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise EngineError(
            f"no vLLM server answers at {url} ({reason}; waited up to {timeout_s:g} s): start it with "
            f"`{_START}`, or correct vllm_server_base_url or vllm_server_timeout"
        ) from error
    if len(text) > MOST_BYTES:
        raise EngineError(f"{url} answered more than {MOST_BYTES} bytes: it is no vLLM server; correct the address")
    if missing:
        raise EngineError(f"{url}: the answer was cut off, {missing} bytes are missing; see the server's log")
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{url} answered something else than JSON: {text[:80]!r}") from error


def _read_error(error: urllib.error.HTTPError) -> str:
    if 300 <= error.code < 400:
        return f"a redirect to {error.headers.get('Location')}, which is not followed; set the server's own address"
    try:
        return error.read(_MOST_ERROR_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as cut:
        return str(cut)
