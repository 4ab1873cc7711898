"""Compile every kernel variant for GPUs that need not be there, and print what each takes as JSON: run as a script.

With `--write` the committed report is written anew.

The launch functions run on tensors without memory, with recorders in place of the kernels, so what is compiled is what
a launch asks for. A process of its own, since kernels imported under Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from imagine_opd.kernels import launches_triton as launches
from imagine_opd.kernels import tuning
from imagine_opd.kernels.arguments_triton import COMPILE_OPTIONS
from imagine_opd.kernels.slabs import SLAB_COLUMNS
from imagine_opd.kernels.types import STATE_ROWS, TABLE_ROWS, Logits, StatsSpec

CAPABILITIES = (90, 80)
REPORT = Path(__file__).parents[2] / "benches/baselines/compiled_kernels.json"
ROWS = 8192
HIDDEN = 2560
VOCABULARY = 151936
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.bool: "u1",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was launched with."""

    kernel: Any
    variant: str
    arguments: dict[str, Any]
    num_warps: int
    options: dict[str, Any]


class Recorder:
    """Stands in for a kernel: `recorder[grid](...)` notes the launch."""

    def __init__(self, kernel: Any, launches_made: list[Launch]) -> None:
        self.kernel, self.launches_made, self.variant = kernel, launches_made, ""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def record(*args: Any, num_warps: int, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in COMPILE_OPTIONS}
            names = list(inspect.signature(self.kernel.fn).parameters)
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            self.launches_made.append(Launch(self.kernel, Recorder.current, arguments, num_warps, options))

        return record

    current = ""


def record_launches() -> list[Launch]:
    """Every variant that users reach: dtypes, vocabularies, modes, policies, adjustments."""
    made: list[Launch] = []
    for name in list(vars(launches)):
        if name.endswith("_kernel"):
            setattr(launches, name, Recorder(getattr(launches, name), made))
    for name, run in list_variants():
        Recorder.current = name
        run()
    return made


