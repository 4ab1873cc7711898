"""A source of rows (JSONL, JSON, Parquet, list, dataset) to `LoadedRows`; bad rows are raised together or counted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagine_opd.data.rows import RowContext, parse_row
from imagine_opd.errors import RowError
from imagine_opd.types import Row

_SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row left out: its place, a short reason code and the full sentence."""

    source: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """The usable rows in order, and the ones left out."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...] = ()


def load_rows(
    source: Any, *, image_root: str | Path | None = None, box_format: str = "xyxy", bad_rows: str = "raise"
) -> LoadedRows:
    """Rows of a JSONL/JSON/Parquet path, a list of mappings or `Row`s, or a `datasets.Dataset`.

    Relative image paths start at the file's folder (for a list: the working folder). Images of a file may not lie
    outside `image_root` (default: the file's folder). `bad_rows`: `raise` one `RowError` naming all of them, or `skip`.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for item, context in _iterate_items(source, image_root, box_format):
        if isinstance(item, Row):
            rows.append(item if item.source else dataclasses.replace(item, source=context.source))
            continue
        if isinstance(item, RowError):
            bad.append(BadRow(context.source, "malformed", str(item)))
            continue
        try:
            rows.append(parse_row(item, context))
        except RowError as error:
            bad.append(BadRow(context.source, "malformed", str(error)))
    if bad and bad_rows == "raise":
        raise_bad_rows(bad, len(rows) + len(bad))
    if not rows:
        if bad:
            raise_bad_rows(bad, len(bad))
        raise RowError(f"{source if isinstance(source, (str, Path)) else type(source).__name__}: holds no row")
    return LoadedRows(tuple(rows), tuple(bad))


def raise_bad_rows(bad: Sequence[BadRow], total: int) -> None:
    """Raise one `RowError` that names the first bad rows and counts all."""
    lines = [item.message for item in bad[:_SHOWN_ROWS]]
    if len(bad) > _SHOWN_ROWS:
        lines.append(f"and {len(bad) - _SHOWN_ROWS} more")
    if len(bad) == 1 and total == 1:
        raise RowError(lines[0])
    head = f"{len(bad)} of {total} rows cannot be used (bad_rows='skip' leaves them out):"
    raise RowError("\n  ".join([head, *lines]))


def describe_bad_rows(bad: Sequence[BadRow], total: int) -> str:
    """`12 of 6000 rows left out: 9 missing, 3 malformed`."""
    counts: dict[str, int] = {}
    for item in bad:
        counts[item.reason] = counts.get(item.reason, 0) + 1
    return f"{len(bad)} of {total} rows left out: " + ", ".join(f"{count} {why}" for why, count in counts.items())


def _iterate_items(source: Any, image_root: str | Path | None, box_format: str) -> Iterator[tuple[Any, RowContext]]:
    root = Path(image_root) if image_root is not None else None
    if isinstance(source, (str, Path)):
        path = Path(source)
        folder = path.parent
        for place, item in _read_file(path):
            yield item, RowContext(place, root or folder, root or folder, box_format)
        return
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise RowError(f"data is {type(source).__name__}; expected a path, a list of rows or a dataset")
    folder = root or Path()
    for index, item in enumerate(_iterate_dataset(source)):
        yield item, RowContext(f"row {index}", folder, root, box_format)


def _iterate_dataset(source: Iterable[Any]) -> Iterable[Any]:
    """A `datasets.Dataset` with its image columns undecoded: Rust decodes, once. Anything else as it is."""
    features = getattr(source, "features", None)
    if not features or not hasattr(source, "cast_column"):
        return source
    from datasets import Image
    from datasets import Sequence as DatasetSequence

    for name, feature in dict(features).items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            source = source.cast_column(name, Image(decode=False))
        elif isinstance(inner, Image):
            source = source.cast_column(name, DatasetSequence(Image(decode=False)))
    return source


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        raise RowError(f"{path}: is a folder; expected a .jsonl, .json or .parquet file")
    if not path.is_file():
        raise RowError(f"{path}: no such file")
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path)
    elif kind == ".json":
        yield from _read_json(path)
    elif kind == ".parquet":
        yield from _read_parquet(path)
    else:
        raise RowError(f"{path}: unknown kind of file {kind!r}; expected .jsonl, .json or .parquet")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, RowError(f"{place}: not valid JSON ({error})")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RowError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(items, list):
        raise RowError(f"{path}: expected a list of rows, found {type(items).__name__}")
    for index, item in enumerate(items):
        yield f"{path.name}[{index}]", item


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise RowError(f"{path}: Parquet needs the data extra: pip install 'imagine-opd[data]'") from error
    dataset = Dataset.from_parquet(str(path))
    for index, item in enumerate(_iterate_dataset(dataset)):
        yield f"{path.name}[{index}]", item
