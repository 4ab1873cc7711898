"""The door of `imagine_opd.kernels`: what it refuses, which backend it takes, what it imports."""

import subprocess
import sys

import pytest
import torch

from imagine_opd.errors import ConfigError
from imagine_opd.kernels import token_stats

S, T, Y = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((S[0], T[0], Y), r"student logits are \[3\] .*expected the same \[N, V\]"),
        ((S[None], T[None], Y), r"flatten batch and time"),
        ((S, T[:, :2], Y), r"teacher logits \[2, 2\]"),
        ((S[:, :0], T[:, :0], Y), "no columns"),
        ((S, T, Y[:1]), r"token ids are \[1\]; expected \[2\]"),
        ((S, T, Y[:, None]), r"token ids are \[2, 1\]"),
        ((S.long(), T, Y), "student logits are torch.int64; expected a floating-point"),
        ((S, T, Y.float()), "token ids are torch.float32; expected an integer"),
        ((S, T, Y.bool()), "token ids are torch.bool"),
        ((S, T.to("meta"), Y), "student logits on cpu, token ids on cpu, teacher logits on meta: expected one device"),
        ((S, T, Y, 0.0), "temperature is 0.0; expected a finite number above 0"),
        ((S, T, Y, -1.0), "temperature is -1.0"),
        ((S, T, Y, float("nan")), "temperature is nan"),
        ((S, T, Y, float("inf")), "temperature is inf"),
        ((S, T, Y, 1.0, "cuda"), "backend is 'cuda'; expected one of 'auto', 'triton', 'reference'"),
        ((S.double(), T, Y, 1.0, "triton"), "backend 'triton' takes float32, bfloat16 and float16"),
    ],
)
def test_refuses_what_does_not_fit(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        token_stats(*arguments)
    assert isinstance(caught.value, ValueError)


def test_triton_on_cpu_tensors_is_refused_outside_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="logits are on cpu; backend 'triton' needs a CUDA device"):
        token_stats(S, T, Y, backend="triton")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_takes_any_integer_ids(dtype: torch.dtype) -> None:
    assert torch.equal(token_stats(S, T, Y.to(dtype)).student_logprob_N, token_stats(S, T, Y).student_logprob_N)


def test_cpu_path_never_imports_our_triton_kernels() -> None:
    code = (
        "import sys, torch, imagine_opd.kernels as kernels\n"
        "kernels.token_stats(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))\n"
        "found = [name for name in sys.modules if name.startswith('imagine_opd') and name.endswith('_triton')]\n"
        "assert not found, found\n"
        "assert callable(kernels.token_stats)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
