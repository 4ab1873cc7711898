"""Compile both kernels for an H100 or H200 without one, and print registers and spills as JSON: run as a script.

A process of its own, since kernels that were imported under Triton's interpreter cannot be compiled.
"""

import inspect
import json
import re
import subprocess
import tempfile
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from imagine_opd.kernels import token_stats_triton

VOCABULARIES = (59, 32000, 151936)
LOGITS = ("student_ptr", "teacher_ptr", "grad_ptr")


def compile_kernel(kernel: object, dtype: str, vocabulary: int, **flags: bool) -> dict[str, object]:
    """Compile as a launch with contiguous, 16-byte aligned logits would, then ask the assembler for its resources."""
    names = list(inspect.signature(kernel.fn).parameters)
    tile = token_stats_triton.choose_tile(vocabulary)
    constants = {"V": vocabulary, "BLOCK_V": tile.block_v, "NUM_STAGES": tile.num_stages, **flags}
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in LOGITS else "*i64" if name == "token_ids_ptr" else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("_stride"):
            signature[name] = "i32"
            if vocabulary % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.num_warps, **token_stats_triton.COMPILE_OPTIONS},
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx.name, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True)
    report = log.stdout + log.stderr
    return {
        "kernel": kernel.fn.__name__,
        "logits": dtype,
        "vocabulary": vocabulary,
        "flags": [name for name, value in flags.items() if value],
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "shared_bytes": compiled.metadata.shared,
        "warps": tile.num_warps,
    }


def main() -> None:
    every = {"HAS_LOGPROB": True, "HAS_KL": True, "HAS_ENTROPY": True}
    only_kl = {"HAS_LOGPROB": False, "HAS_KL": True, "HAS_ENTROPY": False}
    rows = []
    for dtype, vocabulary in product(("bf16", "fp32"), VOCABULARIES):
        rows.append(compile_kernel(token_stats_triton._stats_kernel, dtype, vocabulary))
        rows.append(compile_kernel(token_stats_triton._gradient_kernel, dtype, vocabulary, **every))
    rows.append(compile_kernel(token_stats_triton._gradient_kernel, "bf16", 151936, **only_kl))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
