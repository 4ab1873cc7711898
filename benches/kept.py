"""Kept runs: results to JSON, one row a line, and a kept run's tables into a page of docs, between its marks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_run(path: Path, head: Mapping[str, Any], environment: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """Keep a run: `head`, what it was made with, and its rows (dataclasses), a line each."""
    # Where the package lies is of no use to others.
    kept = {name: value for name, value in environment.items() if name != "package_folder"}
    begin = json.dumps({**head, "environment": kept}, indent=1).rstrip()[:-2]
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{begin},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def fill_page(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between its two marks. Raises `ValueError` where it lacks them."""
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no {begin!r} followed by {end!r}")
    return f"{before}{begin}\n{text}\n{end}{after}"
