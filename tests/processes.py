"""Runs a function or a command in several processes, under a time limit that ends them all.

    answers = run_in_processes(check_something, folder)   # of each rank, in order; any pickled value
    text = run_command(["-m", "accelerate.commands.launch", ...])

Each start costs some seconds of imports: put several checks into one function, and assert on what it returned.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
_TAIL_CHARACTERS = 6000


def run_in_processes(
    function: Callable[..., Any],
    *args: Any,
    count: int = 2,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """`function(*args)` on `count` ranks: what each returned, in order of rank.

    `function` stands at the top of a module in `tests/` and opens the process group itself (`PartialState(cpu=True)`,
    or arguments of a Trainer). When a rank fails or time is up, all are killed and each one's output is in the error.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder, "call.pkl")
        call.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        port = str(find_free_port())
        ranks = []
        for rank in range(count):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            ranks.append(
                _start(
                    [str(TESTS / "processes.py"), folder, str(rank)],
                    Path(folder, f"output{rank}.txt"),
                    {**{name: str(value) for name, value in places.items()}, "MASTER_ADDR": "127.0.0.1"},
                    {"MASTER_PORT": port, **(env or {})},
                )
            )
        _wait(ranks, timeout_s, [Path(folder, f"output{rank}.txt") for rank in range(count)])
        return [pickle.loads(Path(folder, f"answer{rank}.pkl").read_bytes()) for rank in range(count)]


def run_command(arguments: Sequence[str], timeout_s: float = 120, env: Mapping[str, str] | None = None) -> str:
    """What `python *arguments` printed; it and all it started are killed when it fails or time is up."""
    return run_commands([arguments], timeout_s, env)[0]


def run_commands(
    commands: Sequence[Sequence[str]], timeout_s: float = 120, env: Mapping[str, str] | None = None
) -> list[str]:
    """As `run_command`, several at once: what each printed. When one fails, all are killed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"output{place}.txt") for place in range(len(commands))]
        started = [
            _start(list(arguments), output, env or {}) for arguments, output in zip(commands, outputs, strict=True)
        ]
        _wait(started, timeout_s, outputs)
        return [output.read_text(errors="replace") for output in outputs]


def find_free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _start(arguments: list[str], output: Path, *env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    import imagine_opd

    package = str(Path(imagine_opd.__file__).parents[1])
    paths = [package, str(TESTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for more in env:
        settings.update(more)
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts can be ended with it
        )


def _wait(started: Sequence[subprocess.Popen[bytes]], timeout_s: float, outputs: Sequence[Path]) -> None:
    give_up = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                time.sleep(1)  # the others may be about to say why, too
                break
            if time.monotonic() > give_up:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if any(code != 0 for code in codes):
        ends = {None: "ended by this test" if any(codes) else f"did not end within {timeout_s} s", 0: "ended well"}
        texts = [
            f"--- process {place} {ends.get(code, f'ended with {code}')}\n"
            + output.read_text(errors="replace")[-_TAIL_CHARACTERS:]
            for place, (code, output) in enumerate(zip(codes, outputs, strict=True))
        ]
        raise AssertionError("\n".join(texts))


def _run_rank(folder: Path, rank: int) -> None:
    """The other side of `run_in_processes`."""
    module, name, args = pickle.loads(Path(folder, "call.pkl").read_bytes())
    function = getattr(importlib.import_module(module), name)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    answer = function(*args)
    Path(folder, f"answer{rank}.pkl").write_bytes(pickle.dumps(answer))
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), int(sys.argv[2]))
