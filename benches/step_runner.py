"""The step bench's turns: a case and its peers in; equal losses and gradients asserted, then seconds and memory out.

    python -m benches.step_runner --case cpu --peer ours plain --rounds 3 --trains lora

Each peer is a process of its own (`step_worker`) that holds still, stopped by a signal, while another has its turn.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benches.step_cases import CASES, StepCase, make_case
from benches.step_worker import pack_case
from benches.table import OURS

ROOT = Path(__file__).resolve().parents[1]

LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Relative, of the loss; both sides sum in fp32, in another order."""
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""|ours - theirs| / |theirs| of a parameter's gradient; in bf16 that of a KL between close models is a difference of
nearly equal numbers."""

PEER_OPTIONS: dict[str, tuple[str, ...]] = {
    "ours": ("--peer", "ours"),
    "plain": ("--peer", "plain"),
    "plain, completion logits": ("--peer", "plain", "--keeps", "completion"),
    "trl": ("--peer", "trl"),
}


class PeerError(RuntimeError):
    """A peer's process has ended, or its answer is not what ours is."""


class PeerMissingError(PeerError):
    """A peer that cannot run here, and why."""


class Peer:
    """A worker's process. It runs between a command and its answer only."""

    def __init__(self, name: str, case: StepCase, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        command = [sys.executable, "-m", "benches.step_worker", *PEER_OPTIONS[name]]
        command += ["--case", pack_case(case), "--folder", str(folder)]
        self.log = (folder / f"{name}.log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(os.environ, **(environment or {})),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def wait(self) -> dict[str, Any]:
        """The next answer; after it the process is stopped."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise PeerError(f"{self.name} has ended: {self.log.read().strip()[-1500:]}")
        self.process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "left_out" in answer:
            raise PeerMissingError(answer["left_out"])
        return answer

    def step(self, **command: Any) -> dict[str, Any]:
        """One optimizer step."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"do": "step", **command}) + "\n")
        self.process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                pipe.close()


@dataclass
class Measured:
    """One peer's answers over the rounds: seconds of wall time and of CPU time, and the peak of its memory."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    peak_mib: float = 0.0
    held_mib: float = 0.0

    @property
    def tokens(self) -> int:
        """Of all completions of a step, the last one's."""
        return int(self.answers[-1]["tokens"])

    def read_step_s(self, cpu: bool = False) -> float:
        """Median of the whole step."""
        return statistics.median(answer["cpu_s" if cpu else "seconds"] for answer in self.answers)

    def read_stage_s(self, name: str, cpu: bool = False) -> float:
        """Median of a stage."""
        return statistics.median(answer["stages_cpu" if cpu else "stages"].get(name, 0.0) for answer in self.answers)

    def read_outside_s(self, cpu: bool = False) -> float:
        """Median of all but the rollout."""
        whole, stages = ("cpu_s", "stages_cpu") if cpu else ("seconds", "stages")
        return statistics.median(answer[whole] - answer[stages].get("rollout", 0.0) for answer in self.answers)

    def list_stages(self, cpu: bool = False) -> dict[str, float]:
        """Medians of all stages."""
        names = dict.fromkeys(name for answer in self.answers for name in answer["stages"])
        return {name: self.read_stage_s(name, cpu) for name in names}


@dataclass(frozen=True)
class Agreement:
    """How far a peer is from ours on the same completions."""

    loss: float
    loss_error: float
    gradient_errors: dict[str, float]


def compare_records(name: str, case: StepCase, ours: Path, theirs: Path) -> Agreement:
    """Raises `PeerError` where loss or a gradient differ by more than rounding."""
    left, right = torch.load(ours), torch.load(theirs)
    if not torch.equal(left["completion_ids_BT"], right["completion_ids_BT"]):
        raise PeerError(f"{name} was given other completions than ours")
    loss_error = abs(left["loss"] - right["loss"]) / abs(right["loss"])
    if not loss_error <= LOSS_TOLERANCE[case.dtype]:
        raise PeerError(f"{name}: loss {right['loss']:.6g}, ours {left['loss']:.6g}, apart by {loss_error:.2g}")
    errors = {}
    for parameter, gradient in right["gradients"].items():
        own = left["gradients"][parameter]
        errors[parameter] = float((own - gradient).norm() / gradient.norm())
        if not errors[parameter] <= GRADIENT_TOLERANCE[case.dtype]:
            raise PeerError(f"{name}: the gradient of {parameter} is apart by {errors[parameter]:.2g} of its norm")
    if not errors:
        raise PeerError(f"{name}: no gradient was kept")
    return Agreement(float(right["loss"]), loss_error, errors)


TimeOurs = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]
"""Runs our last step, once; pytest-benchmark puts its clock around it."""

Found = tuple[dict[str, Measured], dict[str, Agreement], dict[str, str]]


def run_peers(
    case: StepCase,
    names: Sequence[str],
    folder: Path,
    rounds: int,
    *,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
    time_ours: TimeOurs = lambda step: step(),
) -> Found:
    """Equality on the same completions first (which also warms up), then turns, then a step each for its memory.

    Gives the peers' figures, how far each is from ours, and those that cannot run here with the reason. On a GPU, whose
    memory does not hold them all, one peer ends before the next begins; nobody else works there.
    """
    found: dict[str, Measured] = {}
    agreements: dict[str, Agreement] = {}
    missing: dict[str, str] = {}
    names = sorted(names, key=lambda name: name != OURS)
    for group in [[name] for name in names] if torch.cuda.is_available() else [names]:
        with ExitStack() as stack:
            peers: dict[str, Peer] = {}
            for name in group:
                try:
                    peers[name] = stack.enter_context(closing(Peer(name, case, folder)))
                    peers[name].wait()
                except PeerMissingError as reason:
                    missing[name] = str(reason)
                    say(f"{name}: left out: {reason}")
                    del peers[name]
            for name, peer in peers.items():
                agreement = warm_up(peer, case, folder, compared=names[0] == OURS)
                if agreement is not None:
                    agreements[name] = agreement
                    worst = max(agreement.gradient_errors.values())
                    say(
                        f"{name}: loss {agreement.loss:.6g}, apart by {agreement.loss_error:.1e}, gradients {worst:.1e}"
                    )
            found |= take_turns(peers, rounds, say, time_ours)
    lengths = {name: measured.tokens for name, measured in found.items()}
    if len(set(lengths.values())) > 1:
        raise PeerError(f"peers made completions of different lengths: {lengths}")
    return found, agreements, missing


def warm_up(peer: Peer, case: StepCase, folder: Path, compared: bool) -> Agreement | None:
    """The first step: on the completions of ours, and compared with it, where ours runs as well."""
    own, theirs = folder / "ours.pt", folder / "theirs.pt"
    if peer.name == OURS:
        peer.step(record=str(own))
    elif compared:
        peer.step(record=str(theirs), completions=str(own))
        return compare_records(peer.name, case, own, theirs)
    else:
        peer.step()
    return None


def take_turns(
    peers: Mapping[str, Peer], rounds: int, say: Callable[[str], None], time_ours: TimeOurs
) -> dict[str, Measured]:
    """Every other round in the opposite order. The last step of each counts its memory, and is a round itself where
    counting changes nothing (on a GPU) or no other is asked for."""
    found = {name: Measured() for name in peers}
    counts_last = torch.cuda.is_available() or not rounds
    order = list(peers)
    for _ in range(rounds - 1 if rounds and counts_last else rounds):
        for name in order:
            found[name].answers.append(peers[name].step())
            say(f"{name}: {describe(found[name].answers[-1])}")
        order.reverse()
    for name in order:
        step = partial(peers[name].step, memory=True)
        answer = time_ours(step) if name == OURS else step()
        found[name].peak_mib, found[name].held_mib = answer["peak_mib"], answer["held_mib"]
        if counts_last:
            found[name].answers.append(answer)
        say(f"{name}: {describe(answer)}, peak {answer['peak_mib']:,.0f} MiB above {answer['held_mib']:,.0f}")
    return found


def describe(answer: Mapping[str, Any]) -> str:
    """One step's answer in a line."""
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in answer["stages_cpu"].items())
    return f"{answer['seconds']:.2f} s, CPU {answer['cpu_s']:.2f} s ({stages})"


def render(found: Mapping[str, Measured], cpu: bool) -> str:
    """Each peer's step, stages and memory, a line each; by CPU time where the device is a CPU."""
    lines = []
    for name, measured in found.items():
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in measured.list_stages(cpu).items())
        lines.append(
            f"{name}: step {measured.read_step_s(cpu):.2f} s, outside generation {measured.read_outside_s(cpu):.2f} s "
            f"({stages}); peak {measured.peak_mib:,.0f} MiB above {measured.held_mib:,.0f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="cpu")
    parser.add_argument("--peer", nargs="+", choices=PEER_OPTIONS, default=["ours", "plain"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps pictures and logs; default: a temporary one")
    for name in ("trains", "views", "cache"):
        parser.add_argument(f"--{name}")
    for name in ("crops", "new_tokens", "vocabulary", "rows", "micro_rows", "max_pixels"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = vars(parser.parse_args(arguments))
    name, names, rounds, folder = (options.pop(key) for key in ("case", "peer", "rounds", "folder"))
    case = make_case(name, **{key: value for key, value in options.items() if value is not None})
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found, _, _ = run_peers(case, names, folder, rounds)
    print(render(found, cpu=not torch.cuda.is_available()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
