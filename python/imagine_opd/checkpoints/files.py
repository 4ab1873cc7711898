"""Checkpoints on disk: staged, sealed by a manifest, renamed when whole; which one a run may go on from; which go.

A checkpoint is written to `tmp-checkpoint-N/checkpoint-N`. When every file is on the disk, `complete.json` names them
with their sizes, and one rename brings the folder to `checkpoint-N`. What is to go is first renamed back below a
`tmp-` folder. So a folder that is called `checkpoint-N` is whole at every moment, and `tmp-` folders are leftovers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from imagine_opd.errors import ConfigError

MANIFEST_FILE = "complete.json"
STATE_FILE = "trainer_state.json"
_FORMAT = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"tmp-(removed-)?(checkpoint-\d+)")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")  # plain, FSDP whole, FSDP shards, ZeRO
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model_fsdp.bin",
    "pytorch_model_fsdp_0",
    "global_step*",
)


@dataclass(frozen=True, slots=True)
class DataOrder:
    """What decides which rows a step takes. world_size: only how a step's rows are spread."""

    rows: int
    rows_per_step: int
    world_size: int
    seed: int
    data_seed: int | None
    train_sampling_strategy: str
    dataloader_drop_last: bool


# writing


def find_staging(folder: Path, step: int) -> Path:
    """The folder below which the checkpoint of `step` is written: `tmp-checkpoint-N`."""
    return folder / f"tmp-checkpoint-{step}"


