"""What users install: the wheel holds every kernel file and the base model, and it works without the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNEL_SUFFIXES = (".py", ".json")
PROBE = """
import imagine_opd, imagine_opd._rust, imagine_opd.kernels.reference, torch
from imagine_opd.demo import base_model_path
from imagine_opd.kernels import token_stats
stats = token_stats(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 4]))
assert float(stats.reverse_kl_N.abs().max()) == 0.0
assert (base_model_path() / "model.safetensors").stat().st_size < 4_000_000
print(imagine_opd.__file__)
"""


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "maturin", "build", "--release", "--out", folder)
    return next(folder.glob("*.whl"))


def kernel_sizes() -> dict[str, int]:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "kernels").iterdir() if path.suffix in KERNEL_SUFFIXES}
    assert len(sizes) >= 10
    return sizes


def test_wheel_holds_every_kernel_file_whole(wheel):
    with zipfile.ZipFile(wheel) as archive:
        prefix = "imagine_opd/kernels/"
        packed = {
            Path(item.filename).name: item.file_size
            for item in archive.infolist()
            if item.filename.startswith(prefix) and item.filename.endswith(KERNEL_SUFFIXES)
        }
        names = archive.namelist()
    assert packed.pop("__init__.py") > 0
    assert packed == kernel_sizes()
    assert not any(name.startswith("kernels/") for name in names)  # would clash with Hugging Face's package
    assert not any(name.startswith(("tests/", "benches/")) or name.endswith(".pyc") for name in names)


def test_wheel_is_abi3_and_carries_stub_marker_and_base_model(wheel):
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    for wanted in ("imagine_opd/py.typed", "imagine_opd/_rust.pyi", "imagine_opd/demo/base/model.safetensors"):
        assert wanted in names
    assert (
        any(name.startswith("imagine_opd/_rust") and name.endswith(".so") for name in names) or sys.platform != "linux"
    )
    assert "License-Expression: Apache-2.0" in text
    for extra in ("peft", "data", "dev"):
        assert f"Provides-Extra: {extra}" in text


def test_every_link_points_at_a_kernel_file():
    folder = ROOT / "python/imagine_opd/kernels"
    links = {path.name: path for path in folder.iterdir() if path.suffix in KERNEL_SUFFIXES}
    del links["__init__.py"]
    assert links.keys() == kernel_sizes().keys()
    for name, link in links.items():
        assert link.is_symlink()
        assert link.resolve() == ROOT / "kernels" / name


def test_wheel_works_without_the_source_tree(wheel, tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel)
    printed = run(sys.executable, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(printed.strip()).is_relative_to(tmp_path / "site")


def test_sdist_builds_a_wheel_with_the_same_kernels(tmp_path):
    run(sys.executable, "-m", "maturin", "sdist", "--out", tmp_path)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "source", filter="data")
    source = next((tmp_path / "source").iterdir())
    for folder, pattern in (("rust", "*.rs"), ("kernels", "*"), ("tests", "*.py"), (".", "Cargo.*")):
        wanted = {path.name for path in (ROOT / folder).glob(pattern) if path.is_file()}
        assert wanted <= {path.name for path in (source / folder).iterdir()}
    # The same build folder: only our own crate is compiled again.
    run(
        sys.executable, "-m", "maturin", "build", "--release", "--out", tmp_path / "wheels",
        cwd=source, CARGO_TARGET_DIR=str(ROOT / "target"),
    )  # fmt: skip
    with zipfile.ZipFile(next((tmp_path / "wheels").glob("*.whl"))) as wheel_archive:
        sizes = {
            Path(item.filename).name: item.file_size
            for item in wheel_archive.infolist()
            if item.filename.startswith("imagine_opd/kernels/") and not item.filename.endswith("__init__.py")
        }
    assert sizes == kernel_sizes()
