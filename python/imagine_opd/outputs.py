"""Failed writes: which errors mean that a file could not be written, and the `OutputError` that names room and fix."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imagine_opd.errors import OutputError

# Rust libraries (safetensors, tokenizers) and torch's checkpoint writer carry the system's error only in their text.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
_NAMED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO)
_FIXES = {
    errno.ENOSPC: "free some space, lower save_total_limit, or choose an output_dir on another disk",
    errno.EDQUOT: "free some of your quota, lower save_total_limit, or choose an output_dir elsewhere",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "the file system is mounted read-only; choose another output_dir, or mount it again for writing",
    errno.EACCES: "give this user the right to write there, or choose another output_dir",
    errno.EPERM: "give this user the right to write there, or choose another output_dir",
    errno.ENOENT: "the folder was removed while the run wrote to it; leave it alone, or choose another output_dir",
}
_MIB = 1024 * 1024


@contextmanager
def guard_writing(path: Path, what: str, measure_need: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Turn a failed write inside the block into an `OutputError`; any other error travels on.

    `what` is being written below `path`; `measure_need` gives its size in bytes, asked for only on failure.
    """
    try:
        yield
    except (OutputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torch.distributed.checkpoint raises one that is no Exception
        if not is_failed_write(error):
            raise
        number, need, free = find_errno(error), measure_need(), measure_free_bytes(path)
        if number is None and need is not None and free is not None and free < need:
            number = errno.ENOSPC
        failure = OutputError(describe_failed_write(path, what, error, number, need, free))
        failure.errno = number
        raise failure from error


def is_failed_write(error: BaseException) -> bool:
    """Whether an error raised while files were written says that one could not be."""
    if isinstance(error, (ConnectionError, TimeoutError)):  # OSErrors of the network between processes
        return False
    text = str(error)
    return isinstance(error, OSError) or bool(_NUMBER.search(text)) or any(word in text for word in _TORCH_WRITER)


def find_errno(error: BaseException) -> int | None:
    """The system's number of a failed write, also out of a text; `None` where it was lost on the way."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if match := _NUMBER.search(text):
        return int(match.group(1) or match.group(2))
    return next((number for number in _NAMED if os.strerror(number) in text), None)


def describe_failed_write(
    path: Path, what: str, error: BaseException, number: int | None, need: int | None, free: int | None
) -> str:
    """One sentence: what, where, why (`number` is the system's), free and needed bytes, and what to do."""
    reason = os.strerror(number) if number is not None else f"{type(error).__name__}: {str(error).strip()[:200]}"
    room = "" if free is None else f"; {free / _MIB:,.1f} MiB are free there"
    if room and need is not None:
        room += f", {what} needs about {need / _MIB:,.1f} MiB"
    fix = _FIXES.get(number or 0, "check the disk, or choose another output_dir")
    return f"{str(path)!r}: {what} could not be written ({reason}){room}; {fix}"


def measure_free_bytes(path: Path) -> int | None:
    """Free bytes of the file system of `path` or of its nearest folder that exists."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None