def seal_checkpoint(folder: Path, step: int, order: DataOrder | None = None) -> Path:
    """Bring a whole staged checkpoint to its name; a sudden end before the rename leaves the earlier ones as they are.

    Raises `OSError`. One process calls this, after all have written their files.
    """
    staging, target = find_staging(folder, step), folder / f"checkpoint-{step}"
    staged = staging / target.name
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in _walk_files(staged)}
    manifest = {"format": _FORMAT, "step": step, "order": None if order is None else asdict(order), "files": sizes}
    for path in _walk_files(staged):
        flush_to_disk(path)
    with (staged / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for directory in (*(path for path in staged.rglob("*") if path.is_dir()), staged, staging):
        flush_to_disk(directory)
    if is_own(target):  # of the same step of this run: both are whole, either may stay
        remove_checkpoint(target)
    elif target.exists():
        set_aside([target])
    staged.rename(target)
    flush_to_disk(folder)
    with suppress(OSError):  # an empty folder; the next start would clear it too
        staging.rmdir()
    return target


def flush_to_disk(path: Path) -> None:
    """Have the system write a file or folder out, so that a rename never outruns what it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


# removing


def rotate_checkpoints(folder: Path, limit: int | None, step: int, best: str | None = None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the one of `step` nor the best, nor a folder of others."""
    if not limit or limit <= 0:
        return
    kept = {folder / f"checkpoint-{step}"} | ({folder / Path(best).name} if best is not None else set())
    candidates = [path for path in list_checkpoints(folder) if path not in kept and is_own(path)]
    kept = {path for path in kept if path.is_dir()}
    for path in candidates[: max(len(candidates) - max(limit - len(kept), 0), 0)]:
        try:
            remove_checkpoint(path)
        except OSError as error:
            print(f"{path} could not be removed ({error.strerror}); save_total_limit={limit} is exceeded", flush=True)


def remove_checkpoint(path: Path) -> None:
    """Take a checkpoint's name away, then its files: it is never there by half. Raises `OSError`."""
    trash = path.parent / f"tmp-removed-{path.name}"
    if trash.is_dir():
        shutil.rmtree(trash)
    trash.mkdir()
    path.rename(trash / path.name)
    flush_to_disk(path.parent)
    shutil.rmtree(trash, ignore_errors=True)  # what stays is removed at the next start


def finish_renames(folder: Path) -> None:
    """Give a checkpoint that was sealed but not renamed its name. Any process may call this, several at once too."""
    for staging, name in _list_temporary(folder, removed=False):
        staged, target = staging / name, folder / name
        if not target.exists() and (staged / MANIFEST_FILE).is_file() and find_fault(staged) is None:
            try:
                staged.rename(target)
            except OSError:  # another process was first, or the folder cannot be written: it is then left alone
                continue


def clear_leftovers(folder: Path) -> list[str]:
    """Remove the temporary folders of a killed run, and only such; their names."""
    cleared = []
    for removed in (False, True):
        for path, name in _list_temporary(folder, removed):
            if {child.name for child in path.iterdir()} <= {name}:
                shutil.rmtree(path, ignore_errors=True)
                cleared.append(path.name)
    return cleared


def set_aside_later(folder: Path, step: int) -> Path | None:
    """Move the checkpoints after `step` aside: they are of another run than the one that begins at `step`."""
    later = [path for path in list_checkpoints(folder) if read_step(path) > step]
    return set_aside(later) if later else None


def set_aside(paths: Sequence[Path]) -> Path:
    """Move folders to the first free `earlier.N/` beside them; nothing is lost."""
    number = 1
    while (target := paths[0].parent / f"earlier.{number}").exists():
        number += 1
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return target


# finding


def find_checkpoint(resume: str | Path | bool | None, folder: Path) -> str | None:
    """The checkpoint folder to go on from, complete; `None` for a fresh start. Raises `ConfigError`.

    `True` is the last complete one of `folder`, `"auto"` the same or a fresh start. What is passed over is printed.
    """
    if resume is None or resume is False:
        return None
    if resume is not True and str(resume) != "auto":
        path = Path(resume)
        if (fault := find_fault(path)) is not None:
            raise ConfigError(f"resume_from_checkpoint={str(path)!r}: {fault}; give a complete checkpoint-N folder")
        return str(path)
    if folder.is_dir():
        finish_renames(folder)
    for path in reversed(list_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None and is_own(path):
            return str(path)
        fault = fault or "is a copy of another step's"
        print(f"{path} is passed over: {fault}", flush=True)
    if resume is True:
        raise ConfigError(
            f"resume_from_checkpoint=True: {str(folder)!r} holds no complete checkpoint to resume from "
            "('auto' starts afresh then)"
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders called `checkpoint-N`, by step."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=read_step)


def read_step(path: Path) -> int:
    """The step in a checkpoint folder's name; 0 for another name."""
    match = _CHECKPOINT.fullmatch(path.name)
    return int(match.group(1)) if match else 0


def is_own(path: Path) -> bool:
    """Whether a run wrote this folder under this name: a copy or a folder that only has the name is not ours."""
    has_manifest = (path / MANIFEST_FILE).is_file()
    try:
        found = _read_json(path / (MANIFEST_FILE if has_manifest else STATE_FILE))
    except (OSError, ValueError):
        return False
    return bool(found.get("step" if has_manifest else "global_step") == read_step(path))


def measure_checkpoint_bytes(folder: Path) -> int | None:
    """Bytes of the last complete checkpoint in `folder`."""
    for path in reversed(list_checkpoints(folder)):
        if (path / MANIFEST_FILE).is_file():
            return sum(file.stat().st_size for file in _walk_files(path))
    return None


def find_fault(path: Path) -> str | None:
    """The first thing a checkpoint lacks for a run to go on exactly; `None` for a complete one."""
    if not path.is_dir():
        return "is not a folder"
    fault = _compare_manifest(path) if (path / MANIFEST_FILE).exists() else _probe_files(path)
    if fault is not None:
        return fault
    for names, needed in (((STATE_FILE,), STATE_FILE), (_WEIGHTS, _WEIGHTS[0]), (_OPTIMIZERS, _OPTIMIZERS[0])):
        if not any(next(path.glob(name), None) for name in names):
            hint = " (save_only_model=True writes none)" if needed == _OPTIMIZERS[0] else ""
            return f"has no {needed}{hint}, so the run could not go on exactly"
    if next(path.glob("global_step*"), None) is None and not (path / "scheduler.pt").is_file():
        return "has no scheduler.pt, so the run could not go on exactly"
    return None


def _compare_manifest(path: Path) -> str | None:
    try:
        sizes = {str(name): int(size) for name, size in _read_json(path / MANIFEST_FILE)["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} is not readable ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"has no {name}, which its {MANIFEST_FILE} names"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} has {found:,} of {size:,} bytes"
    return None


def _probe_files(path: Path) -> str | None:
    """For a checkpoint without a manifest, as earlier versions and other tools write: are its files whole?"""
    for file in _walk_files(path):
        name = file.relative_to(path).as_posix()
        try:
            if file.suffix == ".json":
                _read_json(file)
            elif file.suffix == ".safetensors":
                _refuse_short_safetensors(file)
            elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
                return f"{name} is cut off or not a file of torch.save"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{name} is not readable ({error})"
    for index in path.glob("*.safetensors.index.json"):
        for shard in sorted(set(_read_json(index).get("weight_map", {}).values())):
            if not (path / shard).is_file():
                return f"has no {shard}, which {index.name} names"
    return None


def _refuse_short_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{size:,} bytes are less than its header")
        header = json.loads(file.read(length))
    ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{size:,} of {expected:,} bytes")


# going on


def refuse_other_order(checkpoint: Path, order: DataOrder, allow: bool) -> None:
    """Raise `ConfigError` when the run would take other rows than the one that made `checkpoint`; `allow` only says so.

    Another number of processes with as many rows a step is allowed, and said: its sums are taken in another order.
    """
    made = read_order(checkpoint)
    if made is None:
        return
    names = [item.name for item in fields(DataOrder) if item.name != "world_size"]
    changed = [name for name in names if getattr(made, name) != getattr(order, name)]
    if changed:
        found = ", ".join(f"{name}={getattr(made, name)} (now {getattr(order, name)})" for name in changed)
        text = f"{checkpoint} was made with {found}"
        if not allow:
            hint = ""
            if "rows_per_step" in changed:
                hint = (
                    "set per_device_train_batch_size and gradient_accumulation_steps so that their product with the "
                    f"number of processes ({order.world_size}) is {made.rows_per_step}, or "
                )
            raise ConfigError(
                f"{text}: rows would be left out or taken twice; {hint}set ignore_data_skip=True to begin an epoch anew"
            )
        print(f"{text}: ignore_data_skip=True, so an epoch begins anew", flush=True)
    elif made.world_size != order.world_size:
        print(
            f"{checkpoint} was made by {made.world_size} processes, this run has {order.world_size}: each step takes "
            "the same rows, but sums are rounded in another order",
            flush=True,
        )


def read_order(checkpoint: Path) -> DataOrder | None:
    """The order a checkpoint was made with; `None` where it does not say (earlier versions)."""
    try:
        return DataOrder(**_read_json(checkpoint / MANIFEST_FILE)["order"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _walk_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_FILE)


def _list_temporary(folder: Path, removed: bool) -> list[tuple[Path, str]]:
    """Temporary folders and the name of the checkpoint each is for."""
    found = []
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        match = _TEMPORARY.fullmatch(path.name)
        if match and bool(match.group(1)) is removed and path.is_dir() and not path.is_symlink():
            found.append((path, match.group(2)))
    return found
