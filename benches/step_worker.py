"""One peer of the step bench in a process of its own: commands in on standard input, one JSON line each out.

    python -m benches.step_worker --peer ours --case cpu --folder DIR

`{"do": "step"}` runs one optimizer step and answers with its seconds, in all and by stage, and its loss. With
`"record": FILE` the completions, the loss and some gradients are written there; `"completions": FILE` takes those of
another peer's record instead of sampling; `"memory": true` counts the peak. `{"do": "stop"}` ends the process.
A peer's memory is its own this way, its packages too, and it can be held still while another works.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benches.step_cases import StepCase, build_model, build_processor, make_rows
from benches.step_turns import MOST_STEPS, Clock, Link, Meter, find_device, pick_gradients

PARENT_DEATH_SIGNAL = 1
"""What Linux calls PR_SET_PDEATHSIG."""


def run_plain(case: StepCase, link: Link, folder: Path, options: argparse.Namespace) -> None:
    """The loop of `step_plain`."""
    from benches.step_plain import PlainLoop

    device = find_device()
    processor = build_processor(case)
    model = build_model(case, processor, device)
    teacher = build_model(case, processor, device).requires_grad_(False).eval() if case.trains == "full" else None
    loop = PlainLoop(case, model, teacher, processor, options.keeps)
    rows = make_rows(case, folder, MOST_STEPS)
    # The step that is compared takes our completions: without this the first timed one would be the first to generate.
    loop.generate(loop.make_inputs(rows[: case.rows])[0])
    meter, clock, number = Meter(device), Clock(device), 0
    link.answer(ready=True)
    while (command := link.read())["do"] == "step":
        part = rows[number * case.rows : (number + 1) * case.rows]
        given = torch.load(command["completions"])["completion_ids_BT"] if "completions" in command else None
        kept: dict[str, Any] = {}
        loop.before_update = lambda: kept.update(gradients=pick_gradients(model)) if "record" in command else None  # noqa: B023
        if command.get("memory"):
            meter.start()
        clock.start()
        loss, ids_BT = loop.step(part, clock.stage, given)
        taken = clock.stop()
        number += 1
        if "record" in command:
            torch.save({"completion_ids_BT": ids_BT.cpu(), "loss": loss, **kept}, command["record"])
        memory = meter.read() if command.get("memory") else {}
        link.answer(loss=loss, tokens=ids_BT.numel(), **taken, **memory)


def run_ours(case: StepCase, link: Link, folder: Path, options: argparse.Namespace) -> None:
    """`ImagineOPDTrainer` as it is."""
    from benches.step_ours import run

    run(case, link, folder)


def run_trl(case: StepCase, link: Link, folder: Path, options: argparse.Namespace) -> None:
    """TRL's `DistillationTrainer`."""
    from benches.step_trl import run

    run(case, link, folder)


PEERS: dict[str, Callable[[StepCase, Link, Path, argparse.Namespace], None]] = {
    "ours": run_ours,
    "plain": run_plain,
    "trl": run_trl,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--case", type=json.loads, required=True, help="the fields of a StepCase as JSON")
    parser.add_argument("--folder", type=Path, required=True, help="for pictures and the run's folder")
    parser.add_argument("--keeps", choices=("all", "completion"), default="all", help="logits of the plain peer")
    options = parser.parse_args(arguments)
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)  # one that is stopped would stay for ever
    fields = {**options.case, "picture": tuple(options.case["picture"])}
    link = Link()
    find_device()
    try:
        PEERS[options.peer](StepCase(**fields), link, options.folder, options)
    except LookupError as reason:
        link.answer(left_out=str(reason.args[0]))
        link.read()
    return 0


def pack_case(case: StepCase) -> str:
    """What `--case` takes."""
    return json.dumps(dataclasses.asdict(case))


if __name__ == "__main__":
    sys.exit(main())