def list_variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, table, weights = empty(ROWS, dtype=torch.int64), empty(TABLE_ROWS, ROWS), empty(5, ROWS)
    mask = empty(ROWS, dtype=torch.bool)
    bf16, fp32 = torch.bfloat16, torch.float32
    kl, policy_gradient = (False, True, False, False, False), (True, False, False, False, False)
    standard = (True, True, True, False, False)

    for dtype, vocabulary in product((bf16, fp32), (59, 32000, VOCABULARY, 151669)):
        logits = Logits(empty(ROWS, vocabulary, dtype=dtype))
        yield (
            f"{TYPES[dtype]} V={vocabulary}",
            lambda s=logits, v=vocabulary: (
                launches.compute_stats(s, s, ids, StatsSpec(), v),
                launches.compute_gradient(s, s, ids, table, weights, standard, StatsSpec(), v, s.values_NV),
                launches.compute_both(s, s, ids, weights, kl, StatsSpec(), v, s.values_NV),
            ),
        )

    for dtype in (bf16, fp32):
        s = Logits(empty(ROWS, VOCABULARY, dtype=dtype))
        chunk = empty(ROWS, VOCABULARY, dtype=bf16)
        adjusted = Logits(s.values_NV, empty(VOCABULARY, dtype=bf16), 0.5, 30.0)
        for uses, name in ((kl, "KL"), (policy_gradient, "log-prob")):
            yield (
                f"{TYPES[dtype]} {name} to bf16",
                lambda s=s, u=uses, c=chunk: launches.compute_gradient(
                    s, s, ids, table, weights, u, StatsSpec(), VOCABULARY, c
                ),
            )
        for spec, name in (
            (StatsSpec(temperature=0.7, teacher_temperature=1.1), "two temperatures"),
            (StatsSpec(forward_kl=True, jsd_beta=0.5, exact_kl=True), "every divergence"),
            (StatsSpec(missing="drop", forward_kl=True), "drop"),
            (StatsSpec(missing="inf"), "inf"),
        ):
            uses = (True, True, True, spec.forward_kl, spec.jsd_beta > 0)
            yield (
                f"{TYPES[dtype]} {name}",
                lambda s=s, spec=spec, u=uses: (
                    launches.compute_stats(s, s, ids, spec, VOCABULARY, mask),
                    launches.compute_gradient(s, s, ids, table, weights, u, spec, VOCABULARY, s.values_NV),
                ),
            )
        yield (
            f"{TYPES[dtype]} bias, scale, softcap",
            lambda s=adjusted: (
                launches.compute_stats(s, s, ids, StatsSpec(), VOCABULARY),
                launches.compute_gradient(s, s, ids, table, weights, kl, StatsSpec(), VOCABULARY, s.values_NV),
            ),
        )
        yield (
            f"{TYPES[dtype]} no teacher",
            lambda s=s: (
                launches.compute_stats(s, None, ids, StatsSpec(), VOCABULARY),
                launches.compute_both(s, None, ids, weights, policy_gradient, StatsSpec(), VOCABULARY, s.values_NV),
            ),
        )
        yield f"{TYPES[dtype]} split", lambda s=s: launch_split(s, ids)
        slab = Logits(empty(ROWS, SLAB_COLUMNS, dtype=dtype))
        yield (
            f"{TYPES[dtype]} slab",
            lambda s=slab: launches.compute_state(s, s, ids, StatsSpec(), SLAB_COLUMNS, SLAB_COLUMNS),
        )
    padded = Logits(empty(ROWS, 151680, dtype=fp32))
    yield (
        "fp32 V=151669 padded",
        lambda: (
            launches.compute_stats(padded, padded, ids, StatsSpec(jsd_beta=0.5), 151669),
            launches.compute_gradient(
                padded, padded, ids, table, weights, standard, StatsSpec(), 151669, empty(ROWS, 151680, dtype=bf16)
            ),
        ),
    )
    row_ids, row = empty(1, dtype=torch.int64), Logits(empty(1, VOCABULARY, dtype=bf16))
    yield (
        "bf16 one row",
        lambda: (
            launch_split(row, row_ids),
            launches.compute_gradient(
                row, row, row_ids, empty(TABLE_ROWS, 1), empty(5, 1), standard, StatsSpec(), VOCABULARY, row.values_NV
            ),
            launches.compute_both(row, row, row_ids, empty(5, 1), kl, StatsSpec(), VOCABULARY, row.values_NV),
            launches.look_again(row, row, empty(TABLE_ROWS, 1), StatsSpec(exact_kl=True), VOCABULARY),
        ),
    )
    yield "merge", lambda: launches.finish_state(empty(8, STATE_ROWS, ROWS), ids, StatsSpec(), VOCABULARY)
    yield (
        "scale",
        lambda: (
            launches.scale(empty(VOCABULARY, HIDDEN, dtype=fp32), empty()),
            launches.scale(empty(VOCABULARY, HIDDEN, dtype=bf16), empty()),
        ),
    )


def launch_split(side: Logits, ids: torch.Tensor) -> None:
    """As on a GPU that rows alone would not fill."""
    choose, tuning.choose_splits = tuning.choose_splits, lambda *_: 4
    try:
        launches.compute_stats(side, side, ids, StatsSpec(), VOCABULARY)
    finally:
        tuning.choose_splits = choose


def compile_launch(launch: Launch, capability: int) -> dict[str, object]:
    """Compile as the launch would, then ask the assembler for registers and spills."""
    kernel = launch.kernel
    names = list(inspect.signature(kernel.fn).parameters)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], object] = {}
    for index, parameter in enumerate(inspect.signature(kernel.fn).parameters.values()):
        value = launch.arguments[parameter.name]
        if "constexpr" in str(parameter.annotation):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    assert set(signature) == set(names)
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, **launch.options},
    )
    ptx = compiled.asm["ptx"]
    architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True)
    report = log.stdout + log.stderr
    return {
        "kernel": kernel.fn.__name__,
        "variant": launch.variant,
        "architecture": f"sm_{capability}",
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "shared_bytes": compiled.metadata.shared,
        "warps": launch.num_warps,
        "wide_loads": bool(re.search(r"ld\.global[\w.:]*\.v[48]|cp\.async\.cg[\w.]* .*0x10", ptx)),
    }


def main() -> None:
    made = record_launches()
    rows = [compile_launch(launch, capability) for capability in CAPABILITIES for launch in made]
    if sys.argv[1:] == ["--write"]:
        text = ",\n".join(json.dumps(row) for row in rows)
        REPORT.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{text}\n]}}\n', encoding="utf-8")
    else:
        json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
